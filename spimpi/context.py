"""The communicators of one run, made once and passed explicitly.

Ownership: the caller's communicator is duplicated and never used for messages. All communicators
below are this object's; ``with`` frees them on a clean exit. On an exception nothing collective is
called, because the other ranks may not come. The caller's handle is kept to recognise it again.
"""

from functools import cached_property
from hashlib import blake2b
from numbers import Real

import numpy as np
from mpi4py import MPI

from spimpi.checks.attendance import Attendance
from spimpi.checks.pending import require_comm
from spimpi.checks.session import Session
from spimpi.errors import IncompleteError, SpimpiError, UsageError
from spimpi.fingerprint.tag import DEFAULT_SEED, Tag
from spimpi.launch import require_world
from spimpi.reduction import RecordReduction, agree, together
from spimpi.topology.grid import Grid

COMMUNICATORS = ("node", "replica", "data", "pipeline", "sequence", "tensor", "world")
GONE = (*COMMUNICATORS, "session", "records", "tracer", "open_batch")  # after ``free``


class DistributedContext:
    """World, tensor, sequence, pipeline, data and replica communicators of a grid, seed, tracer.

    ``replica`` joins the ranks that together hold one copy of the model (all with the same data
    and sequence index). Without a grid all ranks are one tensor group. Collective over ``comm``:
    every rank makes it with the same grid and the same seed; UsageError on every rank where seeds
    differ.

    ``trace``: the path of an HDF5 trace (docs/trace.md), on a file system that all ranks share.
    Every check that is given this context leaves an event in it. Journals are kept while the
    program runs, and sealed when ``with`` is left normally (or by ``free``); an exception leaves
    them as they are, and ``spimpi trace show`` reads them. UsageError on every rank where the
    trace is there already, or can't be written. ``journal``: a folder for the journals, on each
    node's own disk; ``sync``: every flush waits until the disk has it, against a loss of power;
    ``overwrite``: a trace that is there is replaced when this one is sealed. These three are
    refused without ``trace``.

    ``timeout``: seconds after which a check that not all ranks have come to is given up: the ranks
    in it raise IncompleteError, which names those that are not, and where they are. The context
    makes no other check then. Needs MPI.THREAD_MULTIPLE, for a thread of each rank (docs/checks.md).
    """

    def __init__(
        self, comm, grid: Grid | None = None, seed: int = DEFAULT_SEED, trace=None, *,
        journal=None, sync: bool = False, overwrite: bool = False, timeout: float | None = None,
    ):  # fmt: skip
        require_world()
        require_comm(comm, "a context")
        self.grid = grid = grid or Grid(comm.size, 1, 1, (1,))
        self.tracer, self.attendance = None, None
        self._given = comm
        self.world = comm.Dup()
        self.seed = self._require_sound(seed, trace, journal, sync, overwrite)
        self._require_same(self.seed, trace, timeout)
        if timeout is not None:
            self._require_threads(timeout)
        if trace is not None:
            self.tracer = self._opened(trace, journal, sync, overwrite)
        self.place = grid.coordinates(self.world.rank)
        d, p, s, t = self.place
        self.tensor = self.world.Split((d * grid.pp + p) * grid.sp + s, t)
        self.sequence = self.world.Split((d * grid.pp + p) * grid.tp + t, s)
        self.pipeline = self.world.Split((d * grid.sp + s) * grid.tp + t, p)
        self.data = self.world.Split((p * grid.sp + s) * grid.tp + t, d)
        self.replica = self.world.Split(d * grid.sp + s, p * grid.tp + t)
        self.node = self.world.Split_type(MPI.COMM_TYPE_SHARED)
        self.records = RecordReduction()
        self.session = Session(self.world, self.records)
        self.open_batch = None
        if timeout is not None:
            self.attendance = self.session.attendance = Attendance(self.world, timeout)

    def _require_sound(self, seed, trace, journal, sync, overwrite) -> int:
        """The seed as a number; UsageError on every rank for what is wrong on any."""
        try:
            with together(self.world):
                number = Tag(seed).seed
                if trace is None and (journal is not None or sync or overwrite):
                    msg = "journal=, sync= and overwrite= say how a trace is kept: give trace= too"
                    raise UsageError(msg)
        except SpimpiError:
            self.world.Free()
            raise
        return number

    def _require_same(self, seed, trace, timeout) -> None:
        """Raise UsageError on every rank where they give other seeds, traces or timeouts."""
        given = {
            "the same trace=, a path that they share, or all none":
                "none" if trace is None else f"trace {trace}",
            "the same seed=": f"seed {seed}",
            "the same timeout=": f"timeout {_in_words(timeout)}",
        }  # fmt: skip
        digests = [
            blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
            for text in given.values()
        ]
        same = agree(self.world, [int.from_bytes(digest, "little") for digest in digests])
        if all(same):
            return
        what, own = next(fact for fact, alike in zip(given.items(), same) if not alike)
        told = self.world.allgather(own)
        self.world.Free()
        found = "; ".join(f"rank {r}: {one}" for r, one in enumerate(told[:4]))
        more = "; …" if len(told) > 4 else ""
        msg = f"all ranks of a context must give it {what}; found {found}{more}"
        raise UsageError(msg)

    def _require_threads(self, timeout) -> None:
        """Raise UsageError on every rank where this timeout, or MPI on some rank, is not fit."""
        msg = ""
        if not _is_number(timeout) or not timeout > 0:
            msg = f"timeout= is a number of seconds above 0, or None, found {timeout!r}"
        elif self.world.allreduce(MPI.Query_thread(), op=MPI.MIN) < MPI.THREAD_MULTIPLE:
            msg = (
                "timeout= needs an MPI that was initialised with MPI.THREAD_MULTIPLE (mpi4py does "
                "so by default): a thread of each rank answers where its rank is"
            )
        if msg:
            self.world.Free()
            raise UsageError(msg)

    def _opened(self, trace, journal, sync, overwrite):
        from spimpi.checks.program_trace import ProgramTracer

        try:
            return ProgramTracer(
                self.world, trace, self.grid.text(), self.seed, journal, sync, overwrite
            )
        except SpimpiError:  # of all ranks
            self.world.Free()
            raise

    def is_over(self, comm) -> bool:
        """Whether a communicator is this context's: its world, or the one that it was made of."""
        return comm == self._given or comm == self.world

    def batch(self):
        """``with ctx.batch():`` many checks, one collective (docs/checks.md). Collective at exit.

        Raises at exit, on every rank: CorruptionError for the first check that fails, UsageError
        where ranks made different checks or one tag stands for two tensors.
        """
        if self.open_batch is not None:
            msg = "a batch of this context is open already: batches do not nest"
            raise UsageError(msg)
        from spimpi.checks.batch import Batch

        return Batch(self)

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def layers(self) -> range:
        """The layers of this rank's stage."""
        start = sum(self.grid.layer_sizes[: self.place.p])
        return range(start, start + self.grid.layer_sizes[self.place.p])

    @property
    def is_first_stage(self) -> bool:
        return self.place.p == 0

    @property
    def is_last_stage(self) -> bool:
        return self.place.p == self.grid.pp - 1

    @cached_property
    def hosts(self) -> list[str]:
        """Host name of every world rank. Collective on first use."""
        return self.world.allgather(MPI.Get_processor_name())

    @cached_property
    def n_nodes(self) -> int:
        """Number of nodes (shared-memory domains). Collective on first use."""
        leaders = np.array([self.node.rank == 0], np.int64)
        self.world.Allreduce(MPI.IN_PLACE, leaders, op=MPI.SUM)
        return int(leaders[0])

    def __getattr__(self, name):
        # Python asks here only for what an object has not.
        if name in GONE:
            msg = (
                "this DistributedContext was given back (its `with` block has ended, or free() was "
                "called): make the checks before that, or another context"
            )
            raise UsageError(msg)
        msg = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(msg)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.free()
            return
        if self.tracer is not None:
            self.tracer.give_up(error)
        if self.attendance is not None:
            self.attendance.leave(f"has left the context by {kind.__name__}")

    def free(self):
        """Seal the trace, give back the communicators and the reduction. Collective.

        Requests of ``spimpi.checked(comm, ctx)`` under way are judged first: wait for them before or
        after. After it every use of the context that needs one of these raises UsageError.
        """
        unsealed = None
        try:
            self.session.judge_requests()
            if self.attendance is not None:
                self.attendance.close()
        except IncompleteError as error:  # as if the error had ended the block
            if self.tracer is not None:
                self.tracer.give_up(error)
            raise
        if self.tracer is not None:
            try:
                self.tracer.seal()
            except SpimpiError as error:  # of all ranks
                unsealed = error
        self.session.free()
        self.records.free()
        for name in COMMUNICATORS:
            getattr(self, name).Free()
        for name in GONE:
            delattr(self, name)
        if unsealed is not None:
            raise unsealed


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _in_words(value) -> str:
    """The same for 5, 5.0 and numpy's."""
    return f"{float(value):.17g}" if _is_number(value) else repr(value)
