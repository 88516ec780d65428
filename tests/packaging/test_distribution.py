"""What is shipped: the source distribution is whole, and reading traces needs little."""

import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import spimpi

ROOT = Path(__file__).parents[2]
HEAVY = ("mpi4py", "numba", "llvmlite", "safetensors", "ml_dtypes", "pandas", "xarray", "torch")

# Behaves as a venv in which none of these is installed.
WITHOUT = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def without_mpi(tmp_path, code, *arguments):
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)


COMMAND = "from spimpi.cli import entry\nsys.argv[0] = 'spimpi'\nentry()"


def test_reading_traces_needs_no_mpi_and_no_compiler():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {line.partition(">")[0] for line in project["dependencies"]}
    assert core == {"numpy", "h5py", "rich"}
    assert project["optional-dependencies"]["report"] == ["jinja2>=3.1"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    from spimpi.bench.synthetic_trace import synthetic_trace

    path = tmp_path_factory.mktemp("reader") / "run.h5"
    synthetic_trace(path, 3, 40)
    return path


@pytest.mark.parametrize("what", ["show", "locate", "check", "diff", "report", "export"])
def test_every_trace_command_runs_without_mpi_and_numba(trace, tmp_path, what):
    if what == "report":
        pytest.importorskip("jinja2", reason="reports need jinja2: pip install 'spimpi[report]'")
    files = {"diff": [trace, trace], "export": [trace, "-o", "events.csv"]}.get(what, [trace])
    done = without_mpi(tmp_path, COMMAND, "trace", what, *files)
    assert done.stderr == "" and done.returncode in (0, 1, 3), done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    "arguments", [["verify", "--no-trace"], ["doctor"], ["manifest", "make", ".", "-o", "x.json"], ["golden", "-o", "g.h5"]]
)
def test_what_needs_mpi_says_what_to_install(tmp_path, arguments):
    done = without_mpi(tmp_path, COMMAND, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip install 'spimpi[mpi]'" in done.stderr


@pytest.mark.parametrize(
    "use", ["spimpi.verify_allgather", "spimpi.fingerprint(b'12345678', spimpi.Tag(name='x'))"]
)
def test_a_name_that_needs_a_missing_package_says_which(tmp_path, use):
    code = f"import spimpi\ntry:\n    {use}\nexcept spimpi.MissingDependency as e:\n    print(e)"
    assert "pip install 'spimpi[mpi]'" in without_mpi(tmp_path, code).stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the clone, not an installed copy")
def test_the_source_distribution_has_all_that_the_repository_has(tmp_path):
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    archive = tmp_path / f"spimpi-{spimpi.__version__}.tar.gz"
    assert archive.exists(), made.stdout
    with tarfile.open(archive) as file:
        shipped = {name.partition("/")[2] for name in file.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    left_out = (".ci/", ".gitignore")
    missing = [f for f in tracked if f and f not in shipped and not f.startswith(left_out)]
    assert missing == []
    assert not [f for f in shipped if f.endswith((".pyc", ".nbi", ".nbc"))]
