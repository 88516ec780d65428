"""What each collective of MPI gives and gets, described to its check.

A function takes a communicator for its ranks and the arguments of the call, before the call, so
that what it overwrites can be copied. It returns what looks at the buffers after it: of data that
are moved (rule, established, n_loose, build(check)); of a sum the kind of sum, and look(), which gives
contribution, result and partition. An error is kept until then, for all ranks to raise: raised here
it would leave the others in the collective. ``vector``: of a v-collective, whose buffers mpi4py reads
in its own way.
"""

from functools import lru_cache, partial
from itertools import accumulate

import numpy as np
from mpi4py import MPI

from spimpi.checks.buffers import Blocks, Unreadable, block_of, blocks_of
from spimpi.checks.check import Rule
from spimpi.checks.ring import LONGEST
from spimpi.errors import SpimpiError, UsageError
from spimpi.partition import Slab, TensorPartition
from spimpi.trace.schema import Established

MOVED, AGREED = Established.MOVED, Established.AGREED


def allgather(comm, sendbuf, recvbuf, vector=False):
    """Of MPI_Allgather and MPI_Allgatherv."""
    own = _own(comm, sendbuf, recvbuf, vector)

    def build(c):
        blocks = blocks_of(recvbuf, comm.size, vector=vector)
        *starts, total = accumulate(blocks.counts, initial=0)
        joined = blocks.joined()
        if joined is not None:
            c.gets(joined, None)
        else:
            for part, start in zip(blocks.parts(), starts):
                c.gets(part, Slab((total,), (start,)))
        c.layout = blocks.counts
        c.gives(_value(own), Slab((total,), (starts[comm.rank],)))

    return Rule.ASSEMBLED, MOVED | AGREED, 0, build


def broadcast(comm, buf, root):
    """Of MPI_Bcast."""

    def build(c):
        c.root = root
        c.gets(block_of(buf), None)
        if comm.rank == root:
            c.given, c.n_given, c.contributed = c.got, c.n_got, c.held

    return Rule.ASSEMBLED, MOVED | AGREED, 0, build


def gather(comm, sendbuf, recvbuf, root, vector=False):
    """Of MPI_Gather and MPI_Gatherv."""
    own = _own(comm, sendbuf, recvbuf, vector)

    def build(c):
        c.root = root
        c.gives(_value(own)[None], _rows(comm.size)[comm.rank])
        if comm.rank == root:
            blocks = blocks_of(recvbuf, comm.size, vector=vector)
            _take(c.gets, c.held, blocks, _rows(comm.size))

    return Rule.MOVED, MOVED, 1, build


def scatter(comm, sendbuf, recvbuf, root, vector=False):
    """Of MPI_Scatter and MPI_Scatterv."""

    def build(c):
        c.root = root
        own = None
        if comm.rank == root:
            blocks = blocks_of(sendbuf, comm.size, vector=vector)
            _take(c.gives, c.contributed, blocks, _rows(comm.size))
            own = c.contributed[root][0]
        if not (comm.rank == root and _in_place(recvbuf)):  # else the root keeps its part where it is
            own = block_of(recvbuf)[None]
        c.gets(own, _rows(comm.size)[comm.rank])

    return Rule.MOVED, MOVED, 1, build


def alltoall(comm, sendbuf, recvbuf, vector=False):
    """Of MPI_Alltoall and MPI_Alltoallv."""
    sent = _kept(sendbuf, recvbuf, comm.size, vector)
    sends, receives = _crossing(comm.size, comm.rank)

    def build(c):
        _take(c.gives, c.contributed, _value(sent), sends)
        _take(c.gets, c.held, blocks_of(recvbuf, comm.size, vector=vector), receives)

    return Rule.MOVED, MOVED, 2, build


allgatherv, gatherv = partial(allgather, vector=True), partial(gather, vector=True)
scatterv, alltoallv = partial(scatter, vector=True), partial(alltoall, vector=True)


def _take(take, taken, blocks: Blocks, slabs) -> None:
    """Give or get the blocks of all ranks: in one piece where they are alike and adjoin, which
    costs the less the more ranks there are. A failure looks at the blocks all the same."""
    lead = slabs[-1].offset[:-1]  # only the axis that tells these blocks apart counts from 0 to it
    parts = [part.reshape(*(1 for _ in lead), -1) for part in blocks.parts()]
    joined = blocks.joined()
    if joined is None or len({part.size for part in parts}) > 1:
        for part, slab in zip(parts, slabs):
            take(part, slab)
        return
    spread = [1 + b - a for a, b in zip(slabs[0].offset, lead)]
    take(joined.reshape(*spread, parts[0].size), slabs[0])
    taken[-1:] = zip(parts, slabs)


@lru_cache(maxsize=64)
def _rows(size) -> tuple[Slab, ...]:
    """The places of ranks' blocks of unknown length in [ranks, LONGEST]."""
    return tuple(Slab((size, LONGEST), (rank, 0)) for rank in range(size))


@lru_cache(maxsize=64)
def _crossing(size, rank) -> tuple[tuple[Slab, ...], tuple[Slab, ...]]:
    """The places of what a rank sends to each, and gets from each, in [from, to, LONGEST]."""
    shape = size, size, LONGEST
    sends = tuple(Slab(shape, (rank, r, 0)) for r in range(size))
    return sends, tuple(Slab(shape, (r, rank, 0)) for r in range(size))


# Sums. A reduction to one rank is a reduce-scatter in which that rank's shard is the whole.


def allreduce(comm, sendbuf, recvbuf, op):
    """Of MPI_Allreduce."""
    sent = _kept(sendbuf, recvbuf)

    def look():
        return _array(sent), _array(_or_error(lambda: block_of(recvbuf))), None

    return "allreduce", look


def reduce(comm, sendbuf, recvbuf, op, root):
    """Of MPI_Reduce."""
    sent = _kept(sendbuf, recvbuf)

    def result(own, part):
        return block_of(recvbuf) if comm.rank == root else own[:0]

    def counts(own):
        return [own.size * (r == root) for r in range(comm.size)]

    return _scattered(comm, sent, result, counts)


def reduce_scatter(comm, sendbuf, recvbuf, recvcounts, op):
    """Of MPI_Reduce_scatter."""
    sent = _kept(sendbuf, recvbuf)
    if recvcounts is None:  # mpi4py asks all ranks too
        size = getattr(_or_error(lambda: block_of(recvbuf)), "size", 0)
        recvcounts = comm.allgather(size)

    def result(own, part):
        whole = block_of(recvbuf)
        # In place the result is the first elements of what was the whole contribution.
        return whole[: part and part.sizes[comm.rank]] if _in_place(sendbuf) else whole

    return _scattered(comm, sent, result, lambda own: recvcounts)


def reduce_scatter_block(comm, sendbuf, recvbuf, op):
    """Of MPI_Reduce_scatter_block. The contribution is a block for each rank."""
    sent = _kept(sendbuf, recvbuf, comm.size)

    def result(own, part):
        if _in_place(sendbuf):
            return blocks_of(recvbuf, comm.size).parts()[0]
        return block_of(recvbuf)

    return _scattered(comm, sent, result, lambda own: [own.size // comm.size] * comm.size)


def _scattered(comm, sent, result, counts):
    own = _array(sent)
    part = _shard(comm, own, counts)  # a list of counts may be another after the call

    def look():
        shard = _or_error(lambda: result(own, part)) if isinstance(own, np.ndarray) else own
        shard = Unreadable(shard) if isinstance(shard, SpimpiError) else shard
        return own, shard, part

    return "reduce_scatter", look


def _shard(comm, own, counts) -> TensorPartition | None:
    """The partition of a reduce-scatter; None, for the check to refuse, where it has none."""
    try:
        sizes = tuple(int(n) for n in counts(own))
        return TensorPartition(0, comm.size, comm.rank, sum(sizes), sizes)
    except (SpimpiError, AttributeError, TypeError, ValueError):
        return None


# What was sent, before a collective can overwrite it.


def _in_place(buffer) -> bool:
    return buffer is None or buffer is MPI.IN_PLACE


def _own(comm, sendbuf, recvbuf, vector):
    if not _in_place(sendbuf):
        return _or_error(lambda: block_of(sendbuf))
    return _or_error(lambda: blocks_of(recvbuf, comm.size, vector=vector).parts()[comm.rank].copy())


def _kept(sendbuf, recvbuf, n=1, vector=False):
    """The blocks that this rank contributes; in place a copy of them."""
    if not _in_place(sendbuf):
        return _or_error(lambda: blocks_of(sendbuf, n, vector=vector))
    return _or_error(lambda: blocks_of(recvbuf, n, vector=vector).kept())


def _or_error(make):
    try:
        return make()
    except SpimpiError as error:
        return error
    except Exception as error:  # what an array of anybody's raises: here it would be one rank's
        return UsageError(f"{type(error).__name__}: {error}")


def _value(made):
    """What ``_or_error`` made, or its error raised."""
    if isinstance(made, SpimpiError):
        raise made
    return made


def _array(made):
    """The elements of blocks, which adjoin, or what raises its error when the check looks at it."""
    if isinstance(made, SpimpiError):
        return Unreadable(made)
    return made.joined() if isinstance(made, Blocks) else made
