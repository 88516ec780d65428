"""How far a sum of floats may lie from the exact sum, for any correct MPI: docs/sums.md's bound.

Pure arithmetic on the words that ranks exchange; nothing here communicates. A tensor's elements
are counted in row-major order, bins are ranges of them.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import expm1, fsum, log1p, log2, prod

import numpy as np

from spimpi.fingerprint.projections import rounds

DOUBLE = 2.0**-53  # float64's unit roundoff
WIDER = 1 + 2.0**-10  # what a wider intermediate format can add to a rounding
_UP = 1 + 2.0**-40  # makes up for the rounding of a limit's own evaluation
_SMALLEST = 2.0**-1022
_SURE = 10  # bits: odds of blaming a rank by chance

# unit roundoff, smallest normal number, largest number: by the dtype's name
_FORMATS = {
    "float64": (2.0**-53, 2.0**-1022, float(np.finfo(np.float64).max)),
    "float32": (2.0**-24, 2.0**-126, float(np.finfo(np.float32).max)),
    "float16": (2.0**-11, _SMALLEST, 65504.0),  # of float16, gradual underflow is assumed
    "bfloat16": (2.0**-8, 2.0**-126, (2 - 2.0**-7) * 2.0**127),
}


@dataclass(frozen=True)
class Format:
    """A float dtype's unit roundoff, what a flushed operation can lose, and largest number."""

    unit: float
    tiny: float
    largest: float


@lru_cache(maxsize=64)
def format_of(dtype) -> Format | None:
    """The format of float64, float32, float16 or bfloat16; None for any other dtype."""
    facts = _FORMATS.get(np.dtype(dtype).name)
    return Format(*facts) if facts else None


def phi(n: int, unit: float) -> float:
    """(1 + unit)**n - 1, rounded up: the most that n roundings change a term by, relatively.

    At most n u / (1 - n u), Higham 2002, Lemma 3.1; without that lemma's condition n u < 1.
    """
    return expm1(n * log1p(unit)) * _UP


def most_bins(n_ranks: int) -> int:
    """Into how many bins a tensor's rows are grouped at most: 4096 a rank's share, 16 to 256."""
    return min(256, max(16, 4096 // n_ranks))


@lru_cache(maxsize=1024)
def bins_of(shape: tuple[int, ...], most: int) -> np.ndarray:
    """Cuts int64[B + 1], B <= most, of the rows (last axis) of a tensor into bins; read-only.

    Many rows are grouped, few are cut into equal pieces. A tensor without elements has none.
    """
    cuts = _cuts(shape, most)
    cuts.flags.writeable = False
    return cuts


def _cuts(shape, most: int) -> np.ndarray:
    n = prod(shape)
    if n == 0:
        return np.zeros(1, np.int64)
    columns = shape[-1] if shape else 1
    rows = n // columns
    if rows >= most:
        step = columns * -(-rows // most)
        return np.append(np.arange(0, n, step), n).astype(np.int64)
    piece = -(-columns // (most // rows))
    cuts = [np.arange(row * columns, (row + 1) * columns, piece) for row in range(rows)]
    return np.append(np.concatenate(cuts), n).astype(np.int64)


@lru_cache(maxsize=1024)
def factors(longest: int, n_ranks: int, dtype, pieces: int = 1) -> tuple[float, float]:
    """What a bin's limit is of its norm, and of its number of elements: docs/sums.md.

    ``longest``: elements of the largest bin; ``pieces``: in how many an array was read at most.
    """
    facts = format_of(dtype)
    depth = rounds(longest) + pieces + n_ranks + 4
    own = phi(depth, DOUBLE)
    reduced = phi(n_ranks - 1, facts.unit * WIDER)
    # Upper bounds: of the contributions' norms (their sum over ranks rounds too), the result's.
    relative = (reduced + own * (2 + reduced)) * (1 + 2 * own) * _UP
    return relative, (4 * n_ranks + 6) * facts.tiny * _UP


def limits(norms: np.ndarray, sizes: np.ndarray, n_ranks: int, dtype, pieces: int = 1):
    """The largest |Σ t_k - t| of each bin that a correct sum can have: float64[B].

    ``norms`` [P, B]: computed Σ|x_k,i|; ``sizes`` [B]: elements a bin.
    """
    relative, flushed = factors(int(sizes.max(initial=0)), n_ranks, dtype, pieces)
    return relative * norms.sum(axis=0) + flushed * sizes


def excess(own: np.ndarray, result: np.ndarray) -> np.ndarray:
    """t - Σ t_k of J projections, [J, B], from own [P, J + 1, B] (norms last), result [J, B]."""
    return result - own[:, :-1].sum(axis=0)


@dataclass(frozen=True)
class Blame:
    """The rank whose contribution is missing from a sum, or is in it twice."""

    rank: int
    doubled: bool

    def __str__(self):
        what = "counted twice" if self.doubled else "missing"
        return f"the contribution of rank {self.rank} is {what}"


def blame(own: np.ndarray, result: np.ndarray, limit: np.ndarray) -> Blame | None:
    """The one rank that explains the failing bins, by all projections; None if none or several,
    or if another error would look so with odds of more than 2^-10.

    ``own`` [P, J + 1, B], ``result`` [J, B], ``limit`` [B]: of the failing bins.
    """
    found = []
    difference = excess(own, result)
    for rank in range(len(own)):
        for doubled in (False, True):
            explained = own[rank, :-1] if doubled else -own[rank, :-1]
            # A sum of one addend more has up to twice the roundings, of twice the norm.
            slack = 4 * limit if doubled else limit
            # Another error agrees with it in a bin with odds of 4 slack / |explained|; a rank that
            # gave nothing explains nothing.
            bits = np.log2(np.maximum(np.abs(explained) / (4 * slack), 1)).sum()
            if bits >= _SURE + log2(2 * len(own)) and np.all(
                np.abs(difference - explained) <= slack
            ):
                found.append(Blame(rank, doubled))
    return found[0] if len(found) == 1 else None


def exact_sum(values) -> float:
    """The sum of floats, rounded once; NaN or Inf where they say so, or where it overflows."""
    try:
        return fsum(values)
    except (OverflowError, ValueError):
        return float(np.sum(values))
