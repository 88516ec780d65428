"""``spimpi.checked(comm, ctx)``: a communicator whose collectives are checked after they ran.

Same signatures as mpi4py's upper-case methods. The collective itself runs on the user's
communicator, its check on a private one. docs/checks.md ("The wrapper") has what is covered.
"""

from contextlib import contextmanager
from functools import partial

import numpy as np
from mpi4py import MPI

from spimpi.checks import calls
from spimpi.checks.check import Check, Rule
from spimpi.checks.messages import CheckedMessages
from spimpi.checks.pending import Group, built, enforce, in_words, require_comm
from spimpi.checks.requests import CheckedRequest, Queue, RecordCheck, look
from spimpi.checks.session import request_session_of, session_of
from spimpi.checks.unchecked import SYNCHRONISING, UNCHECKED, name_of, note
from spimpi.fingerprint.tag import DEFAULT_SEED, Tag
from spimpi.one_traceback import told_by_rank_0
from spimpi.trace.schema import Established

SUMS = (MPI.SUM, MPI.BXOR)  # what the check of a reduction to some ranks knows
EXTREMES = (MPI.MAX, MPI.MIN)  # and of one to all


def checked(comm, ctx=None, *, check=True, threads=1) -> "CheckedComm":
    """Wrap a communicator so that its collectives are checked. Collective over ``comm``.

    ctx: a DistributedContext, whose batch then takes the checks. check=False: failures do not
    raise; ``.verdict`` has the last one.
    """
    require_comm(comm)
    return CheckedComm(comm, ctx, check, threads)


class CheckedComm(CheckedMessages):
    """A communicator and the checks of its calls. Made by ``checked``.

    What is not checked is the communicator's own: where it moves data, the first call of each kind
    warns (UncheckedWarning), and ``unchecked`` counts them by name. Every checked method takes
    ``tag=``, a ``spimpi.Tag``, besides mpi4py's arguments; the point-to-point ones have mpi4py's
    tag instead. ``verdict``: that of the last call that is complete, in the order of the calls; None
    where it was not checked.
    """

    def __init__(self, comm, ctx, check, threads):
        self.comm, self.ctx, self.check, self.threads = comm, ctx, check, threads
        self._given, self._tracer = comm, ctx and ctx.tracer
        self._session = session_of(comm, ctx)
        self._seed = DEFAULT_SEED if ctx is None else ctx.seed
        self._tag, self._calls = None, 0
        self._requests = request_session_of(comm)
        self._requests.attendance = self._session.attendance
        if self._requests.queue is None:
            self._requests.queue = Queue(self._requests)
        self._queue = self._requests.queue
        if self._queue not in self._session.queues:
            self._session.queues.append(self._queue)
        self.unchecked = self._requests.unchecked
        super().__init__(self._session)

    def __getattr__(self, name):
        call = getattr(self.comm, name)
        if name not in UNCHECKED and name not in SYNCHRONISING:
            return call

        def passed(*args, **more):
            if name in UNCHECKED:
                self._note(name, 4)
            if name in SYNCHRONISING:
                self._queue.judge_all()
            return call(*args, **more)

        return passed

    def _note(self, what, depth, compared=""):
        self.completed(self.next_call(), None)
        note(self.unchecked, what, depth, compared)
        if self._tracer is not None:
            self._tracer.unchecked[what] += 1

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

    # Data that are moved.

    def Allgather(self, sendbuf, recvbuf, *, tag=None):
        self._move("Allgather", calls.allgather, (sendbuf, recvbuf), tag)

    def Allgatherv(self, sendbuf, recvbuf, *, tag=None):
        self._move("Allgatherv", calls.allgatherv, (sendbuf, recvbuf), tag)

    def Iallgather(self, sendbuf, recvbuf, *, tag=None) -> CheckedRequest:
        return self._imove("Iallgather", calls.allgather, (sendbuf, recvbuf), tag)

    def Iallgatherv(self, sendbuf, recvbuf, *, tag=None) -> CheckedRequest:
        return self._imove("Iallgatherv", calls.allgatherv, (sendbuf, recvbuf), tag)

    def Bcast(self, buf, root=0, *, tag=None):
        self._move("Bcast", calls.broadcast, (buf, root), tag)

    def Ibcast(self, buf, root=0, *, tag=None) -> CheckedRequest:
        return self._imove("Ibcast", calls.broadcast, (buf, root), tag)

    def Gather(self, sendbuf, recvbuf, root=0, *, tag=None):
        self._move("Gather", calls.gather, (sendbuf, recvbuf, root), tag)

    def Gatherv(self, sendbuf, recvbuf, root=0, *, tag=None):
        self._move("Gatherv", calls.gatherv, (sendbuf, recvbuf, root), tag)

    def Igather(self, sendbuf, recvbuf, root=0, *, tag=None) -> CheckedRequest:
        return self._imove("Igather", calls.gather, (sendbuf, recvbuf, root), tag)

    def Igatherv(self, sendbuf, recvbuf, root=0, *, tag=None) -> CheckedRequest:
        return self._imove("Igatherv", calls.gatherv, (sendbuf, recvbuf, root), tag)

    def Scatter(self, sendbuf, recvbuf, root=0, *, tag=None):
        self._move("Scatter", calls.scatter, (sendbuf, recvbuf, root), tag)

    def Scatterv(self, sendbuf, recvbuf, root=0, *, tag=None):
        self._move("Scatterv", calls.scatterv, (sendbuf, recvbuf, root), tag)

    def Iscatter(self, sendbuf, recvbuf, root=0, *, tag=None) -> CheckedRequest:
        return self._imove("Iscatter", calls.scatter, (sendbuf, recvbuf, root), tag)

    def Iscatterv(self, sendbuf, recvbuf, root=0, *, tag=None) -> CheckedRequest:
        return self._imove("Iscatterv", calls.scatterv, (sendbuf, recvbuf, root), tag)

    def Alltoall(self, sendbuf, recvbuf, *, tag=None):
        self._move("Alltoall", calls.alltoall, (sendbuf, recvbuf), tag)

    def Alltoallv(self, sendbuf, recvbuf, *, tag=None):
        self._move("Alltoallv", calls.alltoallv, (sendbuf, recvbuf), tag)

    def Ialltoall(self, sendbuf, recvbuf, *, tag=None) -> CheckedRequest:
        return self._imove("Ialltoall", calls.alltoall, (sendbuf, recvbuf), tag)

    def Ialltoallv(self, sendbuf, recvbuf, *, tag=None) -> CheckedRequest:
        return self._imove("Ialltoallv", calls.alltoallv, (sendbuf, recvbuf), tag)

    # Sums.

    def Allreduce(self, sendbuf, recvbuf, op=MPI.SUM, *, tag=None):
        args = (sendbuf, recvbuf, op)
        self._sum("Allreduce", calls.allreduce, args, op, tag, SUMS + EXTREMES)

    def Iallreduce(self, sendbuf, recvbuf, op=MPI.SUM, *, tag=None) -> CheckedRequest:
        args = (sendbuf, recvbuf, op)
        return self._isum("Iallreduce", calls.allreduce, args, op, tag, SUMS + EXTREMES)

    def Reduce(self, sendbuf, recvbuf, op=MPI.SUM, root=0, *, tag=None):
        self._sum("Reduce", calls.reduce, (sendbuf, recvbuf, op, root), op, tag)

    def Ireduce(self, sendbuf, recvbuf, op=MPI.SUM, root=0, *, tag=None) -> CheckedRequest:
        return self._isum("Ireduce", calls.reduce, (sendbuf, recvbuf, op, root), op, tag)

    def Reduce_scatter(self, sendbuf, recvbuf, recvcounts=None, op=MPI.SUM, *, tag=None):
        args = (sendbuf, recvbuf, recvcounts, op)
        self._sum("Reduce_scatter", self._reduce_scatter(), args, op, tag)

    def Ireduce_scatter(
        self, sendbuf, recvbuf, recvcounts=None, op=MPI.SUM, *, tag=None
    ) -> CheckedRequest:
        args = (sendbuf, recvbuf, recvcounts, op)
        if recvcounts is None:  # then ranks ask each other, and mpi4py does so too
            self._queue.judge_all()
        return self._isum("Ireduce_scatter", self._reduce_scatter(), args, op, tag)

    def _reduce_scatter(self):
        self._session.attendance = self.ctx and self.ctx.attendance
        return partial(calls.reduce_scatter, everyones=self._session.everyones)

    def Reduce_scatter_block(self, sendbuf, recvbuf, op=MPI.SUM, *, tag=None):
        args = (sendbuf, recvbuf, op)
        self._sum("Reduce_scatter_block", calls.reduce_scatter_block, args, op, tag)

    def Ireduce_scatter_block(
        self, sendbuf, recvbuf, op=MPI.SUM, *, tag=None
    ) -> CheckedRequest:
        args = (sendbuf, recvbuf, op)
        return self._isum("Ireduce_scatter_block", calls.reduce_scatter_block, args, op, tag)

    # How they run: described first, then called, then checked. A call that raises an error on this
    # rank is told to the others, who wait in the check, and then raised.

    def _move(self, name, describe, args, tag) -> None:
        self._queue.judge_all()
        self._run(name, args, *self._moved(name, describe, args, tag))

    def _run(self, name, args, check, build) -> None:
        try:
            self._call(name, args, check)
        except Exception:
            if not self._in_batch:  # else its end tells them
                self._session.withdraw()
            raise
        built(check, build)
        if self._in_batch:
            self._keep(self.ctx.open_batch.add(self._session, check, self.check))
        else:
            self._keep(Group(self._session, [check]).merge()[0])

    def _call(self, name, args, check) -> None:
        call, attendance = getattr(self.comm, name), self.ctx and self.ctx.attendance
        self._session.attendance = attendance
        if attendance is None:
            call(*args)
            return
        with attendance.waiting(in_words([check]), self._session.comm, breakable=False):
            call(*args)

    def _imove(self, name, describe, args, tag) -> CheckedRequest:
        return self._irun(name, args, *self._moved(name, describe, args, tag))

    def _irun(self, name, args, check, build) -> CheckedRequest:
        made = RecordCheck(self._session, check, build)
        try:
            request = getattr(self.comm, name)(*args)
        except Exception:
            self._queue.add(None, made, self)
            look()
            raise
        return self._queue.add(request, made, self)

    def _moved(self, name, describe, args, tag) -> tuple:
        tracer = self.ctx and self.ctx.tracer
        rule, established, n_loose, build = describe(self._session.comm, *args)
        tag = self._next_tag(name, tag)
        c = Check(name, tag, rule, established, self.threads, n_loose=n_loose, tracer=tracer)
        return c, build

    def _sum(self, name, describe, args, op, tag, known=SUMS) -> None:
        self._queue.judge_all()
        tag = self._next_tag(name, tag)
        if op in known:
            self._run(name, args, *self._summed(describe, args, op, tag))
            return
        self._note(f"{name} by {name_of(op)}", 5, "the operation")
        self._run(name, args, operation_check(self._session.comm, name, op, tag), _nothing)
        self.completed(self.next_call(), None)

    def _isum(self, name, describe, args, op, tag, known=SUMS) -> CheckedRequest:
        tag = self._next_tag(name, tag)
        if op in known:
            return self._irun(name, args, *self._summed(describe, args, op, tag))
        self._note(f"{name} by {name_of(op)}", 5, "the operation")
        c = operation_check(self._session.comm, name, op, tag, with_words=True)
        return self._irun(name, args, c, _nothing)

    def _summed(self, describe, args, op, tag) -> tuple:
        from spimpi.checks.sums.verify import sum_check_of  # with kernels of its own to load

        kind, look = describe(self._session.comm, *args)
        c, build = sum_check_of(self._given, kind, look, tag, op, self.threads)
        c.tracer = self.ctx and self.ctx.tracer
        return c, build

    @property
    def _in_batch(self) -> bool:
        return self.ctx is not None and self.ctx.open_batch is not None

    def _keep(self, verdict) -> None:
        self.completed(self.next_call(), verdict)
        if not self._in_batch:  # its end raises
            with told_by_rank_0(self._session.rank):
                enforce(verdict, self.check)


def operation_check(comm, name, op, tag, with_words=False) -> Check:
    """The check of a sum by an operation that has none: that all ranks give this one.

    A rank alone with another operation would be waited for in the others' check. ``with_words``: as
    many as the check of another operation takes, for a request's, which are in one Allgather.
    """
    kind = "allreduce" if "allreduce" in name.lower() else "reduce_scatter"
    c = Check(kind, tag, Rule.LOCAL, Established(0), settings=f"op {name_of(op)}")
    if with_words:
        from spimpi.checks.sums.call import n_words

        c.rule, c.conclude = Rule.GATHERED, lambda session, everyone: None
        c.words = np.zeros(n_words(comm.size), np.uint64)
    return c


def _nothing(check) -> None:
    """Nothing is looked at."""
