"""Events and traces to test with."""

import numpy as np
import pytest

from spimpi.bench.synthetic_trace import write_ranks
from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.schema import (
    EVENT, SKETCH_SHARE, Op, Stage, Status, TensorInfo, blank_events,
)  # fmt: skip
from spimpi.trace.sealing.seal import prepare, seal

TENSORS = [
    TensorInfo("embed", (-1, 64), "float32"),
    TensorInfo("hidden", (-1, 64), "float32"),
    TensorInfo("logits", (2, 259), "float32"),
]


def some_events(n: int, seed: int = 0) -> np.ndarray:
    """``n`` events with something in every column, no failure among them."""
    rng = np.random.default_rng(seed)
    events = blank_events(n)
    events["step"] = np.arange(n) // 8
    events["layer"] = np.arange(n) % 8 - 1
    events["microbatch"] = rng.integers(-1, 4, n)
    events["stage"] = rng.integers(0, len(Stage), n)
    events["op"] = rng.integers(0, len(Op), n)
    events["established"] = rng.integers(0, 16, n)
    events["tensor"] = rng.integers(0, len(TENSORS), n)
    events["peer"] = rng.integers(-1, 4, n)
    events["sequence"] = rng.integers(0, 1000, n)
    events["fingerprint"] = rng.integers(0, 2**64, n, dtype=np.uint64)
    events["expected"] = events["fingerprint"]
    events["bytes"] = rng.integers(0, 8 << 20, n)
    events["t_start"] = np.sort(rng.random(n))
    events["t_end"] = events["t_start"] + 1e-3
    return events


def some_sketches(rank: int = 0, world: int = 1, steps: int = 3) -> np.ndarray:
    """A rank's shares of the sketches of a run: embed, hidden of two layers, logits, each step.

    Numbers are whole, so that sums over ranks are exact; a later rank has the later tensors first.
    """
    rng = np.random.default_rng(rank)
    places = [(0, -1), (1, 0), (1, 1), (2, -1)]
    shares = np.zeros(steps * len(places), SKETCH_SHARE)
    shares["rank"] = rank
    shares["step"] = np.repeat(np.arange(steps), len(places))
    shares["tensor"], shares["layer"] = np.tile(np.array(places), (steps, 1)).T
    shares["size"] = 100 + rank
    shares["whole"] = sum(100 + r for r in range(world))
    shares["nonfinite"] = rng.integers(0, 3, len(shares))
    for name in ("absmax", "sumsq"):
        shares[name] = rng.integers(0, 1000, len(shares))
    shares["projections"] = rng.integers(-1000, 1000, (len(shares), 8))
    return shares[::-1].copy() if rank % 2 else shares


def failing(events: np.ndarray, row: int, **columns) -> np.ndarray:
    """The events with one more failure, at ``row``."""
    events = events.copy()
    events["verdict"][row] = Status.FAILED
    events["expected"][row] = events["fingerprint"][row] ^ np.uint64(1)
    for name, value in columns.items():
        events[name][row] = value
    return events


def header(world: int, **more) -> dict:
    return {"run_id": "run-1", "world": world, "model": "tiny", "topology": {"tp": 2}} | more


def write_journal(comm, path, events, end_state="verified", sketches=None, **more) -> Journal:
    """Each rank's journal of the trace ``path``. Collective."""
    if sketches is not None:
        more["sketches"] = True
    if comm.rank == 0 and not journal_folder(path).exists():
        prepare(path, overwrite=True)
    comm.Barrier()
    journal = Journal(journal_folder(path), comm.rank, {**header(comm.size), **more}, TENSORS)
    for start in range(0, len(events), 20):
        journal.append(events[start : start + 20])
    if sketches is not None:
        journal.sketches.append(sketches[:5])
        journal.sketches.append(sketches[5:])
    journal.close(end_state)
    return journal


def write_trace(
    comm, path, events, driver="parts", end_state="verified", sketches=None, **options
) -> None:
    """A sealed trace. Collective."""
    journal = write_journal(comm, path, events, end_state, sketches)
    seal(comm, journal, path, {"end_state": end_state}, driver, **options)


def write_alone_trace(path, ranks, driver="gather", **attributes) -> None:
    """A sealed trace of several ranks' events, written by this process alone."""
    attributes = header(len(ranks), end_state="verified") | attributes
    write_ranks(path, len(ranks), ranks.__getitem__, TENSORS, attributes, driver)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == EVENT and a.tobytes() == b.tobytes()


def skip_without_mpio() -> None:
    from mpi4py import MPI  # noqa: F401  before h5py

    import h5py

    if not h5py.get_config().mpi:
        pytest.skip("this h5py is serial: the mpio driver needs one built with MPI")
