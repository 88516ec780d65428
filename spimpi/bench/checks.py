"""What a check costs beside the collective that it checks, and beside gathering to compare.

Sizes are bytes of the result on each rank. Collective and check run in turn; figures are medians
over the rounds of the slowest rank. Over a network the collective alone gets slower: what the
same check would be there is computed from the bytes that a ring moves. "Reading" is the least that
a check of all bytes can take: after another collective, contribution and result are read once, with
next to no arithmetic. On more than four ranks gathering alone is measured, on the first 2, 4, 8, ...
"""

from time import perf_counter, sleep

import numpy as np
from mpi4py import MPI

import spimpi
from spimpi.bench.fingerprint import read
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import Tag
from spimpi.partition import TensorPartition
from spimpi.reduction import reduce_fingerprints

SIZES = tuple(1 << n for n in (12, 16, 20, 23, 26))
MOST_RANKS = 4  # with more, a rank's part of two cores is too small to time every collective
CURVE_SIZES = SIZES[2:]
NAP = 0.05
DTYPES = ("float64", "float32", "uint16", "uint8")  # 16-bit floats are 2-byte items
GIGABITS = (100, 400)
TAG = Tag(name="hidden", layer=0, step=0)


def measure(comm) -> dict:
    """Allgather and allreduce with their checks, and a gather that compares. Collective."""
    if comm.size > MOST_RANKS:
        return _curve(comm)
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


def _curve(comm) -> dict:
    """Gathering against checking on the first 2, 4, 8, ... ranks, while the others sleep."""
    figures = {"ranks": comm.size}
    n = 2
    while n <= comm.size:
        part = comm.Split(0 if comm.rank < n else MPI.UNDEFINED)
        if part != MPI.COMM_NULL:
            for size in CURVE_SIZES:
                name = f"gather and compare / check, {n} ranks, {_text(size)}, float32"
                figures[name] = _gathering(part, size)
            part.Free()
        done = comm.Ibarrier()
        while not done.Test():
            sleep(NAP)  # longer than launch.wait_asleep does: even looks disturb the others
        n *= 2
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
        _reading(local, gathered),
    )


def _allreduce(comm, size, dtype):
    n = size // np.dtype(dtype).itemsize
    contribution = _payload((max(n // 1024, 1), min(n, 1024)), dtype, comm.rank)
    result = np.empty_like(contribution)
    return (
        lambda: comm.Allreduce(contribution, result),
        lambda: spimpi.verify_allreduce(comm, contribution, result, TAG),
        _reading(contribution, result),
    )


def _reading(*arrays):
    words = [x.reshape(-1).view(np.uint64) for x in arrays]
    return lambda: [read(one) for one in words]


def _gathering(comm, size) -> str:
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

    def reduce():
        return reduce_fingerprints(comm, 0)

    gathering, checking, reducing = _times(comm, size, gather, check, reduce)
    return (
        f"{gathering / checking:.2f} ({1e6 * gathering:.0f} of {1e6 * checking:.0f} us, of which "
        f"the reduction of 8 bytes takes {1e6 * reducing:.0f})"
    )


def _ratio(comm, moved, collective, check, reading) -> str:
    """check / collective, here and over networks on which a ring moves ``moved`` bytes a rank."""
    alone, checked, _, bare = _times(comm, moved, collective, check, collective, reading)
    text = f"{checked / alone:.2f} ({1e6 * checked:.0f} of {1e6 * alone:.0f} us"
    text += f"; reading {bare / alone:.2f})"
    share = (comm.size - 1) / comm.size * moved * 8e-9
    over = [f"{checked / (share / speed):.2f} at {speed} Gb/s" for speed in GIGABITS]
    return f"{text}; computed {', '.join(over)}"


def _times(comm, size, *works) -> tuple[float, ...]:
    """Median seconds of each, in turn, the slowest rank's."""
    rounds = 200 if size < 1 << 18 else 40 if size < 1 << 25 else 9
    seconds = np.empty((rounds, len(works)))
    for i in range(rounds):
        for j, work in enumerate(works):
            comm.Barrier()
            start = perf_counter()
            work()
            seconds[i, j] = perf_counter() - start
    comm.Allreduce(MPI.IN_PLACE, seconds, op=MPI.MAX)
    return tuple(np.median(seconds[1:], axis=0))
