"""Fabric preflight: the collectives that a topology uses, over its own communicators.

Payloads are made from the colour field, so that the fingerprint of every result, sums included,
is known from its shape alone before anything is sent. Results are 8 bytes to 8 MB a rank: wrong
transfers are known to depend on size (docs/what-pass-means.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from mpi4py import MPI

from spimpi.fingerprint import colours, linear_flat, xor_flat
from spimpi.fingerprint.tag import CONTENT, LINEAR, Tag
from spimpi.partition import balanced_sizes
from spimpi.reduction import blocks
from spimpi.trace.schema import Established, Op, Stage

# Elements of 8 bytes in a result: 8 B, 1 KiB, 64 KiB, 1 MiB, 8 MiB a rank.
SIZES = (1, 128, 8192, 131072, 1048576)
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Probe:
    """One collective over one communicator: its name in the trace, where it belongs, its check."""

    name: str
    op: Op
    established: Established
    comm: object
    run: Callable


def tensor_names() -> list[str]:
    """Names of the fabric's payloads in the trace's table of tensors."""
    return [f"fabric.{axis}.{kind}" for axis in ("tensor", "pipeline", "data", "world")
            for kind in ("sum", "max", "bor", "bxor", "allgather", "broadcast", "handoff")]  # fmt: skip


def probes(ctx) -> list[Probe]:
    """The collectives that the run will use, those over a single rank left out."""
    moved, computed = Established.MOVED, Established.MOVED | Established.COMPUTED
    chosen = []
    if ctx.tensor.size > 1:
        chosen += [
            Probe("fabric.tensor.sum", Op.ALLREDUCE_SUM, computed, ctx.tensor, _sum),
            Probe("fabric.tensor.max", Op.ALLREDUCE_MAX, computed, ctx.tensor, _max),
            Probe("fabric.tensor.bor", Op.ALLREDUCE_BOR, computed, ctx.tensor, _bor),
            Probe("fabric.tensor.allgather", Op.ALLGATHER, moved, ctx.tensor, _allgather),
        ]
    if ctx.pipeline.size > 1:
        chosen.append(
            Probe("fabric.pipeline.handoff", Op.HANDOFF, moved, ctx.pipeline, _ring),
        )
    if ctx.data.size > 1:
        chosen.append(Probe("fabric.data.allgather", Op.ALLGATHER, moved, ctx.data, _allgather))
    if ctx.world.size > 1:
        chosen += [
            Probe("fabric.world.bxor", Op.ALLREDUCE_BXOR, computed, ctx.world, _bxor),
            Probe("fabric.world.broadcast", Op.BROADCAST, moved, ctx.world, _broadcast),
        ]
    return chosen


def check_fabric(ctx, recorder, progress=None, sizes=SIZES) -> int:
    """Run every probe at every size; returns this rank's failures. Collective over the world."""
    failures = 0
    for probe in probes(ctx):
        for step, n in enumerate(sizes):
            tag = Tag(ctx.seed, probe.name, -1, step)
            start = perf_counter()
            found, expected = probe.run(probe.comm, tag, n)
            wrong = found != expected
            failures += wrong
            recorder.one(
                probe.name, probe.op, Stage.FABRIC, probe.established, found, expected, wrong,
                t_start=start, step=step, bytes=8 * n,
            )  # fmt: skip
        if progress:
            progress(probe.name)
    return failures


def expected_events(ctx, sizes=SIZES) -> int:
    """Events that the preflight records on this rank."""
    return len(probes(ctx)) * len(sizes)


def _content(tag, words) -> int:
    return xor_flat(words, tag.key(CONTENT, words.shape, 8), 0)


def _colour_content(tag, n, first=0) -> int:
    """Content fingerprint of the colour field itself: from the shape alone."""
    return _content(tag, colours(tag, (n,), 8, first, first + n))


def _linear(tag, words) -> int:
    return linear_flat(words, tag.key(LINEAR, words.shape, 8), 0)


def _sum(comm, tag, n):
    """Rank t sends (t + 1)·colour: the sum is colour·P(P + 1)/2, mod 2^64."""
    field = colours(tag, (n,), 8, 0, n)
    expected = _linear(tag, field) * (comm.size * (comm.size + 1) // 2) & MASK
    result = np.empty(n, np.int64)
    comm.Allreduce((field * np.uint64(comm.rank + 1)).view(np.int64), result, op=MPI.SUM)
    return _linear(tag, result.view(np.uint64)), expected


def _masks(field, rank, size):
    """Which elements rank owns: element i belongs to rank colour(i) mod P."""
    return field % np.uint64(size) == np.uint64(rank)


def _max(comm, tag, n):
    """Each element's colour comes from one rank, smaller numbers from the others.

    63 bits of it, as the run's own maxima have: Open MPI 4.1.4 compares MPI_UNSIGNED_LONG, which
    numpy's uint64 becomes, as if it were signed (MPI_MAX of words with the top bit set is wrong).
    """
    field = colours(tag, (n,), 8, 0, n) >> np.uint64(1)
    expected = _content(tag, field)
    own = np.where(_masks(field, comm.rank, comm.size), field, field >> np.uint64(1))
    result = np.empty(n, np.uint64)
    comm.Allreduce(own, result, op=MPI.MAX)
    return _content(tag, result), expected


def _bor(comm, tag, n):
    """Each element's colour comes from one rank, zeros from the others."""
    field = colours(tag, (n,), 8, 0, n)
    expected = _content(tag, field)
    own = np.where(_masks(field, comm.rank, comm.size), field, np.uint64(0))
    result = np.empty(n, np.uint64)
    comm.Allreduce(own, result, op=MPI.BOR)
    return _content(tag, result), expected


def _bxor(comm, tag, n):
    """Rank 0 sends what XORs with everybody's colours to the first colour field."""
    field = colours(tag, (n,), 8, 0, n)
    expected = _content(tag, field)
    own = field * np.uint64(2 * comm.rank + 1)
    if comm.rank == 0:
        for rank in range(1, comm.size):
            own ^= field * np.uint64(2 * rank + 1)
    result = np.empty(n, np.uint64)
    comm.Allreduce(own, result, op=MPI.BXOR)
    return _content(tag, result), expected


def _allgather(comm, tag, n):
    """Balanced blocks of the colour field, gathered."""
    sizes = balanced_sizes(n, comm.size)
    start = sum(sizes[: comm.rank])
    own = colours(tag, (n,), 8, start, start + sizes[comm.rank])
    result = np.empty(n, np.uint64)
    comm.Allgatherv(own, blocks(result, sizes))
    return _content(tag, result), _colour_content(tag, n)


def _broadcast(comm, tag, n):
    result = colours(tag, (n,), 8, 0, n) if comm.rank == 0 else np.zeros(n, np.uint64)
    comm.Bcast(result, root=0)
    return _content(tag, result), _colour_content(tag, n)


def _ring(comm, tag, n):
    """Every rank hands its own colours to the next; the last closes the ring."""
    total = n * comm.size
    before = (comm.rank - 1) % comm.size
    own = colours(tag, (total,), 8, comm.rank * n, (comm.rank + 1) * n)
    result = np.empty(n, np.uint64)
    requests = [
        comm.Irecv(result, before, 3),
        comm.Isend(own, (comm.rank + 1) % comm.size, 3),
    ]
    MPI.Request.Waitall(requests)
    expected = _content(tag, colours(tag, (total,), 8, before * n, (before + 1) * n))
    return _content(tag, result), expected
