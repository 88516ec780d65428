"""Reading: what is missing or altered is named, and no wrong value is ever given out."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from trace_samples import same, some_events, write_journal, write_trace

from spimpi.errors import IncompleteError, UsageError
from spimpi.trace import open as open_trace
from spimpi.trace.journals.journal_files import journal_folder


def test_columns_are_read_lazily(tmp_path, one, driver):
    import h5py

    write_trace(one, tmp_path / "run.h5", some_events(50), driver)
    with open_trace(tmp_path / "run.h5") as trace:
        column = trace.column("t_end")
        assert isinstance(column, h5py.Dataset)
        assert np.array_equal(column[10:20], some_events(50)["t_end"][10:20])
        with pytest.raises(UsageError, match="no column 'colour'; there are step, microbatch"):
            trace.column("colour")
        with pytest.raises(UsageError, match="no rank 1"):
            trace.events(1)


def test_reading_needs_neither_mpi_nor_numba(tmp_path, one):
    write_trace(one, tmp_path / "run.h5", some_events(5))
    code = (
        "import sys, spimpi.trace.reading.reader as r; t = r.open(sys.argv[1]); t.events();"
        "print([m for m in ('mpi4py.MPI', 'numba') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run.h5"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("column, value", [("rank", 2**40), ("rank", -5), ("count", 2**50), ("offset", -1)])
def test_a_rank_that_cannot_be_is_damage_to_every_command(tmp_path, one, column, value, capfd):
    import h5py

    from spimpi.cli import main

    write_trace(one, tmp_path / "run.h5", some_events(5), "gather")
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        file[f"ranks/{column}"][0] = value
    for command in ("show", "locate", "check"):
        status = main(["trace", command, str(tmp_path / "run.h5")])
        out = "".join(capfd.readouterr())
        assert status == 3, out
        assert "1 of 1 ranks cannot be" in out and "Traceback" not in out


@pytest.mark.mpi(min_size=2)
def test_a_missing_part_is_named_and_never_read_as_fill_values(mpi_tmp_path):
    from mpi4py import MPI

    world, path = MPI.COMM_WORLD, mpi_tmp_path / "run.h5"
    write_trace(world, path, some_events(30, world.rank))
    if world.rank == 0:
        (mpi_tmp_path / "run.h5.parts" / "rank-00001.h5").unlink()
    world.Barrier()
    with open_trace(path) as trace:
        assert not trace.complete
        assert "rank 1 on" in trace.problems[0] and "is missing" in trace.problems[0]
        assert same(trace.events(0), some_events(30, 0))
        for read in (lambda: trace.events(1), trace.events, lambda: trace.column("step")):
            with pytest.raises(IncompleteError, match="rank-00001.h5 is missing"):
                read()


@pytest.mark.mpi(min_size=2)
def test_exchanged_parts_are_named(mpi_tmp_path):
    from mpi4py import MPI

    world, path = MPI.COMM_WORLD, mpi_tmp_path / "run.h5"
    write_trace(world, path, some_events(30, world.rank))
    first, second = (mpi_tmp_path / "run.h5.parts" / f"rank-0000{r}.h5" for r in (0, 1))
    if world.rank == 0:
        shutil.copy(first, second)
    world.Barrier()
    with open_trace(path) as trace, pytest.raises(IncompleteError, match="not the one that was"):
        trace.events(1)


def test_a_part_of_an_earlier_run_is_named(tmp_path, one):
    for name in ("old", "run"):
        write_trace(one, tmp_path / f"{name}.h5", some_events(30, len(name) + ord(name[0])))
    shutil.copy(
        tmp_path / "old.h5.parts" / "rank-00000.h5", tmp_path / "run.h5.parts" / "rank-00000.h5"
    )
    with (
        open_trace(tmp_path / "run.h5") as trace,
        pytest.raises(IncompleteError, match="rank 0 on .*events were altered: expected fingerp"),
    ):
        trace.events()


def test_an_altered_value_is_named(tmp_path, one, driver):
    import h5py

    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(30), driver)
    rows = path if driver != "parts" else tmp_path / "run.h5.parts" / "rank-00000.h5"
    with h5py.File(rows, "r+") as file:
        file["events/layer"][7] += 1
    with open_trace(path) as trace, pytest.raises(IncompleteError, match="were altered"):
        trace.events()


def test_altered_attributes_and_tables_are_named(tmp_path, one):
    import h5py

    for place in ("attribute", "ranks/host", "tensors/name"):
        path = tmp_path / f"{place[:3]}.h5"
        write_trace(one, path, some_events(3))
        with h5py.File(path, "r+") as file:
            if place == "attribute":
                file.attrs["model"] = "other"
            else:
                file[place][0] = "other"
        trace = open_trace(path)
        assert not trace.complete and "tables of ranks and tensors were altered" in trace.problems[0]


def test_a_run_that_never_sealed_is_read_from_its_journals(tmp_path, one):
    path = tmp_path / "run.h5"
    write_journal(one, path, some_events(50), world=3)
    for name in (path, journal_folder(path)):
        with open_trace(name) as trace:
            assert (trace.driver, trace.complete) == ("journals", False)
            assert same(trace.events(), some_events(50))
            assert np.array_equal(trace.column("step"), some_events(50)["step"])
            assert "never sealed: the run was killed" in trace.problems[0]
            assert "no journal of 2 of 3 ranks: 1, 2" in trace.problems[-1]


def test_a_journal_of_another_run_is_left_out_by_name(tmp_path, one):
    path = tmp_path / "run.h5"
    write_journal(one, path, some_events(50), world=2)
    write_journal(one, tmp_path / "other.h5", some_events(60), world=2, run_id="run-0")
    source = journal_folder(tmp_path / "other.h5") / "rank-00000.journal"
    shutil.copy(source, journal_folder(path) / "rank-00001.journal")
    trace = open_trace(path)
    assert len(trace) == 50
    assert any("rank-00001.journal: of another run" in problem for problem in trace.problems)


def test_a_closed_trace_is_no_damaged_one(tmp_path, one):
    """It would have no rows, and so no failures."""
    write_trace(one, tmp_path / "run.h5", some_events(10), "gather")
    with open_trace(tmp_path / "run.h5") as trace:
        pass
    for read in (trace.events, lambda: list(trace.blocks()), lambda: trace.column("step")):
        with pytest.raises(UsageError, match="was closed; open it again"):
            read()
    assert not trace.problems


def test_what_is_not_a_trace_is_refused_in_one_line(tmp_path):
    from mpi4py import MPI  # noqa: F401

    import h5py

    (tmp_path / "text.h5").write_text("not HDF5")
    os.mkfifo(tmp_path / "fifo")
    h5py.File(tmp_path / "other.h5", "w").close()
    with h5py.File(tmp_path / "newer.h5", "w") as file:
        file.attrs["schema_version"] = 2
    for name, message in (
        ("absent.h5", "there is no trace .*absent.h5"),
        ("text.h5", "not a trace: not an HDF5 file"),
        ("other.h5", "not a trace: an HDF5 file without a schema_version"),
        ("newer.h5", "has schema 2, this spimpi reads up to schema 1"),
        (".", "there is no trace .*, it is a directory"),
        ("fifo", "there is no trace .*fifo, it is no ordinary file"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            open_trace(tmp_path / name)
        assert "\n" not in str(caught.value)
