"""``spimpi.checked(comm, ctx)``: a communicator whose collectives are checked after they ran.

Same signatures as mpi4py's upper-case methods. The collective itself runs on the user's
communicator, its check on a private one. docs/checks.md ("The wrapper") has what is covered.
"""

from contextlib import contextmanager

import numpy as np
from mpi4py import MPI

from spimpi.checks.buffers import Message, message_of
from spimpi.checks.check import Check, Rule
from spimpi.checks.messages import CheckedMessages
from spimpi.checks.pending import Group, PendingVerdict, built, enforce, require_comm
from spimpi.checks.requests import CheckedRequest, Queue
from spimpi.checks.ring import LONGEST
from spimpi.checks.session import request_session_of, session_of
from spimpi.errors import SpimpiError
from spimpi.fingerprint.tag import DEFAULT_SEED, Tag
from spimpi.partition import Slab, TensorPartition
from spimpi.trace.schema import Established

MOVED, AGREED = Established.MOVED, Established.AGREED


def checked(comm, ctx=None, *, check=True, threads=1) -> "CheckedComm":
    """Wrap a communicator so that its collectives are checked. Collective over ``comm``.

    ctx: a DistributedContext, whose batch then takes the checks. check=False: failures do not
    raise; ``.verdict`` has the last one.
    """
    require_comm(comm)
    return CheckedComm(comm, ctx, check, threads)


class CheckedComm(CheckedMessages):
    """A communicator and the checks of its calls. Made by ``checked``.

    What is not checked is the communicator's own. Every checked method takes ``tag=``, a
    ``spimpi.Tag``, besides mpi4py's arguments; the point-to-point ones have mpi4py's tag instead.
    ``verdict``: that of the last call.
    """

    def __init__(self, comm, ctx, check, threads):
        self.comm, self.ctx, self.check, self.threads = comm, ctx, check, threads
        self.verdict, self._given = None, comm
        self._session = session_of(comm, ctx)
        self._seed = DEFAULT_SEED if ctx is None else ctx.seed
        self._tag, self._calls = None, 0
        self._requests = request_session_of(comm)
        if self._requests.queue is None:
            self._requests.queue = Queue(self._requests)
        self._queue = self._requests.queue
        super().__init__(self._session)

    def __getattr__(self, name):
        return getattr(self.comm, name)

    @contextmanager
    def tagged(self, tag: Tag):
        """Calls inside take this tag; the second one's step is one more, and so on."""
        before = self._tag, self._calls
        self._tag, self._calls = tag, 0
        try:
            yield self
        finally:
            self._tag, self._calls = before

    def _next_tag(self, name, tag):
        if tag is not None:
            return tag
        if isinstance(self._tag, Tag):
            step = self._tag.step + self._calls
            self._calls += 1
            return Tag(self._tag.seed, self._tag.name, self._tag.layer, step)
        if self._tag is not None:
            return self._tag
        # Collectives come in the same order on all ranks, so their number names the call.
        self._session.calls += 1
        return Tag(self._seed, name, -1, self._session.calls)

    # The collectives: each runs, and is then described to its check.

    def Allgather(self, sendbuf, recvbuf, *, tag=None):
        own = self._own(sendbuf, recvbuf)
        self.comm.Allgather(sendbuf, recvbuf)
        self._run(self._gathered("Allgather", own, recvbuf, tag))

    def Allgatherv(self, sendbuf, recvbuf, *, tag=None):
        own = self._own(sendbuf, recvbuf)
        self.comm.Allgatherv(sendbuf, recvbuf)
        self._run(self._gathered("Allgatherv", own, recvbuf, tag))

    def Iallgather(self, sendbuf, recvbuf, *, tag=None) -> CheckedRequest:
        own = self._own(sendbuf, recvbuf)
        request = self.comm.Iallgather(sendbuf, recvbuf)
        return self._later(request, self._gathered("Iallgather", own, recvbuf, tag))

    def Iallgatherv(self, sendbuf, recvbuf, *, tag=None) -> CheckedRequest:
        own = self._own(sendbuf, recvbuf)
        request = self.comm.Iallgatherv(sendbuf, recvbuf)
        return self._later(request, self._gathered("Iallgatherv", own, recvbuf, tag))

    def Bcast(self, buf, root=0, *, tag=None):
        self.comm.Bcast(buf, root)
        self._run(self._broadcast("Bcast", buf, root, tag))

    def Ibcast(self, buf, root=0, *, tag=None) -> CheckedRequest:
        request = self.comm.Ibcast(buf, root)
        return self._later(request, self._broadcast("Ibcast", buf, root, tag))

    def Gather(self, sendbuf, recvbuf, root=0, *, tag=None):
        own = self._own(sendbuf, recvbuf)
        self.comm.Gather(sendbuf, recvbuf, root)
        self._run(self._to_root("Gather", own, recvbuf, root, tag))

    def Gatherv(self, sendbuf, recvbuf, root=0, *, tag=None):
        own = self._own(sendbuf, recvbuf)
        self.comm.Gatherv(sendbuf, recvbuf, root)
        self._run(self._to_root("Gatherv", own, recvbuf, root, tag))

    def Scatter(self, sendbuf, recvbuf, root=0, *, tag=None):
        self.comm.Scatter(sendbuf, recvbuf, root)
        self._run(self._from_root("Scatter", sendbuf, recvbuf, root, tag))

    def Scatterv(self, sendbuf, recvbuf, root=0, *, tag=None):
        self.comm.Scatterv(sendbuf, recvbuf, root)
        self._run(self._from_root("Scatterv", sendbuf, recvbuf, root, tag))

    def Alltoall(self, sendbuf, recvbuf, *, tag=None):
        sent = self._kept(sendbuf, recvbuf)
        self.comm.Alltoall(sendbuf, recvbuf)
        self._run(self._exchanged("Alltoall", sent, recvbuf, tag))

    def Alltoallv(self, sendbuf, recvbuf, *, tag=None):
        sent = self._kept(sendbuf, recvbuf)
        self.comm.Alltoallv(sendbuf, recvbuf)
        self._run(self._exchanged("Alltoallv", sent, recvbuf, tag))

    def Ialltoall(self, sendbuf, recvbuf, *, tag=None) -> CheckedRequest:
        sent = self._kept(sendbuf, recvbuf)
        request = self.comm.Ialltoall(sendbuf, recvbuf)
        return self._later(request, self._exchanged("Ialltoall", sent, recvbuf, tag))

    def Allreduce(self, sendbuf, recvbuf, op=MPI.SUM, *, tag=None):
        sent = self._kept(sendbuf, recvbuf)
        self.comm.Allreduce(sendbuf, recvbuf, op)
        self._summed(self._sum("Allreduce", sent, recvbuf, None, op, tag))

    def Iallreduce(self, sendbuf, recvbuf, op=MPI.SUM, *, tag=None) -> CheckedRequest:
        sent = self._kept(sendbuf, recvbuf)
        request = self.comm.Iallreduce(sendbuf, recvbuf, op)
        settle = self._sum("Iallreduce", sent, recvbuf, None, op, tag, self._requests.comm)
        return self._queue.add(request, settle=settle, raises=self.check)

    def Reduce_scatter(self, sendbuf, recvbuf, recvcounts=None, op=MPI.SUM, *, tag=None):
        sent = self._kept(sendbuf, recvbuf)
        result = recvbuf
        if sendbuf is MPI.IN_PLACE and recvcounts is not None:
            # The result is the first elements of what was the whole contribution.
            result = _or_error(lambda: message_of(recvbuf).whole()[: recvcounts[self.comm.rank]])
        counts = "own" if recvcounts is None else recvcounts
        self.comm.Reduce_scatter(sendbuf, recvbuf, recvcounts, op)
        self._summed(self._sum("Reduce_scatter", sent, result, counts, op, tag))

    def Reduce_scatter_block(self, sendbuf, recvbuf, op=MPI.SUM, *, tag=None):
        sent = self._kept(sendbuf, recvbuf)
        result = recvbuf
        if sendbuf is MPI.IN_PLACE:
            result = _or_error(lambda: np.split(message_of(recvbuf).whole(), self.comm.size)[0])
        self.comm.Reduce_scatter_block(sendbuf, recvbuf, op)
        self._summed(self._sum("Reduce_scatter_block", sent, result, "block", op, tag))

    # What was sent, before a collective can overwrite it. An error waits for the check, which
    # raises it on all ranks: raised here it would leave the others in the collective.

    def _own(self, sendbuf, recvbuf):
        if sendbuf is not MPI.IN_PLACE:
            return _or_error(lambda: message_of(sendbuf).whole())
        return _or_error(lambda: message_of(recvbuf).parts(self.comm.size)[self.comm.rank].copy())

    def _kept(self, sendbuf, recvbuf):
        if sendbuf is not MPI.IN_PLACE:
            return _or_error(lambda: message_of(sendbuf))

        def copied():
            m = message_of(recvbuf)
            return Message(m.data.copy(), m.counts, m.displacements)

        return _or_error(copied)

    # How each kind of collective is described to its check.

    def _start(self, name, rule, established, tag, n_loose=0) -> Check:
        return Check(
            name, self._next_tag(name, tag), rule, established, self.threads, n_loose=n_loose,
            tracer=self.ctx and self.ctx.tracer,
        )  # fmt: skip

    def _gathered(self, name, own, recvbuf, tag):
        c = self._start(name, Rule.ASSEMBLED, MOVED | AGREED, tag)

        def build(c):
            message = message_of(recvbuf)
            counts = message.counts_of(self.comm.size)
            slabs = [Slab((sum(counts),), (sum(counts[:r]),)) for r in range(len(counts))]
            joined = message.joined(len(counts))
            if joined is not None:
                c.gets(joined, None)
            else:
                for part, slab in zip(message.parts(len(counts)), slabs):
                    c.gets(part, slab)
            c.layout = tuple(counts)
            c.gives(_value(own), slabs[self.comm.rank])

        return c, build

    def _broadcast(self, name, buf, root, tag):
        c = self._start(name, Rule.ASSEMBLED, MOVED | AGREED, tag)

        def build(c):
            c.root = root
            c.gets(message_of(buf).whole(), None)
            if self.comm.rank == root:
                c.given, c.n_given, c.contributed = c.got, c.n_got, c.held

        return c, build

    def _to_root(self, name, own, recvbuf, root, tag):
        c = self._start(name, Rule.MOVED, MOVED, tag, n_loose=1)

        def build(c):
            c.root = root
            c.gives(*self._row(_value(own), self.comm.rank))
            if self.comm.rank == root:
                for r, part in enumerate(message_of(recvbuf).parts(self.comm.size)):
                    c.gets(*self._row(part, r))

        return c, build

    def _from_root(self, name, sendbuf, recvbuf, root, tag):
        c = self._start(name, Rule.MOVED, MOVED, tag, n_loose=1)

        def build(c):
            c.root = root
            parts = None
            if self.comm.rank == root:
                parts = message_of(sendbuf).parts(self.comm.size)
                for r, part in enumerate(parts):
                    c.gives(*self._row(part, r))
            if recvbuf is MPI.IN_PLACE:  # the root keeps its part where it is
                c.gets(*self._row(parts[self.comm.rank], self.comm.rank))
            else:
                c.gets(*self._row(message_of(recvbuf).whole(), self.comm.rank))

        return c, build

    def _exchanged(self, name, sent, recvbuf, tag):
        c = self._start(name, Rule.MOVED, MOVED, tag, n_loose=2)
        size, rank = self.comm.size, self.comm.rank

        def block(part, source, target):
            return part[None, None], Slab((size, size, LONGEST), (source, target, 0))

        def build(c):
            for r, part in enumerate(_value(sent).parts(size)):
                c.gives(*block(part, rank, r))
            for r, part in enumerate(message_of(recvbuf).parts(size)):
                c.gets(*block(part, r, rank))

        return c, build

    def _row(self, part, rank):
        return part[None], Slab((self.comm.size, LONGEST), (rank, 0))

    def _sum(self, name, sent, recvbuf, counts, op, tag, comm=None):
        """What checks a sum, to be called when it is complete."""
        tag = self._next_tag(name, tag)
        on, ctx = (self._given, self.ctx) if comm is None else (comm, None)

        def settle():
            from spimpi.checks.sums.verify import verify_allreduce, verify_reduce_scatter

            pending = ctx is not None and ctx.open_batch is not None
            kept = {
                "op": op, "check": pending and self.check, "ctx": ctx, "threads": self.threads,
            }  # fmt: skip
            own, result = _array(sent), _array(_or_error(lambda: message_of(recvbuf)))
            if counts is None:
                return verify_allreduce(on, own, result, tag, **kept)
            part = self._shard(counts, own, result)
            return verify_reduce_scatter(on, own, result, part, tag, **kept)

        return settle

    def _shard(self, counts, own, result) -> TensorPartition | None:
        """The partition of a reduce-scatter; None, for the check to refuse, where it has none."""
        size, rank = self.comm.size, self.comm.rank
        try:
            if isinstance(counts, str):
                if counts == "own":
                    counts = self._session.comm.allgather(getattr(result, "size", 0))
                else:
                    counts = [own.size // size] * size
            counts = tuple(int(n) for n in counts)
            return TensorPartition(0, size, rank, sum(counts), counts)
        except (SpimpiError, AttributeError, TypeError, ValueError):
            return None

    # How checks are settled.

    def _run(self, described) -> None:
        c, build = described
        built(c, build)
        if self.ctx is not None and self.ctx.open_batch is not None:
            self.verdict = self.ctx.open_batch.add(self._session, c, self.check)
            return
        self._keep(Group(self._session, [c]).merge()[0])

    def _summed(self, settle) -> None:
        verdict = settle()
        if isinstance(verdict, PendingVerdict):
            self.verdict = verdict
        else:
            self._keep(verdict)

    def _keep(self, verdict) -> None:
        self.verdict = verdict
        enforce(verdict, self.check)

    def _later(self, request, described) -> CheckedRequest:
        c, build = described
        return self._queue.add(request, c, build, raises=self.check)


def _or_error(make):
    try:
        return make()
    except SpimpiError as error:
        return error


def _value(made):
    """What ``_or_error`` made, or its error raised."""
    if isinstance(made, SpimpiError):
        raise made
    return made


def _array(made):
    """The elements of a message; an error stays, for the check to refuse it on all ranks."""
    return made.whole() if isinstance(made, Message) else made
