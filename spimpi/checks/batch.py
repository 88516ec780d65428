"""``with ctx.batch():`` many checks, one reduction at its end.

The checks over the context's world share one reduction of 48 bytes, those over each other
communicator one more. Where there are sums, painted tensors or weights, their words follow in one
Allgather for each of these communicators. Hand-offs in a batch are exchanged between their two ends
meanwhile; their failures travel in the world's record, so that every rank of the context raises the
same error.
"""

from operator import itemgetter

from spimpi.checks.check import HANDOFFS, Check, Rule
from spimpi.checks.pending import Group, PendingVerdict, error_of
from spimpi.checks.session import ELSEWHERE
from spimpi.errors import CorruptionError, SpimpiError, UsageError
from spimpi.fingerprint.tag import MASK, Tag
from spimpi.one_traceback import mark
from spimpi.trace.schema import Established


class Batch:
    """The checks of a batch, in the order of the calls. Made by ``DistributedContext.batch``."""

    def __init__(self, ctx):
        self.ctx = ctx
        self._entries: dict = {ctx.session: []}  # session -> (check, pending verdict, raises)
        self._handoffs: list = []  # (order, what finishes it, verdict, raises)
        self._tensors: dict = {}  # tag -> (global shape, dtype)
        self._contents: dict = {}  # tag, check, places -> words

    def __enter__(self):
        if self.ctx.open_batch is not None:
            msg = "a batch of this context is open already: batches do not nest"
            raise UsageError(msg)
        self.ctx.open_batch = self
        return self

    def __exit__(self, kind, error, traceback):
        self.ctx.open_batch = None
        if kind is None:
            self._settle()
        else:  # hand-offs may be under way: their buffers stay until the communicator goes
            self.ctx.session.abandoned.append(self._handoffs)
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

    def add_handoff(self, order, finish, raises: bool) -> PendingVerdict:
        """Take a hand-off under way; ``finish()`` gives its verdict or raises. Local.

        ``order``: hand-offs are finished by it, so that no ring of ranks waits in a circle.
        """
        pending = PendingVerdict("pipeline hand-off")
        self._handoffs.append((order, finish, pending, raises))
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
        """Finish hand-offs, reduce, judge, and raise what is to be raised. Collective."""
        failed, error = [], None
        for _, finish, pending, raises in sorted(self._handoffs, key=itemgetter(0)):
            try:
                verdict = pending._verdict = finish()
            except SpimpiError as caught:
                error = error or caught
                continue
            if raises and not verdict:
                failed.append(verdict)
        world = self.ctx.session
        entries = [(world, self._entries.pop(world)), *self._entries.items()]
        entries[0][1].append((_handoff_check(failed, error), PendingVerdict(HANDOFFS), True))
        groups = [(Group(session, [c for c, _, _ in some]), some) for session, some in entries]
        for i, (group, _) in enumerate(groups):
            group.start(ELSEWHERE if i == 0 and len(groups) > 1 else MASK)
        merged = [groups[0][0].wait()]
        if merged[0][5] < ELSEWHERE:  # a rank left the batch: it may be missing in the others too
            groups[0][0].judge(merged[0])
        merged += [group.wait() for group, _ in groups[1:]]
        for (group, _), words in zip(groups, merged):
            group.follow(words)
        errors = [_judged(group, words, some) for (group, some), words in zip(groups, merged)]
        elsewhere = None
        if merged[0][5] == ELSEWHERE:
            elsewhere = self._first_elsewhere(next((e for e in errors[1:] if e), None))
        first = errors[0] or elsewhere
        if first:
            raise mark(first, self.ctx.session.rank)

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


def _handoff_check(failed, error) -> Check:
    """The hand-offs' failures on this rank, as a check that the whole world settles."""
    check = Check(HANDOFFS, Tag(name=HANDOFFS), Rule.LOCAL, Established(0))
    check.seal()
    check.error, check.n_bad = error, len(failed)
    check.complaint = lambda: {"verdict": failed[0]}
    return check
