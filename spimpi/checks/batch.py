"""``with ctx.batch():`` many checks, one reduction at its end.

The checks over the context's world share one reduction of 48 bytes, those over each other
communicator one more. Where there are sums, painted tensors or weights, their words follow in one
Allgather for each of these communicators. Hand-offs in a batch are exchanged between their two ends
meanwhile; their failures travel in a second record of the world's, so that every rank of the context
raises the same error. The world's first record tells whether a rank has left the batch by an
exception: nothing else is begun before it, so that such a one leaves nothing half done.
"""

from spimpi.checks.check import HANDOFFS, Check, Rule
from spimpi.checks.pending import Group, PendingVerdict, error_of
from spimpi.checks.session import ELSEWHERE, HANDED_OVER
from spimpi.errors import CorruptionError, IncompleteError, SpimpiError, UsageError
from spimpi.fingerprint.tag import MASK, Tag
from spimpi.one_traceback import mark
from spimpi.trace.schema import Established


class Batch:
    """The checks of a batch, in the order of the calls. Made by ``DistributedContext.batch``."""

    def __init__(self, ctx):
        self.ctx = ctx
        self._entries: dict = {ctx.session: []}  # session -> (check, pending verdict, raises)
        self._began = False
        self._handoffs: list = []  # (exchange under way, verdict, raises)
        self._tensors: dict = {}  # tag -> (global shape, dtype)
        self._contents: dict = {}  # tag, check, places -> words

    def __enter__(self):
        if self._began:
            msg = "this batch has ended: make another one with ctx.batch()"
            raise UsageError(msg)
        if self.ctx.open_batch is not None:
            msg = "a batch of this context is open already: batches do not nest"
            raise UsageError(msg)
        self.ctx.open_batch, self._began = self, True
        return self

    def __exit__(self, kind, error, traceback):
        self.ctx.open_batch = None
        if kind is None:
            self._settle()
        else:
            self._take_back()
            if issubclass(kind, Exception):
                self.ctx.session.withdraw()

    def add(self, session, check: Check, raises: bool) -> PendingVerdict:
        """Take a check whose words are known. Local."""
        check.waits = True
        if check.error is None:
            try:
                self._require_one_tensor(check)
            except UsageError as caught:
                check.error = caught
        pending = PendingVerdict(check.name)
        self._entries.setdefault(session, []).append((check, pending, raises))
        return pending

    def add_handoff(self, exchange, raises: bool) -> PendingVerdict:
        """Take a hand-off under way; ``exchange.finish()`` gives its verdict or raises. Local.

        Hand-offs are finished by ``exchange.order``, so that no ring of ranks waits in a circle.
        """
        pending = PendingVerdict("pipeline hand-off")
        self._handoffs.append((exchange, pending, raises))
        return pending

    def _require_one_tensor(self, check: Check) -> None:
        """Raise UsageError where the tag has stood for another tensor in this batch."""
        if check.shape is None or check.rule is Rule.LOCAL:
            return
        tensor = check.shape, check.dtype
        known = self._tensors.setdefault(check.tag, tensor)
        if known != tensor:
            was, now = (f"{dtype} of global shape {shape}" for shape, dtype in (known, tensor))
            msg = f"the tag stands for two tensors in one batch: {was}, and {now}"
            raise UsageError(msg)
        slabs = tuple(slab for _, slab in (*check.contributed, *check.held))
        gathered = b"" if check.words is None else check.words.tobytes()
        words = check.given, check.got, gathered
        if self._contents.setdefault((check.tag, check.name, slabs), words) != words:
            msg = (
                f"the tag stands for two tensors in one batch: two {check.name} checks of other "
                "data have it; give each step or tensor a tag of its own"
            )
            raise UsageError(msg)

    def _settle(self) -> None:
        """Reduce, finish hand-offs, judge, and raise what is to be raised. Collective."""
        world = self.ctx.session
        entries = [(world, self._entries.pop(world)), *self._entries.items()]
        entries[0][1].append((_handoff_check(), PendingVerdict(HANDOFFS), True))
        groups = [(Group(session, [c for c, _, _ in some]), some) for session, some in entries]
        for session, _ in entries:
            session.judge_requests()
        first, others = groups[0][0], [group for group, _ in groups[1:]]
        first.start(ELSEWHERE if others else HANDED_OVER if self._handoffs else MASK)
        try:
            merged = [first.wait()]
        except IncompleteError:
            self._take_back()
            raise
        place = merged[0][5]
        if place < ELSEWHERE:  # a rank left the batch: nothing else may be waited for
            self._take_back()
            first.judge(merged[0])
        # All ranks are here, so the other end of a hand-off is too.
        handed = [_handoff_check(*self._finished())] if place != MASK else []
        for group in others:
            group.start()
        merged += [group.wait() for group in others]
        for (group, _), words in zip(groups, merged):
            group.follow(words)
        errors = [_judged(group, words, some) for (group, some), words in zip(groups, merged)]
        if handed:
            group = Group(world, handed)
            group.start()
            some = [(handed[0], PendingVerdict(HANDOFFS), True)]
            errors[0] = errors[0] or _judged(group, group.wait(), some)
        elsewhere = None
        if place == ELSEWHERE:
            elsewhere = self._first_elsewhere(next((e for e in errors[1:] if e), None))
        error = errors[0] or elsewhere
        if error:
            raise mark(error, world.rank)

    def _finished(self) -> tuple:
        """Finish the hand-offs: those that failed, and the first error. Collective over their ends."""
        failed, error = [], None
        for exchange, pending, raises in sorted(self._handoffs, key=lambda one: one[0].order):
            try:
                verdict = pending._verdict = exchange.finish()
            except SpimpiError as caught:
                error = error or caught
                continue
            if raises and not verdict:
                failed.append(verdict)
        return failed, error

    def _take_back(self) -> None:
        """The hand-offs are not finished. Local."""
        for exchange, _, _ in reversed(self._handoffs):
            exchange.take_back()

    def _first_elsewhere(self, own):
        """The error of the lowest rank that met one over another communicator. Collective."""
        told = None
        if own is not None:
            verdict = own.verdict if isinstance(own, CorruptionError) else None
            told = type(own), str(own), verdict
        said = next((t for t in self.ctx.session.comm.allgather(told) if t), None)
        if said is None:
            return None
        kind, text, verdict = said
        return CorruptionError(verdict) if verdict is not None else kind(text)


def _judged(group: Group, merged, entries):
    """Give every pending verdict its own; returns the error to raise, or None."""
    try:
        verdicts = group.judge(merged)
    except SpimpiError as error:
        return error
    for (_, pending, _), verdict in zip(entries, verdicts):
        pending._verdict = verdict
    bad = [v for (_, _, raises), v in zip(entries, verdicts) if raises and not v]
    return error_of(bad[0]) if bad else None


def _handoff_check(failed=(), error=None) -> Check:
    """The hand-offs' failures on this rank, as a check that the whole world settles; without any,
    what the world settles where it has no other check."""
    check = Check(HANDOFFS, Tag(name=HANDOFFS), Rule.LOCAL, Established(0))
    check.seal()
    check.error, check.n_bad = error, len(failed)
    check.complaint = lambda: {"verdict": failed[0]}
    return check
