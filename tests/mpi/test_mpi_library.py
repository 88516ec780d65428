"""The library's checks in one program, at whatever number of ranks it is started on.

``mpiexec -n 64 python -m mpi4py tests/mpi/test_mpi_library.py`` runs the same and says how long
each step took.
"""

import sys
import time

import numpy as np
import pytest
from mpi4py import MPI

import spimpi
from spimpi import Tag, TensorPartition, launch

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
COLUMNS = 16


def rows_of(rank):
    """Uneven blocks, one of them empty where there are more than two ranks."""
    return (rank + 1) % 3


def block_of(rank):
    return np.arange(rows_of(rank) * COLUMNS, dtype=np.float32).reshape(-1, COLUMNS) + 1000 * rank


def allgather_by_function(comm, fault=None):
    sizes = tuple(map(rows_of, range(comm.size)))
    part = TensorPartition(0, comm.size, comm.rank, sum(sizes), sizes)
    whole = np.concatenate([block_of(r) for r in range(comm.size)])
    if fault is not None:
        fault(whole)
    own, tag = block_of(comm.rank), Tag(name="hidden")
    return spimpi.verify_allgather(comm, own, whole, part, tag, check=False)


def allreduce_by_function(comm):
    total = np.empty(64)
    own = np.random.default_rng(comm.rank).standard_normal(64)
    comm.Allreduce(own, total)
    return spimpi.verify_allreduce(comm, own, total, Tag(name="sum"))


def alltoall_by_function(comm):
    size, rank = comm.size, comm.rank
    whole = np.arange(size * size * 2.0).reshape(size, 2 * size)
    before = TensorPartition(0, size, rank, size)
    after = TensorPartition(1, size, rank, 2 * size)
    received = whole[:, 2 * rank : 2 * rank + 2].copy()
    own, tag = whole[rank : rank + 1], Tag(name="cut")
    return spimpi.verify_alltoall(comm, own, received, before, after, tag)


def ring_by_function(comm):
    return spimpi.verify_ring(
        comm, block_of(comm.rank), block_of((comm.rank - 1) % comm.size), Tag(name="ring")
    )


def replicas_by_function(comm):
    return spimpi.verify_replicas(comm, block_of(2), Tag(name="norm"))


def blocking_calls(comm):
    world, size, rank = spimpi.checked(comm), comm.size, comm.rank
    own, out = np.full(4, 1.0 + rank), np.empty(4 * size)
    verdicts = []
    for call in (
        lambda: world.Allgather(own, out),
        lambda: world.Allreduce(own, out[:4]),
        lambda: world.Reduce(own, out[:4], root=size - 1),
        lambda: world.Alltoall(np.arange(2.0 * size), out[: 2 * size]),
        lambda: world.Bcast(out, size - 1),
        lambda: world.Gather(own, out, size - 1),
        lambda: world.Scatter(out, own, size - 1),
        lambda: world.Sendrecv(own, (rank + 1) % size, 1, out[:4], (rank - 1) % size, 1),
    ):
        call()
        verdicts.append(world.verdict)
    return all(verdicts)


def requests(comm):
    world, size, rank = spimpi.checked(comm), comm.size, comm.rank
    own, box = np.full(4, 1.0 + rank), np.empty(4)
    started = [
        world.Iallgather(own, np.empty(4 * size)),
        world.Irecv(box, (rank - 1) % size, 1),
        world.Iallreduce(own, np.empty(4)),
        world.Isend(own, (rank + 1) % size, 1),
        world.Igather(own, np.empty(4 * size), 0),
    ]
    order = np.random.default_rng(rank).permutation(len(started))
    return spimpi.CheckedRequest.Waitall([started[i] for i in order])


def fault_is_localised(comm):
    """One bit of one element on the last rank; every rank names the same."""
    last = comm.size - 1

    def flip(whole):
        if comm.rank == last:
            whole.view(np.uint32)[0, 3] ^= 1 << 20

    verdict = allgather_by_function(comm, flip)
    elements = verdict.where.elements
    found = [(e.rank, e.index, e.bits) for e in elements]
    alike = len(set(comm.allgather(str(verdict)))) == 1
    one = verdict.where.rank == last or comm.size == 1
    return not verdict and found == [(last, (0, 3), (20,))] and alike and one


def error_is_everybodys(comm):
    """The last rank gives an object array."""
    x = np.array([None]) if comm.rank == comm.size - 1 else np.ones(1)
    try:
        spimpi.verify_replicas(comm, x, Tag(name="bad"))
    except spimpi.UsageError as error:
        return len(set(comm.allgather(str(error)))) == 1
    return False


STEPS = [
    allgather_by_function, allreduce_by_function, alltoall_by_function, ring_by_function,
    replicas_by_function, blocking_calls, requests, fault_is_localised, error_is_everybodys,
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_the_library_works_at_this_number_of_ranks(comm, step):
    assert step(comm)


def test_a_world_of_one_under_a_launcher_of_three_is_refused(comm, monkeypatch):
    """In a world of three a check on COMM_SELF is what it is."""
    world, alone = MPI.COMM_WORLD.size, MPI.COMM_SELF.Dup()
    monkeypatch.setattr(launch, "launch", lambda: launch.Launch("srun", 0, 3, None, None))
    calls = [
        lambda: spimpi.verify_replicas(alone, np.ones(2), Tag(name="x")),
        lambda: spimpi.checked(alone),
        lambda: spimpi.DistributedContext(alone).free(),
        lambda: spimpi.exact_allreduce(alone, np.ones(2), tag=Tag(name="x")),
    ]
    for call in calls:
        monkeypatch.setattr(launch, "_not_torn_apart", False)
        if world == 1:
            with pytest.raises(spimpi.UsageError, match="srun started 3 ranks, but .* has 1"):
                call()
            monkeypatch.setenv("SPIMPI_ALONE", "1")
        call()
        assert launch._not_torn_apart
        monkeypatch.delenv("SPIMPI_ALONE", raising=False)
    alone.Free()


def main():
    comm = MPI.COMM_WORLD
    for step in STEPS * 2:  # the second time without what is made at the first
        comm.Barrier()
        start = time.perf_counter()
        held = bool(step(comm))
        seconds = comm.reduce(time.perf_counter() - start, MPI.MAX)
        all_held = comm.allreduce(held, MPI.LAND)
        if comm.rank == 0:
            print(f"{step.__name__:24} {'ok' if all_held else 'FAILED':7} {1e3 * seconds:9.1f} ms")
        if not all_held:
            sys.exit(1)


if __name__ == "__main__":
    main()
