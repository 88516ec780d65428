"""Where the elements of an array lie in memory, and which global elements they are.

Kernels know neither shapes nor strides: they walk a short table of axes (``Walk``). Because XOR
and sums modulo 2**64 do not care about order, the table follows the memory, not the indices: axes
that walk backwards are turned round, axes are sorted by their stride and merged where they run on.
A Fortran array, a transposed or reversed one is so read as fast as a plain one.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from spimpi.errors import ArgumentKindError, UsageError
from spimpi.fingerprint.protocols import as_array
from spimpi.fingerprint.tag import GOLDEN, MASK
from spimpi.partition import Slab, TensorPartition, whole

WORD_SIZES = (1, 2, 4, 8)
_SHORT_RUN = 16
_CACHE_LINE = 64
_OVERLAP_WORK = 100_000  # candidates that numpy tries for a common byte


@dataclass(frozen=True, eq=False)
class Walk:
    """How to visit each element of an array once, and the tensor that they belong to.

    ``axes`` is uint64 [n, 3], the innermost axis last: length, stride in memory (in words) and
    step of the element key (stride of the global index times GOLDEN). ``low`` and ``extent`` are
    the span in bytes, counted from the array's first element; ``first`` is the global index of the
    element at its start.
    """

    global_shape: tuple[int, ...]
    wordsize: int
    axes: np.ndarray
    rows: int
    run: int
    low: int
    extent: int
    first: int

    @property
    def size(self) -> int:
        return self.rows * self.run


def word_layout(dtype: np.dtype) -> tuple[int, int]:
    """(bytes a word, words an element) of a dtype; UsageError, by name, for what has none.

    A complex number is two words; bfloat16 and float8 of ml_dtypes are 2- and 1-byte words.
    """
    if dtype.byteorder == ">":
        msg = (
            f"big-endian arrays have no fingerprint, found {dtype.str}: "
            f"convert with x.astype(x.dtype.newbyteorder('<'))"
        )
        raise UsageError(msg)
    words = 2 if dtype.kind == "c" else 1
    # ml_dtypes' numbers are of kind V too, but of a type of their own
    is_number = dtype.kind in "biufc" or (dtype.kind == "V" and dtype.type is not np.void)
    wordsize = dtype.itemsize // words
    if not is_number or wordsize not in WORD_SIZES:
        msg = (
            f"no fingerprint for dtype {dtype}: expected bool, integers, floats (bfloat16 and "
            f"float8 too) or complex numbers with items of 1, 2, 4 or 8 bytes, "
            f"found kind {dtype.kind!r} with {dtype.itemsize} bytes"
        )
        raise UsageError(msg)
    return wordsize, words


def dtype_of(dtype) -> np.dtype:
    """A dtype by name or as numpy takes it; also ml_dtypes' names, such as ``bfloat16``."""
    try:
        return np.dtype(dtype)
    except TypeError as not_numpys:
        import ml_dtypes

        if isinstance(dtype, str) and hasattr(ml_dtypes, dtype):
            return np.dtype(getattr(ml_dtypes, dtype))
        msg = f"no such dtype: {dtype!r}"
        raise UsageError(msg) from not_numpys


def slab_of(shape, where) -> Slab:
    """The slab that a block of ``shape`` is: None (the whole), a TensorPartition or a Slab."""
    if where is None:
        return whole(shape)
    if isinstance(where, TensorPartition):
        return where.slab(shape)
    where.check_holds(shape)
    return where


def check_where(where) -> None:
    if where is not None and not isinstance(where, (TensorPartition, Slab)):
        msg = f"where must be None, a TensorPartition or a Slab, found {type(where).__name__}"
        raise UsageError(msg)


def check_threads(threads) -> None:
    """Raise UsageError unless work can be shared among so many threads."""
    if not isinstance(threads, (int, np.integer)):
        msg = f"threads is a whole number of 1 or more, found {threads!r}"
        raise ArgumentKindError(msg)
    if threads < 1:
        msg = f"threads is a whole number of 1 or more, found threads={threads}"
        raise UsageError(msg)


def check_apart(x: np.ndarray) -> None:
    """Raise UsageError unless each element surely has memory of its own."""
    reach = x.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(x.strides, x.shape) if n > 1):
        if stride < reach and x.size:
            msg = (
                f"elements of an array of shape {x.shape} and strides {x.strides} share memory (it "
                "is broadcast, or a sliding window): pass another array to write to"
            )
            raise UsageError(msg)
        reach += (n - 1) * stride


def share_memory(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have bytes in common, in microseconds.

    Their spans are compared first, then strides, as far as that is little work: arrays whose spans
    meet and whose strides are too many to be sure of count as apart. Memory that is mapped at two
    addresses (shared windows, one file twice) is not recognised.
    """
    if not a.size or not b.size or not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return False


def walk_of(x, where) -> tuple[np.ndarray, Walk]:
    """The array whose memory is to be read, and its walk.

    That array is x's own memory, unless its items are not aligned to their size (fields of packed
    records): then it is a copy.
    """
    check_where(where)
    x = as_array(x)
    walk = plan(x.dtype, x.shape, x.strides, where)
    if walk is None or not x.flags.aligned:
        x = np.array(x, order="C", copy=True, subok=False)
        walk = plan(x.dtype, x.shape, x.strides, where)
    return x, walk


@lru_cache(maxsize=8192)
def plan(dtype: np.dtype, shape, strides, where) -> Walk | None:
    """The walk of an array with this dtype, shape and strides (bytes).

    None where the strides are not multiples of the word size.
    """
    wordsize, words = word_layout(dtype)
    slab = slab_of(shape, where)
    if dtype.kind == "c":
        slab = Slab((*slab.global_shape, words), (*slab.offset, 0))
        shape, strides = (*shape, words), (*strides, wordsize)
    if any(stride % wordsize for stride in strides):
        return None
    return _walk(shape, tuple(s // wordsize for s in strides), wordsize, slab)


@lru_cache(maxsize=1024)
def plan_field(shape, wordsize: int, where) -> Walk:
    """The walk of a block that has no data: of the colour field itself."""
    slab = slab_of(shape, where)
    return _walk(shape, _index_strides(shape), wordsize, slab)


@lru_cache(maxsize=8192)
def plan_flat(n_elements: int, wordsize: int) -> Walk:
    """The walk of a contiguous run of words that starts at index 0."""
    return _walk((n_elements,), (1,), wordsize, whole((n_elements,)))


def _index_strides(shape) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _walk(shape, strides, wordsize, slab) -> Walk:
    """``strides`` in words."""
    steps = _index_strides(slab.global_shape)
    first = sum(start * step for start, step in zip(slab.offset, steps))
    if 0 in shape:
        return Walk(slab.global_shape, wordsize, _table([(0, 1, 1)]), 1, 0, 0, 0, first)
    low = 0
    axes = []
    for n, stride, step in zip(shape, strides, steps):
        if stride < 0:
            low += (n - 1) * stride
            first += (n - 1) * step
            stride, step = -stride, -step
        if n > 1:
            axes.append((n, stride, step))
    span = sum((n - 1) * stride for n, stride, _ in axes) + 1
    axes = _inner_last(_merged(axes), wordsize)
    *outer, inner = axes
    return Walk(
        global_shape=slab.global_shape,
        wordsize=wordsize,
        axes=_table(axes),
        rows=prod(n for n, _, _ in outer),
        run=inner[0],
        low=low * wordsize,
        extent=span * wordsize,
        first=first,
    )


def _merged(axes):
    """Axes from the widest stride to the narrowest, joined where one runs on into the next.

    Broadcast axes (stride 0) go outermost.
    """
    merged = []
    for n, stride, step in sorted(axes, key=lambda axis: (axis[1] != 0, -axis[1])):
        if merged and merged[-1][1:] == (n * stride, n * step):
            n *= merged.pop()[0]
        merged.append((n, stride, step))
    return merged or [(1, 1, 1)]


def _inner_last(axes, wordsize):
    """A short innermost run gives its place to the longest axis whose steps stay within a line.

    (3 of 4 columns of a tall matrix: walking down the columns costs less than a million runs of
    3.) Wider steps would miss the cache at each element, and stay outside.
    """
    if axes[-1][0] >= _SHORT_RUN:
        return axes
    near = [a for a in axes if a[1] * wordsize <= _CACHE_LINE]
    longest = max(near, key=lambda axis: axis[0], default=axes[-1])
    return [a for a in axes if a is not longest] + [longest]


def _table(axes) -> np.ndarray:
    rows = [(n, stride, (step * GOLDEN) & MASK) for n, stride, step in axes]
    table = np.array(rows, dtype=np.uint64)
    table.flags.writeable = False
    return table
