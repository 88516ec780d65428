"""Damage anywhere in a trace: it is read right or named; never a wrong value, never a traceback.

Every file is read in a child process, as the commands do, since HDF5 itself crashes on some damaged
metadata (1.10 on about one flip in 200).
"""

import faulthandler
import shutil
import traceback

import pytest
from trace_samples import same, skip_without_mpio, some_events, some_sketches, write_trace

from spimpi.cli import apart as module
from spimpi.cli.apart import apart
from spimpi.errors import SpimpiError
from spimpi.trace import open as open_trace
from spimpi.trace.reading.check import check
from spimpi.trace.reading.sketches import combined
from spimpi.trace.sealing.recover import recover

SAMPLES = 80  # a file
RIGHT, NAMED, CRASHED, WRONG = 0, 1, 3, 99  # 3: as ``apart`` says it

FILES = [
    ("gather", "run.h5"), ("mpio", "run.h5"),
    ("parts", "run.h5"), ("parts", "run.h5.parts/rank-00000.h5"),
]  # fmt: skip


def tables(trace):
    return trace.attributes, trace.ranks, trace.tensors, trace.driver


def sketches_of(driver):
    """One driver's trace has sketches as well."""
    return some_sketches() if driver == "gather" else None


def wrong_sketches(trace) -> bool:
    """Whether they are there as if right, and are not."""
    expected = sketches_of(trace.driver)
    try:
        found = trace.sketches()
    except SpimpiError:
        return False
    return found.tobytes() != (b"" if expected is None else combined(expected)[0].tobytes())


def judged(path, expected, events) -> int:
    """Read a damaged trace in this process: RIGHT, NAMED or WRONG."""
    try:
        found = check(path)
        with open_trace(path) as trace:
            for info, rows in trace.intact_events():
                if not same(rows, events) or info.rank != 0:
                    return WRONG
            if wrong_sketches(trace):
                return WRONG
            if found.state == "intact":
                columns = all((trace.column(n)[:] == events[n]).all() for n in events.dtype.names)
                return RIGHT if columns and tables(trace) == expected else WRONG
            if not found.missing and not found.damage:
                return WRONG
        return NAMED
    except SpimpiError as error:
        return NAMED if str(error) and "\n" not in str(error) else WRONG


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """HDF5 1.10 runs for ever on some damaged metadata."""
    monkeypatch.setattr(module, "PATIENCE", 1.0)


def read_apart(path, expected, events) -> int:
    def read():
        faulthandler.disable()
        try:
            return judged(path, expected, events)
        except Exception:  # ``apart`` would take it for damage
            traceback.print_exc()
            return WRONG

    return apart(read, "run.h5")


def ended_well(capfd) -> bool:
    """Whether no reader raised what nobody expected, nor waited."""
    told = capfd.readouterr().err
    return "Traceback" not in told and "not read within" not in told


@pytest.fixture(params=FILES, ids=[f"{driver} {name}" for driver, name in FILES])
def sound(request, tmp_path, one):
    """A trace, the file of it that is to be damaged, what it says, its events."""
    driver, name = request.param
    if driver == "mpio":
        skip_without_mpio()
    path, events = tmp_path / "run.h5", some_events(40)
    write_trace(one, path, events, driver, sketches=sketches_of(driver))
    with open_trace(path) as trace:
        expected = tables(trace)
    return path, tmp_path / name, expected, events


def test_a_flipped_bit_anywhere_is_harmless_or_named(sound, capfd):
    path, file, expected, events = sound
    data = file.read_bytes()
    results = []
    step = max(1, len(data) // SAMPLES)
    for place in range(0, len(data), step):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place // step) % 8
        file.write_bytes(damaged)
        results.append(read_apart(path, expected, events))
        assert results[-1] in (RIGHT, NAMED, CRASHED), (place, results[-1])
    assert ended_well(capfd)
    assert results.count(NAMED) > 5


def test_a_region_overwritten_anywhere_is_harmless_or_named(sound, capfd):
    path, file, expected, events = sound
    data = file.read_bytes()
    size = max(1, len(data) // 25)
    for place in range(0, len(data), size):
        damaged = bytearray(data)
        damaged[place : place + size] = bytes(len(damaged[place : place + size]))
        file.write_bytes(damaged)
        assert read_apart(path, expected, events) in (RIGHT, NAMED, CRASHED), place
    assert ended_well(capfd)


def test_a_file_cut_short_anywhere_is_named(sound, capfd):
    path, file, expected, events = sound
    data = file.read_bytes()
    for length in range(0, len(data) - 1, max(1, len(data) // 25)):
        file.write_bytes(data[:length])
        assert read_apart(path, expected, events) in (NAMED, CRASHED), length
    assert ended_well(capfd)


def test_a_wrong_value_would_be_seen(sound, tmp_path):
    path, _, expected, events = sound
    assert read_apart(path, expected, events) == RIGHT
    other = events.copy()
    other["layer"][7] += 1
    assert read_apart(path, expected, other) == WRONG
    assert read_apart(path, ({}, *expected[1:]), events) == WRONG


def test_damaged_journals_are_sealed_up_to_the_damage_or_refused(tmp_path):
    from spimpi.trace.journals.journal import Journal
    from spimpi.trace.journals.journal_files import journal_folder, journal_path
    from trace_samples import TENSORS, header

    events, folder = some_events(40), journal_folder(tmp_path / "made.h5")
    journal = Journal(folder, 0, header(1), TENSORS)
    journal.append(events)
    journal.close("verified")
    data = journal.path.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 100)):
        path = tmp_path / f"{place}.h5"
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        journal_folder(path).mkdir()
        journal_path(journal_folder(path), 0).write_bytes(damaged)
        try:
            found = recover(path)
        except SpimpiError:
            assert not path.exists() and journal_folder(path).exists()
        else:
            with open_trace(path) as trace:
                rows = trace.events()
            assert found.missing and found.kept and same(rows, events[: len(rows)])
        shutil.rmtree(journal_folder(path))
