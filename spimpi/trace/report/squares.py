"""Rank × layer: what each rank's checks of one step said, and which replicas have which bits.

Pure numpy over blocks of a trace; how it is drawn: rank_map.py.
"""

from dataclasses import dataclass

import numpy as np

from spimpi.trace.analysis.order import (
    FABRIC, INFERENCE, WEIGHTS, first_layered_tensor, only_met, phase_of,
)  # fmt: skip
from spimpi.trace.analysis.reach import ENDS, blamed_ranks
from spimpi.trace.names import RankPlaces
from spimpi.trace.schema import Op, Stage, Status

# What a square holds; the bits add up. AT_FAULT: a failed check, maybe of another rank, names this
# one. MET: NaN or Inf that came from before, in data that are as expected. AN_END: a failed check
# between two ranks, of which this is one.
HELD, UNKNOWN, FAILED, AT_FAULT, MET, AN_END = 1, 2, 4, 8, 16, 32
COLUMNS = (
    "repeat", "stage", "step", "layer", "tensor", "op", "verdict", "peer", "nonfinite",
    "fingerprint", "expected",
)  # fmt: skip
MOST_TENSORS = 24  # with a map of their own
MOST_REPLICATED = 4  # with fingerprints


@dataclass(frozen=True)
class Place:
    """The part of a run that a map shows: the fabric, the weights or one step of a repetition."""

    repeat: int
    phase: int
    step: int

    @property
    def words(self) -> str:
        run = f" of repetition {self.repeat}" if self.repeat else ""
        what = {FABRIC: "the fabric's checks", WEIGHTS: "the weights"}
        return what.get(self.phase, f"step {self.step}") + run


@dataclass(frozen=True)
class Sheet:
    """One map. ``columns``: their names; ``state`` uint8 [ranks × columns], of the bits above;
    ``blamed`` bool [ranks]: those that are at fault for what went wrong in the run, or suspected;
    ``first``: the column in which the run first went wrong, -1: not in this map.

    ``golden`` uint8 [columns]: what the comparison of whole tensors said (None: there was none).
    Of replicas also ``fingerprint`` uint64 and, all [ranks × columns], ``value``: the number of
    the fingerprint among those of its column, the most frequent first (-1: none); ``differs``:
    from how many replicas of the same data (0: it is of the majority).
    """

    tensor: str
    columns: tuple[str, ...]
    state: np.ndarray
    blamed: np.ndarray
    first: int = -1
    golden: np.ndarray | None = None
    fingerprint: np.ndarray | None = None
    value: np.ndarray | None = None
    differs: np.ndarray | None = None

    @property
    def replicas(self) -> bool:
        return self.value is not None

    @property
    def at_fault(self) -> np.ndarray:
        """Squares of the ranks that are blamed: that a failed check names there, or of whose two
        ends they are one; in the column in which the run first went wrong, where none is, those
        that recorded a failure."""
        found = ((self.state & (AT_FAULT | AN_END)) > 0) & self.blamed[:, None]
        if self.first >= 0 and not found[:, self.first].any():
            found[:, self.first] = ((self.state[:, self.first] & FAILED) > 0) & self.blamed
        return found

    @property
    def shows_first(self) -> bool:
        """Whether the map shows where the run first went wrong: there replicas may have agreed."""
        return self.first >= 0 and bool(self.wrong[:, self.first].any())

    @property
    def wrong(self) -> np.ndarray:
        """Squares that stand out: replicas that differ; else those at fault, and where none is, in
        the column in which the run first went wrong, all whose check failed."""
        if self.replicas and self.differs.any():
            return self.differs > 0
        wrong = self.at_fault
        if self.first >= 0 and not wrong[:, self.first].any():
            wrong[:, self.first] = (self.state[:, self.first] & FAILED) > 0
        return wrong


class Squares:
    """Collects the checks of one place of a run; of the last place seen where none is given.

    ``tensor``, ``layer``: of the first failure; ``at_fault``: the ranks that are blamed.
    """

    def __init__(
        self, ranks, tensors, place: Place | None = None, tensor: int = -1, layer: int = -1,
        at_fault=(),
    ):  # fmt: skip
        self.place, self.tensor, self.layer, self.tensors = place, tensor, layer, tensors
        self._ranks = RankPlaces(ranks)
        self._blamed = np.isin(self._ranks.ranks, list(at_fault))
        self.n_ranks, self._follow = len(ranks), place is None
        self._code = None if place is None else _code(place)
        self._clear()

    def _clear(self) -> None:
        self._width = 1  # columns: no layer, then the layers
        self._state: dict[int, np.ndarray] = {}
        self._golden: dict[int, np.ndarray] = {}
        self._replicas: dict[int, tuple] = {}
        self._first_layered = len(self.tensors)

    def add(self, block) -> None:
        if not len(block):
            return
        phase = phase_of(block)
        step = np.where(phase == INFERENCE, np.maximum(block["step"].astype(np.int64), 0), 0)
        codes = (block["repeat"].astype(np.int64) << 36) | (phase << 33) | step
        if self._follow and (self._code is None or codes.max() > self._code):
            self._clear()
            self._code = int(codes.max())
            repeat, rest = divmod(self._code, 1 << 36)
            self.place = Place(repeat, rest >> 33, rest & ((1 << 33) - 1))
        chosen = codes == self._code
        if not chosen.any():
            return
        rows = block.where(chosen)
        self._first_layered = min(self._first_layered, first_layered_tensor(rows))
        self._grow(int(rows["layer"].max()) + 2)
        keys = self._keys(rows)
        for key in np.unique(keys):
            self._add_tensor(int(key), rows.where(keys == key))

    def _keys(self, rows) -> np.ndarray:
        """The map of each row: its tensor; -1, all others together (weights are of many names)."""
        keys = rows["tensor"].astype(np.int64)
        if self.place.phase == WEIGHTS:
            return np.full(len(keys), -1)
        known = {*self._state, *self._golden, self.tensor}
        for key in np.unique(keys).tolist():
            if key not in known and len(known) <= MOST_TENSORS:
                known.add(key)
        keys[~np.isin(keys, list(known))] = -1
        return keys

    def _grow(self, width: int) -> None:
        if width <= self._width:
            return
        more = width - self._width
        self._width = width
        for kept in (self._state, self._golden):
            for key, array in kept.items():
                kept[key] = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)])
        for key, arrays in self._replicas.items():
            self._replicas[key] = tuple(np.pad(a, ((0, 0), (0, more))) for a in arrays)

    def _add_tensor(self, key: int, rows) -> None:
        golden = rows["stage"] == Stage.GOLDEN
        column = rows["layer"].astype(np.int64) + 1
        failed, met = rows["verdict"] == Status.FAILED, only_met(rows)
        bits = np.full(len(rows), HELD, np.uint8)
        bits[rows["verdict"] == Status.NOT_ESTABLISHED] = UNKNOWN
        bits[failed] = np.where(met, MET, FAILED)[failed]
        if golden.any():
            line = self._golden.setdefault(key, np.zeros(self._width, np.uint8))
            np.bitwise_or.at(line, column[golden], bits[golden])
        if golden.all():
            return
        state = self._state.setdefault(key, np.zeros((self.n_ranks, self._width), np.uint8))
        at = self._ranks.of(rows["rank"])
        np.bitwise_or.at(state, (at[~golden], column[~golden]), bits[~golden])
        blamed = self._ranks.of(blamed_ranks(rows, rows["rank"]))
        blames = failed & ~met & ~golden & (blamed >= 0)
        np.bitwise_or.at(state, (blamed[blames], column[blames]), np.uint8(AT_FAULT))
        ends = failed & ~golden & np.isin(rows["op"], ENDS)
        np.bitwise_or.at(state, (at[ends], column[ends]), np.uint8(AN_END))
        agreement = rows["op"] == Op.AGREEMENT
        if key < 0 or not agreement.any():
            return
        if key not in self._replicas:
            if len(self._replicas) >= MOST_REPLICATED and key != self.tensor:
                return
            shape = self.n_ranks, self._width
            self._replicas[key] = tuple(np.zeros(shape, t) for t in ("<u8", "<u8", bool))
        found, expected, there = self._replicas[key]
        where = at[agreement], column[agreement]
        # Parts of a tensor (microbatches) combine by XOR, as fingerprints do.
        np.bitwise_xor.at(found, where, rows["fingerprint"][agreement])
        np.bitwise_xor.at(expected, where, rows["expected"][agreement])
        there[where] = True

    def sheets(self) -> list[Sheet]:
        """The maps: that of the first failed tensor first (all checks together, where it does not
        show the failure), the other one of these, the replicated tensors, then others whose
        checks failed."""
        if not self._state:
            return []
        together = self._together()
        own = [self._sheet(key) for key in sorted(self._state) if key >= 0]
        first = self._sheet(self.tensor) if self.tensor in self._state else None
        if first is not None and first.state.shape[1] == 1 and not first.replicas:
            first = None  # of no layer: one column, which is in the map of all checks
        sheets = [first] if first is not None else []
        sheets.insert(first is not None and first.shows_first, together)
        rest = [s for s in own if first is None or s.tensor != first.tensor]
        sheets += [s for s in rest if s.replicas and s.state.shape[1] > 1]
        sheets += [
            s for s in rest
            if not s.replicas and s.state.shape[1] > 1 and (s.state & (FAILED | MET)).any()
        ]  # fmt: skip
        return sheets

    def _name(self, key: int) -> str:
        return self.tensors[key].name if key < len(self.tensors) else f"tensor {key}"

    def _sheet(self, key: int) -> Sheet:
        state, golden = self._state[key], self._golden.get(key)
        used = np.flatnonzero(state.any(axis=0))
        names = tuple("no layer" if c == 0 else str(c - 1) for c in used)
        at = self._column(used, self.layer + 1) if key == self.tensor else -1
        if golden is not None:
            golden = golden[used] if _compared(golden) else None
        if key not in self._replicas:
            return Sheet(self._name(key), names, state[:, used], self._blamed, at, golden)
        found, expected, there = (array[:, used] for array in self._replicas[key])
        value, differs = replicas(found, expected, there)
        return Sheet(
            self._name(key), names, state[:, used], self._blamed, at, golden, found, value, differs
        )

    def _column(self, used, column: int) -> int:
        """Where the column of the first failure is among those that are used; -1: nowhere."""
        at = np.flatnonzero(used == column)
        return int(at[0]) if at.size and not self._follow else -1

    def _together(self) -> Sheet:
        if self._width == 1:  # no layers: a column a tensor
            keys = sorted(self._state)
            state = np.concatenate([self._state[key] for key in keys], axis=1)
            names = tuple(self._name(key) if key >= 0 else "others" for key in keys)
            golden = [self._golden.get(key, np.zeros(1, np.uint8)) for key in keys]
            golden = np.concatenate(golden)
            golden = golden if _compared(golden) else None
            at = self._column(np.array(keys), self.tensor if self.tensor in keys else -1)
            return Sheet("all checks", names, state, self._blamed, at, golden)
        shape = self.n_ranks + 1, self._width + 1
        both = np.zeros(shape, np.uint8)  # the last row is the golden one, the last column "after"
        for kept, rows in ((self._state, slice(0, -1)), (self._golden, slice(-1, None))):
            for key, array in kept.items():
                after = key >= self._first_layered
                array = np.atleast_2d(array)
                both[rows, 1 : self._width] |= array[:, 1:]
                both[rows, self._width if after else 0] |= array[:, 0]
        used = np.flatnonzero(both.any(axis=0))
        names = {0: "before", self._width: "after"}
        names = tuple(names.get(int(c), str(c - 1)) for c in used)
        golden = both[-1, used] if _compared(both[-1]) else None
        after = self._width if self.tensor >= self._first_layered else 0
        at = self._column(used, self.layer + 1 if self.layer >= 0 else after)
        return Sheet("all checks", names, both[:-1, used], self._blamed, at, golden)


def replicas(found, expected, there) -> tuple[np.ndarray, np.ndarray]:
    """(value, differs) of a Sheet, of fingerprints uint64 [ranks × columns].

    Ranks whose check expected the same are replicas of each other: each check's ``expected`` is
    made of all of its replicas' fingerprints.
    """
    value = np.full(found.shape, -1, np.int32)
    differs = np.zeros(found.shape, np.int32)
    for column in range(found.shape[1]):
        rows = np.flatnonzero(there[:, column])
        if not rows.size:
            continue
        f, e = found[rows, column], expected[rows, column]
        order = np.lexsort((f, e))
        new_group = np.r_[True, e[order][1:] != e[order][:-1]]
        new_pair = new_group | np.r_[True, f[order][1:] != f[order][:-1]]
        starts = np.flatnonzero(new_pair)
        counts = np.diff(np.r_[starts, len(order)])
        group = (np.cumsum(new_group) - 1)[starts]  # of each pair
        heads = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
        size = np.add.reduceat(counts, heads)[group]
        most = np.maximum.reduceat(counts, heads)[group]
        tied = np.add.reduceat((counts == most).astype(int), heads)[group] > 1
        odd = (counts < most) | tied
        pair = np.cumsum(new_pair) - 1
        differs[rows[order], column] = np.where(odd, size - counts, 0)[pair]
        value[rows, column] = _by_frequency(f)
    return value, differs


def _compared(golden: np.ndarray) -> bool:
    """Whether whole tensors were compared with known ones, not just recorded."""
    return bool((golden & (HELD | FAILED)).any())


def _by_frequency(values) -> np.ndarray:
    """Each value's number: 0 the most frequent, of equally frequent ones the first."""
    _, first, inverse, counts = np.unique(
        values, return_index=True, return_inverse=True, return_counts=True
    )
    number = np.empty(len(counts), np.int64)
    number[np.lexsort((first, -counts))] = np.arange(len(counts))
    return number[inverse]


def _code(place: Place) -> int:
    return (place.repeat << 36) | (place.phase << 33) | max(place.step, 0)
