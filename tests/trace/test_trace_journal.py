"""A rank's journal: what was flushed can be read, whatever happened afterwards."""

import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from trace_samples import TENSORS, header, same, some_events

from spimpi.errors import IncompleteError, UsageError
from spimpi.trace.checksum import RECORD
from spimpi.trace.journals.journal import BUFFERED, Journal, read_journal
from spimpi.trace.journals.journal_files import journal_path
from spimpi.trace.schema import EVENT


def a_journal(folder, events, rank=3) -> Journal:
    journal = Journal(folder, rank, header(4), TENSORS)
    journal.append(events)
    journal.flush()
    return journal


def first_record(path) -> int:
    return path.read_bytes().index(b"\n") + 1 + int(path.read_bytes().split()[2])


def test_what_was_written_is_read_back(tmp_path):
    events = some_events(100)
    journal = a_journal(tmp_path, events)
    journal.close("verified")
    contents = read_journal(tmp_path / "rank-00003.journal")
    assert same(contents.events, events)
    assert (contents.complete, contents.end_state, contents.problems) == (True, "verified", [])
    assert contents.tensors == TENSORS
    assert contents.header["topology"] == {"tp": 2}
    assert (contents.header["rank"], contents.header["pid"]) == (3, os.getpid())


@pytest.mark.parametrize("rows", [1, 20, BUFFERED + 1])
def test_flushes_of_any_size_follow_each_other(tmp_path, rows):
    events = some_events(3 * rows)
    journal = Journal(tmp_path, 0, header(1), TENSORS)
    for start in range(0, len(events), rows):
        journal.append(events[start : start + rows])
        journal.flush()
    journal.close("verified")
    contents = read_journal(journal.path)
    assert contents.complete and same(contents.events, events)


def test_rows_may_be_changed_after_they_were_appended(tmp_path):
    events = some_events(10)
    journal = Journal(tmp_path, 0, header(1), TENSORS)
    reused = events.copy()
    journal.append(reused)
    reused["step"] = 99
    journal.close("verified")
    assert same(read_journal(journal.path).events, events)


def test_a_full_buffer_is_written_without_being_asked(tmp_path):
    journal = Journal(tmp_path, 0, header(1), TENSORS)
    events = some_events(BUFFERED)
    journal.append(events)
    assert same(read_journal(journal.path).events, events)


def test_a_journal_without_an_end_is_not_complete(tmp_path):
    journal = a_journal(tmp_path, some_events(10))
    contents = read_journal(journal.path)
    assert not contents.complete and contents.problems == []
    assert len(contents.events) == 10


@pytest.mark.parametrize("cut", [1, 44, 87])
def test_a_torn_record_is_named_and_what_stands_before_it_kept(tmp_path, cut):
    events = some_events(10)
    journal = a_journal(tmp_path, events)
    os.truncate(journal.path, journal.path.stat().st_size - cut)
    contents = read_journal(journal.path)
    assert same(contents.events, events[:9])
    assert contents.problems == [
        f"rank-00003.journal: record 9 is torn, {88 - cut} of its 88 bytes are there"
    ]


def test_a_flipped_byte_is_named_wherever_it_lies(tmp_path):
    events = some_events(4)
    journal = a_journal(tmp_path, events)
    journal.close("verified")
    sound = journal.path.read_bytes()
    start = first_record(journal.path)
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        journal.path.write_bytes(damaged)
        contents = read_journal(journal.path)
        assert not contents.complete
        assert contents.problems
        row = (place - start) // RECORD.itemsize
        kept = events[: min(row, 4)] if place >= start else events[:0]
        assert same(contents.events, kept)


def test_a_lost_record_is_named(tmp_path):
    journal = a_journal(tmp_path, some_events(10))
    data = journal.path.read_bytes()
    start = first_record(journal.path) + 4 * RECORD.itemsize
    journal.path.write_bytes(data[:start] + data[start + RECORD.itemsize :])
    contents = read_journal(journal.path)
    assert len(contents.events) == 4
    assert "record 4 is damaged; it and the 4 records after it" in contents.problems[0]


def test_a_newer_schema_is_refused(tmp_path):
    import spimpi.trace.journals.journal as module

    body = b"{}      "
    path = tmp_path / "rank-00000.journal"
    path.write_bytes(module._first_line(2, body) + body)
    with pytest.raises(UsageError, match="schema 2, this spimpi reads up to schema 1"):
        read_journal(path)


def test_an_existing_journal_is_not_overwritten(tmp_path):
    a_journal(tmp_path, some_events(1))
    with pytest.raises(UsageError, match="remove it .with .spimpi verify. use --overwrite, with a Distributed"):
        Journal(tmp_path, 3, header(4), TENSORS)


def test_rows_of_another_dtype_are_refused(tmp_path):
    journal = Journal(tmp_path, 0, header(1), TENSORS)
    with pytest.raises(TypeError, match="EVENT"):
        journal.append(np.zeros(3))


def test_a_full_disk_is_said_and_the_journal_goes_on_when_there_is_room(tmp_path):
    events = some_events(1000)
    journal = a_journal(tmp_path, events[:100])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 300, limits[1]))
    try:
        journal.append(events[100:500])
        with pytest.raises(IncompleteError, match="could not be written: File too large; 100 ev"):
            journal.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(read_journal(journal.path).events, events[:100])
    journal.append(events[500:])
    journal.close("verified")
    assert same(read_journal(journal.path).events, events)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from trace_samples import TENSORS, header, some_events
from spimpi.trace.journals.journal import Journal

journal = Journal(sys.argv[1], 0, header(2), TENSORS)
for step in range(5):
    journal.append(some_events(20, seed=step))
    journal.flush()
journal.append(some_events(20, seed=99))
if sys.argv[3] == "handler":
    signal.signal(signal.SIGTERM, lambda *_: (journal.flush(), os._exit(1)))
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["plainly", "handler"])
def test_a_killed_process_loses_only_what_was_not_flushed(tmp_path, how):
    tests = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, tests, how], check=False)
    assert done.returncode == (1 if how == "handler" else -signal.SIGKILL)
    seeds = [*range(5), *([99] if how == "handler" else [])]
    expected = np.concatenate([some_events(20, seed=s) for s in seeds])
    contents = read_journal(journal_path(tmp_path, 0))
    assert same(contents.events, expected) and not contents.complete
    assert contents.events.dtype == EVENT
