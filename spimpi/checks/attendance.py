"""Who has come to a check, and who has not: for contexts that do not wait without limit.

A thread on each rank of the context knows what its rank waits in. Where that lasts longer than the
timeout, it asks the threads of the other ranks, which answer whatever their rank does, as long as
that lets Python's threads run. Then all ranks that wait in the check raise the same IncompleteError.
A rank inside an MPI call of the user's communicator cannot be got out of it: there the job ends.
"""

import atexit
import os
import sys
import threading
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep

from mpi4py import MPI

from spimpi.errors import IncompleteError
from spimpi.launch import naps
from spimpi.printable import one_line
from spimpi.reduction import PATIENCE
from spimpi.units import ranks_text
from spimpi.watchdog import EXIT_STATUS

ASK, ANSWER, GIVE_UP = 1, 2, 3  # message tags
GRACE = 2.0  # seconds for the answers
SHOWN = 8  # ranks that are named one by one
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass(eq=False)
class Wait:
    """One thread's wait. ``breakable``: it looks here, and raises what it finds."""

    what: str
    ranks: list[int]
    since: float
    breakable: bool


class Attendance:
    """The ranks of a context that has a timeout, in seconds. Making and closing it is collective.

    MPI must have been initialised with MPI.THREAD_MULTIPLE.
    """

    def __init__(self, comm, timeout: float):
        self.timeout, self.error = timeout, None
        self._waits: dict[int, Wait] = {}  # by thread
        self._main, self._left = threading.get_ident(), ""
        self._answers: dict[int, tuple] = {}
        self._number, self._sends = 0, []
        self._stop, self._taking = threading.Event(), threading.Lock()
        self._comm = comm.Dup()
        self._thread = threading.Thread(target=self._attend, daemon=True, name="spimpi-attendance")
        self._thread.start()
        atexit.register(self.stop)  # before MPI is finalised

    def stop(self) -> None:
        """End the thread. Local."""
        self._stop.set()
        self._thread.join(2 * GRACE)

    def close(self) -> None:
        """Collective: when all have come, nobody asks any more; until then this rank answers.

        IncompleteError where a check has been given up, and the others do not come.
        """
        self.leave("has left the context")
        everyone, pause, patience = self._comm.Ibarrier(), naps(), None
        while not everyone.Test():
            if self.error is not None:
                patience = patience or monotonic() + PATIENCE
                if monotonic() > patience:
                    self.require_time()
            next(pause)
        self.stop()
        atexit.unregister(self.stop)
        self._comm.Free()

    def leave(self, why: str) -> None:
        """This rank makes no check any more: answer so from now on."""
        self._left = why

    @contextmanager
    def waiting(self, what: str, comm, breakable=True):
        """Inside, this thread waits for the ranks of ``comm`` (whatever has its Get_group);
        ``require_time`` is to be called."""
        if self._stop.is_set():  # closed: a communicator's session may know it still
            yield
            return
        thread = threading.get_ident()
        before = self._waits.get(thread)
        self._take_messages()  # the others may have given up what this rank is late for
        self.require_time()
        self._waits[thread] = Wait(what, self._ranks_of(comm), monotonic(), breakable)
        try:
            yield
        finally:
            if before is None:
                self._waits.pop(thread, None)
            else:
                self._waits[thread] = before

    def require_time(self) -> None:
        """Raise IncompleteError where a check has been given up."""
        if self.error is not None:
            raise IncompleteError(self.error)

    def wait(self, request, what: str, comm) -> None:
        """Wait for an MPI request that all ranks of ``comm`` make together."""
        with self.waiting(what, comm):
            pause = naps()
            while not request.Test():
                self.require_time()
                next(pause)

    def _ranks_of(self, comm) -> list[int]:
        """A communicator's ranks as the context's."""
        theirs, ours = comm.Get_group(), self._comm.Get_group()
        ranks = theirs.Translate_ranks(None, ours)
        theirs.Free()
        ours.Free()
        return [int(r) for r in ranks if r != MPI.UNDEFINED]

    # The thread.

    def _attend(self) -> None:
        period = min(0.25, self.timeout / 4)
        while not self._stop.wait(period):
            self._take_messages()
            late = list(filter(self._is_late, list(self._waits.values())))
            if late and self.error is None:
                self._give_up(late[0])
            elif not all(wait.breakable for wait in late):
                self._end_the_job()  # another rank has given up, and this one can't see it

    def _is_late(self, wait: Wait) -> bool:
        """First for the lowest rank of those that wait, then for twice as many, and so on: one asks
        for all, or a few do."""
        patience = self.timeout + GRACE * wait.ranks.index(self._comm.rank).bit_length()
        return monotonic() - wait.since > patience

    def _take_messages(self) -> None:
        status = MPI.Status()
        with self._taking:
            self._sends = [send for send in self._sends if not send.Test()]
            while self._comm.iprobe(status=status):
                source, kind = status.source, status.tag
                self._take(self._comm.recv(source=source, tag=kind), source, kind)

    def _take(self, said, source, kind) -> None:
        if kind == ASK:
            self._send((said, self._own_waits(), self._place()), source, ANSWER)
        elif kind == ANSWER and said[0] == self._number:
            self._answers[source] = said[1:]
        elif kind == GIVE_UP:
            self._fail(*said, ())

    def _fail(self, error, told, ranks) -> None:
        """This rank makes no check any more: ``ranks``, and whoever waits for it in any check, wait
        in vain. ``told`` know it already."""
        if self.error is None:
            waiting = {rank for wait in list(self._waits.values()) for rank in wait.ranks}
            waiting |= set(ranks)
            for rank in waiting - told:
                self._send((error, told | waiting), rank, GIVE_UP)
            self.error = error

    def _send(self, what, rank, kind) -> None:
        self._sends.append(self._comm.isend(what, rank, kind))

    def _own_waits(self) -> list[str]:
        return [wait.what for wait in list(self._waits.values())]

    def _place(self) -> str:
        """Where this rank's program is, in words."""
        if self._left:
            return self._left
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "its thread has ended"
        stack = [f for f in traceback.extract_stack(frame) if not f.filename.startswith(_PACKAGE)]
        if not stack:
            return "in spimpi"
        return f"in {stack[-1].name} ({os.path.basename(stack[-1].filename)}:{stack[-1].lineno})"

    def _give_up(self, late: Wait) -> None:
        """Ask the others, and tell those who wait that they wait in vain."""
        with self._taking:
            self._number += 1
            self._answers = {self._comm.rank: (self._own_waits(), self._place())}
            for rank in late.ranks:
                if rank != self._comm.rank:
                    self._send(self._number, rank, ASK)
        start = monotonic()
        while len(self._answers) < len(late.ranks) and monotonic() - start < GRACE:
            sleep(0.01)
            self._take_messages()
        if self.error is not None or late not in self._waits.values():
            return  # another rank was faster, or the last one has come meanwhile
        with self._taking:
            self._fail(self._in_words(late), {self._comm.rank}, late.ranks)
        if not late.breakable:
            self._end_the_job()

    def _end_the_job(self) -> None:
        print(f"spimpi: {self.error}", file=sys.stderr, flush=True)
        self._comm.Abort(EXIT_STATUS)

    def _in_words(self, late: Wait) -> str:
        came = [r for r in late.ranks if late.what in self._answers.get(r, ((), ""))[0]]
        missing = [r for r in late.ranks if r not in came]
        told = [self._about(r) for r in missing[:SHOWN]]
        more = len(missing) - SHOWN
        told += [f"… ({len(missing)} in all)"] * (more > 0)
        return one_line(
            f"{late.what}: given up after {self.timeout:g} s; {ranks_text(came)} "
            f"wait{'s' * (len(came) == 1)} in it; not in it: {'; '.join(told) or 'none'}"
        )

    def _about(self, rank) -> str:
        if rank not in self._answers:
            return f"rank {rank} does not answer"
        waits, place = self._answers[rank]
        return f"rank {rank} {place}, waits in {' and '.join(waits) if waits else 'no check'}"
