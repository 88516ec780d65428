"""Output that cannot be written: full, closed, or a pipe that nobody reads any more."""

import os
import shutil
import subprocess
import sys

import pytest

from spimpi.bench.synthetic_trace import synthetic_trace
from spimpi.inference.config import EMBEDDED_MODEL

RUN = ["verify", "--tokens", "1", "--prompt", "hi", "--no-trace"]
FAULT = ["--inject", "bitflip:rank=0,layer=3,tensor=hidden,element=1,bit=30"]
FULL = "spimpi: cannot write standard output: No space left on device\n"
CLOSED = "spimpi: cannot write standard output: Bad file descriptor\n"
COMMANDS = [  # that end with 0, and print something
    RUN, ["verify", "--help-faults"], ["--version"], ["doctor"],
    ["completion", "bash"], ["golden", "--tokens", "1", "--prompt", "hi", "-o", "g.h5"],
    ["manifest", "make", "model", "-o", "m.json"], ["manifest", "check", "good.json", "model"],
    ["trace", "check", "t.h5"], ["trace", "export", "t.h5", "-o", "-", "--format", "csv"],
]  # fmt: skip
REFUSED = [["bad"], ["verify", "--config", "nosuch"], ["trace", "show", "nosuch"]]


def name(arguments) -> str:
    return " ".join(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    shutil.copytree(EMBEDDED_MODEL, folder / "model")
    synthetic_trace(folder / "t.h5", 1, 3)
    assert ended(folder, ["manifest", "make", "model", "-o", "good.json"], ">/dev/null") == (0, "")
    return folder


def ended(folder, arguments, redirection, **options) -> tuple[int, str]:
    """A command's status, and what it said on standard error, under a shell's redirection."""
    for made in ("g.h5", "m.json"):
        (folder / made).unlink(missing_ok=True)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "spimpi", *arguments],
        cwd=folder, stderr=subprocess.PIPE, text=True, timeout=120, check=False, **options,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines(keepends=True) if "compiling kernels" not in line]
    return done.returncode, "".join(said)


@pytest.mark.parametrize("arguments", COMMANDS, ids=name)
def test_what_went_well_but_could_not_be_told_is_2_in_one_line(folder, arguments):
    assert ended(folder, arguments, ">/dev/full") == (2, FULL)
    assert ended(folder, arguments, ">&-") == (2, CLOSED)


def test_nor_does_it_matter_when_it_is_found_out(folder):
    for unbuffered in ("", "1"):
        env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        for arguments in (["--version"], ["trace", "check", "t.h5"]):
            assert ended(folder, arguments, ">/dev/full", env=env) == (2, FULL)
    assert ended(folder, ["--version"], "<&- >&-") == (2, CLOSED)


@pytest.mark.parametrize("arguments", COMMANDS, ids=name)
def test_a_reader_that_left_is_141_without_a_word(folder, arguments):
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        assert ended(folder, arguments, "", stdout=theirs) == (141, "")
    finally:
        os.close(theirs)


@pytest.mark.parametrize("arguments", [[*RUN, *FAULT], [*RUN, *FAULT, "--json"]], ids=["text", "json"])
def test_corruption_is_1_whatever_becomes_of_the_output(folder, arguments):
    assert ended(folder, arguments, ">/dev/full") == (1, FULL)
    assert ended(folder, arguments, ">&- 2>&-") == (1, "")


def test_a_trace_keeps_its_verdict_too(folder):
    data = bytearray((folder / "t.h5").read_bytes())
    (folder / "cut.h5").write_bytes(data[: len(data) // 2])
    status, said = ended(folder, ["trace", "check", "cut.h5"], ">/dev/full")
    assert status == 3 and "Traceback" not in said
    assert ended(folder, ["trace", "check", "cut.h5"], ">/dev/full 2>&1") == (3, "")


@pytest.mark.parametrize("arguments", REFUSED, ids=name)
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_wrong_usage_is_2_also_where_it_cannot_be_said(folder, arguments, redirection):
    assert ended(folder, arguments, redirection) == (2, "")


def test_standard_error_alone_changes_no_status(folder):
    for redirection in ("2>&-", "2>/dev/full"):
        assert ended(folder, RUN, f">/dev/null {redirection}") == (0, "")


def test_no_file_of_the_run_gets_the_number_of_a_closed_output(folder):
    arguments = [argument for argument in RUN if argument != "--no-trace"]
    ended(folder, [*arguments, "--trace", "run.h5", "--overwrite"], ">&- 2>&-")
    assert ended(folder, ["trace", "check", "run.h5"], ">/dev/null") == (0, "")


def test_all_ranks_end_alike_where_rank_0_has_lost_its_output(folder, run_ranks):
    script = f'"{sys.executable}" -m spimpi "$@" >/dev/full; echo status $?'
    for more, status in (([], 2), (FAULT, 1)):
        done = run_ranks(2, "sh", "-c", script, "sh", *RUN, *more)
        assert done.stdout.split() == ["status", str(status)] * 2, done.stderr
        assert done.stderr.count(FULL) == 1 and "Traceback" not in done.stderr
