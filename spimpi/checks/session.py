"""What the checks keep for a communicator: a duplicate of it, the merging of records, links.

Ownership: the user's communicator is duplicated once, by the first check on it, and never used
for messages. What is kept hangs on it as an MPI attribute, so that it is freed together with it.
The two ends of a hand-off have a communicator of their own, made by these two alone, because the
other ranks do not take part. A DistributedContext has a session of its own on its world.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from threading import RLock

import numpy as np
from mpi4py import MPI

from spimpi.errors import IncompleteError
from spimpi.fingerprint.tag import MASK
from spimpi.launch import require_world
from spimpi.reduction import PATIENCE, RECORD, RecordReduction, within

REMEMBERED = 64  # fingerprints of earlier contributions, for "shard of step 6 in step 7"
LINK_HISTORY = 8
PAIR_TAG = 1069

# What a record's place tells all ranks, as the lowest of theirs: below ELSEWHERE, a rank that takes
# no part in the check; ELSEWHERE, that some rank's batch has checks over other communicators;
# HANDED_OVER, that none has, but some rank's has hand-offs.
ELSEWHERE, HANDED_OVER = 1 << 32, 1 << 33


@dataclass
class Link:
    """One direction of hand-offs between two ranks: the next sequence number, the last words; how
    many hand-offs were of elements."""

    sequence: int = 0
    running: int = 0
    n_filled: int = 0
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
        self.abandoned: list = []  # what is under way and is not waited for any more
        # In how many checks some rank took no part, as all ranks count them: the records of
        # hand-offs that such a one left under way are not to meet those of later ones.
        self.n_left = 0
        self.attendance = None  # of a context with a timeout
        self._owned = owned

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

    def start(self, words) -> tuple:
        """Start merging one record over all ranks: (request, what keeps the buffers alive, result).
        Words and result in RECORD's order."""
        self.judge_requests()
        return self._start(words)

    def _start(self, words) -> tuple:
        own, merged = np.array(words, np.uint64), np.empty(6, np.uint64)
        request = self.records.start(self.comm, own.view(RECORD), merged.view(RECORD))
        return request, own, merged

    def wait(self, request, what: str) -> None:
        """Wait for a request of a check; IncompleteError where the context's timeout has passed."""
        if self.attendance is None:
            request.Wait()
        else:
            self.attendance.wait(request, what, self.comm)

    def everyones(self, number: int, what: str) -> list[int]:
        """A number of each rank; ``what`` they are asked for, in words. Collective."""
        own, everyone = np.array([number], np.int64), np.empty(self.size, np.int64)
        request = self.comm.Iallgather(own, everyone)
        try:
            self.wait(request, what)
        except IncompleteError:
            self.abandoned.append((request, own, everyone))
            raise
        return everyone.tolist()

    def withdraw(self) -> None:
        """Take no part in the check that the others make now, or will: this rank has an error.

        They learn it from the merged record and raise too (Group.judge), so this rank need not
        stay; it does for PATIENCE seconds, for a reduction moves on where its ranks are in MPI.
        """
        self.n_left += 1
        words = [0, 0, MASK, MASK, 0, self.rank]
        request, *kept = self._start(words)
        self.abandoned.append((request, kept))
        within(request, PATIENCE)

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
        self.abandoned: list = []  # hand-offs that are under way and are not waited for any more
        self.n_left = 0  # of the context that is used now: Session.n_left
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

    def Get_group(self):
        """The two ends, as a communicator gives its ranks: the caller frees it. Local."""
        everyone = self.comm.Get_group()
        if self._session is None:
            return everyone
        ends = everyone.Incl(self._ends)
        everyone.Free()
        return ends

    def free(self) -> None:
        if self._own is not None:
            self._own.Free()


def _discard(comm, keyval, kept) -> None:
    # MPI calls this when the user's communicator is freed, on all of its ranks.
    for one in kept.values():
        one.free()


_keyval = None
_making = RLock()  # of threads, each with its own communicator: what all share is made once


def _kept(comm) -> dict:
    """What hangs on a communicator; made empty where nothing does yet."""
    global _keyval
    require_world()
    with _making:
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
    session = _of_its_own(comm, "session", ctx and ctx.attendance)
    session.attendance = ctx and ctx.attendance
    return session


def _of_its_own(comm, name, attendance=None) -> Session:
    kept = _kept(comm)
    if name not in kept:
        duplicate, records = _duplicate(comm, attendance), RecordReduction()
        kept[name] = Session(duplicate, records, (records, duplicate))
    return kept[name]


def _duplicate(comm, attendance):
    if attendance is None:
        return comm.Dup()
    duplicate, request = comm.Idup()
    attendance.wait(request, f"the first check over a communicator of {comm.size} ranks", comm)
    return duplicate


def request_session_of(comm) -> Session:
    """A second session of a communicator, for checks that overlap others. Collective at first."""
    return _of_its_own(comm, "requests")


def pair_of(comm, one: int, other: int, ctx=None) -> Pair:
    """The pair of two ranks of ``comm``. Without a context collective over these two at first."""
    ends = (min(one, other), max(one, other))
    session = ctx.session if ctx is not None and ctx.is_over(comm) else None
    kept = session.pairs if session is not None else _kept(comm)
    if ends not in kept:
        kept[ends] = Pair(comm, *ends, session)
    kept[ends].n_left = 0 if ctx is None else ctx.session.n_left
    return kept[ends]
