"""Writing the trace: journals, sealing by each driver, their peers, and what a running job pays."""

import io
import shutil
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter, process_time, sleep

import numpy as np
from mpi4py import MPI

from spimpi.checks.recorder import FLUSH_SECONDS, Recorder
from spimpi.reduction import together
from spimpi.trace.journals import node_file
from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.journal_files import journal_folder, own_journal
from spimpi.trace.schema import Established, Op, Stage, TensorInfo, blank_events
from spimpi.trace.sealing import layout
from spimpi.trace.sealing.seal import choose_driver, prepare, seal

EVENTS, BLOCK, ROUNDS = 500_000, 1000, 3  # a rank; events a flush
PER_SECOND, BURSTS = 1000, 16
TENSORS = [TensorInfo(name, (-1, 64), "float32") for name in ("embed", "hidden", "logits")]


def measure(comm) -> dict:
    """Events a second written by all ranks, bytes an event, the writer's share. Collective."""
    folder = Path(comm.bcast(tempfile.mkdtemp(prefix="spimpi-bench-") if comm.rank == 0 else None))
    try:
        return _measure(comm, folder)
    finally:
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _measure(comm, folder: Path) -> dict:
    events = _events(EVENTS, comm.rank)
    drivers = ["parts", "gather"] + ["mpio"] * (choose_driver() == "mpio")
    times: dict[str, list[float]] = {}
    size = 0.0
    for _ in range(ROUNDS):
        for driver in drivers:
            path = folder / "run.h5"
            journal = _timed(comm, times, "journal", lambda: _journalled(comm, path, events))
            _timed(comm, times, driver, lambda: seal(comm, journal, path, driver=driver))
            size = max(size, _size(comm, path) / (EVENTS * comm.size))
            _clear(comm, path)
        node_file.SEPARATE, separate = 0, node_file.SEPARATE
        journal = _timed(comm, times, "shared", lambda: _journalled(comm, path, events))
        node_file.SEPARATE = separate
        comm.Barrier()
        _clear(comm, path)
        own = folder / f"plain-{comm.rank}"
        _timed(comm, times, "plain", lambda: _plain(own, events))
        _timed(comm, times, "h5py", lambda: _h5py(own.with_suffix(".h5"), events))
    best = {name: min(spent) for name, spent in times.items()}
    total = EVENTS * comm.size
    figures = {"ranks": comm.size, "events": total}
    figures["journal, 10^6 events/s"] = round(total / best["journal"] / 1e6, 2)
    for driver in drivers:
        figures[f"{driver}: seal, 10^6 events/s"] = round(total / best[driver] / 1e6, 2)
        whole = best["journal"] + best[driver]
        figures[f"{driver}: journal and seal, 10^6 events/s"] = round(total / whole / 1e6, 2)
        figures[f"{driver}: seal / h5py of the columns"] = round(best[driver] / best["h5py"], 2)
    figures["journal / plain write of its bytes"] = round(best["journal"] / best["plain"], 2)
    figures["one file a node / a file a rank"] = round(best["shared"] / best["journal"], 2)
    figures["bytes an event, the largest"] = round(size, 1)
    return figures | _running(comm, folder)


def _events(n: int, rank: int) -> np.ndarray:
    """Events such as a run of 32 layers leaves."""
    rng = np.random.default_rng(rank)
    events = blank_events(n)
    i = np.arange(n)
    events["step"], events["layer"] = i // 320, i // 10 % 32
    events["stage"], events["op"] = Stage.COMPUTE, i % 10
    events["established"], events["tensor"] = Established.COMPUTED, i % len(TENSORS)
    events["fingerprint"] = rng.integers(0, 2**64, n, dtype=np.uint64)
    events["expected"] = events["fingerprint"]
    events["bytes"] = rng.integers(0, 8 << 20, n)
    events["t_start"] = np.cumsum(rng.random(n)) * 2e-3
    events["t_end"] = events["t_start"] + 1e-3
    return events


def _timed(comm, times, name: str, work):
    """Seconds from when all begin to when the last has ended."""
    comm.Barrier()
    start = perf_counter()
    result = work()
    spent = comm.allreduce(perf_counter() - start, op=MPI.MAX)
    times.setdefault(name, []).append(spent)
    return result


def _opened(comm, path: Path, sync: bool = False) -> Journal:
    if comm.rank == 0:
        prepare(path)
    comm.Barrier()
    own = own_journal(comm, partial(together, comm), journal_folder(path))
    comm.Barrier()
    header = {"run_id": "bench", "world": comm.size}
    return Journal(journal_folder(path), comm.rank, header, TENSORS, sync, own)


def _journalled(comm, path: Path, events) -> Journal:
    journal = _opened(comm, path)
    for start in range(0, len(events), BLOCK):
        journal.append(events[start : start + BLOCK])
        journal.flush()
    journal.close("verified")
    return journal


def _plain(path: Path, events) -> None:
    """The bytes of a journal, in the same pieces, by the file object of Python."""
    piece = bytes(88 * BLOCK)
    with path.open("wb", buffering=0) as file:
        for _ in range(0, len(events), BLOCK):
            file.write(piece)
    path.unlink()


def _h5py(path: Path, events) -> None:
    """The columns in a file of this rank alone, in the types that a trace has."""
    import h5py

    types = layout.column_types(*layout.column_range(events))
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for name, dtype in types.items():
            file.create_dataset(name, data=events[name].astype(dtype))
    path.write_bytes(image.getbuffer())
    path.unlink()


def _size(comm, path: Path) -> int:
    return path.stat().st_size + sum(
        part.stat().st_size for part in Path(f"{path}.parts").glob("*.h5")
    )


def _clear(comm, path: Path) -> None:
    comm.Barrier()
    if comm.rank == 0:
        path.unlink(missing_ok=True)
        for left in (journal_folder(path), Path(f"{path}.parts")):
            shutil.rmtree(left, ignore_errors=True)
    comm.Barrier()


def _running(comm, folder: Path) -> dict:
    """What a job that makes PER_SECOND events a second pays: recording, packing, writing."""
    figures = {}
    flushes = {}
    for sync in (False, True):
        journal = _opened(comm, folder / f"sync-{sync}.h5", sync)
        recorder = Recorder({"hidden": 1}, comm.rank, journal)
        used, waited = 0.0, []
        for burst in range(BURSTS):
            sleep(FLUSH_SECONDS)
            start, cpu = perf_counter(), process_time()
            for _ in range(int(PER_SECOND * FLUSH_SECONDS)):
                recorder.one(
                    "hidden", Op.MATMUL, Stage.COMPUTE, Established.COMPUTED, burst, burst, False,
                    t_start=start, step=burst, layer=3, bytes=1 << 16,
                )  # fmt: skip
            begun = perf_counter()
            recorder.write_down()
            waited.append(perf_counter() - begun)
            used += process_time() - cpu
        flushes[sync] = float(np.median(waited))
        share = comm.allreduce(used, op=MPI.MAX) / (BURSTS * FLUSH_SECONDS)
        name = "with sync, " if sync else ""
        figures[f"{name}{PER_SECOND} events/s a rank, % of the time"] = round(100 * share, 3)
        journal.close("verified")
        comm.Barrier()
    ratio = comm.allreduce(flushes[True] / flushes[False], op=MPI.MAX)
    figures["flush with sync / without"] = round(ratio, 1)
    figures["flush with sync, ms"] = round(1e3 * comm.allreduce(flushes[True], op=MPI.MAX), 2)
    return figures
