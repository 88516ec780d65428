"""Random projections of float arrays, on CPUs: for checks of sums and for sketches.

docs/sums.md and docs/sketches.md say what the numbers are for, and bound their rounding. Sums are
made in blocks of BLOCK elements, as lanes.py says, and then block after block. Not part of what
``spimpi verify`` loads.
"""

import numpy as np
from numba import types

from spimpi.fingerprint.lanes import (
    EXPONENT, SIGN_AND_FRACTION, WIDTH, narrow_sums, narrow_sums_of_both, wide_sums,
    wide_sums_of_both,
)  # fmt: skip
from spimpi.fingerprint.words import GOLDEN, ONE, ZERO, mix
from spimpi.jit import inlined, kernel

BLOCK = 1024
_CHUNK = 1 << 15  # words of coefficients that are kept at a time: a part of the L2 cache
_TOP_BIT = np.uint64(1 << 63)
_WIDTH = np.uint64(WIDTH)
_KEPT, _EXPONENT = np.uint64(SIGN_AND_FRACTION), np.uint64(EXPONENT)

_DOUBLES = types.Array(types.float64, 1, "C", readonly=True)
_SINGLES = types.Array(types.float32, 1, "C", readonly=True)
_WORDS = types.Array(types.uint64, 1, "C", readonly=True)
_CUTS = types.Array(types.int64, 1, "C", readonly=True)
_SUMS = types.Array(types.float64, 2, "C")
_TABLE = types.Array(types.float64, 2, "C", readonly=True)
_HASHES = types.Array(types.uint64, 2, "C")
_OUT = types.Array(types.float64, 1, "C")


def rounds(n: int) -> int:
    """How often a term of a sum of n elements of a bin is rounded at most, here or in numpy.

    Without its product. In a lane BLOCK / WIDTH - 1 times, four times as the lanes are added; up to
    WIDTH elements that are left over are added one after the other; then the blocks are.
    """
    return min(n, BLOCK // WIDTH + WIDTH) + -(-n // BLOCK)


@inlined
def _fill(key, start, words):
    """The stream's words from ``start`` on, made odd."""
    own = key + (np.uint64(start) + ONE) * GOLDEN
    for i in range(words.size):
        words[i] = mix(own + np.uint64(i) * GOLDEN) | ONE


@kernel(types.void(types.uint64, types.int64, _OUT))
def coefficients(key, start, out):
    """Coefficients w of elements ``start``... of a bin, into float64[n]."""
    words = out.view(np.uint64)
    _fill(key, start, words)
    for i in range(words.size):
        words[i] = words[i] & _KEPT | _EXPONENT


@inlined
def _block_of_both(x, result, words, place, at, n):
    whole = n // _WIDTH
    done = whole * _WIDTH
    a, norm, b, plain, keyed = wide_sums_of_both(x, result, words, place, at, whole)
    more = narrow_sums_of_both(x, result, words, place + done, at + done, n - done)
    return a + more[0], norm + more[1], b + more[2], plain + more[3], keyed + more[4]


@inlined
def _block(x, words, place, at, n):
    whole = n // _WIDTH
    done = whole * _WIDTH
    a, norm = wide_sums(x, words, place, at, whole)
    more = narrow_sums(x, words, place + done, at + done, n - done)
    return a + more[0], norm + more[1]


@inlined
def _longest(cuts):
    longest = 0
    for i in range(cuts.size - 1):
        longest = max(longest, cuts[i + 1] - cuts[i])
    return longest


@kernel(
    types.void(_DOUBLES, _DOUBLES, types.int64, _CUTS, types.uint64, _SUMS, _HASHES),
    types.void(_SINGLES, _SINGLES, types.int64, _CUTS, types.uint64, _SUMS, _HASHES),
)
def project_both(x, result, first, cuts, key, sums, hashes):
    """Add the projections of a piece of a contribution and of a result to sums float64[3, B].

    x and result [n] are elements ``first``... of a tensor whose bins are cuts int64[B + 1]; the
    rows of sums are the projection and norm of x and the result's projection. hashes uint64[2, B]
    gets what ``close_hashes`` needs of the result's bits. Each element is read once.
    """
    words = np.empty(min(_CHUNK, _longest(cuts)), np.uint64)
    last = first + x.size
    for at in range(0, _longest(cuts), _CHUNK):
        _fill(key, at, words)
        for b in range(cuts.size - 1):
            begin = max(first, cuts[b] + at)
            end = min(last, min(cuts[b + 1], cuts[b] + at + _CHUNK))
            for i in range(begin, end, BLOCK):
                place, word = np.uint64(i - first), np.uint64(i - cuts[b] - at)
                n = np.uint64(min(BLOCK, end - i))
                own, norm, found, plain, keyed = _block_of_both(x, result, words, place, word, n)
                sums[0, b] += own
                sums[1, b] += norm
                sums[2, b] += found
                hashes[0, b] += plain
                hashes[1, b] += keyed


@kernel(types.uint64(_HASHES, types.uint64))
def close_hashes(hashes, key):
    """The agreement word of a tensor whose bins have these hashes."""
    total = ZERO
    for b in range(hashes.shape[1]):
        own = key + (np.uint64(b) + ONE) * GOLDEN
        total ^= mix(mix(hashes[0, b] ^ own) ^ hashes[1, b])
    return total


@kernel(types.float64(_TABLE, types.int64, types.int64, _CUTS, types.float64, types.float64))
def largest_limit(everyone, first, stride, sizes, relative, flushed):
    """The largest limit of a bin, if all projections lie within theirs, and these are finite; else -1.

    everyone float64[P, W]: each rank's projection, norm and result's projection of bin b stand
    ``first + b``, ``stride`` and twice ``stride`` further. The result is rank 0's; sizes int64[B];
    relative and flushed are float_bound.factors.
    """
    largest = 0.0
    for b in range(sizes.size):
        at = first + b
        total, norm = 0.0, 0.0
        for rank in range(everyone.shape[0]):
            total += everyone[rank, at]
            norm += everyone[rank, at + stride]
        limit = relative * norm + flushed * sizes[b]
        off = abs(everyone[0, at + 2 * stride] - total)
        if not (off <= limit and limit < np.inf):
            return -1.0
        largest = max(largest, limit)
    return largest


@kernel(
    types.void(_DOUBLES, types.int64, _CUTS, types.uint64, _SUMS),
    types.void(_SINGLES, types.int64, _CUTS, types.uint64, _SUMS),
)
def project(x, first, cuts, key, sums):
    """As project_both, of one array: projection and norm are added to sums float64[2, B]."""
    words = np.empty(min(_CHUNK, _longest(cuts)), np.uint64)
    last = first + x.size
    for at in range(0, _longest(cuts), _CHUNK):
        _fill(key, at, words)
        for b in range(cuts.size - 1):
            begin = max(first, cuts[b] + at)
            end = min(last, min(cuts[b + 1], cuts[b] + at + _CHUNK))
            for i in range(begin, end, BLOCK):
                place, word = np.uint64(i - first), np.uint64(i - cuts[b] - at)
                own, norm = _block(x, words, place, word, np.uint64(min(BLOCK, end - i)))
                sums[0, b] += own
                sums[1, b] += norm


# Sketches


@inlined
def _two_sum(a, b):
    """Knuth's exact sum: the rounded sum of a and b, and what the rounding left out."""
    s = a + b
    c = s - a
    return s, (a - (s - c)) + (b - c)


@inlined
def _sketched(x, key, first, sums):
    not_finite = 0
    for i in range(x.size):
        a = np.float64(x[i])
        if not np.isfinite(a):
            not_finite += 1
            continue
        word = mix(key + (first + np.uint64(i) + ONE) * GOLDEN)
        for j in range(8):
            signed = -a if (word >> np.uint64(j)) & ONE else a
            sums[j, 0], lost = _two_sum(sums[j, 0], signed)
            sums[j, 1] += lost
        sums[8, 0], lost = _two_sum(sums[8, 0], a * a)
        sums[8, 1] += lost
        sums[9, 0] = max(sums[9, 0], abs(a))
    return not_finite


@kernel(
    types.int64(_DOUBLES, types.uint64, types.uint64, _SUMS),
    types.int64(_SINGLES, types.uint64, types.uint64, _SUMS),
)
def sketch_run(x, key, first, sums):
    """Add a run's eight projections, squares and maximum to sums float64[10, 2].

    x [n]: elements ``first``... of the tensor. Rows 0 to 7 are the projections and 8 the
    squares, each as a value and what its rounding left out; [9, 0] is the largest |x|. Returns how
    many elements are not finite; they add nothing.
    """
    return _sketched(x, key, first, sums)


@kernel(
    types.int64(
        types.Array(types.float32, 2, "A", readonly=True),
        types.uint64, types.int64, types.int64, types.int64, _SUMS,
    )
)  # fmt: skip
def sketch_block(x, key, first_row, first_col, n_cols, sums):
    """As sketch_run, of a block of rows and columns of a tensor that has n_cols columns."""
    not_finite = 0
    for row in range(x.shape[0]):
        first = np.uint64((first_row + row) * n_cols + first_col)
        not_finite += _sketched(x[row], key, first, sums)
    return not_finite


# Integers that wrap, and XOR

@kernel(types.void(_WORDS, types.int64, types.uint64, types.Array(types.uint64, 1, "C")))
def wrapped(values, first, key, out):
    """Add to out uint64[17], mod 2^64: Σ (z_i | 1) q_i, and Σ (z_i >> j) q_i for j = 0..15.

    values: integers as uint64 (sign-extended), elements ``first``... of the tensor; z_i the words
    of the stream. Meant to be compared modulo 2^b for items of b bits.
    """
    for i in range(values.size):
        z = mix(key + (np.uint64(first + i) + ONE) * GOLDEN)
        q = values[i]
        out[0] += (z | ONE) * q
        for j in range(16):
            out[j + 1] += (z >> np.uint64(j)) * q


@kernel(types.uint64(_WORDS, types.int64, types.uint64))
def xor_linear(values, first, key):
    """Σ z_i · bits_i in GF(2^64) (x^64 + x^4 + x^3 + x + 1): linear under XOR of the values."""
    total = ZERO
    for i in range(values.size):
        z = mix(key + (np.uint64(first + i) + ONE) * GOLDEN)
        z = z if z != ZERO else ONE
        q = values[i]
        while q != ZERO:
            if q & ONE:
                total ^= z
            q >>= ONE
            carry = z & _TOP_BIT
            z = z << ONE
            if carry != ZERO:
                z ^= np.uint64(27)
    return total
