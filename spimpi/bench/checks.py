"""What a check costs beside the collective that it checks, and beside gathering to compare.

Sizes are bytes of the result on each rank. Collective and check run in turn; figures are medians
over the rounds of the slowest rank. Over a network the collective alone gets slower: what the
same check would be there is computed from the bytes that a ring moves.
"""

from time import perf_counter

import numpy as np
from mpi4py import MPI

import spimpi
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import Tag
from spimpi.partition import TensorPartition
from spimpi.reduction import reduce_fingerprints

SIZES = tuple(1 << n for n in (12, 16, 20, 23, 26))
DTYPES = ("float64", "float32", "uint16", "uint8")  # 16-bit floats are 2-byte items
GIGABITS = (100, 400)
TAG = Tag(name="hidden", layer=0, step=0)


def measure(comm) -> dict:
    """Allgather and allreduce with their checks, and a gather that compares. Collective."""
    figures = {"ranks": comm.size}
    for size in SIZES:
        for dtype in DTYPES:
            name = f"allgather, {_text(size)}, {dtype}"
            figures[name] = _ratio(comm, size, *_allgather(comm, size, dtype))
    for size in SIZES:
        for dtype in DTYPES[:2]:
            name = f"allreduce, {_text(size)}, {dtype}"
            figures[name] = _ratio(comm, 2 * size, *_allreduce(comm, size, dtype))
    for size in SIZES:
        figures[f"gather and compare / check, {_text(size)}, float32"] = _gathering(comm, size)
    return figures


def _text(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _payload(shape, dtype, seed) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape, np.float32).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def _allgather(comm, size, dtype):
    columns = 64
    rows = size // (columns * np.dtype(dtype).itemsize) // comm.size * comm.size
    rows = max(rows, comm.size)
    part = TensorPartition(0, comm.size, comm.rank, rows)
    local = _payload((part.size, columns), dtype, comm.rank)
    gathered = np.empty((rows, columns), dtype)
    return (
        lambda: comm.Allgather(local, gathered),
        lambda: spimpi.verify_allgather(comm, local, gathered, part, TAG),
    )


def _allreduce(comm, size, dtype):
    n = size // np.dtype(dtype).itemsize
    contribution = _payload((max(n // 1024, 1), min(n, 1024)), dtype, comm.rank)
    result = np.empty_like(contribution)
    return (
        lambda: comm.Allreduce(contribution, result),
        lambda: spimpi.verify_allreduce(comm, contribution, result, TAG),
    )


def _gathering(comm, size) -> float:
    """Gathering a sharded tensor to compare it, over checking it in place against a fingerprint."""
    columns = 64
    rows = max(size // (4 * columns) // comm.size, 1) * comm.size
    part = TensorPartition(0, comm.size, comm.rank, rows)
    shard = _payload((part.size, columns), "float32", comm.rank)
    whole = np.empty((rows, columns), np.float32) if comm.rank == 0 else None
    comm.Gather(shard, whole)
    wanted = whole.copy() if comm.rank == 0 else None
    expected = comm.bcast(fingerprint(wanted, TAG) if comm.rank == 0 else None)

    def gather():
        comm.Gather(shard, whole)
        return comm.bcast(np.array_equal(whole, wanted) if comm.rank == 0 else None)

    def check():
        return reduce_fingerprints(comm, fingerprint(shard, TAG, part)) == expected

    gathering, checking = _times(comm, gather, check, size)
    return round(gathering / checking, 2)


def _ratio(comm, moved, collective, check) -> str:
    """check / collective, here and over networks on which a ring moves ``moved`` bytes a rank."""
    alone, checked = _times(comm, collective, check, moved)
    text = f"{checked / alone:.2f} ({1e6 * checked:.0f} of {1e6 * alone:.0f} us)"
    share = (comm.size - 1) / comm.size * moved * 8e-9
    over = [f"{checked / (share / speed):.2f} at {speed} Gb/s" for speed in GIGABITS]
    return f"{text}; computed {', '.join(over)}"


def _times(comm, first, second, size) -> tuple[float, float]:
    """Median seconds of each, in turn, the slowest rank's."""
    rounds = 200 if size < 1 << 18 else 20 if size < 1 << 25 else 7
    seconds = np.empty((rounds, 2))
    for i in range(rounds):
        for j, work in enumerate((first, second)):
            comm.Barrier()
            start = perf_counter()
            work()
            seconds[i, j] = perf_counter() - start
    comm.Allreduce(MPI.IN_PLACE, seconds, op=MPI.MAX)
    return tuple(np.median(seconds[1:], axis=0))
