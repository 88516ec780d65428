"""Requests of a checked communicator: complete when the operation is, and its check.

MPI lets ranks wait for their requests in any order. The check of a collective is a reduction, which
can begin when the data are there, and which all ranks of a communicator must begin in one order.
Hence two steps. A check begins, in the order of the calls, in the first checked call of this rank
that sees the data there: whoever waits for one thing looks after all others, whatever their
communicator. It is judged in the order of the calls too, since a check that fails exchanges more
(checks/failure.py): by Wait, Test, the next blocking collective, or a rank that would wait for
something else, on which the ranks in that exchange may wait. Those exchanges are begun in turn
(checks/turns.py), so that those of two communicators do not wait for each other.

Threads of a rank take turns (``lock``): each looks after all queues, as the only one would, but for
those in which another is asleep in MPI, which looks after them when it wakes.
"""

from collections import deque
from copy import copy
from threading import RLock

from mpi4py import MPI

from spimpi.checks.pending import Group, built, in_words
from spimpi.checks.turns import InTurn, NotYetError, Turns
from spimpi.errors import CorruptionError, SpimpiError, UsageError
from spimpi.fingerprint.tag import MASK
from spimpi.launch import naps
from spimpi.one_traceback import mark

LOOKS_AWAKE = 200  # before the first nap: most waits end sooner

lock = RLock()  # of all queues, and held in an exchange: a rank is in one at a time
_busy: dict = {}  # queues with collectives whose checks have not begun
_open: dict = {}  # and with collectives that are not judged


def look() -> None:
    """Begin the checks of all collectives whose data are there. Never waits."""
    with lock:
        for queue in list(_busy):
            queue.begin_ready()


def under_way() -> bool:
    """Whether a rank that waits must look after collectives meanwhile."""
    return bool(_open)


def _attend() -> None:
    """Judge what is complete: this rank would wait, perhaps for one that waits for it to do so."""
    with lock:
        for queue in list(_open):
            while queue.judge_first():
                pass


def wait(request, status=None, attendance=None, what="", comm=None) -> None:
    """Wait for an MPI request, and look after the collectives under way meanwhile.

    ``attendance``: of a context with a timeout; then ``what`` is waited for, of ranks of ``comm``.
    """
    _meanwhile(request.Get_status, attendance, what, comm)
    request.Wait(status)


def _meanwhile(is_complete, attendance=None, what="", comm=None) -> None:
    """Look after the collectives under way until there are none or ``is_complete()``."""
    if attendance is None:
        _look_after_all(lambda: not _open or is_complete())
        return
    with attendance.waiting(what, comm):

        def may_end():
            attendance.require_time()
            return is_complete()

        _look_after_all(may_end)


def _look_after_all(may_end) -> None:
    pause = naps(LOOKS_AWAKE)
    while True:
        look()
        if may_end():
            return
        _attend()
        next(pause)


class CheckedRequest:
    """An operation under way, and its check. ``verdict`` is known when it is complete.

    ``Wait`` and ``Test`` as mpi4py's; they raise what the check raises, once. True until then.
    ``Waitall``, ``Waitany``, ``Waitsome``, ``Testall``, ``Testany`` and ``Testsome`` take lists of
    these and of mpi4py's own requests; ``MPI.Request.Waitall`` and the like refuse them.
    """

    verdict = None

    def __init__(self):
        self._active = True

    def __bool__(self):
        return self._active

    def Wait(self, status=None) -> bool:
        """Wait for the operation and its check."""
        if self._active:
            self._complete(True)
            self._active = False
            self._take(status)
        return True

    def Test(self, status=None) -> bool:
        """Whether the operation and its check are complete. A failure is raised, once."""
        return not self._active or (self._complete(False) and self.Wait(status))

    def wait(self, status=None) -> None:
        """As ``Wait``."""
        self.Wait(status)

    def test(self, status=None) -> tuple:
        """As ``Test``, in the form of mpi4py's lower-case method: (flag, None)."""
        return self.Test(status), None

    @staticmethod
    def Waitall(requests, statuses=None) -> bool:
        """Wait for all; then the first failure, in the order of the list, is raised."""
        requests, error = list(requests), None
        for request, status in zip(requests, _statuses(requests, statuses), strict=True):
            try:
                if isinstance(request, CheckedRequest):
                    request.Wait(status)
                else:
                    wait(request, status)
            except SpimpiError as caught:
                error = error or caught
        if error is not None:
            raise error
        return True

    @staticmethod
    def Testall(requests, statuses=None) -> bool:
        """Whether all are complete; else none is taken. Raises as ``Waitall``."""
        requests = list(requests)
        return all([_is_complete(r) for r in requests]) and CheckedRequest.Waitall(
            requests, statuses
        )

    @staticmethod
    def Testany(requests, status=None) -> tuple:
        """(index of one that is complete, True), or (MPI.UNDEFINED, whether none is active)."""
        requests = list(requests)
        for i, request in enumerate(requests):
            if request and request.Test(status):
                return i, True
        return MPI.UNDEFINED, not any(requests)

    @staticmethod
    def Waitany(requests, status=None) -> int:
        """The index of one that is complete; MPI.UNDEFINED where none is active."""
        requests, pause = list(requests), naps(LOOKS_AWAKE)
        while True:
            i, flag = CheckedRequest.Testany(requests, status)
            if flag:
                return i
            look()
            _attend()
            next(pause)

    @staticmethod
    def Testsome(requests, statuses=None):
        """The indices of those that are complete; None where none is active."""
        requests = list(requests)
        if not any(requests):
            return None
        done = [i for i, request in enumerate(requests) if request and _is_complete(request)]
        complete = [requests[i] for i in done]
        CheckedRequest.Waitall(complete, statuses)
        return done

    @staticmethod
    def Waitsome(requests, statuses=None):
        """As ``Testsome``, at least one; None where none is active."""
        requests, pause = list(requests), naps(LOOKS_AWAKE)
        while (done := CheckedRequest.Testsome(requests, statuses)) == []:
            look()
            _attend()
            next(pause)
        return done


def _statuses(requests, statuses) -> list:
    """One for each request, in the user's list where there is one."""
    if statuses is None:
        return [None] * len(requests)
    statuses.extend(MPI.Status() for _ in range(len(requests) - len(statuses)))
    return statuses[: len(requests)]


def _is_complete(request) -> bool:
    """Whether it is complete, without taking it."""
    if not isinstance(request, CheckedRequest):
        return request.Get_status()
    return not request._active or request._complete(False)


class CheckedCollective(CheckedRequest):
    """A collective under way. ``check``: its RecordCheck. ``request`` is None where the call itself
    raised an error on this rank, which then takes no part in the check."""

    def __init__(self, queue, request, check, owner):
        super().__init__()
        self._queue, self._request, self._check, self._owner = queue, request, check, owner
        self._error, self._judged, self._takes_part = None, False, request is not None
        self._number = owner.next_call()

    def _complete(self, blocking: bool) -> bool:
        return self._queue.judge_until(self, blocking)

    def _take(self, status) -> None:
        self._owner.completed(self._number, self.verdict)
        error, self._error = self._error, None
        if error is not None:
            raise mark(error, self._check.session.rank)

    def _has_data(self, blocking=False) -> bool:
        """Whether MPI is done with it; its error is kept until this rank waits for it."""
        if not self._takes_part:
            return True
        try:
            if not blocking:
                return self._request.Test()
            self._request.Wait()
        except MPI.Exception as error:
            self._error, self._takes_part = error, False
        return True

    def _judge(self, turns) -> None:
        try:
            if self._takes_part:
                self.verdict = self._check.judge(turns)
            if self._owner.check and self.verdict is not None and not self.verdict:
                self._error = CorruptionError(self.verdict)
        except SpimpiError as error:
            self._error = error
        self._judged = True


class RecordCheck:
    """A Check of a collective under way, in steps.

    ``session``: that of blocking checks, on which a failure is looked into. The reduction runs on
    the requests' own, since blocking checks come in between at other moments on other ranks.
    """

    def __init__(self, session, check, build):
        self.session, self.check, self.build = session, check, build

    def begin(self, requests, takes_part: bool) -> None:
        if takes_part:
            built(self.check, self.build)
        self.group = Group(requests, [self.check], in_one=True)
        self.group.start(MASK if takes_part else requests.rank)

    def test(self) -> bool:
        return self.group.test()

    def wait(self) -> None:
        self.group.wait()

    def judge(self, turns):
        """The verdict. NotYetError where more must be exchanged and it is not this rank's turn:
        nothing has happened then."""
        merged = self.group.wait()
        self.group.session = copy(self.session)
        self.group.session.comm = InTurn(self.session.comm, turns)
        return self.group.judge(merged)[0]


class Queue:
    """The collectives of one communicator that are not judged, in the order of the calls.

    Making it is collective.
    """

    def __init__(self, session):
        self.session = session
        self._turns, self._asks = Turns(session.comm), False
        self._waiting: deque[CheckedCollective] = deque()  # for their data
        self._begun: deque[CheckedCollective] = deque()
        self._asleep = False  # a thread waits in MPI for the first of them

    def add(self, request, check, owner) -> CheckedCollective:
        """A collective that ``owner``, a CheckedComm, has called (None: in vain), and its check."""
        made = CheckedCollective(self, request, check, owner)
        with lock:
            self._waiting.append(made)
            _busy[self] = _open[self] = None
        return made

    def begin_ready(self) -> None:
        """Begin the checks of those whose data are there, as far as all before them have begun."""
        while self._waiting and not self._asleep and self._waiting[0]._has_data():
            self._begin_first()

    def _begin_first(self) -> None:
        if not self._waiting:  # a freed communicator goes when its last operation completes
            return
        first = self._waiting.popleft()
        if not self._waiting:
            del _busy[self]
        first._check.begin(self.session, first._takes_part)
        self._begun.append(first)

    def _can_judge(self) -> bool:
        """Whether the first one's check is complete, and the turn has come that it may ask for."""
        with lock:
            if self._asleep or not self._begun or not self._begun[0]._check.test():
                return False
            return not self._asks or self._turns.has_come()

    def judge_first(self) -> bool:
        """Judge the first one, if that can be done now; whether it was."""
        if not self._can_judge():
            return False
        first = self._begun.popleft()
        if not self._begun and not self._waiting:
            del _open[self]
        try:
            first._judge(self._turns)
        except NotYetError:
            self._begun.appendleft(first)
            _open[self] = None
            self._asks = True
            return False
        self._asks = False
        return True

    def judge_until(self, last: CheckedCollective, blocking: bool) -> bool:
        """Judge those up to ``last``, in order; whether it is judged."""
        while True:
            with lock:
                look()
                while not last._judged and self.judge_first():
                    look()
                if last._judged:
                    return True
                if not self._begun and not self._waiting:
                    msg = "the communicator of this request was freed: wait for it before"
                    raise UsageError(msg)
                asleep = blocking and self._may_sleep()
                self._asleep = self._asleep or asleep
            if not blocking:
                return False
            self._wait(last, asleep)

    def judge_all(self) -> None:
        """Judge all; failures are raised when they are waited for. Collective.

        Blocking collectives of the communicator begin with it, so that no rank waits in one for
        another that is at an earlier request, where a check fails. MPI lets it: a blocking
        collective may wait for all ranks.
        """
        if not _open:
            return
        with lock:
            look()
            last = (self._waiting or self._begun or [None])[-1]
        if last is not None:
            self.judge_until(last, True)

    def _may_sleep(self) -> bool:
        """Whether this thread may wait in MPI for the first one: where nothing else is under way."""
        other = len(_open) > 1 or self._asks or (self._begun and self._waiting)
        return not (self._asleep or other or self.session.attendance)

    def _wait(self, last, asleep) -> None:
        """Until the first one can be judged, or its check can begin."""
        if not asleep:
            may_end = lambda: last._judged or self._can_judge()  # noqa: E731
            what = in_words([last._check.check])
            _meanwhile(may_end, self.session.attendance, what, self.session.comm)
            return
        try:
            if self._begun:
                self._begun[0]._check.wait()
            else:
                self._waiting[0]._has_data(blocking=True)
                with lock:
                    self._begin_first()
        finally:
            self._asleep = False

    def close(self) -> None:
        """Forget what nobody waited for, before the communicator is freed."""
        with lock:
            self._waiting.clear()
            self._begun.clear()
            _busy.pop(self, None)
            _open.pop(self, None)
        self._turns.free()
