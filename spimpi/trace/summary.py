"""What a trace says in short: checks in groups, the failures in program order, the verdict."""

from dataclasses import dataclass, field

import numpy as np

from spimpi.trace.base import Block, joined
from spimpi.trace.names import member, name_of, tensor_name
from spimpi.trace.order import first_layered_tensor, program_order
from spimpi.trace.schema import Op, RankInfo, Stage, Status, TensorInfo
from spimpi.trace.totals import Total, Totals

KEPT = 100_000  # failures held while looking for the first ones
SPELT = ("stage", "op", "tensor", "expected", "fingerprint")  # columns that a Failure has in words


@dataclass(frozen=True)
class Failure:
    """A check that failed, in words; ``rank`` is the one that recorded it."""

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
    failed, n_kept, first_layered = [], 0, len(trace.tensors)
    for block in trace.blocks():
        for each in totals.values():
            each.add(block)
        first_layered = min(first_layered, first_layered_tensor(block))
        bad = _first_failures(block, KEPT - n_kept, n_failures)
        n_kept += len(bad)
        failed.append(bad)
    summary.stages, summary.groups = totals["stage"].result(), totals[by].result()
    summary.n_failed = sum(stage.failed for stage in summary.stages.values())
    bad = joined(failed)
    names = [tensor.name for tensor in trace.tensors]
    order = program_order(bad, bad.rank, first_layered, names)[:n_failures]
    ranks = {info.rank: info for info in trace.ranks}
    for i in order.tolist():
        row = bad.where([i])
        summary.failures.append(in_words(row, ranks[row.rank.item()], trace.tensors))
    summary.verdict, summary.exit_status = verdict_of(trace, summary.n_failed)
    return summary


def _first_failures(block: Block, room: int, n_failures: int) -> Block:
    """The failures of a block; where there is no room for all, the first few of each rank."""
    rows = np.flatnonzero(block["verdict"] == Status.FAILED)
    if len(rows) > room:
        rank = block["rank"][rows]
        place = np.arange(len(rows)) - np.searchsorted(rank, rank)
        rows = rows[place < n_failures]
    return block.where(rows)


def verdict_of(trace, n_failed: int) -> tuple[str, int]:
    """A run's verdict and the exit status that tells it, where so many checks failed."""
    ended = trace.attributes.get("end_state", "verified")
    if n_failed or ended == "failed":
        return "corrupted", 1
    if not trace.complete or ended != "verified":
        return "incomplete", 3
    return "verified", 0


def in_words(event, info: RankInfo, tensors: list[TensorInfo]) -> Failure:
    """A failed check as people read it. ``event``: one row, columns by name."""
    plain = ("repeat", "step", "microbatch", "layer", "peer", "element", "nonfinite")
    row = {name: event[name].item() for name in (*plain, *SPELT)}
    return Failure(
        **{name: row[name] for name in plain},
        stage=name_of(member(Stage, row["stage"])),
        op=name_of(member(Op, row["op"])),
        tensor=tensor_name(tensors, row["tensor"]),
        rank=info.rank,
        host=info.host,
        expected=f"{row['expected']:016x}",
        found=f"{row['fingerprint']:016x}",
    )
