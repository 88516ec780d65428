"""What a trace says in short: checks in groups, the failures in program order, the verdict."""

from dataclasses import dataclass, field

import numpy as np

from spimpi.trace.analysis.order import first_layered_tensor, program_order
from spimpi.trace.analysis.totals import Total, Totals
from spimpi.trace.names import member, name_of, tensor_name
from spimpi.trace.reading.base import Block, joined
from spimpi.trace.schema import Op, RankInfo, Stage, Status, TensorInfo

KEPT = 100_000  # failures held while looking for the first ones
SPELT = ("stage", "op", "tensor", "expected", "fingerprint")  # columns that a Failure has in words


@dataclass(frozen=True)
class Failure:
    """A check that failed, in words; ``rank`` is the one that recorded it.

    ``expected`` and ``found`` are empty where the check compares no fingerprints (sums of floats).
    """

    repeat: int
    step: int
    microbatch: int
    layer: int
    stage: str
    op: str
    tensor: str
    rank: int
    host: str
    peer: int
    element: int
    nonfinite: int
    expected: str
    found: str


@dataclass
class Summary:
    """``groups``: the totals by what was asked for, which are those of ``stages`` by default."""

    stages: dict[Stage | int, Total] = field(default_factory=dict)
    groups: dict = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    n_failed: int = 0
    verdict: str = "verified"
    exit_status: int = 0

    @property
    def n_events(self) -> int:
        return sum(stage.events for stage in self.stages.values())

    @property
    def n_checks(self) -> int:
        """Events that say whether something held."""
        return self.n_events - sum(stage.not_established for stage in self.stages.values())


def summarise(trace, n_failures: int = 10, by: str = "stage") -> Summary:
    """Read a whole trace once; check it, count it (``by``: see Totals), order its failures.

    Ranks whose rows are not intact are left out, and then named in ``trace.problems``.
    """
    summary = Summary()
    totals = {name: Totals(trace, name) for name in {"stage", by}}
    failures = Failures(trace, n_failures)
    for block in trace.blocks():
        for each in totals.values():
            each.add(block)
        failures.add(block)
    summary.stages, summary.groups = totals["stage"].result(), totals[by].result()
    summary.n_failed, summary.failures = failures.n_failed, failures.first()
    summary.verdict, summary.exit_status = verdict_of(
        trace, summary.n_failed, summary.n_checks
    )
    return summary


class Failures:
    """Takes the blocks of a trace (all columns), counts its failures and keeps the first ``n``."""

    def __init__(self, trace, n: int):
        self.trace, self.n, self.n_failed = trace, n, 0
        self._kept, self._n_kept, self._first_layered = [], 0, len(trace.tensors)

    def add(self, block: Block) -> None:
        self._first_layered = min(self._first_layered, first_layered_tensor(block))
        self.n_failed += int((block["verdict"] == Status.FAILED).sum())
        bad = _first_failures(block, KEPT - self._n_kept, self.n)
        self._n_kept += len(bad)
        self._kept.append(bad)

    def first(self) -> list[Failure]:
        """The first ones in program order."""
        bad, tensors = joined(self._kept), self.trace.tensors
        names = [tensor.name for tensor in tensors]
        order = program_order(bad, bad.rank, self._first_layered, names)[: self.n]
        ranks = {info.rank: info for info in self.trace.ranks}
        rows = [bad.where([i]) for i in order.tolist()]
        return [in_words(row, ranks[row.rank.item()], tensors) for row in rows]


def _first_failures(block: Block, room: int, n_failures: int) -> Block:
    """The failures of a block; where there is no room for all, the first few of each rank."""
    rows = np.flatnonzero(block["verdict"] == Status.FAILED)
    if len(rows) > room:
        rank = block["rank"][rows]
        place = np.arange(len(rows)) - np.searchsorted(rank, rank)
        rows = rows[place < n_failures]
    return block.where(rows)


def verdict_of(trace, n_failed: int, n_checks: int) -> tuple[str, int]:
    """A run's verdict and the exit status that tells it, where so many of its checks failed.

    Where there is no check, nothing was verified.
    """
    ended = trace.attributes.get("end_state", "verified")
    if n_failed or ended == "failed":
        return "corrupted", 1
    if not trace.complete or ended != "verified" or not n_checks:
        return "incomplete", 3
    return "verified", 0


def in_words(event, info: RankInfo, tensors: list[TensorInfo]) -> Failure:
    """A failed check as people read it. ``event``: one row, columns by name."""
    plain = ("repeat", "step", "microbatch", "layer", "peer", "element", "nonfinite")
    row = {name: event[name].item() for name in (*plain, *SPELT)}
    compared = row["expected"] or row["fingerprint"]  # both 0 stand for none
    return Failure(
        **{name: row[name] for name in plain},
        stage=name_of(member(Stage, row["stage"])),
        op=name_of(member(Op, row["op"])),
        tensor=tensor_name(tensors, row["tensor"]),
        rank=info.rank,
        host=info.host,
        expected=f"{row['expected']:016x}" if compared else "",
        found=f"{row['fingerprint']:016x}" if compared else "",
    )
