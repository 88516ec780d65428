"""exp, sin, cos and 1/sqrt made of + - * / and sqrt alone: the same bits on every machine.

IEEE 754 fixes the results of those five operations and of no other, so libm's functions differ
between machines and versions and these do not. Strict float64: no fused multiply-add, no
reordering; sums and products happen exactly as they are written, whatever the vector width.
docs/exact-arithmetic.md derives the error bounds.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np
from numba import types
from numba.extending import intrinsic

from spimpi.jit import inlined, kernel

# Adding this to |v| < 2**51 rounds v to an integer (half to even), which then stands in the low
# bits of the sum; subtracting it again gives the integer as a float.
_TO_INTEGER = 6755399441055744.0  # 1.5 * 2**52
_TO_INTEGER_BITS = 0x4338000000000000

_LOG2_E = float.fromhex("0x1.71547652b82fep+0")
# ln 2 in two parts; the first has 32 bits, so its product with an 11-bit integer is exact.
_LN2_1 = float.fromhex("0x1.62e42feep-1")
_LN2_2 = float.fromhex("0x1.a39ef35793c76p-33")
# Beyond these, exp is 0 or inf anyway; within them the two halves of its exponent are normal.
_EXP_LOW, _EXP_HIGH = -746.0, 710.0

_TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
# pi/2 in three parts of 33 bits (their products with a 20-bit integer are exact) and a rest.
_HALF_PI_1 = float.fromhex("0x1.921fb544p+0")
_HALF_PI_2 = float.fromhex("0x1.0b4611a6p-34")
_HALF_PI_3 = float.fromhex("0x1.3198a2e0p-69")
_HALF_PI_REST = float.fromhex("0x1.b839a252049c1p-104")

# Taylor coefficients, each the float64 nearest to 1/n!.
_E2, _E3, _E4, _E5, _E6, _E7, _E8, _E9, _E10, _E11, _E12, _E13 = (
    1 / math.factorial(n) for n in range(2, 14)
)
_S3, _S5, _S7, _S9, _S11, _S13, _S15, _S17 = (
    (-1) ** (n // 2) / math.factorial(n) for n in range(3, 18, 2)
)
_C4, _C6, _C8, _C10, _C12, _C14, _C16 = (
    (-1) ** (n // 2) / math.factorial(n) for n in range(4, 17, 2)
)


@intrinsic
def bits_of(typing_context, value):
    """The bits of a float64, as an int64."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.int64))

    return types.int64(types.float64), generate


@intrinsic
def float_of(typing_context, bits):
    """The float64 that has these bits (int64)."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.int64), generate


@inlined
def power_of_two(exponent):
    """2.0**exponent for an int64 exponent in -1022..1023."""
    return float_of((exponent + 1023) << 52)


@inlined
def rounded(v):
    """The integer nearest to a float64 of at most 2**51, halves to even; a zero is +0.0."""
    return (v + _TO_INTEGER) - _TO_INTEGER


@inlined
def exp(x):
    """e**x for a float64, within 1 ulp; overflows to inf, underflows through denormals to 0.

    Cody and Waite's reduction x = k ln 2 + r, |r| <= ln(2)/2, and a Taylor polynomial.
    """
    x = _EXP_HIGH if x > _EXP_HIGH else x  # in this form a NaN passes through
    x = _EXP_LOW if x < _EXP_LOW else x
    shifted = x * _LOG2_E + _TO_INTEGER
    k = bits_of(shifted) - _TO_INTEGER_BITS
    whole = shifted - _TO_INTEGER
    a = x - whole * _LN2_1
    b = whole * _LN2_2
    r = a - b
    rest = (a - r) - b
    p = _E12 + r * _E13
    p = _E11 + r * p
    p = _E10 + r * p
    p = _E9 + r * p
    p = _E8 + r * p
    p = _E7 + r * p
    p = _E6 + r * p
    p = _E5 + r * p
    p = _E4 + r * p
    p = _E3 + r * p
    p = _E2 + r * p
    y = 1.0 + (r + ((r * r) * p + rest))
    half = k >> 1
    return y * power_of_two(half) * power_of_two(k - half)


@inlined
def _two_sum(a, b):
    """Knuth's exact sum: the rounded sum of a and b, and what the rounding left out."""
    s = a + b
    c = s - a
    return s, (a - (s - c)) + (b - c)


@inlined
def sincos(x):
    """sin(x) and cos(x) of a float64, within 1 ulp for |x| <= 2**20 * pi/2; NaN for NaN and inf.

    Cody and Waite's reduction x = n pi/2 + (r + rest), and Taylor polynomials.
    """
    shifted = x * _TWO_OVER_PI + _TO_INTEGER
    n = bits_of(shifted)  # its two lowest bits are those of the integer
    whole = shifted - _TO_INTEGER
    a = x - whole * _HALF_PI_1
    b, b_rest = _two_sum(a, -(whole * _HALF_PI_2))
    c, c_rest = _two_sum(b, -(whole * _HALF_PI_3))
    d = (b_rest + c_rest) - whole * _HALF_PI_REST
    r = c + d
    rest = (c - r) + d

    z = r * r
    p = _S15 + z * _S17
    p = _S13 + z * p
    p = _S11 + z * p
    p = _S9 + z * p
    p = _S7 + z * p
    p = _S5 + z * p
    p = _S3 + z * p
    half = 0.5 * z
    sine = r + ((r * z) * p + (rest - half * rest))

    p = _C14 + z * _C16
    p = _C12 + z * p
    p = _C10 + z * p
    p = _C8 + z * p
    p = _C6 + z * p
    p = _C4 + z * p
    top = 1.0 - half
    cosine = top + (((1.0 - top) - half) + ((z * z) * p - r * rest))

    swap = (n & 1) != 0
    sine, cosine = (cosine if swap else sine), (sine if swap else cosine)
    sine = -sine if (n & 2) != 0 else sine
    cosine = -cosine if ((n + 1) & 2) != 0 else cosine
    return sine, cosine


@inlined
def rsqrt(x):
    """1/sqrt(x) of a float64: two correctly rounded operations, within 1 ulp."""
    return 1.0 / np.sqrt(x)


@lru_cache
def _table_kernel():
    # Made on first use: only tests and digest() need it, and each kernel costs start-up.
    @kernel("void(f8[::1], f8[:, ::1])")
    def fill(x, out):
        for i in range(x.shape[0]):
            out[0, i] = exp(x[i])
            out[1, i], out[2, i] = sincos(x[i])
            out[3, i] = rsqrt(abs(x[i]))

    return fill


def table(x: np.ndarray) -> np.ndarray:
    """exp(x), sin(x), cos(x) and 1/sqrt(|x|) of n float64 values: the rows of float64[4, n]."""
    x = np.ascontiguousarray(x, np.float64)
    out = np.empty((4, x.size))
    _table_kernel()(x, out)
    return out


def digest() -> int:
    """A 64-bit fingerprint of the four functions at fixed arguments, results' bits and all.

    Ranks that compute alike have the same one. Denormal arguments and results are among them, so
    a processor that flushes denormals to zero shows.
    """
    return int.from_bytes(
        hashlib.blake2b(table(_arguments()).astype("<f8").tobytes(), digest_size=8).digest(),
        "little",
    )


def _arguments() -> np.ndarray:
    """Fixed finite arguments: a spread over each function's range, and its edges."""
    spread = (np.arange(1021) * 619 % 1021 - 510) / 510
    edges = [0.0, 5e-324, 1e-310, 2.2250738585072014e-308, 709.782712893384, 709.7827128933841]
    edges += [708.3964185322641, 745.1332191019411, 745.1332191019412, 746.5]
    edges += [n * 1.5707963267948966 for n in (1, 2, 3, 355, 2**10, 2**20)]
    edges = np.array(edges)
    return np.concatenate([spread, 20 * spread, 740 * spread, 1.6e6 * spread, edges, -edges])
