"""When each rank was at which step, and how long it checked: what the timeline shows."""

from dataclasses import dataclass

import numpy as np

from spimpi.trace.analysis.order import INFERENCE, phase_of
from spimpi.trace.names import RankPlaces
from spimpi.trace.schema import Stage

COLUMNS = ("repeat", "stage", "step", "bytes", "t_start", "t_end")
GOLDEN = INFERENCE + 1  # written down when the inference has ended
LONGEST = 1e9  # seconds, 30 years: what lies beyond is no time of a run
NAMES = ("fabric", "weights", "", "comparison with expected")


@dataclass(frozen=True)
class Span:
    """A step of a row of ranks, in seconds since the first rank's start; ``checking``: the mean."""

    row: int
    name: str
    start: float
    end: float
    checking: float


class Spans:
    """Collects the steps' times for rows of ranks: ``row_of`` gives that of each in the table.

    ``checking``: what a rank spent checking in the whole inference, the mean in seconds, where the
    trace tells it; steps share it by the bytes that they checked. Elsewhere, and without it, a
    check takes from its start to its end. ``left_out``: checks whose times can be of no run.
    """

    def __init__(self, ranks, row_of: np.ndarray, checking: float | None = None):
        self.row_of, self._spent = row_of, None if checking is None else checking * len(ranks)
        self._ranks, self.left_out = RankPlaces(ranks), 0
        started = np.array([r.started for r in ranks], float)
        first = started[np.isfinite(started)].min(initial=np.inf)
        self._offset = np.where(np.abs(started - first) <= LONGEST, started - first, 0.0)
        self._kept: dict[tuple[int, int], list] = {}
        self._last = (-1, -1, 0.0)  # rank, segment, time that is covered: pieces of one rank

    def add(self, block) -> None:
        possible = (np.abs(block["t_start"]) <= LONGEST) & (np.abs(block["t_end"]) <= LONGEST)
        self.left_out += len(block) - int(possible.sum())
        block = block.where(possible)
        if not len(block):
            return
        phase = phase_of(block)
        phase[block["stage"] == Stage.GOLDEN] = GOLDEN
        step = np.where(phase == INFERENCE, np.maximum(block["step"].astype(np.int64), 0), 0)
        segment = (block["repeat"].astype(np.int64) << 36) | (phase << 33) | step
        rank = self._ranks.of(block["rank"])
        start, end = block["t_start"], block["t_end"]
        size = block["bytes"]
        if not _sorted(rank, segment, start):
            order = np.lexsort((start, segment, rank))
            rank, segment, start, end = rank[order], segment[order], start[order], end[order]
            size = size[order]
        new = np.r_[True, (rank[1:] != rank[:-1]) | (segment[1:] != segment[:-1])]
        heads = np.flatnonzero(new)
        first, last = start[heads], np.maximum.reduceat(end, heads)
        checking, reached = self._covered(start, end, new, heads, rank, segment)
        self._last = int(rank[-1]), int(segment[-1]), reached
        n_bytes = np.add.reduceat(size, heads).astype(float)
        self._merge(rank[heads], segment[heads], first, last, checking, n_bytes)

    def _covered(self, start, end, new, heads, rank, segment):
        """Seconds that the checks of each (rank, segment) cover; those made together count once."""
        group = np.cumsum(new) - 1
        base = start[heads][group]
        # Groups are laid out side by side, so that one running maximum serves them all.
        span = float((end - base).max()) + 1.0
        begin, finish = start - base + group * span, end - base + group * span
        finish = np.maximum.accumulate(finish)
        before = np.r_[0.0, finish[:-1]]
        before[heads] = begin[heads]
        if (int(rank[0]), int(segment[0])) == self._last[:2]:
            before[0] = max(before[0], self._last[2] - base[0])
            first = heads[1] if len(heads) > 1 else len(start)
            before[:first] = np.maximum(before[:first], before[0])
        covered = np.maximum(finish - np.maximum(begin, before), 0)
        reached = float(finish[-1] - group[-1] * span + base[-1])
        if len(heads) == 1 and (int(rank[0]), int(segment[0])) == self._last[:2]:
            reached = max(reached, self._last[2])
        return np.add.reduceat(covered, heads), reached

    def _merge(self, rank, segment, first, last, checking, n_bytes) -> None:
        offset = self._offset[rank]
        rows = self.row_of[rank]
        order = np.lexsort((segment, rows))
        rows, segment = rows[order], segment[order]
        heads = np.flatnonzero(
            np.r_[True, (rows[1:] != rows[:-1]) | (segment[1:] != segment[:-1])]
        )
        begin = np.minimum.reduceat((first + offset)[order], heads)
        end = np.maximum.reduceat((last + offset)[order], heads)
        total, size = (np.add.reduceat(each[order], heads) for each in (checking, n_bytes))
        keys = zip(rows[heads].tolist(), segment[heads].tolist())
        for key, a, b, *more in zip(keys, begin, end, total, size):
            kept = self._kept.setdefault(key, [a, b, 0.0, 0.0])
            kept[:2] = min(kept[0], a), max(kept[1], b)
            kept[2:] = kept[2] + more[0], kept[3] + more[1]

    def spans(self, ranks_of_row) -> list[Span]:
        """All of them, row by row in time; ``ranks_of_row``: how many ranks each row has."""
        found = []
        per_byte = self._seconds_per_byte()
        for (row, segment), (start, end, checking, n_bytes) in sorted(self._kept.items()):
            repeat, rest = divmod(segment, 1 << 36)
            phase, step = divmod(rest, 1 << 33)
            name = (NAMES[phase] or f"step {step}") + (f", repetition {repeat}" if repeat else "")
            if per_byte is not None and phase == INFERENCE:
                checking = n_bytes * per_byte
            mean = float(checking) / max(ranks_of_row[row], 1)
            found.append(Span(row, name, float(start), float(end), mean))
        return found

    def _seconds_per_byte(self) -> float | None:
        if self._spent is None:
            return None
        of_steps = [
            kept[3] for (_, segment), kept in self._kept.items()
            if segment % (1 << 36) >> 33 == INFERENCE
        ]  # fmt: skip
        return self._spent / sum(of_steps) if sum(of_steps) else None


def _sorted(rank, segment, start) -> bool:
    same = (rank[1:] == rank[:-1]) & (segment[1:] == segment[:-1])
    ordered = (rank[1:] > rank[:-1]) | ((rank[1:] == rank[:-1]) & (segment[1:] > segment[:-1]))
    return bool((ordered | (same & (start[1:] >= start[:-1]))).all())
