"""The words of a sum's check that a rank makes on its own: projections, hashes, blocks of arrays.

Arrays are read as blocks of items: a complex number is two items along a new last axis. float16
and bfloat16 are widened to float32 a piece at a time. Nothing here communicates.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import prod

import numpy as np

from spimpi.checks.sums.float_bound import bins_of
from spimpi.errors import UsageError
from spimpi.fingerprint import arrays, as_array, fingerprint, projections
from spimpi.fingerprint.cpu import _pool
from spimpi.fingerprint.tag import SKETCH
from spimpi.partition import Slab, whole

_PIECE = 1 << 17  # elements of an array that are copied at a time, where they must be
_SCALE = 2.0**-128  # keeps the sums of the largest float64 finite


def items(x) -> np.ndarray:
    """The array's items: a complex array with a new last axis of 2 (copied unless contiguous)."""
    if x.dtype.kind != "c":
        return x
    part = x.real.dtype
    return np.ascontiguousarray(x).view(part).reshape(*x.shape, 2)


def widened(x: np.ndarray) -> np.ndarray:
    """float32 of float16 and bfloat16, itself of float64 and float32; exact."""
    return x if x.dtype in (np.float64, np.float32) else x.astype(np.float32)


def pieces_of(shape, limit: int):
    """(first element, index) of blocks of at most ``limit`` elements, in row-major order."""
    n = prod(shape)
    if n <= limit or not shape:
        yield 0, ()
        return
    if shape[0] == 1:
        for first, index in pieces_of(shape[1:], limit):
            yield first, (0, *index)
        return
    row = n // shape[0]
    if row > limit:
        for i in range(shape[0]):
            for first, index in pieces_of(shape[1:], limit):
                yield i * row + first, (i, *index)
        return
    step = limit // row
    for i in range(0, shape[0], step):
        yield i * row, (slice(i, i + step),)


def _is_plain(x) -> bool:
    flags = x.flags
    return flags.c_contiguous and flags.aligned and x.dtype in (np.float64, np.float32)


def _readable(x) -> np.ndarray:
    return np.require(widened(x), requirements=("C", "A")).reshape(-1)


def _jobs(blocks, threads):
    """Runs (first element, arrays with one axis) that together are the blocks, all alike cut."""
    if all(_is_plain(x) for x in blocks):
        flat = [x.reshape(-1) for x in blocks]
        for i in range(threads):
            a, b = (flat[0].size * j // threads for j in (i, i + 1))
            yield a, lambda a=a, b=b: [x[a:b] for x in flat]
        return
    for first, index in pieces_of(blocks[0].shape, _PIECE):
        yield first, lambda index=index: [_readable(x[index]) for x in blocks]


@dataclass(frozen=True)
class Projected:
    """Sums float64[2 or 3, B] of a block (projections.project_both), its hash, pieces read."""

    sums: np.ndarray
    word: int
    pieces: int


def project_block(x, result, cuts, key: int, threads: int = 1) -> Projected:
    """Projection and norm of a block of float items; the result's projection and hash, if given.

    ``cuts`` int64[B + 1] are the block's bins, ``key`` its sketch stream.
    """
    blocks = [x] if result is None else [x, result]
    n_bins = len(cuts) - 1
    jobs = list(_jobs(blocks, threads)) if n_bins else []

    def nothing():
        return np.zeros((2 if result is None else 3, n_bins)), np.zeros((2, n_bins), np.uint64)

    def run(job):
        first, parts = job
        sums, hashes = nothing()
        own, *there = parts()
        if there:
            projections.project_both(own, there[0], first, cuts, key, sums, hashes)
        else:
            projections.project(own, first, cuts, key, sums)
        return sums, hashes

    key = np.uint64(key)
    parts = list(_pool(threads).map(run, jobs)) if threads > 1 else [run(job) for job in jobs]
    sums, hashes = parts[0] if parts else nothing()
    for more, others in parts[1:]:
        sums += more
        hashes += others
    return Projected(sums, int(projections.close_hashes(hashes, key)), len(jobs))


@dataclass(frozen=True)
class Layout:
    """Where a tensor's blocks lie, and their bins: B / blocks each at most, at least one.

    Kept for each shape (``layout_of``), for after a large collective every call costs.
    """

    shapes: tuple[tuple[int, ...], ...]
    slabs: tuple[Slab, ...]
    most: int

    @cached_property
    def cuts(self) -> tuple[np.ndarray, ...]:
        """The bins of each block."""
        most = max(1, self.most // len(self.shapes))
        return tuple(bins_of(shape, most) for shape in self.shapes)

    @cached_property
    def starts(self) -> list[int]:
        """Where each block's bins start among all bins; one more entry than blocks."""
        return list(accumulate((len(cuts) - 1 for cuts in self.cuts), initial=0))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Elements of each bin, int64, of all blocks one after the other."""
        return np.concatenate([np.diff(cuts) for cuts in self.cuts])

    @cached_property
    def longest(self) -> int:
        """Elements of the largest bin."""
        return int(self.sizes.max(initial=0))


@lru_cache(maxsize=256)
def layout_of(shape, most: int, dim: int = 0, starts: tuple[int, ...] | None = None) -> Layout:
    """Of a tensor in one block, or in shards along ``dim`` that begin (and end) at ``starts``."""
    if starts is None:
        return Layout((shape,), (whole(shape),), most)
    shapes, slabs = [], []
    for start, stop in zip(starts, starts[1:]):
        shapes.append((*shape[:dim], stop - start, *shape[dim + 1 :]))
        slabs.append(Slab(shape, (*(0,) * dim, start, *(0,) * (len(shape) - dim - 1))))
    return Layout(tuple(shapes), tuple(slabs), most)


@dataclass(frozen=True)
class Blocks:
    """A rank's addends as blocks, each with bins of its own, and the block its result is for.

    An allreduce has one block; a reduce-scatter one for each rank, of which ``own`` is the one
    that this rank's result is the sum of. Arrays are of items; offsets count them.
    """

    blocks: tuple[np.ndarray, ...]
    result: np.ndarray
    own: int
    key: int
    layout: Layout

    @property
    def slabs(self) -> tuple[Slab, ...]:
        return self.layout.slabs

    def bins_of(self, block: int) -> slice:
        return slice(*self.layout.starts[block : block + 2])

    def index_of(self, block: int, place: int) -> tuple[int, ...]:
        """The global index of an element of a block."""
        local = np.unravel_index(place, self.blocks[block].shape)
        return tuple(int(i + start) for i, start in zip(local, self.slabs[block].offset))


def flat(x: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Elements start:stop of an array in row-major order."""
    return x.reshape(-1)[start:stop] if x.flags.c_contiguous else x.flat[start:stop]


def float_words(x, ranges, key: int, skip=(), scale=False) -> np.ndarray:
    """s, t and norm, float64[3, R], of ranges (bin's start, start, stop) of a block.

    Elements at the positions ``skip`` count as 0; ``scale`` multiplies all by 2**-128.
    """
    words = np.zeros((3, len(ranges)))
    skip = np.asarray(skip, np.int64)
    for slot, (origin, start, stop) in enumerate(ranges):
        values = flat(x, start, stop).astype(np.float64)
        if skip.size:
            values[skip[(skip >= start) & (skip < stop)] - start] = 0.0
        if scale:
            values *= _SCALE
        w = np.empty(stop - start)
        projections.coefficients(np.uint64(key), start - origin, w)
        words[0, slot] = np.where(w < 0, -values, values).sum()
        words[1, slot] = (values * w).sum()
        words[2, slot] = np.abs(values).sum()
    return words


def agreement_word(result, tag, projected: Projected | None) -> int:
    """A word of the result's bits: the fused hash, else its fingerprint."""
    if projected is not None and result.dtype in (np.float64, np.float32):
        return projected.word
    return fingerprint(result, tag)


def comparable(result, op: str, unsure=None) -> np.ndarray:
    """A copy of a float result without what MPI may give otherwise on each rank.

    Ranks may take the two operands of an operation in either order. NaN plus NaN has the payload
    of one of them: all NaN are made the same. MPI.MAX and MPI.MIN return either of two zeros, and
    of an element with a NaN (``unsure``: bool, flat) anything: all made 0.
    """
    kept = np.array(result, order="C")
    kept[kept != kept] = np.nan
    if op != "SUM":
        kept[kept == 0] = 0
        kept.reshape(-1)[unsure] = 0
    return kept


def sketch_key(tag, shape, itemsize: int) -> int:
    return tag.key(SKETCH, shape, itemsize)


def same_arrays(contribution, result) -> tuple[np.ndarray, np.ndarray]:
    """Both as numpy's; UsageError unless they are arrays with a fingerprint, of one dtype."""
    contribution, result = as_array(contribution), as_array(result)
    for x in (contribution, result):
        arrays.word_layout(x.dtype)
    if contribution.dtype != result.dtype:
        msg = (
            f"contribution and result must have one dtype, found {contribution.dtype} and "
            f"{result.dtype}"
        )
        raise UsageError(msg)
    return contribution, result
