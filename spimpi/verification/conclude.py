"""From every rank's checks to one verdict: totals, the first failure, what was established."""

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from spimpi.checks.recorder import StageTotals, place_of
from spimpi.checks.verdict import Verdict, Where
from spimpi.errors import CorruptionError
from spimpi.inference.token_words import token_keys, token_words
from spimpi.reduction import empty_records
from spimpi.trace.analysis.order import program_keys
from spimpi.trace.schema import Established, Op, Stage

HANDED_ON = (Op.HANDOFF,)
NO_PLACE = (float("inf"),)  # after all places in program order


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
        if self.n_failed or not self.are_those_chosen(self.tokens):
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
            detail = "they changed in memory after they were verified; nothing of them is printed"
            raise CorruptionError(_tokens_changed(detail))
        return tokens

    def are_those_chosen(self, tokens) -> bool:
        """Whether tokens [prompts, steps] are those that the run chose; None: nobody's are. Local."""
        if tokens is None or self.token_words is None:
            return True
        keys = token_keys(self.seed, len(tokens), len(self.token_words))
        words = token_words(tokens, keys)
        return np.array_equal(words, self.token_words)


def _tokens_changed(detail: str) -> Verdict:
    """The verdict on tokens of this process that are no longer those that were chosen."""
    where = Where("at rest", "tokens", 0, -1, -1, 0, "", 0, "", "", detail)
    return Verdict(False, Established(0), where, check="at rest")


def global_totals(ctx, recorder) -> tuple[dict[Stage, StageTotals], int, int]:
    """Checks, failures, bytes and mean seconds of every stage over all ranks. Collective."""
    stages = list(Stage)
    records = empty_records(len(stages) + 1)
    for record, stage in zip(records, stages):
        totals = recorder.totals[stage]
        record["total"], record["count"] = totals.n_bytes, totals.checks
    records[-1]["count"] = recorder.n_events
    records[-1]["total"] = sum(t.failed for t in recorder.totals.values())
    merged = ctx.records.merge(ctx.world, records)
    failed = np.array([recorder.totals[s].failed for s in stages], np.int64)
    seconds = np.array([recorder.totals[s].seconds for s in stages])
    ctx.world.Allreduce(MPI.IN_PLACE, failed, op=MPI.SUM)
    ctx.world.Allreduce(MPI.IN_PLACE, seconds, op=MPI.SUM)
    seconds /= ctx.world.size
    totals = {
        stage: StageTotals(
            int(merged[i]["count"]), int(failed[i]), int(merged[i]["total"]), float(seconds[i])
        )
        for i, stage in enumerate(stages)
    }
    return totals, int(merged[-1]["count"]), int(merged[-1]["total"])


def any_failed(ctx, recorder) -> bool:
    """Whether any rank has a failure so far. Collective."""
    own = sum(t.failed for t in recorder.totals.values())
    return bool(ctx.world.allreduce(own, op=MPI.SUM))


def first_failure(ctx, recorder, names: list[str]) -> Where | None:
    """The failure that comes first in program order, on every rank. Collective.

    The lowest rank that has it tells.
    """
    failures = recorder.all_failures()
    keys = np.array(program_keys(failures, names.index("embed") + 1, names), np.int64)
    places = [tuple(place) for place in keys.T.tolist()]
    first = ctx.world.allreduce(min(places, default=NO_PLACE), op=MPI.MIN)
    if first == NO_PLACE:
        return None
    mine = failures[[place == first for place in places]]
    # A rank whose data changed speaks before one that only met the NaN that came of it (all meet
    # it: their row maxima are reduced), and one that can name the culprit before one that cannot.
    mine = sorted(mine, key=_authority)
    rank, size = ctx.world.rank, ctx.world.size
    bid = _authority(mine[0]) * size + rank if mine else 3 * size
    speaker = ctx.world.allreduce(bid, op=MPI.MIN) % size
    said = None
    if rank == speaker:
        event = mine[0]
        said = (event.tobytes(), _note(recorder, event))
    raw, note = ctx.world.bcast(said, root=speaker)
    event = np.frombuffer(raw, failures.dtype)[0]
    return _where(ctx, event, names, speaker, note, _golden_says(ctx, recorder, event))


def _authority(event) -> int:
    """How much a failure says of its cause, 0 the most."""
    if event["peer"] < 0:
        return 2
    return int(event["nonfinite"] > 0 and event["fingerprint"] == event["expected"])


def _note(recorder, event) -> str:
    return recorder.notes.get(
        (int(event["step"]), int(event["microbatch"]), int(event["layer"])), ""
    )


def _golden_says(ctx, recorder, event) -> bool | None:
    """Whether the golden comparison of the same tensor failed; None where there is none, as for
    weights.

    The golden fingerprint is taken from the lowest replica, so it decides between two.
    """
    answer = None
    in_run = event["stage"] not in (Stage.FABRIC, Stage.WEIGHTS)
    if ctx.rank == 0 and in_run and recorder.totals[Stage.GOLDEN].checks:
        answer = place_of(event) in recorder.golden_failures
    return ctx.world.bcast(answer)


def _where(ctx, event, names, speaker, note, golden_failed) -> Where:
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
