"""A sample of the killed runs of kill_runs.py."""

import os
import shutil
from pathlib import Path

import pytest
from kill_runs import RANKS, RECOVERY, compare, kill_runs, note, rows_of, sketches_of
from trace_samples import TENSORS, header

from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.journal_files import journal_folder


def test_ten_killed_runs_leave_traces_that_say_what_is_there_and_what_is_not():
    counts = kill_runs(10, seed=1)
    assert sum(counts.values()) == 10
    assert len({way for _, _, way, _, _ in counts}) == 4


def a_killed_run(path: Path) -> list[Path]:
    """Journals as of ranks killed after 100 rows and two steps' sketches, and their notes."""
    files, facts = [], header(RANKS, sketches=True)
    for rank in range(RANKS):
        journal = Journal(journal_folder(path), rank, facts, TENSORS)
        journal.append(rows_of(rank)[:100])
        journal.flush()
        journal.sketches.append(sketches_of(rank)[:8])
        os.close(journal._file.fd)
        note(path, rank, "flushed 100")
        note(path, rank, "sketched 2")
        files.append(journal.path)
    return files


FAULTS = ["none", "a row lost", "a row of another rank", "a rank lost", "a sketch lost"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_planted_fault(tmp_path, fault):
    path = tmp_path / "run.h5"
    files = a_killed_run(path)
    if fault == "a row lost":
        os.truncate(files[1], files[1].stat().st_size - 88)
    elif fault == "a row of another rank":
        shutil.copy(files[2], files[1])
    elif fault == "a rank lost":
        files[1].unlink()
    elif fault == "a sketch lost":
        file = files[1].with_suffix(".sketches")
        os.truncate(file, file.stat().st_size - 136)
    if fault == "none":
        assert compare(path, "before writing") == "incomplete, journals"
        return
    with pytest.raises(AssertionError):
        compare(path, "before writing")


@pytest.mark.parametrize("phase", RECOVERY)
def test_a_recovery_that_is_killed_can_be_done_again(tmp_path, phase):
    path = tmp_path / "run.h5"
    a_killed_run(path)
    assert compare(path, phase) == "incomplete, journals"
    assert sorted(p.name for p in tmp_path.iterdir() if "notes" not in p.name) == ["run.h5"]
