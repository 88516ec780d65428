"""What each collective of MPI gives and gets, described to its check.

A function takes a communicator for its ranks and the arguments of the call, before the call, so
that what it overwrites can be copied. It returns what looks at the buffers after it: of data that
are moved (rule, established, n_loose, build(check)); of a sum build(), which gives the kind of sum,
contribution, result and partition. An error is kept until then, for all ranks to raise: raised here
it would leave the others in the collective.
"""

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
        slabs = [Slab((sum(counts),), (sum(counts[:r]),)) for r in range(len(counts))]
        joined = message.joined(len(counts))
        if joined is not None:
            c.gets(joined, None)
        else:
            for part, slab in zip(message.parts(len(counts)), slabs):
                c.gets(part, slab)
        c.layout = tuple(counts)
        c.gives(_value(own), slabs[comm.rank])

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
        c.gives(*_row(comm, _value(own), comm.rank))
        if comm.rank == root:
            for r, part in enumerate(message_of(recvbuf).parts(comm.size)):
                c.gets(*_row(comm, part, r))

    return Rule.MOVED, MOVED, 1, build


def scatter(comm, sendbuf, recvbuf, root):
    """Of MPI_Scatter and MPI_Scatterv."""

    def build(c):
        c.root = root
        parts = None
        if comm.rank == root:
            parts = message_of(sendbuf).parts(comm.size)
            for r, part in enumerate(parts):
                c.gives(*_row(comm, part, r))
        if recvbuf is MPI.IN_PLACE:  # the root keeps its part where it is
            c.gets(*_row(comm, parts[comm.rank], comm.rank))
        else:
            c.gets(*_row(comm, message_of(recvbuf).whole(), comm.rank))

    return Rule.MOVED, MOVED, 1, build


def alltoall(comm, sendbuf, recvbuf):
    """Of MPI_Alltoall and MPI_Alltoallv."""
    sent = _kept(sendbuf, recvbuf)
    size, rank = comm.size, comm.rank

    def block(part, source, target):
        return part[None, None], Slab((size, size, LONGEST), (source, target, 0))

    def build(c):
        for r, part in enumerate(_value(sent).parts(size)):
            c.gives(*block(part, rank, r))
        for r, part in enumerate(message_of(recvbuf).parts(size)):
            c.gets(*block(part, r, rank))

    return Rule.MOVED, MOVED, 2, build


def _row(comm, part, rank):
    return part[None], Slab((comm.size, LONGEST), (rank, 0))


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
