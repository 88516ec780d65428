"""Checks that are settled at once, or together at the end of a batch.

All of them go through one reduction of 48 bytes (``Group``). Where the merged record is not
what clean checks give, and only there, the ranks tell each other more (checks/failure.py).
"""

from collections.abc import Callable

from mpi4py import MPI

from spimpi.checks.check import Check, fold
from spimpi.checks.failure import explain, holding
from spimpi.checks.session import Session, session_of
from spimpi.checks.verdict import Verdict
from spimpi.errors import CorruptionError, SpimpiError, UsageError
from spimpi.fingerprint.tag import MASK, Tag


class Group:
    """Checks of one session that share a reduction. All methods are collective over it."""

    def __init__(self, session: Session, checks: list[Check]):
        self.session, self.checks = session, checks
        self.record, self.clean = fold(checks)
        self._request = None

    def merge(self) -> list[Verdict]:
        """Reduce and judge, blocking."""
        return self.judge(self.session.merge(self.record))

    def start(self, place: int = MASK) -> None:
        """Start the reduction; ``place`` is for whoever merges something else by minimum."""
        self._request = self.session.start([*self.record[:5], place])

    def test(self) -> bool:
        """Whether the reduction is complete; only ``finish`` judges."""
        return self._request[0].Test()

    def finish(self) -> list[Verdict]:
        """Wait for the reduction and judge."""
        return self.judge(self.wait())

    def wait(self) -> list[int]:
        """The merged record."""
        request, _, merged = self._request
        request.Wait()
        return merged.tolist()

    def judge(self, merged: list[int]) -> list[Verdict]:
        """One verdict for each check; UsageError on every rank where one could not be made."""
        if merged[:5] == self.clean:
            for c in self.checks:
                if len(c.contributed) == 1 and not c.n_loose:
                    self.session.remember(c.tag, c.contributed[0][1], c.given)
            return [holding(c) for c in self.checks]
        return explain(self.session, self.checks)


def built(check: Check, build: Callable) -> Check:
    """Run the local part of a check; its error is kept, for all ranks to raise together."""
    try:
        if not isinstance(check.tag, Tag):
            msg = f"expected a spimpi.Tag, found {type(check.tag).__name__}"
            raise UsageError(msg)
        build(check)
        check.seal()
    except SpimpiError as error:
        check.error = error
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        check.error = UsageError(f"{type(error).__name__}: {error}")
    return check


def settle(comm, check: Check, build: Callable, raises: bool, ctx):
    """Build a check and settle it: at once, or at the end of the context's batch. Collective."""
    require_comm(comm)
    session = session_of(comm, ctx)
    built(check, build)
    if ctx is not None and ctx.open_batch is not None:
        return ctx.open_batch.add(session, check, raises)
    return enforce(Group(session, [check]).merge()[0], raises)


def require_comm(comm) -> None:
    """Raise UsageError for what is no communicator of ranks that this one belongs to."""
    if isinstance(comm, MPI.Comm) and comm == MPI.COMM_NULL:
        msg = "a check needs a communicator that this rank belongs to, found MPI.COMM_NULL"
        raise UsageError(msg)
    if not isinstance(comm, MPI.Intracomm):
        msg = f"a check's first argument is an intracommunicator, found {type(comm).__name__}"
        raise UsageError(msg)


def enforce(verdict: Verdict, raises: bool) -> Verdict:
    """The verdict, or CorruptionError where it fails and is to raise."""
    if raises and not verdict:
        raise CorruptionError(verdict)
    return verdict


class PendingVerdict:
    """The verdict of a check in a batch: that of ``Verdict`` once the batch has ended.

    Asking it earlier raises UsageError.
    """

    def __init__(self, check: str):
        self._check, self._verdict = check, None

    def _settled(self) -> Verdict:
        if self._verdict is None:
            msg = (
                f"the verdict of this {self._check} is pending: it is known when its batch has "
                "ended (leave the `with ctx.batch():` block first)"
            )
            raise UsageError(msg)
        return self._verdict

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._settled(), name)

    def __bool__(self):
        return bool(self._settled())

    def __str__(self):
        return str(self._settled())

    def __repr__(self):
        return f"<pending {self._check}>" if self._verdict is None else repr(self._verdict)
