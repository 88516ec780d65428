"""Exact arithmetic, version ``exact-1``: matmuls whose bits do not depend on how they are cut.

The inputs of a matmul are scaled by powers of two and rounded to integers of so few bits that
every product and every partial sum is an integer of at most 2**53. float64 holds all of those, so
no sum rounds: any order, blocking, vector width, thread count or split over ranks gives the same
bits, and a check by equality has no false alarms. docs/exact-arithmetic.md derives this, and the
odds of the check of a product.

Everything here is local: no function communicates. Layouts: activations [R, K], weights [N, K]
as Hugging Face stores them, products Y = X W^T [R, N]; K is the inner size.
"""

from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter

import numpy as np
from numba import types
from numba.extending import intrinsic

from spimpi.arithmetic import EXACT as ARITHMETIC, exact_bits as bits  # noqa: F401
from spimpi.errors import UsageError
from spimpi.fingerprint.words import linear_weight
from spimpi.inference.elementary import bits_of, power_of_two, rounded
from spimpi.jit import inlined, kernel

# Scaling to integers

# float32 rows with any distance between them, writable or not; each row itself contiguous.
_ROWS = types.Array(types.float32, 2, "A", readonly=True)
NOT_FINITE = 0x7F800000  # the bits of +inf: those of a NaN without its sign lie above


@intrinsic
def _contiguous(typing_context, row):
    """The same row, of a type that says that its elements are adjacent (vectorised loads)."""

    def generate(context, builder, signature, arguments):
        context.nrt.incref(builder, signature.return_type, arguments[0])
        return arguments[0]

    return row.copy(layout="C")(row), generate


@inlined
def _check_rows(x):
    if x.shape[0] > 0 and x.shape[1] > 1 and x.strides[1] != x.itemsize:
        raise ValueError("the elements of a row must be adjacent")


@kernel(types.void(_ROWS, types.uint32[::1]))
def row_absmax(x, out):
    """The largest |x| of each row of x float32[R, K], as integer bits, into out uint32[R].

    NaN and Inf come out on top, so that an MPI_MAX over the shards of a row keeps them. A row
    without elements gives 0. The elements of a row must be adjacent, rows may be apart.
    """
    _check_rows(x)
    for row in range(x.shape[0]):
        words = _contiguous(x[row]).view(np.uint32)
        largest = np.uint32(0)
        for i in range(words.size):
            largest = max(largest, np.uint32(words[i] & 0x7FFFFFFF))
        out[row] = largest


@inlined
def exponent_of(word):
    """The least e with |x| < 2**e, for the bits of a finite float32 |x| > 0."""
    if word >= 0x00800000:
        return np.int64(word >> 23) - 126
    return (bits_of(np.float64(word)) >> 52) - 1022 - 149  # denormal: word * 2**-149


@kernel(types.int64(_ROWS, types.uint32[::1], types.int64, types.float64[:, ::1], types.int32[::1]))
def quantize_rows(x, absmax, b, out, exps):
    """Scale the rows of x float32[R, K] to integers of b bits; returns how many are not finite.

    absmax uint32[R]: row_absmax of the GLOBAL rows. exps int32[R] gets each row's exponent e, the
    least with max |x| < 2**e; out float64[R, K] gets x * 2**(b - e) rounded half to even: integers
    of at most 2**b, zero always +0.0. A row of zeros, and one that is not finite (NaN or Inf
    anywhere in it), gives zeros and e = 0. Rows of x as in row_absmax.
    """
    _check_rows(x)
    n_not_finite = 0
    for row in range(x.shape[0]):
        exps[row] = 0
        result = out[row]
        if absmax[row] == 0 or absmax[row] >= NOT_FINITE:
            n_not_finite += absmax[row] != 0
            result[:] = 0.0
            continue
        e = exponent_of(absmax[row])
        exps[row] = e
        scale = power_of_two(b - e)
        values = _contiguous(x[row])
        for i in range(values.size):
            result[i] = rounded(np.float64(values[i]) * scale)
    return n_not_finite


def weight_absmax(w: np.ndarray) -> np.ndarray:
    """row_absmax of weights float32[N, K]: uint32[N], to be reduced by MPI_MAX where K is cut."""
    absmax = np.empty(len(w), np.uint32)
    row_absmax(w, absmax)
    return absmax


def quantize_weights(w: np.ndarray, absmax: np.ndarray, b: int):
    """Scale weights float32[N, K] like quantize_rows, into integers carried as float32.

    Returns (wq float32[N, K], exps int32[N], n_not_finite, first): how many rows hold NaN or Inf
    and the first of them (-1: none). float32 holds these integers exactly since b <= 24. The
    float64 that they pass through are made a block of rows at a time.
    """
    n, k = w.shape
    wq, exps = np.empty((n, k), np.float32), np.empty(n, np.int32)
    rows = max(1, (1 << 16) // max(k, 1))
    block = np.empty((min(rows, n), k))
    n_not_finite = 0
    for i in range(0, n, rows):
        part = block[: min(rows, n - i)]
        j = i + len(part)
        n_not_finite += quantize_rows(w[i:j], absmax[i:j], b, part, exps[i:j])
        wq[i:j] = part
    first = int(np.argmax(absmax >= NOT_FINITE)) if n_not_finite else -1
    return wq, exps, n_not_finite, first


# The product

FEW_ROWS = 16
_L2_SHARE = 1 << 18  # bytes of weights that stay cached while the activations pass over them


@kernel("void(f8[:, ::1], f4[:, ::1], f8[:, ::1])", reassociate=True)
def _multiply(x, w, y):
    # Four rows of x by four of w share their loads: 16 sums in registers. A block of w is read
    # from memory once, however many rows x has.
    n_rows, k = x.shape
    n = w.shape[0]
    block = 4 * max(1, _L2_SHARE // (16 * max(k, 1)))
    for first in range(0, n, block):
        last = min(first + block, n)
        fours = last - (last - first) % 4
        row = 0
        while row < n_rows:
            if row + 4 <= n_rows:
                step = 4
                x0, x1, x2, x3 = x[row], x[row + 1], x[row + 2], x[row + 3]
                for j in range(first, fours, 4):
                    w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
                    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = 0.0
                    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = 0.0
                    for i in range(k):
                        u, v = np.float64(w0[i]), np.float64(w1[i])
                        s, t = np.float64(w2[i]), np.float64(w3[i])
                        a0 += x0[i] * u
                        a1 += x0[i] * v
                        a2 += x0[i] * s
                        a3 += x0[i] * t
                        b0 += x1[i] * u
                        b1 += x1[i] * v
                        b2 += x1[i] * s
                        b3 += x1[i] * t
                        c0 += x2[i] * u
                        c1 += x2[i] * v
                        c2 += x2[i] * s
                        c3 += x2[i] * t
                        d0 += x3[i] * u
                        d1 += x3[i] * v
                        d2 += x3[i] * s
                        d3 += x3[i] * t
                    y[row, j], y[row, j + 1], y[row, j + 2], y[row, j + 3] = a0, a1, a2, a3
                    z = y[row + 1]
                    z[j], z[j + 1], z[j + 2], z[j + 3] = b0, b1, b2, b3
                    z = y[row + 2]
                    z[j], z[j + 1], z[j + 2], z[j + 3] = c0, c1, c2, c3
                    z = y[row + 3]
                    z[j], z[j + 1], z[j + 2], z[j + 3] = d0, d1, d2, d3
            else:
                step = 1
                x0 = x[row]
                for j in range(first, fours, 4):
                    w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
                    a0 = a1 = a2 = a3 = 0.0
                    for i in range(k):
                        a0 += x0[i] * np.float64(w0[i])
                        a1 += x0[i] * np.float64(w1[i])
                        a2 += x0[i] * np.float64(w2[i])
                        a3 += x0[i] * np.float64(w3[i])
                    y[row, j], y[row, j + 1], y[row, j + 2], y[row, j + 3] = a0, a1, a2, a3
            for r in range(row, row + step):
                for j in range(fours, last):
                    a0 = 0.0
                    for i in range(k):
                        a0 += x[r, i] * np.float64(w[j, i])
                    y[r, j] = a0
            row += step


def _tile_rows(k: int) -> int:
    return min(256, max(64, (1 << 19) // max(k, 1)))


@dataclass(frozen=True)
class Scratch:
    """The buffer in which matmul widens weights; made once for all matrices of a rank."""

    tile: np.ndarray  # float64, one axis

    @classmethod
    def for_matrices(cls, shapes) -> "Scratch":
        """Enough for weights of these local shapes (N, K)."""
        return cls(np.empty(max((min(n, _tile_rows(k)) * k for n, k in shapes), default=0)))


def _multiply_by_blas(xq, wq, out, scratch):
    # BLAS wants float64 weights: widened a tile at a time, so that the wide ones stay in cache.
    n, k = wq.shape
    rows = min(n, _tile_rows(k))
    if scratch.tile.size < rows * k:
        msg = (
            f"matmul's scratch holds {scratch.tile.size} float64, but weights of shape {(n, k)} "
            f"need {rows * k}: make it with Scratch.for_matrices of all shapes"
        )
        raise UsageError(msg)
    tile = scratch.tile[: rows * k].reshape(rows, k)
    for i in range(0, n, max(rows, 1)):
        j = min(i + rows, n)
        part = tile[: j - i]
        np.copyto(part, wq[i:j])
        np.matmul(xq, part.T, out=out[:, i:j])


def matmul(xq: np.ndarray, wq: np.ndarray, out: np.ndarray, scratch: Scratch) -> None:
    """out = xq wq^T without any rounding: float64[R, K] by float32[N, K] into float64[R, N].

    Inputs are integers from quantize_rows and quantize_weights; all arrays are contiguous. A few
    rows are multiplied by a kernel that reads the weights once; more by that kernel or by BLAS,
    whichever is faster here: the bits are the same.
    """
    if len(xq) <= FEW_ROWS or _kernel_beats_blas():
        _multiply(xq, wq, out)
    else:
        _multiply_by_blas(xq, wq, out, scratch)


@lru_cache
def _kernel_beats_blas() -> bool:
    # It depends on the width of the vectors, on the kernels that BLAS picks for the processor and
    # on its threads, so it is tried, once a process, in a few ms.
    x, w, y = np.ones((64, 512)), np.ones((512, 512), np.float32), np.empty((64, 512))
    scratch = Scratch.for_matrices([w.shape])
    times = {}
    for _ in range(3):
        for multiply, more in ((_multiply, ()), (_multiply_by_blas, (scratch,))):
            start = perf_counter()
            multiply(x, w, y, *more)
            times[multiply] = min(perf_counter() - start, times.get(multiply, np.inf))
    return times[_multiply] <= times[_multiply_by_blas]


# The check of a product (Freivalds 1977), over the integers mod 2**64: Y r == X (W^T r), row by row.
# A single wrong element in a row is always found; several, their errors all divisible by 2**a and
# no more, but for odds of 2**-(63 - a). product.py and attention.py make it.


@kernel("void(u8, i8[::1])")
def _fill_odd(key, out):
    for i in range(out.size):
        out[i] = np.int64(linear_weight(key, np.uint64(i)))


def odd_vector(key: int, n: int) -> np.ndarray:
    """The odd weights r int64[n] of a matmul check: the linear fingerprint's, for stream key."""
    r = np.empty(n, np.int64)
    _fill_odd(np.uint64(key), r)
    return r


@kernel("i8(f4[:,::1], u4[::1], u4[::1], i4[::1], i8, i8[::1], i8[::1])")
def _project(w, own, absmax, exps, b, r, out):
    out[:] = 0
    n_wrong = 0
    for n in range(w.shape[0]):
        row, largest, given = w[n], np.uint32(0), absmax[n]
        words = row.view(np.uint32)
        for i in range(words.size):
            largest = max(largest, np.uint32(words[i] & 0x7FFFFFFF))
        e = exponent_of(given) if 0 < given < NOT_FINITE else 0
        n_wrong += largest != own[n] or largest > given or exps[n] != e
        if 0 < given < NOT_FINITE:
            scale = power_of_two(b - e)
            for i in range(out.size):
                out[i] += np.int64(rounded(np.float64(row[i]) * scale)) * r[n]
    return n_wrong


def project_weights(w, own, absmax, exps, b: int, r):
    """(W^T r mod 2**64 of the integers of weights float32[N, K], how many rows are wrong).

    The integers are those that quantize_weights makes with ``absmax``, made once more: a product
    of others is seen. A row is wrong where its maximum is not ``own`` (uint32[N], weight_absmax) or
    exceeds the GLOBAL row's (absmax), or where its exponent (exps) is not that of the latter.
    """
    wr = np.empty(w.shape[1], np.int64)
    return wr, _project(w, own, absmax, exps, b, r, wr)


@inlined
def is_sum(v):
    """Whether a float64 is an integer of at most 2**53, as every exact sum is."""
    return (np.rint(v) == v) & (abs(v) <= 9007199254740992.0)


@inlined
def row_product(values, r):
    """(values r mod 2**64, elements of values that are not integers of at most 2**53)."""
    total, n_wrong = 0, 0
    for i in range(values.size):
        good = is_sum(values[i])
        total += np.int64(values[i] if good else 0.0) * r[i]
        n_wrong += not good
    return total, n_wrong


@inlined
def row_input(values, wr):
    """values (W^T r) mod 2**64, for a row of what was multiplied."""
    total = 0
    for i in range(values.size):
        total += np.int64(values[i]) * wr[i]
    return total


# Back to float32


@inlined
def scaled_back(v, exponent):
    """v * 2**exponent as float32, rounded once; a zero is +0.0."""
    # Beyond these bounds a float32 is 0 or inf anyway, so they change nothing.
    e = min(max(exponent, -1022), 1023)
    return np.float32(v * power_of_two(e)) + np.float32(0.0)


@inlined
def scale_back(y, ex, ew, b, out):
    """out float32[R, N] = y * 2**(ex + ew - 2 b), rounded once; a zero is +0.0.

    y float64 or int64 [R, N]: the exact sums; ex int32[R] and ew int32[N]: exponents of the
    rows of activations and weights; b: their bits.
    """
    for row in range(y.shape[0]):
        own = np.int64(ex[row]) - 2 * b
        values, result = y[row], out[row]
        for i in range(values.size):
            result[i] = scaled_back(np.float64(values[i]), own + ew[i])
