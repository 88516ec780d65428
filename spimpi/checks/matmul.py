"""Freivalds' check of a product of integer-valued matrices, over the integers mod 2^64.

y = x w is compared with x by y r == x (w r), r a vector of odd words that the tag gives (R.
Freivalds, Probabilistic machines can use less running time, IFIP Congress 1977). It costs
O(rows · (K + N) + K · N) against the product's O(rows · K · N), has no tolerance and no false
alarms, since it is made only where the product cannot have rounded.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from spimpi.checks.check import Check, Rule
from spimpi.checks.pending import settle
from spimpi.checks.verdict import ElementError, Verdict
from spimpi.errors import UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.arrays import share_memory
from spimpi.fingerprint.protocols import as_array
from spimpi.fingerprint.tag import GOLDEN, LINEAR, Tag
from spimpi.trace.schema import Established
from spimpi.units import counted, listed

NAME = "matmul"
SHOWN = 16
# Integers of at most so much are exact in a float of this many bytes.
EXACT = {8: 2.0**53, 4: 2.0**24, 2: 2.0**11}
_CHUNK = 1 << 16  # elements converted to int64 at a time
ELSEWHERE = (
    "this check is of integers; for other floats check the sum over ranks (verify_allreduce: a "
    "rigorous bound) or replicas (verify_replicas), or compute in exact arithmetic"
)


@dataclass(frozen=True, eq=False)
class ProjectedWeight:
    """A weight w [K, N] and w r mod 2^64. Made by ``project_weight``, for many products."""

    w: np.ndarray
    r: np.ndarray
    wr: np.ndarray
    largest: float


def project_weight(w, tag) -> ProjectedWeight:
    """w r mod 2^64 of integer-valued w [K, N], once for many ``verify_matmul``. Local.

    r depends on the tag's seed, name and layer, not on its step. UsageError where an element is
    not an integer.
    """
    w = _matrix(w, "w")
    if w.ndim != 2:
        msg = f"a weight has two axes [K, N], found shape {w.shape}"
        raise UsageError(msg)
    r = _odd_words(Tag(tag.seed, tag.name, tag.layer), w.shape[1])
    wr = np.zeros(w.shape[0], np.int64)
    largest = 0.0
    for rows in _row_chunks(w):
        block = _integers(w[rows], "w", rows.start)
        wr[rows] = block @ r
        largest = max(largest, _largest(w[rows]))
    return ProjectedWeight(w, r, wr, largest)


def verify_matmul(comm, x, w, y, tag, *, check=True, ctx=None) -> Verdict:
    """Check y = x @ w of integer values, on every rank its own product; agreed over ``comm``.

    x [..., K], w [K, N] or what project_weight gave, y [..., N]; integer or float arrays, any
    strides, shapes may differ between ranks. Establishes computed; a failure names the rank and
    the elements. UsageError on every rank for x or w that are not integers, for floats in which a
    sum of this size would round, for products that wrapped in their dtype and are right beside
    that (or are of bools), and where y lies in the memory of x or w. Collective.
    """

    def build(c):
        weight = w if isinstance(w, ProjectedWeight) else project_weight(w, tag)
        rows_x, rows_y, shape = _rows(x, y, weight)
        bad = _wrong_rows(rows_x, rows_y, weight)
        c.n_bad, c.n_bytes = len(bad), rows_x.nbytes + rows_y.nbytes
        c.compares = rows_y.size > 0
        if c.tracer is not None:
            c.got = fingerprint(rows_y, tag)
        if bad:  # at once: in a batch the buffers may be used again before its end
            told = _complaint(rows_x, rows_y, weight, bad, shape)
            if "refused" in told:  # kept, not raised: another rank's product may be wrong
                c.n_bad, c.error, c.yields = 0, UsageError(told["refused"]), True
            c.complaint = lambda: told

    return settle(comm, Check(NAME, tag, Rule.LOCAL, Established.COMPUTED), build, check, ctx)


def _matrix(a, name) -> np.ndarray:
    a = as_array(a)
    if a.dtype.kind not in "biuf" or a.itemsize > 8:  # longdouble is more than float64 can tell
        msg = f"{name} of a matmul's check holds integers, found dtype {a.dtype}; {ELSEWHERE}"
        raise UsageError(msg)
    return a


def _rows(x, y, weight):
    """x and y as matrices, and y's shape; UsageError where shapes, dtypes or memory do not fit."""
    x, y = _matrix(x, "x"), _matrix(y, "y")
    k, n = weight.w.shape
    if x.ndim == 0 or x.shape[-1] != k or y.shape != (*x.shape[:-1], n):
        msg = (
            f"y = x @ w has shapes [..., K] @ [K, N] = [..., N], found x {x.shape}, "
            f"w {weight.w.shape}, y {y.shape}"
        )
        raise UsageError(msg)
    if y.dtype.kind == "b":
        msg = "products of this dtype wrap: of bool, True + True is True; multiply in integers"
        raise UsageError(msg)
    for name, other in (("x", x), ("w", weight.w)):
        if share_memory(other, y):
            msg = (
                f"`{name}` and `y` share memory, so that the product would be compared with itself: "
                f"give a copy of `{name}` made before the multiplication"
            )
            raise UsageError(msg)
    n_rows = prod(x.shape[:-1])
    return x.reshape(n_rows, k), y.reshape(n_rows, n), y.shape


def _wrong_rows(x, y, weight) -> list[int]:
    """Rows of y that are not x's times w, mod 2^64 (integer dtypes: mod their own size)."""
    bad, bound = [], 0.0
    for rows in _row_chunks(x):
        block = _integers(x[rows], "x", rows.start)
        if block.size and y.dtype.kind == "f":
            bound = max(bound, float(_magnitudes(x[rows]).sum(axis=1).max()))
        found, whole = _found(y[rows])
        # Both sides wrap alike: int64 arithmetic is arithmetic mod 2^64.
        differ = (found @ weight.r != block @ weight.wr) | ~whole
        bad += [rows.start + int(i) for i in np.flatnonzero(differ)]
    if y.dtype.kind == "f" and bound * weight.largest > EXACT.get(y.itemsize, 0.0):
        msg = (
            f"sums of this product may round in {y.dtype}: Σ|x|·max|w| is up to "
            f"{bound * weight.largest:.3g}, integers are exact up to "
            f"{EXACT.get(y.itemsize, 0):.3g}; {ELSEWHERE}"
        )
        raise UsageError(msg)
    return bad


def _found(y) -> tuple[np.ndarray, np.ndarray]:
    """(y as int64, which rows hold integers only); what is not an integer counts as 0."""
    if y.dtype.kind != "f":
        return y.astype(np.int64), np.ones(len(y), bool)
    wide = y.astype(np.float64)
    whole = (np.rint(wide) == wide) & (np.abs(wide) <= EXACT[8])
    return np.where(whole, wide, 0.0).astype(np.int64), whole.all(axis=1)


def _integers(a, name, first_row) -> np.ndarray:
    """A chunk of x or w as int64; UsageError, with the first place, where it is not integers."""
    if a.dtype.kind != "f":
        return a.astype(np.int64)
    wide = a.astype(np.float64)
    whole = (np.rint(wide) == wide) & (np.abs(wide) <= EXACT[8])
    if not whole.all():
        row, column = (int(i) for i in np.argwhere(~whole)[0])
        msg = (
            f"{name} has elements that are not integers of at most 2**53, the first at row "
            f"{first_row + row}, column {column}: {a[row, column]}; {ELSEWHERE}"
        )
        raise UsageError(msg)
    return wide.astype(np.int64)


def _magnitudes(a) -> np.ndarray:
    """|a| as float64, also of unsigned integers that int64 has no room for."""
    return np.abs(a.astype(np.float64))


def _largest(block) -> float:
    return float(_magnitudes(block).max(initial=0.0))


def _row_chunks(a):
    step = max(1, _CHUNK // max(a.shape[1], 1))
    return [slice(i, min(i + step, len(a))) for i in range(0, len(a), step)]


def _odd_words(tag: Tag, n: int) -> np.ndarray:
    """The linear fingerprint's odd weights, int64 [n], of a stream of n words of 8 bytes."""
    key = tag.key(LINEAR, (n,), 8)
    z = np.uint64(key) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


def _complaint(x, y, weight, bad, shape) -> dict:
    """What is wrong in words; wrong rows are computed again, in integers: the first of them, or
    all of an integer dtype in which some may have wrapped.

    ``refused``: nothing is found but sums that the dtype has no room for.
    """
    has_room = y.dtype.kind == "f" or y.itemsize == 8  # not rounded; or compared modulo 2^64
    looked_at = bad[:SHOWN] if has_room else bad
    elements, n_wrapped = _again(x, y, weight.w, looked_at, has_room, shape)
    n = len(bad)
    if n_wrapped and not elements:
        refused = (
            f"products of this dtype wrap: {y.dtype} has no room for the sums of "
            f"{counted(n_wrapped)} of row{'s' * (n > 1)} {listed(bad)}, and beside them nothing "
            "is wrong there: multiply in a wider dtype"
        )
        return {"refused": refused}
    detail = f"{counted(n, 'row')} of the product wrong: {listed(bad)}"
    if n_wrapped:
        detail += f" (in some {y.dtype} has no room for the sums)"
    if not elements:
        which = f"the first {SHOWN} of them are" if len(looked_at) < n else "they are"
        detail += f"; computed again in integers {which} right: an input or w·r has changed"
    all_seen = n <= SHOWN and len(elements) < SHOWN and not n_wrapped
    return {
        "detail": detail, "elements": elements, "n_wrong": len(elements) if all_seen else None,
    }  # fmt: skip


def _again(x, y, w, rows, has_room: bool, shape) -> tuple[list[ElementError], int]:
    """(the first SHOWN wrong elements of some rows, how many of all have no room), in integers."""
    elements, n_wrapped = [], 0
    factors, others = _integers(w, "w", 0), None if has_room else w.astype(np.float64)
    step = max(1, _CHUNK // max(*w.shape, 1))
    for at in range(0, len(rows), step):
        some = rows[at : at + step]
        fits = doubtful = np.ones((len(some), w.shape[1]), bool)
        if not has_room:
            fits, doubtful = _in_floats(x[some], others, y[some])
            n_wrapped += np.count_nonzero(~fits)
        for i in np.flatnonzero(doubtful.any(axis=1)):
            if len(elements) == SHOWN:
                break
            row = some[i]
            expected = (_integers(x[row : row + 1], "x", row)[0] @ factors).astype(y.dtype)
            found = np.ascontiguousarray(y[row])
            wrong = np.flatnonzero((expected != found) & fits[i])  # a zero may have either sign
            elements += [
                _element(row, column, expected, found, shape)
                for column in wrong[: SHOWN - len(elements)]
            ]
    return elements, n_wrapped


def _element(row, column, expected, found, shape) -> ElementError:
    index = (*np.unravel_index(row, shape[:-1]), column) if len(shape) > 1 else (column,)
    index = tuple(int(i) for i in index)
    return ElementError(index, expected[column].tobytes(), found[column].tobytes(), 0)


def _in_floats(x, w, y) -> tuple[np.ndarray, np.ndarray]:
    """(elements that the dtype of y surely has room for, those of them that may be wrong) of x w.

    In float64, with what it can be off by: all rows in integers would take too long.
    """
    sizes = x.astype(np.float64)
    about, info = sizes @ w, np.iinfo(y.dtype)
    slack = np.abs(sizes) @ np.abs(w) * (2 + w.shape[0]) * 2.0**-52
    fits = (about - slack >= info.min - 0.5) & (about + slack <= info.max + 0.5)
    right = (slack < 0.5) & (np.abs(about - y) < 0.5)
    return fits, fits & ~right
