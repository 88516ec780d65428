"""Checks added up by stage, op, layer, tensor, rank or host: how many, what failed, what they took."""

from dataclasses import dataclass

import numpy as np

from spimpi.trace.names import RankPlaces, member, places
from spimpi.trace.schema import ENUMERATIONS, Established, Status


@dataclass
class Total:
    """The checks of one group over all ranks.

    ``seconds``: of the rank that spent most in them; checks made together share their time.
    """

    events: int = 0
    failed: int = 0
    not_established: int = 0
    bytes: int = 0
    seconds: float = 0.0
    established: Established = Established(0)


class Totals:
    """Totals of a trace, added up block by block (all columns, in the trace's order).

    ``by``: "stage", "op", "layer", "tensor", "rank" or "host".
    """

    def __init__(self, trace, by: str):
        self.by = by
        self._names, self._place = [], np.zeros(0, np.int64)
        self._ranks = RankPlaces(trace.ranks)
        if by == "host":
            self._names, self._place = places(info.host for info in trace.ranks)
        elif by == "tensor":
            self._names, self._place = places(tensor.name for tensor in trace.tensors)
        self._sums = np.zeros((0, 4), np.uint64)  # of each group: events, failed, unknown, bytes
        self._seconds, self._established = np.zeros(0), np.zeros(0, np.uint8)
        self._open = _OpenRank()

    def add(self, block) -> None:
        if not len(block):
            return
        group = self._groups(block)
        self._make_room(int(group.max()) + 1)
        order, starts = _segments(block["rank"], group)
        group, rank = group[order][starts], block["rank"][order][starts]
        verdict = block["verdict"][order]
        held = np.where(verdict == Status.VERIFIED, block["established"][order], 0)
        counts = np.diff(starts, append=len(order))
        for i, counted in enumerate(
            (
                counts,
                np.add.reduceat(verdict == Status.FAILED, starts, dtype=np.int64),
                np.add.reduceat(verdict == Status.NOT_ESTABLISHED, starts, dtype=np.int64),
                np.add.reduceat(block["bytes"][order], starts),
            )
        ):
            np.add.at(self._sums[:, i], group, counted.astype(np.uint64))
        np.bitwise_or.at(self._established, group, np.bitwise_or.reduceat(held, starts))
        self._open.resize(len(self._sums))
        goes_on = rank == self._open.rank
        known = np.where(goes_on, self._open.ends[group], -np.inf)
        begins = np.maximum(block["t_start"][order], np.repeat(known, counts))
        seconds, ends = _covered(begins, block["t_end"][order], starts)
        seconds += np.where(goes_on, self._open.seconds[group], 0.0)
        ends = np.maximum(ends, known)
        np.maximum.at(self._seconds, group, seconds)
        last = rank == block["rank"][-1]
        self._open.set(block["rank"][-1], group[last], seconds[last], ends[last])

    def result(self) -> dict:
        """Total of each group, by its label: a Stage or Op (or a number), a name, a rank, a layer.

        In the order of their numbers; tensors of one name are one group.
        """
        groups: dict = {}
        for i in np.flatnonzero(self._sums[:, 0]).tolist():
            total = Total(*self._sums[i].tolist(), self._seconds[i].item())
            total.established = Established(int(self._established[i]))
            groups[self._label(i)] = total
        return groups

    def _groups(self, block) -> np.ndarray:
        """The number of each row's group, int64."""
        if self.by == "host":
            return self._place[self._ranks.of(block["rank"])]
        if self.by == "rank":
            return self._ranks.of(block["rank"])
        numbers = block[self.by].astype(np.int64)
        if self.by == "tensor":
            for number in range(len(self._place), int(numbers.max()) + 1):
                self._place = np.append(self._place, len(self._names))
                self._names.append(f"tensor {number}")
            return self._place[numbers]
        return numbers + 1 if self.by == "layer" else numbers  # there is a layer -1

    def _label(self, i: int):
        if self._names:
            return self._names[i]
        if self.by in ENUMERATIONS:
            return member(ENUMERATIONS[self.by], i)
        if self.by == "rank":
            return int(self._ranks.ranks[i])
        return i - 1 if self.by == "layer" else i

    def _make_room(self, n: int) -> None:
        more = n - len(self._sums)
        if more > 0:
            self._sums = np.pad(self._sums, ((0, more), (0, 0)))
            self._seconds = np.pad(self._seconds, (0, more))
            self._established = np.pad(self._established, (0, more))


class _OpenRank:
    """The rank whose rows may go on in the next block: what it has spent in each group."""

    def __init__(self):
        self.rank, self.seconds, self.ends = -1, np.zeros(0), np.zeros(0)

    def resize(self, n: int) -> None:
        more = n - len(self.ends)
        self.seconds = np.pad(self.seconds, (0, more))
        self.ends = np.pad(self.ends, (0, more), constant_values=-np.inf)

    def set(self, rank: int, group, seconds, ends) -> None:
        if rank != self.rank:
            self.rank = rank
            self.seconds[:], self.ends[:] = 0, -np.inf
        self.seconds[group], self.ends[group] = seconds, ends


def _segments(rank: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order that puts each rank's rows of each group side by side, and where these start."""
    place = np.cumsum(np.diff(rank, prepend=rank[0]) != 0)
    segment = place * (int(group.max()) + 1) + group
    if segment.max() < 1 << 16:
        segment = segment.astype(np.uint16)  # which numpy sorts by counting
    order = np.argsort(segment, kind="stable")
    changes = np.diff(segment[order], prepend=segment[order[0]]) != 0
    changes[0] = True
    return order, np.flatnonzero(changes)


def _covered(begins, ends, starts) -> tuple[np.ndarray, np.ndarray]:
    """Seconds that the intervals of each segment cover, and the latest end of each."""
    first = np.zeros(len(begins), bool)
    first[starts] = True
    if (((np.diff(begins) < 0) | (np.diff(ends) < 0)) & ~first[1:]).any():
        begins, ends = _in_order_of_time(begins, ends, np.cumsum(first))
    before = np.empty_like(ends)
    before[1:] = ends[:-1]
    before[starts] = -np.inf
    new = np.maximum(ends - np.maximum(begins, before), 0)
    return np.add.reduceat(new, starts), ends[np.append(starts[1:], len(ends)) - 1]


def _in_order_of_time(begins, ends, segment):
    """Each segment's intervals by their begin, each end the latest so far."""
    order = np.lexsort((begins, segment))
    begins, ends = begins[order], ends[order]
    # The place of an end among all of its own and earlier segments: a running maximum of places
    # starts anew with each segment.
    by_end = np.lexsort((ends, segment))
    place = np.empty(len(ends), np.int64)
    place[by_end] = np.arange(len(ends))
    return begins, ends[by_end[np.maximum.accumulate(place)]]
