"""Rows of a trace as a few words each, gathered by the place in the program that they are of.

A place is a repetition, stage, step, layer, tensor, op, and which of a rank's checks of these.
"""

import numpy as np

from spimpi.trace.schema import Stage

MOST_VALUES = 64  # of one place; distinct ones come of groups of ranks that hold different data
SETTLE = 1 << 20  # rows that wait until they are put together
_MOST_OCCURRENCES = (1 << 24) - 1
_ODD = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)

# Two words that are a place, and a fingerprint. From the highest bit, ``run``: stage (8 bits),
# repeat (16), step (32); ``place``: layer + 1 (16), tensor (16), op (8), occurrence (24).
# ``group`` tells checks of one place apart: of groups of ranks, of what came from other ranks.
WORDS = np.dtype(
    [("run", "<u8"), ("place", "<u8"), ("group", "<u8"), ("fingerprint", "<u8"), ("rank", "<i8")]
)


def packed(block) -> np.ndarray:
    """A block's rows as WORDS, of occurrence 0 and group 0."""

    def column(name, bits, shift, plus=0):
        values = block[name].astype(np.int64) + plus
        return (values.astype(np.uint64) & np.uint64((1 << bits) - 1)) << np.uint64(shift)

    words = np.zeros(len(block), WORDS)
    words["run"] = column("stage", 8, 48) | column("repeat", 16, 32) | column("step", 32, 0)
    words["place"] = column("layer", 16, 48, plus=1) | column("tensor", 16, 32) | column("op", 8, 24)
    words["fingerprint"], words["rank"] = block["fingerprint"], block["rank"]
    return words


def unpack(words, found) -> None:
    """Write the places of ``words`` into the columns of ``found``."""
    run, place = words["run"], words["place"]
    for name, word, bits, shift in (
        ("stage", run, 8, 48), ("repeat", run, 16, 32), ("tensor", place, 16, 32),
        ("op", place, 8, 24), ("occurrence", place, 24, 0),
    ):  # fmt: skip
        found[name] = word >> np.uint64(shift) & np.uint64((1 << bits) - 1)
    found["step"] = run.astype(np.uint32).view(np.int32)
    found["layer"] = (place >> np.uint64(48)).astype(np.int64) - 1


def mixed(word, number) -> np.ndarray:
    """A word of both, uint64; equal words of other numbers are unlike."""
    z = word ^ (np.asarray(number).astype(np.int64).view(np.uint64) + np.uint64(1)) * _ODD[0]
    for shift, factor in ((30, _ODD[1]), (27, _ODD[2])):
        z = (z ^ (z >> np.uint64(shift))) * factor
    return z ^ (z >> np.uint64(31))


def starts_of(rows, names=("run", "place")) -> np.ndarray:
    """Where a new value of these columns begins in sorted rows."""
    new = np.ones(len(rows), bool)
    if len(rows):
        new[1:] = np.logical_or.reduce([rows[n][1:] != rows[n][:-1] for n in names])
    return np.flatnonzero(new)


class Occurrences:
    """Counts a rank's checks of one place and group: a program may make several."""

    def __init__(self):
        self.rank, self.seen = None, np.zeros(0, WORDS)

    def of(self, words) -> np.ndarray:
        """The number of each row of a program, from 0; rows of verify have none."""
        numbers = np.zeros(len(words), np.uint64)
        program = np.flatnonzero(words["run"] >> np.uint64(48) == Stage.PROGRAM)
        if not program.size:
            return numbers
        ranks = words["rank"][program]
        starts = np.flatnonzero(np.r_[True, ranks[1:] != ranks[:-1]])
        for start, stop in zip(starts, np.r_[starts[1:], len(ranks)]):
            if ranks[start] != self.rank:
                self.rank, self.seen = ranks[start], np.zeros(0, WORDS)
            own = program[start:stop]
            numbers[own] = np.minimum(self._of_rank(words[own]), _MOST_OCCURRENCES)
        return numbers

    def _of_rank(self, words) -> np.ndarray:
        # ``seen`` has a row a place; in place of the fingerprint, how many there were.
        both = np.concatenate([self.seen, words])
        names = ("run", "place", "group")
        order = np.lexsort([both[n] for n in names[::-1]])  # stable: what was seen comes first
        starts = starts_of(both[order], names)
        lengths = np.diff(np.r_[starts, len(both)])
        is_seen = order[starts] < len(self.seen)
        before = np.zeros(len(starts), np.int64)
        before[is_seen] = self.seen["fingerprint"][order[starts[is_seen]]]
        numbers = np.empty(len(both), np.int64)
        numbers[order] = np.arange(len(both)) - np.repeat(starts + is_seen - before, lengths)
        result = numbers[len(self.seen) :]
        self.seen = both[order][starts]
        self.seen["fingerprint"] = before + lengths - is_seen
        return result


class Gathered:
    """Rows of which those with equal ``names`` become one; ``columns``: how, a ufunc each."""

    def __init__(self, dtype, names, columns):
        self.names, self.columns = names, columns
        self.rows, self.waiting, self.n_waiting = np.zeros(0, dtype), [], 0

    def add(self, rows) -> None:
        self.waiting.append(rows)
        self.n_waiting += len(rows)
        if self.n_waiting > SETTLE:
            self.result()

    def result(self) -> np.ndarray:
        """The rows so far, sorted by ``names``."""
        rows = np.concatenate([self.rows, *self.waiting])
        rows = rows[np.lexsort([rows[n] for n in self.names[::-1]])]
        starts = starts_of(rows, self.names)
        self.rows = rows[starts]
        for name, ufunc in self.columns.items() if len(starts) else ():
            self.rows[name] = ufunc.reduceat(rows[name], starts)
        self.waiting, self.n_waiting = [], 0
        return self.rows


class Distinct:
    """Rows, those of equal place and fingerprint once, of the lowest of their ranks."""

    def __init__(self):
        self.rows, self.waiting, self.n_waiting = np.zeros(0, WORDS), [], 0

    def add(self, words) -> None:
        self.waiting.append(words)
        self.n_waiting += len(words)
        if self.n_waiting > SETTLE:
            self._settle()

    def _settle(self) -> None:
        rows = _once(np.concatenate([self.rows, *self.waiting]))
        self.rows, self.waiting, self.n_waiting = rows, [], 0
        if len(rows) > SETTLE:
            self.rows = self.result()

    def result(self) -> np.ndarray:
        """The rows sorted by place and fingerprint, at most the MOST_VALUES smallest of a place."""
        if self.waiting:
            self._settle()
        rows = self.rows
        rows = rows[np.lexsort([rows[n] for n in ("rank", "fingerprint", "place", "run")])]
        rows = rows[starts_of(rows, ("run", "place", "fingerprint"))]
        starts = starts_of(rows)
        position = np.arange(len(rows)) - np.repeat(starts, np.diff(np.r_[starts, len(rows)]))
        return rows[position < MOST_VALUES]


def _once(words) -> np.ndarray:
    """Equal rows once, in some order. One sort of hashes: most ranks have the same rows."""
    hashes = words["run"] * _ODD[0] ^ words["place"] * _ODD[1] ^ words["fingerprint"] * _ODD[2]
    words = words[np.argsort(hashes)]
    starts = starts_of(words, ("run", "place", "fingerprint"))
    once = words[starts]
    if len(once):
        once["rank"] = np.minimum.reduceat(words["rank"], starts)
    return once
