"""What a trace says in short: checks a stage, the failures in program order, the verdict."""

from dataclasses import dataclass, field

import numpy as np

from spimpi.trace.order import first_layered_tensor, program_order
from spimpi.trace.schema import EVENT, Established, Op, RankInfo, Stage, Status, TensorInfo

KEPT = 100_000  # failures held while looking for the first ones
SPELT = ("stage", "op", "tensor", "expected", "fingerprint")  # columns that a Failure has in words


@dataclass
class StageSummary:
    """One stage over all ranks. ``seconds``: of the rank that spent most in its checks."""

    events: int = 0
    failed: int = 0
    not_established: int = 0
    bytes: int = 0
    seconds: float = 0.0
    established: Established = Established(0)


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
    stages: dict[Stage, StageSummary] = field(default_factory=dict)
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


def summarise(trace, n_failures: int = 10) -> Summary:
    """Read a whole trace once, rank by rank; check it, count it, order its failures.

    Ranks whose rows are not intact are left out, and then named in ``trace.problems``.
    """
    summary = Summary()
    failed, ranks, n_kept = [], [], 0
    first_layered = len(trace.tensors)
    for info, rows in trace.intact_events():
        _add(summary, rows)
        first_layered = min(first_layered, first_layered_tensor(rows))
        bad = rows[rows["verdict"] == Status.FAILED][: max(KEPT - n_kept, n_failures)]
        n_kept += len(bad)
        failed.append(bad)
        ranks += [info] * len(bad)
    summary.n_failed = sum(stage.failed for stage in summary.stages.values())
    events = np.concatenate(failed) if failed else np.zeros(0, EVENT)
    numbers, names = np.array([r.rank for r in ranks], np.int64), [t.name for t in trace.tensors]
    order = program_order(events, numbers, first_layered, names)
    summary.failures = [in_words(events[i], ranks[i], trace.tensors) for i in order[:n_failures]]
    summary.verdict, summary.exit_status = verdict_of(trace, summary.n_failed)
    return summary


class FirstFailure:
    """Takes the blocks of a trace (all columns), counts failures and keeps some to order them."""

    def __init__(self, trace):
        self.trace, self.n_failed = trace, 0
        self._kept, self._ranks = [np.zeros(0, EVENT)], [np.zeros(0, np.int32)]

    def add(self, block) -> None:
        block = block.where(block["verdict"] == Status.FAILED)
        rows = np.zeros(min(len(block), max(KEPT - self.n_failed, 0)), EVENT)
        self.n_failed += len(block)
        for name in EVENT.names:
            rows[name] = block[name][: len(rows)]
        self._kept.append(rows)
        self._ranks.append(block.rank[: len(rows)])

    def first(self, first_layered: int) -> Failure | None:
        """The first failure in program order, None where there is none."""
        events, ranks = np.concatenate(self._kept), np.concatenate(self._ranks)
        if not len(events):
            return None
        tensors = self.trace.tensors
        i = program_order(events, ranks, first_layered, [t.name for t in tensors])[0]
        (info,) = (info for info in self.trace.ranks if info.rank == ranks[i])
        return in_words(events[i], info, tensors)


def _add(summary: Summary, rows: np.ndarray) -> None:
    stages, verdicts = rows["stage"].copy(), rows["verdict"].copy()
    for number in np.unique(stages):
        chosen = stages == number
        verdict = verdicts[chosen]
        stage = summary.stages.setdefault(member(Stage, number), StageSummary())
        stage.events += len(verdict)
        stage.failed += int((verdict == Status.FAILED).sum())
        stage.not_established += int((verdict == Status.NOT_ESTABLISHED).sum())
        stage.bytes += int(rows["bytes"][chosen].sum())
        seconds = _seconds(rows["t_start"][chosen], rows["t_end"][chosen])
        stage.seconds = max(stage.seconds, seconds)
        held = rows["established"][chosen][verdict == Status.VERIFIED]
        stage.established |= Established(int(np.bitwise_or.reduce(held))) if len(held) else 0


def _seconds(starts: np.ndarray, ends: np.ndarray) -> float:
    """Time covered by the checks of one rank; checks made together share their time."""
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    starts[1:] = np.maximum(starts[1:], ends[:-1])
    return float(np.maximum(ends - starts, 0).sum())


def verdict_of(trace, n_failed: int) -> tuple[str, int]:
    """A run's verdict and the exit status that tells it, where so many checks failed."""
    ended = trace.attributes.get("end_state", "verified")
    if n_failed or ended == "failed":
        return "corrupted", 1
    if not trace.complete or ended != "verified":
        return "incomplete", 3
    return "verified", 0


def member(kind, number):
    """The enumeration's member, or the plain number where a later spimpi has added one."""
    try:
        return kind(int(number))
    except ValueError:
        return int(number)


def name_of(member) -> str:
    return getattr(member, "name", str(member)).lower().replace("_", " ")


def tensor_name(tensors: list[TensorInfo], row: int) -> str:
    return tensors[row].name if row < len(tensors) else f"tensor {row}"


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
