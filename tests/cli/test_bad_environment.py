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
