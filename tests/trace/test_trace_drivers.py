"""All drivers, and recovery from the journals, give the same content."""

import shutil
from itertools import count

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from trace_samples import some_events, write_journal

from spimpi.trace import open as open_trace
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.schema import EVENT
from spimpi.trace.sealing import drivers
from spimpi.trace.sealing import layout
from spimpi.trace.sealing.recover import recover
from spimpi.trace.sealing.seal import choose_driver, seal

NUMBER = count()  # of a case
EXTREMES = [(name, value) for name in EVENT.names if EVENT[name].kind in "iu"
            for value in (np.iinfo(EVENT[name]).min, np.iinfo(EVENT[name]).max)
            if name != "bytes" or value < 2**63]  # fmt: skip


def available() -> list[str]:
    has_mpio = choose_driver("auto") == "mpio"
    return ["parts", "gather"] + (["mpio"] if has_mpio else [])


def content(path) -> dict:
    """All that a trace says, and its stored types; without how it was written."""
    with open_trace(path) as trace:
        assert trace.complete
        of_sealing = ("recovered",)
        return {
            "attributes": {k: v for k, v in trace.attributes.items() if k not in of_sealing},
            "ranks": trace.ranks,
            "tensors": trace.tensors,
            "events": trace.events().tobytes(),
            "columns": {n: (trace.column(n).dtype, trace.column(n)[:].tobytes()) for n in EVENT.names},
            "notes": {n: {k: np.array(v).tolist() for k, v in trace.column(n).attrs.items()
                          if k != "DIMENSION_LIST"} for n in EVENT.names},
            "scales": {n: trace.column(n).dims[0].keys() for n in EVENT.names},
        }  # fmt: skip


# All ranks must draw the same: no randomness, no memory of earlier failures, no shrinking.
@pytest.mark.mpi
@settings(
    max_examples=15, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    counts=st.lists(st.integers(0, 300) | st.just(0), min_size=8, max_size=8),
    seed=st.integers(0, 1000),
    extremes=st.lists(st.sampled_from(EXTREMES), max_size=3),
    where=st.integers(0, 7),
)
def test_the_content_does_not_depend_on_the_driver(
    mpi_tmp_path, monkeypatch, counts, seed, extremes, where
):
    from mpi4py import MPI

    monkeypatch.setattr(layout, "ROWS_AT_ONCE", 70)  # several blocks a rank
    monkeypatch.setattr(drivers, "PIECE", 110)
    world = MPI.COMM_WORLD
    events = some_events(counts[world.rank % 8], seed + world.rank)
    if where % world.size == world.rank:
        for name, value in extremes:
            events[name][:1] = value
    case = next(NUMBER)
    first = mpi_tmp_path / f"{case}-first.h5"
    journal = write_journal(world, first, events, started=1.0)
    world.Barrier()
    paths = {name: mpi_tmp_path / f"{case}-{name}.h5" for name in [*available(), "recovered"]}
    if world.rank == 0:
        for path in paths.values():
            shutil.copytree(journal_folder(first), journal_folder(path))
    world.Barrier()
    for name, path in paths.items():
        if name == "recovered":
            if world.rank == 0:
                recover(path)
            continue
        own = journal_folder(path) / journal.path.name
        seal(world, own, path, {"end_state": "verified"}, name)
    world.Barrier()
    found = {name: content(path) for name, path in paths.items()}
    assert all(there == found["gather"] for there in found.values())
    world.Barrier()
    if world.rank == 0:
        for path in mpi_tmp_path.glob(f"{case}-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    world.Barrier()
