"""What a report says of one run, gathered in one pass over its trace."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spimpi.trace.analysis.locate import Located, locate
from spimpi.trace.analysis.order import FABRIC, INFERENCE, WEIGHTS
from spimpi.trace.analysis.summary import Failure
from spimpi.trace.report import spans, squares
from spimpi.trace.report.rows import Row, row_of, rows
from spimpi.trace.report.spans import Span, Spans
from spimpi.trace.report.squares import Place, Sheet, Squares
from spimpi.trace.schema import Op, RankInfo, Stage, Status

_COLUMNS = tuple(dict.fromkeys((*squares.COLUMNS, *spans.COLUMNS, "bytes")))
_KINDS = 256  # a column of one byte; a later spimpi may have more stages and ops than we know
N_ROOTS = 20


@dataclass(frozen=True)
class Totals:
    """Checks of one kind, over all ranks. ``bytes``: what they covered."""

    name: str
    checks: int
    failed: int
    unknown: int
    bytes: int


@dataclass(frozen=True)
class Run:
    """One run. ``place``: what the maps in ``sheets`` show; ``time_rows``: the timeline's rows.

    ``tells_checking``: whether the trace says what was spent checking; else it is what checks span.
    ``timeless``: how many checks have times that can be of no run.
    """

    path: Path
    driver: str
    attributes: dict
    ranks: tuple[RankInfo, ...]
    missing: tuple[str, ...]
    damage: tuple[str, ...]
    located: Located
    ops: tuple[Totals, ...]
    stages: tuple[Totals, ...]
    place: Place | None
    sheets: tuple[Sheet, ...]
    time_rows: tuple[Row, ...]
    spans: tuple[Span, ...]
    tells_checking: bool
    timeless: int

    @property
    def first(self) -> Failure | None:
        return self.located.first

    @property
    def at_fault(self) -> frozenset[int]:
        return frozenset(self.located.at_fault)

    @property
    def hosts(self) -> list[str]:
        return sorted({rank.host for rank in self.ranks})

    @property
    def seconds(self) -> float:
        """From the first rank's first check to the end of the last."""
        if not self.spans:
            return 0.0
        return max(s.end for s in self.spans) - min(s.start for s in self.spans)

    @property
    def started(self) -> str:
        if not self.ranks:
            return ""
        began = min(rank.started for rank in self.ranks)
        try:
            return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began))
        except (ValueError, OverflowError, OSError):
            return ""


def gather(trace) -> Run:
    """The facts of an open trace. Reads it twice: its failures say which step the maps show."""
    located = locate(trace, N_ROOTS)
    first = located.first
    names = [tensor.name for tensor in trace.tensors]
    tensor = names.index(first.tensor) if first and first.tensor in names else -1
    position = {info.rank: i for i, info in enumerate(trace.ranks)}
    own_row = [position[rank] for rank in located.at_fault if rank in position]
    time_rows = rows([info.rank for info in trace.ranks], own_row)
    maps = Squares(
        trace.ranks, trace.tensors, _place_of(first) if first else None, tensor,
        first.layer if first else -1, located.at_fault,
    )  # fmt: skip
    spent = _spent_checking(trace.attributes)
    times = Spans(trace.ranks, row_of(time_rows), spent)
    totals = np.zeros((_KINDS, _KINDS, 4), np.int64)
    for block in trace.blocks(_COLUMNS):
        _count(totals, block)
        maps.add(block)
        times.add(block)
    found = times.spans([row.stop - row.start for row in time_rows])
    return Run(
        trace.path, trace.driver, trace.attributes, tuple(trace.ranks), tuple(trace.missing),
        tuple(trace.damage), located, _totals(totals.sum(axis=0), Op),
        _totals(totals.sum(axis=1), Stage), maps.place, tuple(maps.sheets()), tuple(time_rows),
        tuple(found), spent is not None, times.left_out,
    )  # fmt: skip


def _spent_checking(attributes: dict) -> float | None:
    """Mean seconds that a rank checked during the inference; None where the run does not tell."""
    told = attributes.get("checking_seconds")
    if not isinstance(told, dict):
        return None
    apart = (Stage.FABRIC.name, Stage.WEIGHTS.name, Stage.GOLDEN.name)
    spent = [s for name, s in told.items() if name not in apart and isinstance(s, (int, float))]
    return float(sum(spent))


def _place_of(failure: Failure) -> Place:
    phase = {"fabric": FABRIC, "weights": WEIGHTS}.get(failure.stage, INFERENCE)
    return Place(failure.repeat, phase, failure.step if phase == INFERENCE else 0)


def _count(totals: np.ndarray, block) -> None:
    """Add to [stages × ops × (checks, failed, unknown, bytes)]."""
    kind = block["stage"].astype(np.int64) * _KINDS + block["op"]
    verdict = block["verdict"]
    flat = totals.reshape(-1, 4)
    each = np.bincount(kind, minlength=len(flat))
    flat[:, 0] += each
    for column, status in ((1, Status.FAILED), (2, Status.NOT_ESTABLISHED)):
        flat[:, column] += np.bincount(kind[verdict == status], minlength=len(flat))
    for number in np.flatnonzero(each):
        flat[number, 3] += block["bytes"][kind == number].sum(dtype=np.uint64).astype(np.int64)


def _totals(counts: np.ndarray, kinds) -> tuple[Totals, ...]:
    names = {int(member): member.name.lower().replace("_", " ") for member in kinds}
    return tuple(
        Totals(names.get(int(i), f"{kinds.__name__.lower()} {i}"), *counts[i].tolist())
        for i in np.flatnonzero(counts[:, 0])
    )
