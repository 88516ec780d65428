"""The scripts of jobs/: what they run, and that status 1 is corruption's alone.

Most run with a stand-in for mpirun that says something and ends; prolog.sh also with the real one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"
HELD = "verdict    VERIFIED: 210 checks; moved (bits arrived)"
FOUND = "verdict    CORRUPTED: 1 of 210 checks failed; first: rank 1"
EARLY = "spimpi: corrupted: step 0, tensor embed, rank 0: manifest failed"  # before a run began
LACKS = "verdict    INCOMPLETE: rank 1 is missing"
NO_SLOTS = "There are not enough slots available in the system"
CASES = [
    (HELD, 0, 0),
    (FOUND, 1, 1),
    (FOUND, 143, 1),  # mpirun was ended after the verdict
    (EARLY, 1, 1),
    (EARLY, 143, 2),
    (LACKS, 3, 3),
    (NO_SLOTS, 1, 2),
    ("", 1, 2),
    ("", 0, 3),  # mpirun lost its daemons: status 0, and no verdict
    ("", 143, 2),
    ("spimpi: expected 2 ranks", 2, 2),
    ("Traceback (most recent call last):", 4, 2),
    (HELD, 1, 2),
    ("a prompt that says verdict    CORRUPTED: no", 1, 2),
    (f"[1,0]<stdout>:{HELD}", 0, 0),
    (f"Thu Nov 26 10:00:00 2026<stdout>:{FOUND}", 1, 1),
    (f"[prterun-n1-7@1,0]<stderr>: {EARLY}", 1, 1),
]


def stand_in(folder, said, status):
    """An environment whose mpirun says and does this; it notes its arguments and environment."""
    (folder / "bin").mkdir(parents=True)
    mpirun = folder / "bin" / "mpirun"
    mpirun.write_text(f'#!/bin/sh\necho "with $*" >> {folder}/arguments\nenv > {folder}/environ\ncat <<"END"\n{said}\nEND\nexit {status}\n')
    mpirun.chmod(0o755)
    (folder / "bin" / "activate").write_text(f"PATH={folder}/bin:$PATH\n")
    return folder


def run(script, folder, **environ):
    """As slurmd starts it: with nothing but these variables."""
    return subprocess.run(
        ["/usr/bin/env", "-i", *(f"{k}={v}" for k, v in environ.items()), "bash", JOBS / script],
        cwd=folder, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.parametrize(("said", "status", "expected"), CASES)
def test_the_prologs_status_is_corruptions_only_with_its_verdict(tmp_path, said, status, expected):
    folder = stand_in(tmp_path, said, status)
    done = run("prolog.sh", tmp_path, SPIMPI=folder, RANKS=2)
    assert done.returncode == expected, done.stdout
    assert said in done.stdout


@pytest.mark.parametrize("threads", [{}, {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1"}])
def test_a_prologs_ranks_know_nothing_of_slurm_and_have_a_home_and_a_cache(tmp_path, threads):
    folder = stand_in(tmp_path, HELD, 0)
    slurm = threads | dict(SLURM_JOB_ID="7", SLURMD_NODENAME="n1", SLURM_CONF="/etc/slurm.conf", SLURM_JOB_NODELIST="n[1-4]")
    assert run("prolog.sh", tmp_path, SPIMPI=folder, **slurm).returncode == 0
    environ = dict(line.split("=", 1) for line in (folder / "environ").read_text().splitlines() if "=" in line)
    assert not [name for name in environ if name.startswith("SLURM_")]
    assert Path(environ["HOME"]).is_absolute() and environ["PATH"].startswith(f"{folder}/bin:")
    if os.geteuid() == 0:
        assert environ["SPIMPI_CACHE_DIR"] == "/var/cache/spimpi", "not where others may write"
    cores = len(os.sched_getaffinity(0))
    assert (folder / "arguments").read_text().startswith(f"with -n {cores} spimpi verify --no-trace")


@pytest.mark.parametrize("way", ["fewer slots than ranks", "no HOME"])
def test_the_prolog_runs(tmp_path, way):
    """With this environment's own MPI."""
    if not shutil.which("mpirun"):
        pytest.skip("needs an mpirun on PATH")
    (tmp_path / "bin").mkdir()
    for name, target in (("mpirun", shutil.which("mpirun")), ("python", sys.executable)):
        (tmp_path / "bin" / name).symlink_to(target)
    spimpi = tmp_path / "bin" / "spimpi"
    spimpi.write_text(f'#!/bin/sh\nPYTHONPATH={JOBS.parent} exec {sys.executable} -m spimpi "$@" --tokens 1\n')
    spimpi.chmod(0o755)
    cache = os.environ.get("SPIMPI_CACHE_DIR") or os.path.expanduser("~/.cache/spimpi")
    environ = dict(SPIMPI=tmp_path, RANKS=2, SPIMPI_CACHE_DIR=cache)
    if way == "fewer slots than ranks":
        (tmp_path / "hosts").write_text("localhost slots=1\n")
        environ |= dict(
            HOME=tmp_path, PRTE_MCA_prte_default_hostfile=tmp_path / "hosts",
            OMPI_MCA_orte_default_hostfile=tmp_path / "hosts", OMPI_MCA_rmaps_base_oversubscribe=0,
            PRTE_MCA_rmaps_default_mapping_policy="slot:nooversubscribe",
        )  # fmt: skip
    done = run("prolog.sh", tmp_path, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict    VERIFIED" in done.stdout


@pytest.mark.parametrize(
    ("said", "status", "expected"), [c for c in CASES if HELD not in c[0] and EARLY not in c[0]]
)
def test_acceptance_ends_with_what_was_said(tmp_path, said, status, expected):
    """Its first command, the doctor's, does not hold here; it has words of its own."""
    said = said.replace(FOUND, "doctor: NOT FIT: ranks compute differently")
    folder = stand_in(tmp_path / "venv", said, status)
    done = run("acceptance.sbatch", tmp_path, SPIMPI=folder, PATH=os.environ["PATH"], SLURM_NTASKS=8, SLURM_JOB_ID=5)
    assert done.returncode == expected, done.stdout + done.stderr


def test_acceptance_knows_corruption_that_was_found_before_a_run_began(tmp_path):
    folder = stand_in(tmp_path / "venv", f"doctor: fit\n{EARLY}", 0)
    done = run("acceptance.sbatch", tmp_path, SPIMPI=folder, PATH=os.environ["PATH"], SLURM_NTASKS=8, SLURM_JOB_ID=5)
    assert done.returncode == 1, done.stdout + done.stderr


def test_acceptance_holds_where_all_do_and_a_requeued_job_has_a_trace_of_its_own(tmp_path):
    folder = stand_in(tmp_path / "venv", f"doctor: fit\n{HELD}", 0)
    environ = dict(SPIMPI=folder, PATH=os.environ["PATH"], SLURM_NTASKS=8, SLURM_JOB_ID=5, SLURM_RESTART_COUNT=2)
    done = run("acceptance.sbatch", tmp_path, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    words = (folder / "arguments").read_text().splitlines()
    assert len(words) == 3 and all(line.endswith("--expect-ranks 8") for line in words)
    assert "--trace spimpi-acceptance-5-2.h5" in words[1]


@pytest.mark.parametrize("script", sorted(path.name for path in JOBS.iterdir()))
def test_the_scripts_are_clean(script):
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", JOBS / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
