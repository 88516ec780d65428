"""All ranks of a check in one process: the public functions, without messages.

The ranks are called one after the other. Each runs its check up to the first message; it is kept,
and the rank is left there (``NotYet``). The last one finds what all have said, goes on, and judges.
So what decides is the library's own code, from the arguments to the verdict. Where it asks for more
messages than ``rounds``, it has seen that something is wrong and looks for the place
(``SecondLook``): that search is not made here. A check that needs several rounds to decide is
played again from the start, with the answers that are known by then.
"""

import numpy as np
from mpi4py import MPI

from spimpi.checks.session import Session
from spimpi.fingerprint.tag import DEFAULT_SEED
from spimpi.reduction import RecordReduction, _merge

OPERATIONS = (
    (MPI.SUM, np.add), (MPI.BOR, np.bitwise_or), (MPI.MAX, np.maximum), (MPI.MIN, np.minimum),
)  # fmt: skip


class NotYet(Exception):
    """The other ranks have not come to this message."""


class SecondLook(Exception):
    """The check asks for messages beyond those that decide."""


class _Rank(MPI.Intracomm):
    """A communicator as one rank sees it; its messages go through the Ranks."""

    def __new__(cls, ranks, rank):
        return super().__new__(cls, MPI.COMM_SELF)

    def __init__(self, ranks, rank):
        self.ranks, self._rank, self.kept = ranks, rank, {}

    rank = property(lambda self: self._rank)
    size = property(lambda self: self.ranks.size)

    def Allreduce(self, send, receive, op):
        own = receive if send is MPI.IN_PLACE else send
        said = self.ranks.exchange(self._rank, _words(own).copy())
        _words(receive)[:] = self.ranks.reduced(said, op)

    def Iallreduce(self, send, receive, op):
        self.Allreduce(send, receive, op)
        return MPI.REQUEST_NULL

    def Allgather(self, send, receive):
        receive[:] = np.stack(self.ranks.exchange(self._rank, send.copy())).reshape(receive.shape)

    def allgather(self, told):
        return self.ranks.exchange(self._rank, told)

    def Bcast(self, buffer, root):
        buffer[:] = self.ranks.exchange(self._rank, buffer.copy())[root]

    # The two ends of hand-offs, the sender first: each one's record, and then the next.

    def Irecv(self, buffer, peer, tag):
        box = self.ranks.mail.setdefault((peer, self._rank, tag), [])
        number = self.ranks.at[self._rank]
        self.ranks.waits = number == len(box)
        if not self.ranks.waits:
            buffer[0][:] = box[number]
        return MPI.REQUEST_NULL

    def Isend(self, buffer, peer, tag):
        box = self.ranks.mail.setdefault((self._rank, peer, tag), [])
        if self.ranks.at[self._rank] == len(box):
            box.append(buffer[0].copy())
        self.ranks.at[self._rank] += 1
        if self.ranks.waits:
            raise NotYet
        return MPI.REQUEST_NULL

    # What a checked communicator keeps for requests, which are not played here.

    def Get_attr(self, keyval):
        return self.kept

    def Dup(self):
        return MPI.COMM_SELF

    def Get_group(self):  # for a communicator of the two ends, to find what differs
        raise SecondLook


class _Context:
    """What checks use of a DistributedContext: a session and a seed; no batch, no trace."""

    open_batch = tracer = attendance = None
    seed = DEFAULT_SEED

    def __init__(self, comm, records):
        self.session = Session(comm, records)

    def is_over(self, comm):
        return True


class Ranks:
    """``size`` ranks in this process."""

    def __init__(self, size: int):
        self.size, self.records = size, RecordReduction()
        self.comms = [_Rank(self, rank) for rank in range(size)]
        self.contexts = [_Context(comm, self.records) for comm in self.comms]
        self.said, self.at, self.mail, self.rounds, self.waits = [], {}, {}, 1, False

    def holds(self, call, callers=None, rounds: int = 1) -> bool:
        """Whether the check ``call(comm, ctx)`` holds, by the rank that is called last."""
        verdict = self.verdict(call, callers, rounds)
        return verdict is not None and bool(verdict)

    def verdict(self, call, callers=None, rounds: int = 1):
        """The verdict; None where the check wants a second look."""
        callers = range(self.size) if callers is None else callers
        self.said, self.mail, self.rounds = [], {}, rounds
        for _ in range(rounds):
            self.at = dict.fromkeys(callers, 0)
            for rank in callers:
                self.contexts[rank].session.pairs.clear()
                try:
                    return call(self.comms[rank], self.contexts[rank])
                except NotYet:
                    continue
                except SecondLook:
                    return None
        msg = f"no verdict after {rounds} rounds"
        raise RuntimeError(msg)

    def exchange(self, rank: int, told) -> list:
        """What all ranks say in this rank's next round, in the order of ranks."""
        number = self.at[rank]
        self.at[rank] += 1
        if number >= self.rounds:
            raise SecondLook
        if number == len(self.said):
            self.said.append({})
        said = self.said[number]
        said[rank] = told
        if len(said) < self.size:
            raise NotYet
        return [said[r] for r in range(self.size)]

    def reduced(self, said, op) -> np.ndarray:
        """What MPI_Allreduce gives; an operation of the library's own is that same function."""
        total = said[0].copy()
        for words in said[1:]:
            if op == self.records.op:
                _merge(words, total, None)
            else:
                total = next(f for known, f in OPERATIONS if known == op)(total, words)
        return total


def _words(buffer) -> np.ndarray:
    array = buffer[0] if isinstance(buffer, list) else buffer
    return array.view(np.uint64) if array.dtype.names else array
