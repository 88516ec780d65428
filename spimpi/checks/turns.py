"""In which order ranks begin to exchange more about checks of requests under way.

Such an exchange waits for all ranks of its communicator, and a rank that is in one looks after
nothing else. Two of them, begun in opposite orders by two ranks, would wait for each other. So all
processes have one order, that of their random numbers, and a rank begins an exchange only after the
one before it on that communicator has, which it tells by an empty message. Until then it looks
after everything else. A rank that is waited for is then always a later one than all that have begun:
exchanges can wait for each other along this order, and never in a circle.
"""

import os

import numpy as np
from mpi4py import MPI

_OWN = np.frombuffer(os.urandom(8), np.uint64)  # ranks have other numbers on each communicator
_NOTHING = [None, 0, MPI.BYTE]


class NotYetError(Exception):
    """The rank before this one has not begun; judge again when ``Turns.has_come``."""


class Turns:
    """The order of a communicator's ranks. Made collectively; it owns a duplicate."""

    def __init__(self, comm):
        self._comm = comm.Dup()
        numbers = np.empty(comm.size, np.uint64)
        comm.Allgather(_OWN, numbers)
        order = np.argsort(numbers, kind="stable").tolist()
        at = order.index(comm.rank)
        self._before = order[at - 1] if at else MPI.PROC_NULL
        self._after = order[at + 1] if at + 1 < comm.size else MPI.PROC_NULL
        self._told = MPI.REQUEST_NULL

    def has_come(self) -> bool:
        """Whether the rank before this one has begun. Never waits."""
        return self._before == MPI.PROC_NULL or self._comm.Iprobe(self._before)

    def take(self) -> None:
        """Begin, and tell the next one."""
        self._comm.Recv(_NOTHING, self._before)
        self._told.Wait()  # it began the exchange before this one, which waited for all ranks
        self._told = self._comm.Isend(_NOTHING, self._after)

    def free(self) -> None:
        """Collective over the communicator."""
        if self._told != MPI.REQUEST_NULL:
            self._told.Free()  # it need not be received: of an exchange that nobody waited for
        self._comm.Free()


class InTurn:
    """A communicator that is used in turn: what first communicates takes it, or NotYetError."""

    def __init__(self, comm, turns: Turns):
        self.rank, self.size, self.Get_group = comm.rank, comm.size, comm.Get_group
        self._comm, self._turns, self._taken = comm, turns, False

    def __getattr__(self, name):
        if not self._taken:
            if not self._turns.has_come():
                raise NotYetError
            self._turns.take()
            self._taken = True
        return getattr(self._comm, name)
