"""A program that a failed check ends shows one traceback, not one a rank."""

import sys
from pathlib import Path

import pytest

from spimpi import one_traceback
from spimpi.errors import IncompleteError, UsageError

PROGRAM = Path(__file__).parent / "one_traceback_program.py"
RANKS = 3


@pytest.mark.parametrize("way", ["group without rank 0", "batch", "checked"])
def test_a_corruption_that_all_ranks_raise_has_one_traceback(run_ranks, way):
    done = run_ranks(RANKS, PROGRAM, way, timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("Traceback (most recent call last)") == 1, done.stderr
    assert "CorruptionError: " in done.stderr


def test_a_usage_error_of_all_ranks_has_one_traceback(run_ranks):
    done = run_ranks(RANKS, PROGRAM, "usage", timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("Traceback (most recent call last)") == 1, done.stderr
    assert "UsageError: " in done.stderr


def test_an_error_of_one_rank_shows_its_own(run_ranks):
    done = run_ranks(RANKS, PROGRAM, "one rank", timeout=60)
    assert done.returncode != 0
    assert "RuntimeError: of this rank alone" in done.stderr


def test_every_rank_ends_with_an_error_of_its_own(run_ranks, tmp_path):
    """Without `python -m mpi4py` nothing takes the others along."""
    script = f"{sys.executable} {PROGRAM} check; echo status $?"
    done = run_ranks(RANKS, "sh", "-c", script, timeout=60)
    assert [line for line in done.stdout.splitlines() if "status" in line] == ["status 1"] * RANKS
    assert done.stderr.count("Traceback (most recent call last)") == 1, done.stderr
    for rank in (1, 2):
        assert f"spimpi: rank {rank}: CorruptionError, as on all ranks" in done.stderr


def test_a_rank_that_alone_lets_it_pass_is_not_silent(run_ranks):
    done = run_ranks(2, PROGRAM, "kept", timeout=60)
    assert done.returncode != 0
    assert "spimpi: rank 1: CorruptionError" in done.stderr


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (UsageError, "spimpi: rank 0: UsageError, as on all ranks; its traceback is rank 0's\n"),
        (IncompleteError, "spimpi: rank 0: IncompleteError, as on rank 0, if that waited too: rank 1 is late\n"),
    ],
)  # fmt: skip
def test_what_some_ranks_raise_is_not_said_of_all(kind, told, capsys, monkeypatch):
    monkeypatch.setattr(one_traceback.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(one_traceback, "_hooks", [None])
    error = one_traceback.mark(kind("rank 1 is late"), 2)
    one_traceback._tell(kind, error, None)
    assert capsys.readouterr().err == told
