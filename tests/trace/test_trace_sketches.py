"""Sketches in a trace: shares of all ranks add up, whatever the driver; loss and damage are named."""

import os
import resource

import h5py
import numpy as np
import pytest
from trace_samples import TENSORS, header, same, some_events, some_sketches, write_journal, write_trace

from spimpi.errors import IncompleteError, UsageError
from spimpi.trace import open as open_trace
from spimpi.trace.checksum import SKETCH_RECORD
from spimpi.trace.journals.journal import Journal, read_journal
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.reading.base import DamageError
from spimpi.trace.reading.check import check
from spimpi.trace.reading.sketches import combined
from spimpi.trace.schema import SKETCH, SKETCH_DESCRIPTIONS, SKETCH_SHARE
from spimpi.trace.sealing.recover import recover


@pytest.fixture
def world():
    from mpi4py import MPI

    return MPI.COMM_WORLD


def by_hand(shares: np.ndarray) -> np.ndarray:
    """Sketches of whole tensors, one after the other, in the order embed, layers, logits."""
    places = [(0, -1), (1, 0), (1, 1), (2, -1)]
    made = []
    for step in range(3):
        for tensor, layer in places:
            own = [
                s for s in shares if (s["step"], s["tensor"], s["layer"]) == (step, tensor, layer)
            ]
            sums = [sum(s[n] for s in own) for n in ("size", "nonfinite", "sumsq", "projections")]
            size, nonfinite, sumsq, projections = sums
            absmax = max(s["absmax"] for s in own)
            made.append((0, step, layer, tensor, size, nonfinite, absmax, sumsq, projections))
    return np.array(made, SKETCH)


@pytest.mark.mpi
def test_shares_of_all_ranks_add_up_in_program_order(world, mpi_tmp_path, driver):
    path = mpi_tmp_path / "run.h5"
    events, own = some_events(9, world.rank), some_sketches(world.rank, world.size)
    write_trace(world, path, events, driver, sketches=own)
    shares = np.concatenate([some_sketches(r, world.size) for r in range(world.size)])
    with open_trace(path) as trace:
        found = trace.sketches()
        assert found.dtype == SKETCH and found.tobytes() == by_hand(shares).tobytes()
        assert trace.complete and same(trace.events(world.rank), events)
    with h5py.File(path) as file:
        for name in SKETCH_SHARE.names:
            assert np.array_equal(file[f"sketches/{name}"][:], shares[name])
            assert file[f"sketches/{name}"].attrs["description"] == SKETCH_DESCRIPTIONS[name]
    assert check(path).state == "intact"
    assert not journal_folder(path).exists()


@pytest.mark.mpi
def test_a_run_that_took_none_has_none(world, mpi_tmp_path, driver):
    path = mpi_tmp_path / "run.h5"
    write_trace(world, path, some_events(9), driver)
    with open_trace(path) as trace:
        assert trace.sketches().shape == (0,) and trace.sketches().dtype == SKETCH
    assert "sketches" not in h5py.File(path)


@pytest.mark.mpi(min_size=2)
def test_a_rank_without_sketches_is_refused_on_every_rank(world, mpi_tmp_path):
    from spimpi.trace.sealing.seal import seal

    path = mpi_tmp_path / "run.h5"
    own = some_sketches() if world.rank != 1 else None
    journal = write_journal(world, path, some_events(5), sketches=own)
    with pytest.raises(UsageError, match="lacks sketches, unlike rank 0's"):
        seal(world, journal, path, {}, "gather")


def test_a_share_that_is_missing_or_there_twice_leaves_its_sketch_out():
    shares = np.concatenate([some_sketches(r, 3) for r in range(3)])
    assert combined(shares)[1] == 0
    found, lacking = combined(np.delete(shares, 2))
    assert lacking == 1 and len(found) == 11
    found, lacking = combined(np.append(shares, shares[2]))
    assert lacking == 1 and len(found) == 11


def killed(path, world=2, shares=some_sketches):
    """Journals of ranks that were killed, with their sketches' files still open."""
    for rank in range(world):
        journal = Journal(journal_folder(path), rank, header(world, sketches=True), TENSORS)
        journal.append(some_events(20, rank))
        journal.flush()
        journal.sketches.append(shares(rank, world)[: 12 - 4 * rank])  # not all of rank 1's
        os.close(journal._file.fd)
        os.close(journal.sketches._file.fd)


def test_sketches_survive_a_kill_and_incomplete_ones_are_left_out(tmp_path):
    path = tmp_path / "run.h5"
    killed(path)
    whole = by_hand(np.concatenate([some_sketches(r, 2) for r in range(2)]))
    told = "4 sketches lack some rank's share, left out"
    with open_trace(path) as trace:
        found = trace.sketches()
        assert found.tobytes() == whole[4:].tobytes()  # rank 1 begins with the last step
        assert told in trace.missing
    recovered = recover(path)
    assert told in recovered.missing
    with open_trace(path) as trace:
        assert trace.sketches().tobytes() == whole[4:].tobytes()
    condition = check(path)
    assert (condition.state, condition.missing) == ("incomplete", recovered.missing)
    assert not journal_folder(path).exists()


def test_a_run_that_ended_but_could_not_seal_is_recovered_with_its_sketches(tmp_path, one):
    path = tmp_path / "run.h5"
    write_journal(one, path, some_events(20), sketches=some_sketches())
    assert recover(path).missing == []
    with open_trace(path) as trace:
        assert trace.sketches().tobytes() == by_hand(some_sketches()).tobytes()
    assert check(path).state == "intact"


def test_a_lost_file_of_sketches_is_named(tmp_path, one):
    path = tmp_path / "run.h5"
    write_journal(one, path, some_events(20), sketches=some_sketches()).sketches.path.unlink()
    (line,) = recover(path).missing
    assert line == "rank-00000.sketches: is not there, though this run took sketches"


@pytest.mark.parametrize("cut", [1, 70, 135])
def test_a_torn_sketch_is_named_and_those_before_it_kept(tmp_path, cut):
    path = tmp_path / "run.h5"
    killed(path, 1)
    file = journal_folder(path) / "rank-00000.sketches"
    os.truncate(file, file.stat().st_size - cut)
    contents = read_journal(file.with_suffix(".journal")).sketches
    assert contents.rows.tobytes() == some_sketches()[:11].tobytes()
    size = SKETCH_RECORD.itemsize
    assert contents.problems == [
        f"rank-00000.sketches: record 11 is torn, {size - cut} of its {size} bytes are there"
    ]


def test_sketches_that_were_cut_after_the_run_ended_are_named(tmp_path, one):
    journal = write_journal(one, tmp_path / "run.h5", some_events(5), sketches=some_sketches())
    os.truncate(journal.sketches.path, 64 + 3 * SKETCH_RECORD.itemsize)
    contents = read_journal(journal.path).sketches
    assert contents.missing == ["rank-00000.sketches: its end is missing, 3 sketches are there"]


def test_a_flipped_byte_of_journalled_sketches_is_named_wherever_it_lies(tmp_path, one):
    journal = write_journal(one, tmp_path / "run.h5", some_events(5), sketches=some_sketches())
    file, sound = journal.sketches.path, journal.sketches.path.read_bytes()
    for place in range(0, len(sound), 7):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        contents = read_journal(journal.path).sketches
        kept = min(max(place - 64, 0) // SKETCH_RECORD.itemsize, 12)
        assert contents.damage and len(contents.rows) == (kept if place >= 64 else 0)
        assert contents.rows.tobytes() == some_sketches()[:kept].tobytes()


def test_damaged_sketches_stop_the_sealing_and_recovery_keeps_them(tmp_path, one):
    from spimpi.trace.sealing.seal import seal

    path = tmp_path / "run.h5"
    journal = write_journal(one, path, some_events(5), sketches=some_sketches())
    data = bytearray(journal.sketches.path.read_bytes())
    data[64 + 5 * SKETCH_RECORD.itemsize + 9] ^= 1
    journal.sketches.path.write_bytes(data)
    line = "rank-00000.sketches: record 5 is damaged; it and the 7 records after it are left out"
    with pytest.raises(IncompleteError, match=line):
        seal(one, journal, path, {}, "gather")
    recovered = recover(path)
    assert recovered.missing == [line] and recovered.kept == [str(journal.path)]
    assert journal.sketches.path.exists()
    with open_trace(path) as trace:
        assert trace.sketches().tobytes() == by_hand(some_sketches())[:5].tobytes()
        assert same(trace.events(), some_events(5))


def test_a_sealed_sketch_that_was_altered_is_refused(tmp_path, one, driver):
    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(5), driver, sketches=some_sketches())
    for name in SKETCH_SHARE.names:
        with h5py.File(path, "r+") as file:
            sound = file[f"sketches/{name}"][3]
            file[f"sketches/{name}"][3] = sound + 1
        with open_trace(path) as trace, pytest.raises(DamageError, match="sketches were altered"):
            trace.sketches()
        with h5py.File(path, "r+") as file:
            file[f"sketches/{name}"][3] = sound
    assert check(path).state == "intact"
    with h5py.File(path, "r+") as file:
        del file["sketches"]
    assert (check(path).state, len(check(path).damage)) == ("damaged", 1)


def test_a_disk_that_fills_is_said_and_the_file_stays_readable(tmp_path):
    journal = Journal(tmp_path, 0, header(1, sketches=True), TENSORS)
    journal.sketches.append(some_sketches()[:4])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.sketches.path.stat().st_size + 200, limits[1]))
    try:
        with pytest.raises(IncompleteError, match="could not be written: File too large"):
            journal.sketches.append(some_sketches()[4:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.sketches.append(some_sketches()[4:])
    journal.close("verified")
    contents = read_journal(journal.path).sketches
    assert contents.rows.tobytes() == some_sketches().tobytes() and contents.problems == []
