"""What every rank counted, put together so that one wrong exchange does not pass.

Each number is summed over the ranks twice, by two MPI operations; what ranks tell each other is
compared with what they said themselves. Where it does not fit, that rank has a problem; problems are
exchanged, and make all ranks' verdict incomplete. All exchanges are made whatever they bring, so
that no rank waits for one that has drawn another conclusion.
"""

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from spimpi.checks.recorder import StageTotals
from spimpi.reduction import empty_records
from spimpi.trace.schema import Stage

PER_STAGE = 4  # checks, failed, bytes, nanoseconds
STAGES = tuple(Stage)


@dataclass(frozen=True)
class Sums:
    """The ranks' accounts added up, int64; ``problem``: what does not fit, in words, or ""."""

    words: np.ndarray
    problem: str
    n_ranks: int

    @property
    def totals(self) -> dict[Stage, StageTotals]:
        """What was checked by stage; seconds are the ranks' mean."""
        rows = self.words[: PER_STAGE * len(STAGES)].reshape(-1, PER_STAGE).tolist()
        return {
            stage: StageTotals(checks, failed, n_bytes, ns / 1e9 / self.n_ranks)
            for stage, (checks, failed, n_bytes, ns) in zip(STAGES, rows)
        }

    def _after_stages(self, i) -> int:
        return int(self.words[PER_STAGE * len(STAGES) + i])

    @property
    def n_events(self) -> int:
        return self._after_stages(0)

    @property
    def n_failed(self) -> int:
        return self._after_stages(1)

    @property
    def n_due(self) -> int:
        """Checks that were due."""
        return self._after_stages(2)

    @property
    def changed(self) -> list[int]:
        """On how many ranks each injected fault changed anything."""
        return self.words[PER_STAGE * len(STAGES) + 3 :].tolist()


def account(recorder, n_due: int, changed) -> np.ndarray:
    """This rank's numbers: of every stage, events, failures, checks due, faults that struck. Local."""
    words = []
    for stage in STAGES:
        t = recorder.totals[stage]
        words += [t.checks, t.failed, t.n_bytes, round(1e9 * t.seconds)]
    words += [recorder.n_events, sum(t.failed for t in recorder.totals.values()), n_due, *changed]
    return np.array(words, np.int64)


def summed(ctx, own: np.ndarray) -> Sums:
    """Everybody's accounts added up, by the operation of check records and by MPI_SUM. Collective."""
    records = empty_records(own.size)
    records["total"] = own.view(np.uint64)
    merged = ctx.records.merge(ctx.world, records)["total"].view(np.int64)
    sums = np.zeros_like(own)
    ctx.world.Allreduce(own, sums, op=MPI.SUM)
    return Sums(sums, _misfit(merged, sums, own), ctx.world.size)


def _misfit(merged, sums, own) -> str:
    """What of the sums can't be right, as this rank sees it."""
    differ = np.flatnonzero(merged != sums)
    if differ.size:
        i = differ[0]
        return (
            f"two reductions of what was counted differ: {_name(i)} is {sums[i]} by MPI_SUM, "
            f"{merged[i]} by the merged records"
        )
    low = np.flatnonzero(sums < own)  # no rank counts less than nothing
    if low.size:
        return f"{_name(low[0])} over all ranks is {sums[low[0]]}, and {own[low[0]]} on this one"
    by_stage = sums[: PER_STAGE * len(STAGES)].reshape(-1, PER_STAGE)
    n_events, n_failed = sums[by_stage.size : by_stage.size + 2]
    checks, failed = by_stage[:, 0].sum(), by_stage[:, 1].sum()
    if checks != n_events or failed != n_failed:
        return (
            f"the stages have {checks} checks and {failed} failed ones, the whole run {n_events} "
            f"and {n_failed}"
        )
    return ""


def _name(i) -> str:
    what = ("checks", "failed checks", "bytes", "nanoseconds")
    if i < PER_STAGE * len(STAGES):
        return f"{what[i % PER_STAGE]} of {STAGES[i // PER_STAGE].name.lower()}"
    rest = ("the number of checks", "the number of failed checks", "the number of checks due")
    i -= PER_STAGE * len(STAGES)
    return rest[i] if i < len(rest) else f"what injected fault {i - len(rest)} changed"


def told(comm, mine) -> tuple[list, str]:
    """(what every rank says, what is wrong with that or ""). Collective.

    Where it can't be what the ranks said, this rank hears nothing but itself.
    """
    heard = comm.allgather(mine)
    if not isinstance(heard, list) or len(heard) != comm.size:
        return [mine] * comm.size, f"of {comm.size} ranks' words something else arrived"
    if heard[comm.rank] != mine:
        return [mine] * comm.size, "this rank's own words came back changed"
    strange = [r for r, said in enumerate(heard) if type(said) is not type(mine)]
    if strange:
        return [mine] * comm.size, f"rank {strange[0]}'s words arrived as something else"
    return heard, ""
