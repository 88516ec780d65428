"""From every rank's checks to one verdict: totals, the first failure, what was established."""

from dataclasses import dataclass, replace

import numpy as np
from mpi4py import MPI

from spimpi.checks.recorder import StageTotals, place_of
from spimpi.checks.verdict import Verdict, Where
from spimpi.errors import CorruptionError, IncompleteError
from spimpi.inference.token_words import token_keys, token_words
from spimpi.reduction import PATIENCE, together
from spimpi.trace.analysis.order import program_keys
from spimpi.trace.schema import EVENT, Established, Op, Stage
from spimpi.verification.accounts import account, summed, told

HANDED_ON = (Op.HANDOFF,)


@dataclass
class Outcome:
    """What a run found. The same on every rank, but for ``tokens``, which rank 0 has.

    token_words: each step's word of the tokens as they were chosen (inference/token_words.py).
    """

    verdict: Verdict
    totals: dict[Stage, StageTotals]
    seconds: dict[str, float]
    n_events: int
    n_failed: int
    tokens: np.ndarray | None
    expected_from: str
    completed_runs: int = 1
    token_words: np.ndarray | None = None
    seed: int = 0

    @property
    def exit_status(self) -> int:
        """0 verified, 1 corrupted, 3 incomplete; of the tokens as they are in memory now."""
        if self.n_failed or self.verdict.where or not self.are_those_chosen(self.tokens):
            return 1
        return 3 if self.verdict.missing else 0

    def answer(self) -> list[list[int]] | None:
        """The tokens, one list a prompt, to print: a copy that was looked at once more. Local.

        CorruptionError where the run passed and they are no longer those that it chose.
        """
        if self.tokens is None:
            return None
        tokens = self.tokens.tolist()
        if not self.n_failed and not self.are_those_chosen(tokens):
            raise CorruptionError(tokens_changed())
        return tokens

    def are_those_chosen(self, tokens) -> bool:
        """Whether tokens [prompts, steps] are those that the run chose; None: nobody's are. Local."""
        return those_chosen(tokens, self.token_words, self.seed)


def those_chosen(tokens, words, seed: int) -> bool:
    """Whether tokens [prompts, steps] have these words, one a step; None: nobody's do. Local."""
    if tokens is None or words is None:
        return True
    return np.array_equal(token_words(tokens, token_keys(seed, len(tokens), len(words))), words)


CHANGED = "they changed in memory after the run's last look at them"


def tokens_changed(detail: str = CHANGED, rank: int = 0) -> Verdict:
    """The verdict on tokens of a rank that are no longer those that were chosen."""
    where = Where("at rest", "tokens", 0, -1, -1, rank, "", rank, "", "", detail)
    return Verdict(False, Established(0), where, check="at rest")


def any_failed(ctx, recorder) -> bool:
    """Whether any rank has a failure so far, the same on every rank. Collective.

    IncompleteError on every rank where the ranks' counts do not fit together.
    """
    own = sum(t.failed for t in recorder.totals.values())
    total = ctx.world.allreduce(own, op=MPI.SUM)
    heard, problem = told(ctx.world, own)
    if not problem and total != sum(heard):
        problem = f"two reductions of the failed checks differ: {total} and {sum(heard)}"
    with together(ctx.world, PATIENCE):
        if problem:
            msg = f"the ranks' counts do not fit together: {problem}"
            raise IncompleteError(msg)
    return total > 0


def conclusion(
    ctx, job, recorder, names, has_golden, n_due, changed, source, tokens_hold=True
) -> "Conclusion":
    """One verdict of all ranks' checks, the same on every rank. Collective.

    n_due: how many checks were due on this rank; changed: whether each injected fault changed
    anything here; source: where the golden run is from, of which rank 0's word counts; tokens_hold:
    whether this rank's tokens are still those that were chosen. Every exchange is made whatever the
    ones before brought. Where one of them went wrong, on one rank or on all, every rank says
    incomplete.
    """
    sums = summed(ctx, account(recorder, n_due, changed))
    said, deaf = told(ctx.world, replace(_Said.of(recorder, names), tokens_hold=tokens_hold))
    if not deaf and [one.rank for one in said] != list(range(ctx.world.size)):
        deaf = "the ranks' words arrived in another order"
    first = min((one for one in said if one.key), key=_Said.order, default=None)
    mine = (source, _golden_says(recorder, first)) if ctx.rank == 0 else None
    answer = ctx.world.bcast(mine)
    problems = [p for p in (sums.problem, deaf) if p]
    arrived = isinstance(answer, tuple) and len(answer) == 2
    if not arrived or (ctx.rank == 0 and answer != mine):
        problems.append("rank 0's word on the golden run did not arrive")
        answer = "", None
    source, golden_failed = answer
    n_failed = sum(one.n_failed for one in said)
    if not problems and n_failed != sums.n_failed:
        problems.append(
            f"two reductions of what was counted differ: {sums.n_failed} failed checks, and "
            f"{n_failed} by the ranks' own words"
        )
    if not problems and n_failed and not first:
        problems.append(f"{n_failed} checks failed, and no rank tells which")
    if not problems and first and not n_failed:
        problems.append("a rank tells of a failed check, and no rank counts one")
    where = _where(ctx, first, names, golden_failed) if first else None
    n_failed = max(n_failed, 1) if where else n_failed
    missing = [] if problems else _missing(job, sums, has_golden)
    kinds = established(ctx, job, has_golden) if not where else Established(0)
    verdict = Verdict(not where and not missing, kinds, where, tuple(missing))
    spoilt = [one.rank for one in said if not one.tokens_hold]
    if spoilt and not n_failed:
        verdict, n_failed = tokens_changed(rank=spoilt[0]), 1
    mine = Conclusion(verdict, sums.totals, sums.n_events, n_failed, source or "")
    return _agreed(ctx, mine, "; ".join(problems))


@dataclass(frozen=True)
class Conclusion:
    """A verdict with the numbers behind it."""

    verdict: Verdict
    totals: dict[Stage, StageTotals]
    n_events: int
    n_failed: int
    expected_from: str


def _missing(job, sums, has_golden) -> list[str]:
    """What keeps a run without a failure from being verified."""
    missing = []
    if job.golden_wanted and not has_golden:
        missing.append("the golden comparison that was asked for")
    if sums.n_due != sums.n_events:
        missing.append(f"{sums.n_due} checks were due, {sums.n_events} were recorded")
    idle = [str(f) for f, n in zip(job.faults, sums.changed) if not n]
    if idle and not sums.n_failed:
        missing.append(f"injected faults that changed nothing: {', '.join(idle)}")
    return missing


ROUNDS = 2  # what one rank alone heard in the first round, it tells all in the second


def _agreed(ctx, mine: Conclusion, problem: str) -> Conclusion:
    """``mine`` where all ranks concluded it and none has a problem, else incomplete. Collective.

    What reaches one rank alone in the last round stays with that rank, which says incomplete.
    """
    troubled = False
    for _ in range(ROUNDS):
        heard, deaf = told(ctx.world, (repr(mine), problem, troubled))
        problem = problem or deaf
        odd = [r for r, (text, _, _) in enumerate(heard) if text != heard[0][0]]
        troubled |= bool(problem or odd) or any(words or heard_of for _, words, heard_of in heard)
    if not troubled:
        return mine
    if mine.verdict.where is not None and not odd and not deaf:
        return mine  # it has happened, whatever went wrong with counting
    words = [f"rank {r}: {words}" for r, (_, words, _) in enumerate(heard) if words]
    words += [f"ranks 0 and {odd[0]} concluded differently"] if odd and not words else []
    words += [problem or "a rank heard otherwise"] if not words else []
    said = f"the ranks' counts do not fit together: {'; '.join(words[:3])}"
    return replace(mine, verdict=Verdict(False, Established(0), None, (said,)), n_failed=0)


def first_failure(ctx, recorder, names: list[str]) -> Where | None:
    """The failure that comes first in program order, on every rank. Collective."""
    said = ctx.world.allgather(_Said.of(recorder, names))
    first = min((one for one in said if one.key), key=_Said.order, default=None)
    if first is None:
        return None
    golden_failed = ctx.world.bcast(_golden_says(recorder, first) if ctx.rank == 0 else None)
    return _where(ctx, first, names, golden_failed)


@dataclass(frozen=True)
class _Said:
    """What a rank has to say: how many failures it has, its first one in program order, and whether
    its tokens are still those that were chosen.

    key: the place in program order, () where it has none; of several at one place that which says
    the most of its cause (``authority``, 0 the most).
    """

    n_failed: int
    rank: int
    key: tuple = ()
    authority: int = 0
    raw: bytes = b""
    note: str = ""
    tokens_hold: bool = True

    @classmethod
    def of(cls, recorder, names) -> "_Said":
        failures = recorder.all_failures()
        n_failed = sum(t.failed for t in recorder.totals.values())
        if not failures.size:
            return cls(n_failed, recorder.rank)
        keys = np.array(program_keys(failures, names.index("embed") + 1, names), np.int64)
        places = [tuple(place) for place in keys.T.tolist()]
        first = min(places)
        mine = failures[[place == first for place in places]]
        event = min(mine, key=_authority)
        return cls(
            n_failed, recorder.rank, first, _authority(event), event.tobytes(),
            _note(recorder, event),
        )

    def order(self) -> tuple:
        """The first in program order. A rank whose data changed speaks before one that only met the
        NaN that came of it (all meet it: their row maxima are reduced), and one that can name the
        culprit before one that cannot; else the lowest."""
        return self.key, self.authority, self.rank

    @property
    def event(self):
        return np.frombuffer(self.raw, EVENT)[0]


def _authority(event) -> int:
    """How much a failure says of its cause, 0 the most."""
    if event["peer"] < 0:
        return 2
    return int(event["nonfinite"] > 0 and event["fingerprint"] == event["expected"])


def _note(recorder, event) -> str:
    return recorder.notes.get(
        (int(event["step"]), int(event["microbatch"]), int(event["layer"])), ""
    )


def _golden_says(recorder, first) -> bool | None:
    """Whether the golden comparison of the same tensor failed; None where there is none, as for
    weights. On rank 0, which makes it. Local.

    The golden fingerprint is taken from the lowest replica, so it decides between two.
    """
    if first is None or first.event["stage"] in (Stage.FABRIC, Stage.WEIGHTS):
        return None
    if not recorder.totals[Stage.GOLDEN].checks:
        return None
    return place_of(first.event) in recorder.golden_failures


def _where(ctx, first, names, golden_failed) -> Where:
    event, note, speaker = first.event, first.note, first.rank
    op = Op(int(event["op"]))
    peer = int(event["peer"])
    rank = peer if peer >= 0 and op not in HANDED_ON else None
    details = [note] if note else []
    if op == Op.HANDOFF:
        rank = speaker
        details.append(f"received from rank {peer} ({ctx.hosts[peer]})")
    if op == Op.AGREEMENT and rank is None and ctx.tensor.size == 2:
        pair = _tensor_pair(ctx, speaker)
        if golden_failed is None:
            details.append(f"ranks {pair[0]} and {pair[1]} differ, and nothing tells which is right")
        else:
            rank = pair[0] if golden_failed else pair[1]
            details.append(f"the golden run confirms rank {pair[1] if golden_failed else pair[0]}")
    if event["nonfinite"]:
        details.append(f"{int(event['nonfinite'])} rows with NaN or Inf")
    if op == Op.CONTENT and rank is None and event["stage"] == Stage.WEIGHTS:
        details.append("each rank's slice comes out the same once more")
    if op == Op.CONTENT and rank is None and event["stage"] == Stage.GOLDEN:
        details.append("every check on the ranks held: the wrong value was consistent")
    return Where(
        op.name.lower().replace("_", " "), names[event["tensor"]], int(event["step"]),
        int(event["layer"]), int(event["microbatch"]), rank,
        ctx.hosts[rank] if rank is not None else "", speaker,
        f"{int(event['expected']):016x}", f"{int(event['fingerprint']):016x}",
        "; ".join(details), int(event["repeat"]),
    )  # fmt: skip


def _tensor_pair(ctx, rank) -> tuple[int, int]:
    place = ctx.grid.coordinates(rank)
    return tuple(ctx.grid.rank_of(*place[:3], t) for t in range(2))


def established(ctx, job, has_golden: bool) -> Established:
    """What a pass of this run proves."""
    kinds = Established.MOVED
    if ctx.tensor.size > 1 or ctx.sequence.size > 1:
        kinds |= Established.AGREED
    if job.exact:
        kinds |= Established.COMPUTED
    if has_golden:
        kinds |= Established.EXPECTED
    return kinds
