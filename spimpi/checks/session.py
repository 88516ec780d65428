"""What the checks keep for a communicator: a duplicate of it, the merging of records, links.

Ownership: the user's communicator is duplicated once, by the first check on it, and never used
for messages. What is kept hangs on it as an MPI attribute, so that it is freed together with it.
The two ends of a hand-off have a communicator of their own, made by these two alone, because the
other ranks do not take part. A DistributedContext has a session of its own on its world.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from mpi4py import MPI

from spimpi.reduction import RECORD, RecordReduction, empty_records

REMEMBERED = 64  # fingerprints of earlier contributions, for "shard of step 6 in step 7"
LINK_HISTORY = 8
PAIR_TAG = 1069


@dataclass
class Link:
    """One direction of hand-offs between two ranks: the next sequence number, the last words."""

    sequence: int = 0
    running: int = 0
    history: deque = field(default_factory=lambda: deque(maxlen=LINK_HISTORY))


class Session:
    """A private communicator with the ranks of the user's, and what checks remember of it."""

    def __init__(self, comm, records, owned=()):
        self.comm, self.records, self.batch = comm, records, None
        self.rank, self.size = comm.rank, comm.size
        self.history: dict = {}
        self.calls = 0
        self._owned = owned
        own, merged = empty_records(1), empty_records(1)
        self._own, self._merged = own.view(np.uint64), merged.view(np.uint64)
        self._send = [own, 1, records.datatype]
        self._receive = [merged, 1, records.datatype]

    def remember(self, tag, slab, word) -> None:
        """Keep the fingerprint of what this rank contributed; the oldest is forgotten."""
        history = self.history
        if len(history) >= REMEMBERED and (tag, slab) not in history:
            del history[next(iter(history))]
        history[tag, slab] = word

    def merge(self, words) -> list[int]:
        """One record merged over all ranks, blocking; words and result in RECORD's order."""
        self._own[:] = words
        self.comm.Allreduce(self._send, self._receive, op=self.records.op)
        return self._merged.tolist()

    def start(self, words) -> tuple:
        """As ``merge``, without waiting: (request, what keeps the buffers alive, result)."""
        own, merged = np.array(words, np.uint64), np.empty(6, np.uint64)
        request = self.records.start(self.comm, own.view(RECORD), merged.view(RECORD))
        return request, own, merged

    def free(self) -> None:
        """Collective over the session's ranks."""
        for one in self._owned:
            (one.free if isinstance(one, RecordReduction) else one.Free)()


class Pair:
    """The two ends of a hand-off: their communicator (the lower rank first) and its links."""

    def __init__(self, comm, low: int, high: int):
        group = comm.Get_group()
        pair = group.Incl([low, high] if low != high else [low])
        self.comm = comm.Create_group(pair, PAIR_TAG)
        pair.Free()
        group.Free()
        self.links: dict = {}

    def free(self) -> None:
        self.comm.Free()


def _discard(comm, keyval, kept) -> None:
    # MPI calls this when the user's communicator is freed, on all of its ranks.
    for one in kept.values():
        one.free()


_keyval = None


def _kept(comm) -> dict:
    """What hangs on a communicator; made empty where nothing does yet."""
    global _keyval
    if _keyval is None:
        _keyval = MPI.Comm.Create_keyval(delete_fn=_discard)
    kept = comm.Get_attr(_keyval)
    if kept is None:
        kept = {}
        comm.Set_attr(_keyval, kept)
    return kept


def session_of(comm, ctx=None) -> Session:
    """The session of a communicator, or of a context if it is the context's. Collective at first."""
    if ctx is not None and ctx.is_over(comm):
        return ctx.session
    kept = _kept(comm)
    session = kept.get("session")
    if session is None:
        duplicate, records = comm.Dup(), RecordReduction()
        session = kept["session"] = Session(duplicate, records, (records, duplicate))
    return session


def pair_of(comm, one: int, other: int) -> Pair:
    """The pair of two ranks of ``comm``. Collective over these two at first, local afterwards."""
    ends = (min(one, other), max(one, other))
    kept = _kept(comm)
    if ends not in kept:
        kept[ends] = Pair(comm, *ends)
    return kept[ends]
