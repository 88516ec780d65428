"""Where a sum is wrong: failing bins are cut down to single elements, and NaN and Inf sorted out.

Everything here is collective over the communicator it takes, runs only after a check has failed
or met numbers that are not finite, and gives the same result on every rank. ``holder`` is the rank
whose result is looked at; of an allreduce's equal results, any.
"""

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from spimpi.checks.sums import float_bound, exact as sum_exact, words as sum_words
from spimpi.checks.sums.words import Blocks
from spimpi.fingerprint import projections
from spimpi.fingerprint.tag import LINEAR

FANOUT = 32
MOST_RANGES = 16
_NAN, _INF, _NEGATIVE_INF = 1, 2, 4


@dataclass(frozen=True)
class Element:
    """A wrong element: its place in the block, what the contributions give, what was found."""

    place: int
    expected: object
    found: object


@dataclass(frozen=True)
class Floats:
    """The float bins of one holder's block, seen from this rank.

    skip and scale are as in float_words.
    """

    blocks: Blocks
    block: int
    holder: int
    dtype: np.dtype
    skip: np.ndarray
    scale: bool

    def exchange(self, comm, ranges) -> tuple[np.ndarray, np.ndarray]:
        """Everybody's words of ranges, [P, 3, R], and the holder's result's, [2, R]."""
        own = np.zeros((5, len(ranges)))
        arguments = (ranges, self.blocks.key, self.skip, self.scale)
        own[:3] = sum_words.float_words(self.blocks.blocks[self.block], *arguments)
        if comm.rank == self.holder:
            own[3:] = sum_words.float_words(self.blocks.result, *arguments)[:2]
        everyone = np.empty((comm.size, *own.shape))
        comm.Allgather(own, everyone)
        return everyone[:, :3], everyone[self.holder, 3:]

    def failing(self, own, result, ranges) -> np.ndarray:
        sizes = np.array([stop - start for _, start, stop in ranges])
        limit = float_bound.limits(own[:, 2], sizes, len(own), self.dtype)
        return ~(np.abs(float_bound.excess(own, result)) <= limit).all(axis=0)

    def elements(self, comm, ranges) -> list[Element]:
        """The wrong elements in failing ranges (bin's start, start, stop), MOST_RANGES at most."""
        own, result = self.exchange(comm, ranges)
        while any(stop - start > 1 for _, start, stop in ranges):
            ranges = [part for one in ranges for part in _parts(*one)]
            own, result = self.exchange(comm, ranges)
            failing = np.flatnonzero(self.failing(own, result, ranges))[:MOST_RANGES]
            ranges = [ranges[i] for i in failing]
            own, result = own[:, :, failing], result[:, failing]
        scale = 2.0**128 if self.scale else 1.0
        found = []
        for slot, (origin, place, _) in enumerate(ranges):
            w = np.empty(1)
            projections.coefficients(np.uint64(self.blocks.key), place - origin, w)
            sign = -scale if w[0] < 0 else scale
            expected = float_bound.exact_sum(own[:, 0, slot]) * sign
            found.append(Element(place, expected, float(result[0, slot]) * sign))
        return found


def _parts(origin, start, stop):
    cuts = np.linspace(start, stop, min(FANOUT, stop - start) + 1).astype(int)
    return [(origin, int(a), int(b)) for a, b in zip(cuts, cuts[1:]) if b > a]


def integer_elements(comm, blocks: Blocks, block, holder, tag, modulus) -> list[Element]:
    """The wrong elements of an integer block, compared modulo ``modulus``."""
    x = blocks.blocks[block]
    key = tag.key(LINEAR, blocks.slabs[block].global_shape, x.dtype.itemsize)
    ranges = [(0, 0, x.size)]
    everyone = None
    while ranges:
        done = all(stop - start == 1 for _, start, stop in ranges)
        if not done:
            ranges = [part for one in ranges for part in _parts(*one)]
        flat_ranges = [(start, stop) for _, start, stop in ranges]
        own = np.zeros((2, len(ranges)), np.uint64)
        own[0] = sum_exact.linear_ranges(x, 0, flat_ranges, key)
        if comm.rank == holder:
            own[1] = sum_exact.linear_ranges(blocks.result, 0, flat_ranges, key)
        everyone = np.empty((comm.size, *own.shape), np.uint64)
        comm.Allgather(own, everyone)
        low_bits = np.uint64(modulus - 1)
        wrong = (everyone[holder, 1] - everyone[:, 0].sum(axis=0, dtype=np.uint64)) & low_bits
        failing = np.flatnonzero(wrong)[:MOST_RANGES]
        ranges = [ranges[i] for i in failing]
        if done:
            break
    return [_integer_element(comm, blocks, block, holder, place) for _, place, _ in ranges]


def _integer_element(comm, blocks, block, holder, place) -> Element:
    x = blocks.blocks[block]
    own = np.zeros(2, np.uint64)
    own[0] = np.uint64(int(x[np.unravel_index(place, x.shape)]) % (1 << 64))
    if comm.rank == holder:
        r = blocks.result
        own[1] = np.uint64(int(r[np.unravel_index(place, r.shape)]) % (1 << 64))
    everyone = np.empty((comm.size, 2), np.uint64)
    comm.Allgather(own, everyone)
    dtype = np.dtype(f"u{x.dtype.itemsize}")
    total = everyone[:, 0].sum(dtype=np.uint64)
    expected = total.astype(dtype).view(x.dtype)
    return Element(place, expected, everyone[holder, 1].astype(dtype).view(x.dtype))


@dataclass(frozen=True)
class NotFinite:
    """What non-finite numbers in some bins of a block came to.

    skip: places that the bound does not cover, in the bins looked at; wrong: those that are no
    possible result; n_given: how many elements had NaN or Inf in a contribution, from the ranks
    ``givers``; n_overflowed: in how many finite contributions may have overflowed.
    """

    skip: np.ndarray
    wrong: list[Element]
    n_given: int
    givers: tuple[int, ...]
    n_overflowed: int


def _classes(values) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = values.astype(np.float64)
    codes = np.isnan(values) * _NAN + np.isposinf(values) * _INF
    return (codes + np.isneginf(values) * _NEGATIVE_INF).astype(np.uint8)


def sort_out(comm, blocks: Blocks, block: int, holder: int, dtype, ranges) -> NotFinite:
    """Compare NaN and Inf in ranges (start, stop) of the result with what must come of them."""
    facts = float_bound.format_of(dtype)
    skip, wrong, n_given, n_overflowed = [], [], 0, 0
    gives = np.zeros(comm.size, np.uint8)
    for start, stop in ranges:
        values = sum_words.flat(blocks.blocks[block], start, stop)
        codes = _classes(values)
        gives[comm.rank] |= codes.any()
        comm.Allreduce(MPI.IN_PLACE, codes, op=MPI.BOR)
        found = np.zeros(stop - start, np.uint8)
        if comm.rank == holder:
            found = _classes(sum_words.flat(blocks.result, start, stop))
        comm.Bcast(found, root=holder)
        both = _INF | _NEGATIVE_INF
        expected = np.where((codes & _NAN) | (codes & both == both), _NAN, codes)
        odd = np.flatnonzero(found != expected)
        may = _may_overflow(comm, values[odd], facts.largest, codes[odd], found[odd])
        n_given += int(np.count_nonzero(codes))
        n_overflowed += int(np.count_nonzero(may))
        for i in odd[~may]:
            wrong.append(Element(start + int(i), _NAMES[int(expected[i])], _NAMES[int(found[i])]))
        skip.append(start + np.flatnonzero(codes | found))
    comm.Allreduce(MPI.IN_PLACE, gives, op=MPI.BOR)
    skip = np.concatenate([np.zeros(0, int), *skip])
    return NotFinite(skip, wrong, n_given, tuple(np.flatnonzero(gives).tolist()), n_overflowed)


def _may_overflow(comm, values, largest, given, found) -> np.ndarray:
    """Where partial sums that overflow explain what was found, beside what was given (classes).

    An infinity may come of numbers of its sign that add up to the largest number, and stays unless
    it meets the other: then NaN.
    """
    wide = values.astype(np.float64) / largest / comm.size
    wide[~np.isfinite(wide)] = 0.0
    sums = np.stack([np.maximum(wide, 0), np.maximum(-wide, 0)])
    comm.Allreduce(MPI.IN_PLACE, sums, op=MPI.SUM)
    up, down = sums * comm.size >= 0.99
    has_up, has_down = (given & _INF) != 0, (given & _NEGATIVE_INF) != 0
    only_up, only_down = (up | has_up) & ~has_down, (down | has_down) & ~has_up
    both = (up | has_up) & (down | has_down)
    explained = np.where(found == _INF, only_up, np.where(found == _NAN, both, only_down))
    return explained & (found != 0) & ((given & _NAN) == 0)


_NAMES = {0: "a finite number", _NAN: "NaN", _INF: "Inf", _NEGATIVE_INF: "-Inf"}
