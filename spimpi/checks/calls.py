"""What each collective of MPI gives and gets, described to its check.

A function takes a communicator for its ranks and the arguments of the call, before the call, so
that what it overwrites can be copied. It returns what looks at the buffers after it: of data that
are moved (rule, established, n_loose, build(check)); of a sum build(), which gives the kind of sum,
contribution, result and partition. An error is kept until then, for all ranks to raise: raised here
it would leave the others in the collective.
"""

from functools import lru_cache
from itertools import accumulate

import numpy as np
from mpi4py import MPI

from spimpi.checks.buffers import Message, Unreadable, message_of
from spimpi.checks.check import Rule
from spimpi.checks.ring import LONGEST
from spimpi.errors import SpimpiError, UsageError
from spimpi.partition import Slab, TensorPartition
from spimpi.trace.schema import Established

MOVED, AGREED = Established.MOVED, Established.AGREED


def allgather(comm, sendbuf, recvbuf):
    """Of MPI_Allgather and MPI_Allgatherv."""
    own = _own(comm, sendbuf, recvbuf)

    def build(c):
        message = message_of(recvbuf)
        counts = message.counts_of(comm.size)
        *starts, total = accumulate(counts, initial=0)
        joined = message.joined(comm.size)
        if joined is not None:
            c.gets(joined, None)
        else:
            for part, start in zip(message.parts(comm.size), starts):
                c.gets(part, Slab((total,), (start,)))
        c.layout = tuple(counts)
        c.gives(_value(own), Slab((total,), (starts[comm.rank],)))

    return Rule.ASSEMBLED, MOVED | AGREED, 0, build


def broadcast(comm, buf, root):
    """Of MPI_Bcast."""

    def build(c):
        c.root = root
        c.gets(message_of(buf).whole(), None)
        if comm.rank == root:
            c.given, c.n_given, c.contributed = c.got, c.n_got, c.held

    return Rule.ASSEMBLED, MOVED | AGREED, 0, build


def gather(comm, sendbuf, recvbuf, root):
    """Of MPI_Gather and MPI_Gatherv."""
    own = _own(comm, sendbuf, recvbuf)

    def build(c):
        c.root = root
        c.gives(_value(own)[None], _rows(comm.size)[comm.rank])
        if comm.rank == root:
            _take(c.gets, c.held, message_of(recvbuf), _rows(comm.size))

    return Rule.MOVED, MOVED, 1, build


def scatter(comm, sendbuf, recvbuf, root):
    """Of MPI_Scatter and MPI_Scatterv."""

    def build(c):
        c.root = root
        own = None
        if comm.rank == root:
            _take(c.gives, c.contributed, message_of(sendbuf), _rows(comm.size))
            own = c.contributed[root][0]
        if recvbuf is not MPI.IN_PLACE:  # else the root keeps its part where it is
            own = message_of(recvbuf).whole()[None]
        c.gets(own, _rows(comm.size)[comm.rank])

    return Rule.MOVED, MOVED, 1, build


def alltoall(comm, sendbuf, recvbuf):
    """Of MPI_Alltoall and MPI_Alltoallv."""
    sent = _kept(sendbuf, recvbuf)
    sends, receives = _crossing(comm.size, comm.rank)

    def build(c):
        _take(c.gives, c.contributed, _value(sent), sends)
        _take(c.gets, c.held, message_of(recvbuf), receives)

    return Rule.MOVED, MOVED, 2, build


def _take(take, taken, message, slabs) -> None:
    """Give or get the blocks of all ranks: in one piece where they are alike and adjoin, which
    costs the less the more ranks there are. A failure looks at the blocks all the same."""
    size = len(slabs)
    lead = slabs[-1].offset[:-1]  # only the axis that tells these blocks apart counts from 0 to it
    parts = [part.reshape(*(1 for _ in lead), -1) for part in message.parts(size)]
    joined = message.joined(size)
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

    def build():
        return "allreduce", _array(sent), _array(_or_error(lambda: message_of(recvbuf))), None

    return build


def reduce(comm, sendbuf, recvbuf, op, root):
    """Of MPI_Reduce."""
    sent = _kept(sendbuf, recvbuf)

    def result(own):
        return message_of(recvbuf).whole() if comm.rank == root else own[:0]

    def counts(own):
        return [own.size * (r == root) for r in range(comm.size)]

    return _scattered(comm, sent, result, counts)


def reduce_scatter(comm, sendbuf, recvbuf, recvcounts, op):
    """Of MPI_Reduce_scatter."""
    sent = _kept(sendbuf, recvbuf)
    if recvcounts is None:  # mpi4py asks all ranks too
        size = getattr(_array(_or_error(lambda: message_of(recvbuf))), "size", 0)
        recvcounts = comm.allgather(size)

    def result(own):
        whole = message_of(recvbuf).whole()
        # In place the result is the first elements of what was the whole contribution.
        return whole[: recvcounts[comm.rank]] if sendbuf is MPI.IN_PLACE else whole

    return _scattered(comm, sent, result, lambda own: recvcounts)


def reduce_scatter_block(comm, sendbuf, recvbuf, op):
    """Of MPI_Reduce_scatter_block."""
    sent = _kept(sendbuf, recvbuf)

    def result(own):
        whole = message_of(recvbuf).whole()
        return whole[: own.size // comm.size] if sendbuf is MPI.IN_PLACE else whole

    return _scattered(comm, sent, result, lambda own: [own.size // comm.size] * comm.size)


def _scattered(comm, sent, result, counts):
    def build():
        own = _array(sent)
        shard = _or_error(lambda: result(own)) if isinstance(own, np.ndarray) else own
        shard = Unreadable(shard) if isinstance(shard, SpimpiError) else shard
        return "reduce_scatter", own, shard, _shard(comm, own, counts)

    return build


def _shard(comm, own, counts) -> TensorPartition | None:
    """The partition of a reduce-scatter; None, for the check to refuse, where it has none."""
    try:
        sizes = tuple(int(n) for n in counts(own))
        return TensorPartition(0, comm.size, comm.rank, sum(sizes), sizes)
    except (SpimpiError, AttributeError, TypeError, ValueError):
        return None


# What was sent, before a collective can overwrite it.


def _own(comm, sendbuf, recvbuf):
    if sendbuf is not MPI.IN_PLACE:
        return _or_error(lambda: message_of(sendbuf).whole())
    return _or_error(lambda: message_of(recvbuf).parts(comm.size)[comm.rank].copy())


def _kept(sendbuf, recvbuf):
    if sendbuf is not MPI.IN_PLACE:
        return _or_error(lambda: message_of(sendbuf))

    def copied():
        m = message_of(recvbuf)
        return Message(m.data.copy(), m.counts, m.displacements)

    return _or_error(copied)


def _or_error(make):
    try:
        return make()
    except SpimpiError as error:
        return error
    except (TypeError, ValueError) as error:
        return UsageError(f"{type(error).__name__}: {error}")


def _value(made):
    """What ``_or_error`` made, or its error raised."""
    if isinstance(made, SpimpiError):
        raise made
    return made


def _array(made):
    """The elements of a message, or what raises its error when the check looks at it."""
    return made.whole() if isinstance(made, Message) else Unreadable(made)
