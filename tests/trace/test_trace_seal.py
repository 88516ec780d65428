"""Sealing: the same content whatever the driver and the number of ranks, or nothing at all."""

import os
import resource

import numpy as np
import pytest
from trace_samples import same, some_events, write_journal, write_trace

from spimpi.errors import IncompleteError, UsageError
from spimpi.trace import open as open_trace
from spimpi.trace.checksum import rows_fingerprint
from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.schema import EVENT
from spimpi.trace.sealing.seal import check_can_write, choose_driver, prepare, seal


@pytest.fixture
def world():
    from mpi4py import MPI

    return MPI.COMM_WORLD


def rows_of(rank: int, seed: int = 0) -> np.ndarray:
    """Rank 1 has none; the others differ in number."""
    return some_events(0 if rank == 1 else 137 * (rank + 1), 100 * seed + rank)


def left_over(path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p.name.startswith(path.name))


@pytest.mark.mpi
@pytest.mark.parametrize("seed", [0, 1])
def test_every_rank_reads_back_what_it_wrote(world, mpi_tmp_path, driver, seed):
    path = mpi_tmp_path / "run.h5"
    write_trace(world, path, rows_of(world.rank, seed), driver)
    with open_trace(path) as trace:
        assert (trace.complete, trace.problems, trace.driver) == (True, [], driver)
        assert len(trace.ranks) == world.size
        for rank, info in enumerate(trace.ranks):
            assert same(trace.events(rank), rows_of(rank, seed))
            assert info.fingerprint == rows_fingerprint(rows_of(rank, seed))
        assert same(trace.events(), np.concatenate([rows_of(r, seed) for r in range(world.size)]))
        for name in EVENT.names:
            assert np.array_equal(trace.column(name)[:], trace.events()[name])
        assert trace.attributes["topology"] == {"tp": 2}
        assert trace.attributes["end_state"] == "verified"
    assert not journal_folder(path).exists()


@pytest.mark.mpi
def test_a_trace_without_events_can_be_sealed_and_read(world, mpi_tmp_path, driver):
    path = mpi_tmp_path / "run.h5"
    write_trace(world, path, some_events(0), driver)
    with open_trace(path) as trace:
        assert len(trace) == 0 and trace.complete and len(trace.column("step")) == 0


@pytest.mark.mpi
def test_an_event_takes_at_most_64_bytes_on_disk(world, mpi_tmp_path, driver):
    path = mpi_tmp_path / "run.h5"
    write_trace(world, path, rows_of(world.rank), driver)
    with open_trace(path) as trace:
        assert sum(trace.column(name).dtype.itemsize for name in EVENT.names) <= 64


@pytest.mark.mpi
def test_integers_that_need_all_their_bits_keep_them(world, mpi_tmp_path, driver):
    events = some_events(3, world.rank)
    events["element"][1] = 2**40 + world.rank
    events["bytes"][2] = 2**33
    events["step"] = -(2**31)
    events["nonfinite"] = 2**16 - 1
    path = mpi_tmp_path / "run.h5"
    write_trace(world, path, events, driver)
    assert same(open_trace(path).events(world.rank), events)


@pytest.mark.mpi
def test_large_and_odd_attributes_come_back_as_they_were(world, mpi_tmp_path, driver):
    path = mpi_tmp_path / "per%cent %d.h5"
    odd = {
        "prompt": "x" * 200_000, "seed": 2**64 - 1, "none": None, "yes": True, "list": [1, "a"],
        "nul": "a\0b", "lone": "\udcff", "pi": 3.141592653589793, "empty": "", "huge": 2**70,
    }  # fmt: skip
    journal = write_journal(world, path, some_events(5, world.rank))
    seal(world, journal, path, odd, driver)
    with open_trace(path) as trace:
        assert odd.items() <= trace.attributes.items()
        assert same(trace.events(world.rank), some_events(5, world.rank))


@pytest.mark.mpi
def test_an_existing_trace_is_refused_on_every_rank_and_kept(world, mpi_tmp_path, driver):
    path = mpi_tmp_path / "run.h5"
    write_trace(world, path, some_events(4, world.rank), driver)
    journal = write_journal(world, path, some_events(9))
    with pytest.raises(UsageError, match="exists; choose another name or remove it .*--overwrite"):
        seal(world, journal, path, {}, driver)
    assert journal.path.exists()
    assert same(open_trace(path).events(world.rank), some_events(4, world.rank))


@pytest.mark.mpi
def test_overwriting_replaces_the_trace_and_leaves_nothing_behind(world, mpi_tmp_path, driver):
    path = mpi_tmp_path / "run.h5"
    write_trace(world, path, some_events(4), "parts")
    write_trace(world, path, rows_of(world.rank), driver, overwrite=True)
    with open_trace(path) as trace:
        assert trace.complete and same(trace.events(world.rank), rows_of(world.rank))
    world.Barrier()
    assert left_over(path) == ["run.h5"] + (["run.h5.parts"] if driver == "parts" else [])


@pytest.mark.mpi
def test_a_damaged_journal_of_one_rank_is_raised_on_all_and_nothing_is_lost(
    world, mpi_tmp_path, driver
):
    path = mpi_tmp_path / "run.h5"
    journal = write_journal(world, path, some_events(50))
    last = world.size - 1
    if world.rank == last:
        data = bytearray(journal.path.read_bytes())
        data[-200] ^= 1
        journal.path.write_bytes(data)
    with pytest.raises(IncompleteError, match=rf"\(rank {last}\).*record 48 is damaged"):
        seal(world, journal, path, {}, driver)
    assert journal.path.exists() and not path.exists()


@pytest.mark.mpi
def test_a_disk_that_fills_on_one_rank_is_raised_on_all_and_nothing_is_lost(
    world, mpi_tmp_path
):
    path = mpi_tmp_path / "run.h5"
    old = some_events(4, world.rank)
    write_trace(world, path, old, "parts")
    events = some_events(4000)
    journal = write_journal(world, path, events)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(IncompleteError, match="could not be sealed.*journals are kept"):
            seal(world, journal, path, {}, "parts", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    world.Barrier()
    assert left_over(path) == ["run.h5", "run.h5.journal", "run.h5.parts"]
    assert same(open_trace(path).events(world.rank), old)
    seal(world, journal, path, {}, "parts", overwrite=True)
    assert same(open_trace(path).events(world.rank), events)


@pytest.mark.mpi(min_size=2)
def test_a_journal_of_another_run_is_refused_on_every_rank(world, mpi_tmp_path):
    path = mpi_tmp_path / "run.h5"
    run_id = "run-2" if world.rank == 1 else "run-1"
    journal = write_journal(world, path, some_events(5), run_id=run_id)
    with pytest.raises(UsageError, match="of another run than rank 0's"):
        seal(world, journal, path, {}, "parts")
    assert not path.exists()


def test_mpio_on_a_serial_h5py_says_how_to_get_it():
    from mpi4py import MPI  # noqa: F401

    import h5py

    if h5py.get_config().mpi:
        assert choose_driver("auto") == choose_driver("mpio") == "mpio"
        return
    assert choose_driver("auto") == "parts"
    with pytest.raises(UsageError, match="built with MPI.*build it against.*or use --trace-driver"):
        choose_driver("mpio")


def test_an_unknown_driver_is_refused():
    with pytest.raises(UsageError, match="unknown trace driver 'zarr'; there are auto, mpio, parts, gather"):
        choose_driver("zarr")


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    check_can_write(tmp_path / "run.h5")
    with pytest.raises(UsageError, match="there is no directory"):
        check_can_write(tmp_path / "nowhere" / "run.h5")
    with pytest.raises(UsageError, match="it is a directory"):
        check_can_write(tmp_path)
    (tmp_path / "run.h5").write_text("precious")
    with pytest.raises(UsageError, match="exists; choose another name or remove it .*--overwrite"):
        check_can_write(tmp_path / "run.h5")
    check_can_write(tmp_path / "run.h5", overwrite=True)
    assert (tmp_path / "run.h5").read_text() == "precious"


@pytest.mark.parametrize("driver", ["parts", "gather"])
def test_the_longest_name_that_is_let_pass_can_be_sealed(tmp_path, driver):
    from mpi4py import MPI

    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - len(".0123456789abcdef.sealing")
    with pytest.raises(UsageError, match=f"has {longest + 1} bytes, at most {longest} leave room"):
        check_can_write(tmp_path / f"{(longest - 2) * 'n'}.h5")
    path = tmp_path / f"{(longest - 3) * 'n'}.h5"
    check_can_write(path)
    write_trace(MPI.COMM_SELF, path, rows_of(0), driver)
    assert path.exists()


def test_journals_of_an_unfinished_run_are_cleared_only_when_asked(tmp_path):
    path = tmp_path / "run.h5"
    folder = prepare(path)
    (folder / "rank-00007.journal").write_text("old")
    with pytest.raises(UsageError, match="has not ended"):
        prepare(path)
    assert list(prepare(path, overwrite=True).iterdir()) == []


def test_a_running_jobs_trace_is_not_taken_whatever_folder_its_journals_are_in(tmp_path):
    path = tmp_path / "run.h5"
    folder = prepare(path, local=tmp_path / "disk")
    running = Journal(folder, 0, {"run_id": "on"}, [])
    for local in (None, tmp_path / "disk", tmp_path / "other"):
        with pytest.raises(UsageError, match="being written by a running job"):
            prepare(path, overwrite=True, local=local)
        assert journal_folder(path).resolve() == folder
    running.close("verified")
    prepare(path, overwrite=True)
