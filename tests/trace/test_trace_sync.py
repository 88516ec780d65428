"""With ``sync``, the disk has what is flushed, and the trace before its journals go."""

import os
import re

import pytest
from trace_samples import TENSORS, header, some_events

from spimpi.errors import IncompleteError
from spimpi.trace.journals.journal import Journal, read_journal
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.sealing.recover import recover
from spimpi.trace.sealing.seal import prepare, seal


@pytest.fixture
def synced(monkeypatch):
    """Names of what was synchronised to the disk, in order; without what only one sealing knows."""
    done = []

    def fsync(fd):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        done.append(re.sub(r"[.][0-9a-f]{16}[.]", ".", name))

    monkeypatch.setattr(os, "fsync", fsync)
    return done


def a_journal(path, sync, tensors=TENSORS) -> Journal:
    prepare(path)
    journal = Journal(journal_folder(path), 0, header(1), tensors, sync)
    journal.append(some_events(10))
    journal.flush()
    return journal


def test_without_it_nothing_waits_for_the_disk(tmp_path, one, synced):
    journal = a_journal(tmp_path / "run.h5", False)
    journal.close("verified")
    seal(one, journal, tmp_path / "run.h5", driver="gather")
    assert synced == []


def test_each_flush_and_the_new_names_are_synchronised(tmp_path, synced):
    journal = a_journal(tmp_path / "run.h5", True)
    file = "rank-00000.journal"
    assert synced == [file, "run.h5.journal", tmp_path.name, file]
    journal.flush()
    assert len(synced) == 4  # there was nothing to write
    journal.close("verified")
    assert synced[4:] == [file]


def test_a_growing_table_is_on_the_disk_before_its_events(tmp_path, synced):
    journal = a_journal(tmp_path / "run.h5", True, None)
    synced.clear()
    journal.table.row(TENSORS[0])
    assert synced == ["rank-00000.tensors"]


@pytest.mark.parametrize("driver", ["gather", "parts"])
def test_the_disk_has_the_trace_before_it_is_read_back_and_its_journals_go(
    tmp_path, one, synced, driver
):
    journal = a_journal(tmp_path / "run.h5", True)
    journal.close("verified")
    synced.clear()
    seal(one, journal, tmp_path / "run.h5", driver=driver)
    parts = ["rank-00000.h5", "run.h5.parts"] if driver == "parts" else []
    assert synced == [*parts, "run.h5.sealing", tmp_path.name]


def test_a_disk_that_fails_keeps_the_journals(tmp_path, one, monkeypatch):
    journal = a_journal(tmp_path / "run.h5", True)
    journal.close("verified")

    def fsync(fd):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(IncompleteError, match="Input/output error"):
        seal(one, journal, tmp_path / "run.h5", driver="gather")
    assert not (tmp_path / "run.h5").exists() and read_journal(journal.path).complete


def test_recovery_always_waits_for_the_disk(tmp_path, synced):
    journal = a_journal(tmp_path / "run.h5", False)
    journal.close("verified")
    recover(tmp_path / "run.h5")
    assert synced == ["run.h5.sealing", tmp_path.name]
