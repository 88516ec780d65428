"""What the checks keep for a communicator: a duplicate of it, the merging of records, links.

Ownership: the user's communicator is duplicated once, by the first check on it, and never used
for messages. What is kept hangs on it as an MPI attribute, so that it is freed together with it.
The two ends of a hand-off have a communicator of their own, made by these two alone, because the
other ranks do not take part. A DistributedContext has a session of its own on its world.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from mpi4py import MPI

from spimpi.launch import require_world
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
        self.comm, self.records = comm, records
        self.rank, self.size = comm.rank, comm.size
        self.history: dict = {}
        self.calls = 0
        self.pairs: dict = {}
        # Of checked communicators, however many stand for the user's: how many messages went to
        # and came from (rank, tag), records under way with their requests, requests in order.
        self.sent: dict = {}
        self.received: dict = {}
        self.under_way: list = []
        self.queue = None
        self.queues: list = []  # of requests under way, which are judged before blocking checks
        self.unchecked: Counter = Counter()  # calls that checked communicators passed on
        self.abandoned: list = []  # what a batch left under way when an exception ended it
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

    def judge_requests(self) -> None:
        """Judge the requests under way of all wrappers whose checks go through this session."""
        for queue in self.queues:
            queue.judge_all()

    def merge(self, words) -> list[int]:
        """One record merged over all ranks, blocking; words and result in RECORD's order."""
        self.judge_requests()
        self._own[:] = words
        self.comm.Allreduce(self._send, self._receive, op=self.records.op)
        return self._merged.tolist()

    def start(self, words) -> tuple:
        """As ``merge``, without waiting: (request, what keeps the buffers alive, result)."""
        self.judge_requests()
        own, merged = np.array(words, np.uint64), np.empty(6, np.uint64)
        request = self.records.start(self.comm, own.view(RECORD), merged.view(RECORD))
        return request, own, merged

    def free(self) -> None:
        """Collective over the session's ranks."""
        if self.queue is not None:
            self.queue.close()
        for pair in self.pairs.values():
            pair.free()
        for one in self._owned:
            (one.free if isinstance(one, RecordReduction) else one.Free)()


class Pair:
    """The two ends of a hand-off, the lower rank first: where they exchange records, and links.

    With a session that is there already (a context's) making it does not communicate, so that
    hand-offs of a batch wait for nobody.
    """

    def __init__(self, comm, low: int, high: int, session=None):
        self._user, self._ends, self._session = comm, (low, high), session
        self.links: dict = {}
        self._own = None
        self.peer = high if comm.rank == low else low
        self.comm = session.comm if session is not None else self.alone
        if session is None:
            self.peer = 1 - self.comm.rank

    @property
    def alone(self):
        """A communicator of these two ranks. Collective over them at first."""
        if self._own is None:
            comm = self._user if self._session is None else self._session.comm
            group = comm.Get_group()
            pair = group.Incl(self._ends)
            self._own = comm.Create_group(pair, PAIR_TAG)
            pair.Free()
            group.Free()
        return self._own

    def free(self) -> None:
        if self._own is not None:
            self._own.Free()


def _discard(comm, keyval, kept) -> None:
    # MPI calls this when the user's communicator is freed, on all of its ranks.
    for one in kept.values():
        one.free()


_keyval = None


def _kept(comm) -> dict:
    """What hangs on a communicator; made empty where nothing does yet."""
    global _keyval
    require_world()
    if _keyval is None:
        _keyval = MPI.Comm.Create_keyval(delete_fn=_discard)
    kept = comm.Get_attr(_keyval)
    if kept is None:
        kept = {}
        comm.Set_attr(_keyval, kept)
    return kept


def session_of(comm, ctx=None) -> Session:
    """A communicator's session, or the context's if it is over its ranks. Collective at first."""
    if ctx is not None and ctx.is_over(comm):
        return ctx.session
    kept = _kept(comm)
    session = kept.get("session")
    if session is None:
        duplicate, records = comm.Dup(), RecordReduction()
        session = kept["session"] = Session(duplicate, records, (records, duplicate))
    return session


def request_session_of(comm) -> Session:
    """A second session of a communicator, for checks that overlap others. Collective at first."""
    kept = _kept(comm)
    session = kept.get("requests")
    if session is None:
        duplicate, records = comm.Dup(), RecordReduction()
        session = kept["requests"] = Session(duplicate, records, (records, duplicate))
    return session


def pair_of(comm, one: int, other: int, ctx=None) -> Pair:
    """The pair of two ranks of ``comm``. Without a context collective over these two at first."""
    ends = (min(one, other), max(one, other))
    session = ctx.session if ctx is not None and ctx.is_over(comm) else None
    kept = session.pairs if session is not None else _kept(comm)
    if ends not in kept:
        kept[ends] = Pair(comm, *ends, session)
    return kept[ends]
