"""Fabric preflight: the collectives that a topology uses, over its own communicators.

Payloads are made from the colour field, so that the fingerprint of every result, sums included,
is known from its shape alone before anything is sent. Results are 8 bytes to 8 MB a rank: wrong
transfers are known to depend on size (docs/what-pass-means.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
from mpi4py import MPI

from spimpi.fingerprint import fill_colours, linear_flat, xor_flat
from spimpi.fingerprint.tag import COLOUR, CONTENT, LINEAR, MASK, Tag
from spimpi.launch import wait_asleep
from spimpi.partition import balanced_sizes
from spimpi.reduction import RECORD, blocks
from spimpi.trace.schema import Established, Op, Stage

# Elements of 8 bytes in a result: 8 B, 1 KiB, 64 KiB, 1 MiB, 8 MiB a rank.
SIZES = (1, 128, 8192, 131072, 1048576)
RECORD_SIZES = 3  # the first so many: a run's records are a few KiB, and merged by numpy
WORDS = len(RECORD.names)
RING = 3  # message tag
POISON = 0x5A5A5A5A5A5A5A5A  # what a receive buffer holds before: nothing that could pass


@dataclass(frozen=True)
class Probe:
    """One collective over one communicator: its name in the trace, where it belongs, its check."""

    name: str
    op: Op
    established: Established
    comm: object
    run: Callable
    n_sizes: int = len(SIZES)


def tensor_names() -> list[str]:
    """Names of the fabric's payloads in the trace's table of tensors."""
    return [f"fabric.{axis}.{kind}" for axis in ("tensor", "sequence", "pipeline", "data", "replica", "world")
            for kind in ("sum", "max", "bor", "bxor", "records", "allgather", "broadcast",
                         "handoff")]  # fmt: skip


def probes(ctx) -> list[Probe]:
    """The collectives that the run will use, those over a single rank left out."""
    moved, computed = Established.MOVED, Established.MOVED | Established.COMPUTED
    chosen = []

    def record_probe(axis, comm):
        run = partial(_records, ctx.records)
        return Probe(
            f"fabric.{axis}.records", Op.ALLREDUCE_BXOR, computed, comm, run, RECORD_SIZES
        )

    if ctx.tensor.size > 1:
        chosen += [
            Probe("fabric.tensor.sum", Op.ALLREDUCE_SUM, computed, ctx.tensor, _sum),
            Probe("fabric.tensor.max", Op.ALLREDUCE_MAX, computed, ctx.tensor, _max),
            Probe("fabric.tensor.bor", Op.ALLREDUCE_BOR, computed, ctx.tensor, _bor),
            Probe("fabric.tensor.allgather", Op.ALLGATHER, moved, ctx.tensor, _allgather),
            record_probe("tensor", ctx.tensor),
        ]
    if ctx.sequence.size > 1:
        chosen += [
            Probe("fabric.sequence.allgather", Op.ALLGATHER, moved, ctx.sequence, _allgather),
            record_probe("sequence", ctx.sequence),
        ]
    if ctx.pipeline.size > 1:
        chosen.append(
            Probe("fabric.pipeline.handoff", Op.HANDOFF, moved, ctx.pipeline, _ring),
        )
    if ctx.data.size > 1:
        chosen += [
            Probe("fabric.data.allgather", Op.ALLGATHER, moved, ctx.data, _allgather),
            record_probe("data", ctx.data),
        ]
    if ctx.world.size > ctx.replica.size > 1:
        chosen.append(
            Probe("fabric.replica.bxor", Op.ALLREDUCE_BXOR, computed, ctx.replica, _bxor)
        )
    if ctx.world.size > 1:
        chosen += [
            record_probe("world", ctx.world),
            Probe("fabric.world.bxor", Op.ALLREDUCE_BXOR, computed, ctx.world, _bxor),
            Probe("fabric.world.broadcast", Op.BROADCAST, moved, ctx.world, _broadcast),
        ]
    return chosen


def check_fabric(ctx, recorder, progress=None, sizes=SIZES) -> int:
    """Run every probe at every size; returns this rank's failures. Collective over the world."""
    failures = 0
    wait_asleep(ctx.world.Ibarrier())  # who is here first would take the core from who loads
    room = np.empty((2, max(sizes)), np.uint64)
    for probe in probes(ctx):
        for step, n in enumerate(sizes[: probe.n_sizes]):
            tag = Tag(ctx.seed, probe.name, -1, step)
            start = perf_counter()
            found, expected = probe.run(probe.comm, tag, room[0, :n], room[1, :n])
            wrong = found != expected
            failures += wrong
            recorder.one(
                probe.name, probe.op, Stage.FABRIC, probe.established, found, expected, wrong,
                t_start=start, step=step, bytes=8 * n,
            )  # fmt: skip
        if progress:
            progress(probe.name)
    return failures


# A probe fills ``send``, runs its collective into ``result``, and returns the fingerprint found and
# the one that was known. Both are uint64 [n]; element i of the whole payload is colour(i).


def _colours(tag, n, out, first=0):
    fill_colours(out, tag.key(COLOUR, (n,), 8), first)
    return out


def _content(tag, words) -> int:
    return xor_flat(words, tag.key(CONTENT, words.shape, 8), 0)


def _linear(tag, words) -> int:
    return linear_flat(words, tag.key(LINEAR, words.shape, 8), 0)


def _block(comm, n) -> slice:
    """The elements that this rank contributes."""
    sizes = balanced_sizes(n, comm.size)
    start = sum(sizes[: comm.rank])
    return slice(start, start + sizes[comm.rank])


def _sum(comm, tag, send, result):
    """Rank t sends (t + 1)·colour: the sum is colour·P(P + 1)/2, mod 2^64."""
    _colours(tag, send.size, send)
    expected = _linear(tag, send) * (comm.size * (comm.size + 1) // 2) & MASK
    np.multiply(send, np.uint64(comm.rank + 1), out=send)
    result[:] = POISON
    comm.Allreduce(send.view(np.int64), result.view(np.int64), op=MPI.SUM)
    return _linear(tag, result), expected


def _assembled(comm, tag, send, result, op, shift):
    """Each element's colour comes from the one rank that owns it, zeros from the others."""
    own = _block(comm, send.size)
    _colours(tag, send.size, send)
    send >>= np.uint64(shift)
    expected = _content(tag, send)
    send[: own.start] = send[own.stop :] = 0
    result[:] = POISON
    comm.Allreduce(send, result, op=op)
    return _content(tag, result), expected


def _max(comm, tag, send, result):
    """63 bits of the colours, as the run's own maxima have: Open MPI 4.1.4 compares
    MPI_UNSIGNED_LONG, which numpy's uint64 becomes, as if it were signed."""
    return _assembled(comm, tag, send, result, MPI.MAX, 1)


def _bor(comm, tag, send, result):
    return _assembled(comm, tag, send, result, MPI.BOR, 0)


def _bxor(comm, tag, send, result):
    return _assembled(comm, tag, send, result, MPI.BXOR, 0)


def _records(reduction, comm, tag, send, result):
    """The custom operation on whole records: each word of a record by its own rule.

    Every rank sends the colours, but the summed words of rank t are (t + 1) times theirs and its
    places are not below rank 0's; so the result is the colours where that leaves them be.
    """
    n = max(send.size // WORDS, 1)
    own, merged = np.zeros((2, n), RECORD)
    field = np.empty(n * WORDS, np.uint64)
    colour = _colours(tag, n * WORDS, field).reshape(n, WORDS)
    sums = comm.size * (comm.size + 1) // 2
    expected = colour.copy()
    expected[:, 0] = colour[:, 0] if comm.size % 2 else 0
    expected[:, 1] = colour[:, 1] * np.uint64(sums)
    expected[:, 4] = colour[:, 4] * np.uint64(sums)
    words = own.view(np.uint64).reshape(n, WORDS)
    words[:] = colour
    words[:, [1, 4]] *= np.uint64(comm.rank + 1)
    words[:, 5] |= np.uint64(0xFF if comm.rank else 0)
    merged.view(np.uint64)[:] = POISON
    reduction.start(comm, own, merged).Wait()
    return _content(tag, merged.view(np.uint64)), _content(tag, expected.ravel())


def _allgather(comm, tag, send, result):
    """Balanced blocks of the colour field, gathered."""
    n = result.size
    expected = _content(tag, _colours(tag, n, result))
    own = _block(comm, n)
    block = send[: own.stop - own.start]
    _colours(tag, n, block, own.start)
    result[:] = POISON
    comm.Allgatherv(block, blocks(result, balanced_sizes(n, comm.size)))
    return _content(tag, result), expected


def _broadcast(comm, tag, send, result):
    expected = _content(tag, _colours(tag, send.size, send))
    result[:] = send if comm.rank == 0 else POISON
    comm.Bcast(result, root=0)
    return _content(tag, result), expected


def _ring(comm, tag, send, result):
    """Every rank hands its own colours to the next; the last closes the ring."""
    n, before = send.size, (comm.rank - 1) % comm.size
    total = n * comm.size
    expected = _content(tag, _colours(tag, total, send, before * n))
    _colours(tag, total, send, comm.rank * n)
    result[:] = POISON
    receive = comm.Irecv(result, before, RING)
    comm.Send(send, (comm.rank + 1) % comm.size, RING)
    receive.Wait()
    return _content(tag, result), expected
