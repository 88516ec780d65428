"""The communicators of one run, made once and passed explicitly.

Ownership: the caller's communicator is duplicated and never used for messages. All communicators
below are this object's; ``with`` frees them on a clean exit. On an exception nothing collective is
called, because the other ranks may not come. The caller's handle is kept to recognise it again.
"""

from functools import cached_property

import numpy as np
from mpi4py import MPI

from spimpi.checks.session import Session
from spimpi.errors import UsageError
from spimpi.fingerprint.tag import DEFAULT_SEED
from spimpi.reduction import RecordReduction
from spimpi.topology.grid import Grid


class DistributedContext:
    """World, tensor, pipeline, data and replica communicators of a grid, seed and tracer.

    ``replica`` joins the ranks that together hold one copy of the model (all with the same data
    index). Without a grid all ranks are one tensor group. Collective over ``comm``: every rank
    makes it with the same grid.
    """

    def __init__(self, comm, grid: Grid | None = None, seed: int = DEFAULT_SEED, tracer=None):
        self.grid = grid = grid or Grid(comm.size, 1, 1, (1,))
        self.seed, self.tracer = seed, tracer
        self._given = comm
        self.world = comm.Dup()
        self.place = grid.coordinates(self.world.rank)
        d, p, t = self.place.d, self.place.p, self.place.t
        self.tensor = self.world.Split(d * grid.pp + p, t)
        self.pipeline = self.world.Split(d * grid.tp + t, p)
        self.data = self.world.Split(p * grid.tp + t, d)
        self.replica = self.world.Split(d, p * grid.tp + t)
        self.node = self.world.Split_type(MPI.COMM_TYPE_SHARED)
        self.records = RecordReduction()
        self.session = Session(self.world, self.records)
        self.open_batch = None

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

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.free()

    def free(self):
        """Give back the communicators and the reduction. Collective."""
        self.session.free()
        self.records.free()
        for comm in (self.node, self.replica, self.data, self.pipeline, self.tensor, self.world):
            comm.Free()
