"""Requests whose completion includes a check, which does not block either.

Each check is a reduction, so all ranks must start them in one order: that of the calls. Waiting
for a request therefore first completes those before it. The reductions run on a communicator of
their own, so that they do not meet those of blocking checks, which come in between at other
moments on other ranks.
"""

from collections import deque

from spimpi.checks.check import Check
from spimpi.checks.pending import Group, built
from spimpi.errors import CorruptionError, SpimpiError


class CheckedRequest:
    """A collective under way, and its check. ``verdict`` is known when it is complete.

    ``Wait`` and ``Test`` as mpi4py's; both raise what the check raises, once.
    """

    def __init__(self, queue, request, check, build, settle, raises):
        self.verdict = None
        self._queue, self._request, self._raises = queue, request, raises
        self._check, self._build, self._settle = check, build, settle
        self._group, self._error, self._done = None, None, False

    def Wait(self, status=None) -> bool:
        """Wait for the collective and its check; those of earlier requests come first."""
        self._queue.advance(self, True)
        return self._finished()

    def Test(self, status=None) -> bool:
        """Whether the collective and its check are complete. A failure is raised, once."""
        return self._queue.advance(self, False) and self._finished()

    def wait(self, status=None) -> None:
        """As ``Wait``."""
        self.Wait()

    def test(self, status=None) -> tuple:
        """As ``Test``, in the form of mpi4py's lower-case method: (flag, None)."""
        return self.Test(), None

    def _finished(self) -> bool:
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True

    def _step(self, blocking: bool) -> bool:
        """Go on as far as it goes; whether it is complete."""
        if self._done:
            return True
        if self._request is not None:
            if blocking:
                self._request.Wait()
            elif not self._request.Test():
                return False
            self._request = None
        try:
            if self._settle is not None:
                self._conclude(self._settle())
                return True
            if self._group is None:
                self._group = Group(self._queue.session, [built(self._check, self._build)])
                self._group.start()
            if not blocking and not self._group.test():
                return False
            self._conclude(self._group.finish()[0])
        except SpimpiError as error:
            self._error, self._done = error, True
        return True

    def _conclude(self, verdict) -> None:
        self.verdict, self._done = verdict, True
        if self._raises and not verdict:
            self._error = CorruptionError(verdict)


class Queue:
    """The requests of one communicator that are not complete, in the order of the calls."""

    def __init__(self, session):
        self.session = session
        self._waiting: deque[CheckedRequest] = deque()

    def add(self, request, check: Check | None = None, build=None, settle=None, raises=True):
        """A collective that has begun, and what checks it: a Check, or ``settle()``."""
        made = CheckedRequest(self, request, check, build, settle, raises)
        self._waiting.append(made)
        return made

    def advance(self, last: CheckedRequest, blocking: bool) -> bool:
        """Complete the requests up to ``last``, in order; whether it is complete."""
        while not last._done and self._waiting:
            if not self._waiting[0]._step(blocking):
                return False
            self._waiting.popleft()
        return last._done
