"""Sums that need no tolerance: integers, floats that hold integers, MAX, MIN and BXOR.

The words that a rank makes on its own, and what is decided from everybody's. Nothing here
communicates. docs/sums.md says what each proves.
"""

from math import fsum, prod

import numpy as np

from spimpi.checks.sums.float_bound import format_of
from spimpi.checks.sums.words import flat, pieces_of, widened
from spimpi.fingerprint import linear_fingerprint_counted, projections
from spimpi.fingerprint.tag import LINEAR, MASK
from spimpi.partition import Slab

_TRIED = 64  # elements that must be integers before all are tried
_PIECE = 1 << 18
N_WRAPPED = 17


def looks_integral(x) -> bool:
    """Whether the first elements of a float array are integers that are not all zero."""
    if not x.size or float(x.item(0)) % 1:  # most arrays, at the least cost
        return False
    first = flat(x, 0, min(_TRIED, x.size)).astype(np.float64)
    return bool(np.all(np.trunc(first) == first) and np.any(first))


def linear(x, tag, slab: Slab, threads: int = 1) -> tuple[int, int]:
    """(linear fingerprint, elements that are no integers) of a block of integers or floats."""
    carrier = x if x.dtype.kind in "iu" else widened(x)
    return linear_fingerprint_counted(carrier, tag, slab, x.dtype.itemsize, threads)


def largest_magnitude(x) -> float:
    """max |x| of a float array, rounded up."""
    if not x.size:
        return 0.0
    return float(max(abs(float(x.max())), abs(float(x.min()))))


def never_rounds(largest, dtype) -> bool:
    """Whether sums of integers of these magnitudes (one a rank) are all representable."""
    return fsum(largest) <= 1 / format_of(dtype).unit


def extremes(x) -> tuple[int, int]:
    """The smallest and largest of an integer array, and 0."""
    return (min(0, int(x.min())), max(0, int(x.max()))) if x.size else (0, 0)


def cannot_wrap(lowest, highest, dtype) -> bool:
    """Whether sums of numbers within these bounds (one pair a rank) fit an integer dtype."""
    info = np.iinfo(dtype)
    return sum(lowest) >= info.min and sum(highest) <= info.max


def wrapped_words(x, tag, slab: Slab) -> np.ndarray:
    """uint64[17] of a block of narrow integers, to be compared modulo 2^(bits of an item)."""
    words = np.zeros(N_WRAPPED, np.uint64)
    key = np.uint64(tag.key(LINEAR, slab.global_shape, x.dtype.itemsize))
    for run, first in global_runs(x, slab):
        projections.wrapped(run.astype(np.int64).view(np.uint64), first, key, words)
    return words


def xor_word(x, tag, slab: Slab) -> int:
    """A word of a block's bits that is linear under XOR."""
    unsigned = f"u{x.dtype.itemsize}"
    key = np.uint64(tag.key(LINEAR, slab.global_shape, x.dtype.itemsize))
    total = 0
    for run, first in global_runs(x, slab):
        total ^= int(projections.xor_linear(run.view(unsigned).astype(np.uint64), first, key))
    return total


def global_runs(x, slab: Slab):
    """(contiguous elements, global index of the first) of runs that together are a block."""
    shape, whole_shape = x.shape, slab.global_shape
    if shape == whole_shape:
        for first, index in pieces_of(shape, _PIECE):
            yield np.ascontiguousarray(x[index]).reshape(-1), first
        return
    # The trailing axes that the block has whole, and one more, are adjacent in the tensor.
    axis = len(shape) - 1
    while axis > 0 and shape[axis] == whole_shape[axis]:
        axis -= 1
    strides = [prod(whole_shape[i + 1 :]) for i in range(len(shape))]
    origin = sum(start * stride for start, stride in zip(slab.offset, strides))
    for row in np.ndindex(shape[:axis]):
        first = origin + sum(i * stride for i, stride in zip(row, strides))
        run = np.ascontiguousarray(x[row]).reshape(-1)
        if run.size:
            yield run, first


def linear_ranges(x, index_of_word, ranges, key: int) -> np.ndarray:
    """Linear words, uint64[R], of ranges (start, stop) of an integer block; weights by place.

    ``index_of_word`` offsets the places, so that no two blocks share weights.
    """
    words = np.zeros(len(ranges), np.uint64)
    for slot, (start, stop) in enumerate(ranges):
        values = flat(x, start, stop)
        values = np.ascontiguousarray(values).astype(np.int64).view(np.uint64)
        out = np.zeros(N_WRAPPED, np.uint64)
        projections.wrapped(values, index_of_word + start, np.uint64(key), out)
        words[slot] = out[0]
    return words


def differ(parts, total: int, modulus: int = MASK + 1) -> int:
    """total - Σ parts, modulo the modulus."""
    return (total - sum(int(p) for p in parts)) % modulus


def blame_words(parts, total: int, modulus: int = MASK + 1):
    """(rank, doubled) of the one part whose absence or repetition explains a total, or None."""
    wrong = differ(parts, total, modulus)
    found = []
    for rank, part in enumerate(parts):
        part = int(part) % modulus
        if part and wrong == -part % modulus:
            found.append((rank, False))
        if part and wrong == part:
            found.append((rank, True))
    return found[0] if len(found) == 1 else None
