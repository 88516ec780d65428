"""Variables of the environment that say what cannot be."""

import os
import subprocess
import sys

import pytest

RUN = ["verify", "--tokens", "1", "--prompt", "hi", "--no-trace"]


def ended(tmp_path, arguments, **variables) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "spimpi", *arguments], cwd=tmp_path, env=os.environ | variables,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "compiling kernels" not in line]
    return done.returncode, done.stdout, "\n".join(said)


@pytest.mark.parametrize("size", ["\u00b2", "9" * 5000, "0"], ids=["superscript", "huge", "zero"])
def test_a_terminal_of_an_odd_size_is_none(tmp_path, size):
    status, out, err = ended(tmp_path, RUN, COLUMNS=size, LINES=size)
    assert (status, err) == (0, "") and "VERIFIED" in out


@pytest.mark.parametrize("left_over", ["OMPI_COMM_WORLD_RANK", "PMIX_RANK"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (RUN, "started rank 1, but the MPI world of this process has 1"),
        (["verify", "--bogus"], "unrecognized arguments: --bogus"),
        (["trace", "show", "nosuch.h5"], "there is no trace nosuch.h5"),
    ],
)  # fmt: skip
def test_a_rank_left_over_in_the_environment_hides_no_error(tmp_path, left_over, arguments, words):
    status, out, err = ended(tmp_path, arguments, **{left_over: "1"})
    assert (status, out) == (2, "") and words in err and err.count("\n") == 0
