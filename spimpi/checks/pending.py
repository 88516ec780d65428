"""Checks that are settled at once, or together at the end of a batch.

All of them go through one reduction of 48 bytes (``Group``), and those that compare everybody's
words (Rule.GATHERED) through one Allgather after it. Where the merged record is not what clean
checks give, and only there, the ranks tell each other more (checks/failure.py).
"""

from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from spimpi.checks.check import FAILED, Check, Rule, fold
from spimpi.checks.coverage import Compared, holding
from spimpi.checks.failure import explain
from spimpi.checks.session import ELSEWHERE, Session, session_of
from spimpi.checks.verdict import Verdict
from spimpi.errors import CorruptionError, IncompleteError, SpimpiError, UsageError
from spimpi.fingerprint.tag import MASK, Tag
from spimpi.one_traceback import told_by_rank_0
from spimpi.reduction import merged_here


class Group:
    """Checks of one session that share a reduction. All methods are collective over it.

    The words of checks that gather them are as many on all ranks only if these make the same
    checks, which the record tells: so they follow it. Only where ``in_one`` do the record and the
    words of a single check travel together: a request's, whose call is the same on all ranks.
    """

    def __init__(self, session: Session, checks: list[Check], in_one: bool = False):
        self.session, self.checks = session, checks
        self.record, self.clean = fold(checks)
        words = [c.words for c in checks if c.rule is Rule.GATHERED]
        self._words = np.concatenate(words) if words else None
        self._in_one = in_one and self._words is not None
        self._request = self._following = self._everyone = self._compared = None

    def merge(self) -> list[Verdict]:
        """Reduce and judge, blocking."""
        self.start()
        return self.finish()

    def start(self, place: int = MASK) -> None:
        """Start the reduction; ``place`` is for whoever merges something else by minimum, and for
        a rank that takes no part (checks/session.py)."""
        record = [*self.record[:5], place]
        if not self._in_one:
            self._request = self.session.start(record)
            return
        own = np.concatenate([np.array(record, np.uint64), self._words])
        everyone = np.empty((self.session.size, own.size), np.uint64)
        self._request = self.session.comm.Iallgather(own, everyone), own, everyone

    def test(self) -> bool:
        """Whether the reduction is complete; only ``finish`` judges."""
        return self._request[0].Test()

    def finish(self) -> list[Verdict]:
        """Wait for the reduction and judge."""
        return self.judge(self.wait())

    def wait(self) -> list[int]:
        """The merged record."""
        request, _, merged = self._request
        try:
            self.session.wait(request, in_words(self.checks))
        except IncompleteError:  # it is under way still
            self.session.abandoned.append(self._request)
            raise
        return self._split(merged) if self._in_one else merged.tolist()

    def follow(self, merged: list[int]) -> None:
        """Start telling all ranks the words, if the merged record is clean, and what else they
        need for their verdicts. Never waits, so that ranks may have their groups in any order."""
        if merged[5] < ELSEWHERE or not self._is_clean(merged):
            return
        if len(self.checks) > 1:
            self._compared = Compared(self.session, self.checks, merged[4])
        if self._words is not None and not self._in_one:
            self._everyone = np.empty((self.session.size, self._words.size), np.uint64)
            self._following = self.session.comm.Iallgather(self._words, self._everyone)

    def judge(self, merged: list[int]) -> list[Verdict]:
        """One verdict for each check; UsageError on every rank where one could not be made."""
        if merged[5] < ELSEWHERE:
            self.session.n_left += 1
            msg = (
                f"{in_words(self.checks)}: nothing was checked, rank {merged[5]} takes no part: its "
                "call raised an error, which it tells itself"
            )
            raise UsageError(msg)
        if self._is_clean(merged):
            for c in self.checks:
                if len(c.contributed) == 1 and not c.n_loose and c.rule is not Rule.GATHERED:
                    self.session.remember(c.tag, c.contributed[0][1], c.given)
            size = self.session.size
            verdicts = [
                None if c.rule is Rule.GATHERED else holding(c, size, compares)
                for c, compares in zip(self.checks, self._which_compared(merged[4]))
            ]
        else:
            verdicts = explain(self.session, self.checks)
        if self._words is not None:
            self._conclude(verdicts)
        for c, verdict in zip(self.checks, verdicts):
            if c.tracer is not None:
                c.tracer.record(c, verdict, self.session.comm)
        return verdicts

    def _is_clean(self, merged) -> bool:
        """Whether a merged record is what clean checks give; its count then tells who compared."""
        return merged[:4] == self.clean[:4] and merged[4] < FAILED

    def _which_compared(self, n: int) -> list[bool]:
        """Of each check, whether any rank compared anything; ``n``: how many ranks, in all."""
        if len(self.checks) == 1:
            return [n > 0]
        if self._compared is None:
            self._compared = Compared(self.session, self.checks, n)
        return self._compared.wait()

    def _split(self, everyone) -> list[int]:
        """The merged record of all ranks' records and words, which are kept."""
        n = len(self.record)
        self._everyone = everyone[:, n:]
        return merged_here(everyone[:, :n])

    def _conclude(self, verdicts) -> None:
        """Give the checks that gather words their verdicts."""
        if self._following is not None:
            self._following.Wait()
        if self._everyone is None:
            self._everyone = np.empty((self.session.size, self._words.size), np.uint64)
            self.session.comm.Allgather(self._words, self._everyone)
        at = 0
        for i, c in enumerate(self.checks):
            if c.rule is Rule.GATHERED:
                own = self._everyone[:, at : at + c.words.size]
                verdicts[i] = c.conclude(self.session, own)
                at += c.words.size


def in_words(checks) -> str:
    """What all ranks make together: its kind, tensor, step and layer."""
    first = checks[0]
    text = f"{first.name} of {getattr(first.tag, 'name', first.tag)!r}"
    if isinstance(first.tag, Tag):
        text += f", step {first.tag.step}" + f", layer {first.tag.layer}" * (first.tag.layer >= 0)
    more = len(checks) - 1
    return text + f", and {more} more" * (more > 0)


def built(check: Check, build: Callable) -> Check:
    """Run the local part of a check; its error is kept, for all ranks to raise together."""
    if check.error is not None:
        return check
    try:
        if not isinstance(check.tag, Tag):
            msg = f"expected a spimpi.Tag, found {type(check.tag).__name__}"
            raise UsageError(msg)
        build(check)
        check.seal()
    except SpimpiError as error:
        check.error = error
    except Exception as error:  # whatever an array of anybody's raises, the others would wait
        check.error = UsageError(f"{type(error).__name__}: {error}")
    return check


def settle(comm, check: Check, build: Callable, raises: bool, ctx):
    """Build a check and settle it: at once, or at the end of the context's batch. Collective."""
    require_comm(comm)
    ctx = context_of(check, ctx)
    session = session_of(comm, ctx)
    check.tracer = None if ctx is None else ctx.tracer
    built(check, build)
    if ctx is not None and ctx.open_batch is not None:
        return ctx.open_batch.add(session, check, raises)
    with told_by_rank_0(session.rank):
        return enforce(Group(session, [check]).merge()[0], raises)


def require_comm(comm, whose: str = "a check") -> None:
    """Raise UsageError for what is no communicator of ranks that this one belongs to."""
    if isinstance(comm, MPI.Comm) and comm == MPI.COMM_NULL:
        msg = f"{whose} needs a communicator that this rank belongs to, found MPI.COMM_NULL"
        raise UsageError(msg)
    if not isinstance(comm, MPI.Intracomm):
        msg = f"{whose}'s first argument is an intracommunicator, found {type(comm).__name__}"
        raise UsageError(msg)


def context_of(check: Check, ctx):
    """The context that a check is given. What is none is the check's error, and counts as None:
    so the ranks that gave none meet this one, and raise it too."""
    if ctx is None or hasattr(ctx, "is_over"):
        return ctx
    msg = f"ctx= is a DistributedContext, or None, found {type(ctx).__name__}"
    check.error = UsageError(msg)
    return None


def enforce(verdict: Verdict, raises: bool) -> Verdict:
    """The verdict, or its error where it fails and is to raise."""
    if raises and not verdict:
        raise error_of(verdict)
    return verdict


def error_of(verdict: Verdict) -> SpimpiError:
    """What a verdict that does not hold raises: IncompleteError where nothing was found wrong."""
    if verdict.missing and verdict.where is None:
        return IncompleteError(str(verdict))
    return CorruptionError(verdict)


class PendingVerdict:
    """The verdict of a check in a batch: that of ``Verdict`` once the batch has ended.

    Asking it earlier raises UsageError; only ``str`` and ``repr`` then say that it is pending.
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
        return repr(self) if self._verdict is None else str(self._verdict)

    def __repr__(self):
        return f"<pending {self._check}>" if self._verdict is None else repr(self._verdict)
