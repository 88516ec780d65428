"""Fingerprints of tensors and of their shards: one dispatch over the backends.

docs/fingerprint.md is the contract. Nothing here is collective and nothing imports MPI; numba is
imported with the first fingerprint that is taken.

``where`` says which part of the tensor an array is: None (all of it), a TensorPartition or a Slab.
Arrays are numpy's, or whatever offers DLPack, ``__array_interface__`` or the buffer protocol in
host memory (``as_array``). They may have any number of axes, any strides, be read-only, broadcast
or empty. ``threads`` threads of this process share the work. All raise UsageError for dtypes that
have no fingerprint (objects, records, text, dates, long double, big-endian ones), for arrays that
cannot be read in place and for blocks that do not fit.
"""

import sys
from collections.abc import Iterable
from types import ModuleType

import numpy as np

from spimpi.errors import UsageError
from spimpi.fingerprint import arrays
from spimpi.fingerprint.protocols import as_array
from spimpi.fingerprint.tag import COLOUR, CONTENT, DEFAULT_SEED, LINEAR, MASK, Tag
from spimpi.optional import optional_packages
from spimpi.partition import Slab, TensorPartition

__all__ = [
    "DEFAULT_SEED",
    "Tag",
    "as_array",
    "colour_field_fingerprint",
    "colours",
    "combine",
    "expected_fingerprint",
    "fill_colours",
    "fingerprint",
    "linear_fingerprint",
    "linear_fingerprint_counted",
    "linear_flat",
    "xor_flat",
]

Where = TensorPartition | Slab | None

# Integers are widened to int64 so many elements at a time.
_BLOCK_ELEMENTS = 1 << 18


def fingerprint(x: np.ndarray, tag: Tag, where: Where = None, threads: int = 1) -> int:
    """XOR fingerprint of a tensor, or a shard's share of the whole tensor's fingerprint.

    Any bool, integer, float (bfloat16 and float8 too) or complex array with items of 1, 2, 4 or 8
    bytes. Disjoint shards combine by XOR (``combine``) to the whole tensor's fingerprint.
    """
    cpu = _cpu(threads)
    x, walk = arrays.walk_of(x, where)
    return cpu.xor(x, walk, tag.key(CONTENT, walk.global_shape, walk.wordsize), threads)


def linear_fingerprint(
    q: np.ndarray, tag: Tag, where: Where = None, itemsize: int | None = None, threads: int = 1
) -> int:
    """Linear fingerprint, modulo 2**64, of integers: ``lin(a + b) == lin(a) + lin(b)``.

    ``q``: any integers, or floats that carry integers of at most 2**53 (UsageError where they do
    not). ``itemsize``: bytes an item of the tensor as it is stored, where q is a wider copy of it.
    """
    total, n_bad = linear_fingerprint_counted(q, tag, where, itemsize, threads)
    if n_bad:
        q = as_array(q)
        msg = (
            f"a linear fingerprint is of integers of at most 2**53, found {n_bad} elements of "
            f"{q.size} that are not (dtype {q.dtype}, tensor {tag.name!r}, layer {tag.layer}, "
            f"step {tag.step}); linear_fingerprint_counted counts them instead"
        )
        raise UsageError(msg)
    return total


def linear_fingerprint_counted(
    q: np.ndarray, tag: Tag, where: Where = None, itemsize: int | None = None, threads: int = 1
) -> tuple[int, int]:
    """(linear fingerprint, how many floats are no integers of at most 2**53).

    What is counted adds nothing to the fingerprint; where the count is not 0 it proves nothing.
    """
    cpu = _cpu(threads)
    arrays.check_where(where)
    q = as_array(q)
    if q.dtype.kind not in "biuf":
        msg = f"a linear fingerprint is of integers or floats, found dtype {q.dtype}"
        raise UsageError(msg)
    stored, _ = arrays.word_layout(q.dtype)
    if itemsize is not None:
        stored = _checked_itemsize(itemsize)
    slab = arrays.slab_of(q.shape, where)
    key = tag.key(LINEAR, slab.global_shape, stored)
    total, n_bad = 0, 0
    for block, place in _eight_byte_blocks(q, slab):
        block, walk = arrays.walk_of(block, place)
        share, bad = cpu.linear(block, walk, key, threads)
        total, n_bad = (total + share) & MASK, n_bad + bad
    return total, n_bad


def combine(fingerprints: Iterable[int]) -> int:
    """XOR of fingerprints: the fingerprint of the union of disjoint shards (of none: 0).

    Each element must be in one shard only; two equal replicas cancel to 0.
    """
    total = 0
    for one in fingerprints:
        value = int(one)
        if not 0 <= value <= MASK:
            msg = f"a fingerprint is an unsigned 64-bit number, found {one}"
            raise UsageError(msg)
        total ^= value
    return total


def expected_fingerprint(
    seed: int,
    n_tokens: int,
    hidden_dim: int,
    layer: int = -1,
    name: str = "hidden",
    step: int = 0,
    dtype="float32",
    threads: int = 1,
) -> int:
    """The colour field's fingerprint of a tensor [n_tokens, hidden_dim], from its shape alone.

    It is what painted data give; never to be compared with ``fingerprint``. ``dtype`` is a numpy
    dtype or a name, ml_dtypes' names included.
    """
    wordsize, words = arrays.word_layout(arrays.dtype_of(dtype))
    shape = (n_tokens, hidden_dim) if words == 1 else (n_tokens, hidden_dim, words)
    return colour_field_fingerprint(Tag(seed, name, layer, step), shape, wordsize, None, threads)


def colour_field_fingerprint(
    tag: Tag, shape, itemsize: int, where: Where = None, threads: int = 1
) -> int:
    """XOR of the colour words of a block of this shape; no data is involved.

    ``shape`` is the block's own shape and ``where`` its place, as for an array; ``itemsize`` is
    in bytes. Over the whole tensor this is the expected fingerprint.
    """
    cpu = _cpu(threads)
    arrays.check_where(where)
    walk = arrays.plan_field(_checked_shape(shape), _checked_itemsize(itemsize), where)
    return cpu.xor_colours(walk, tag.key(COLOUR, walk.global_shape, walk.wordsize), threads)


def colours(tag: Tag, shape, itemsize: int, start: int, stop: int, threads: int = 1) -> np.ndarray:
    """Colour words, uint64 [stop - start], of a flat range of elements of a GLOBAL shape."""
    key = tag.key(COLOUR, _checked_shape(shape), _checked_itemsize(itemsize))
    if not 0 <= start <= stop:
        msg = f"expected an element range with 0 <= start <= stop, found {start}..{stop}"
        raise UsageError(msg)
    out = np.empty(stop - start, np.uint64)
    fill_colours(out, key, start, threads)
    return out


def fill_colours(out: np.ndarray, key: int, first_index: int, threads: int = 1) -> None:
    """Write the colour words from global index ``first_index`` on into contiguous uint64 [n].

    ``key`` is the tensor's colour key, ``tag.key(COLOUR, shape, itemsize)``.
    """
    out = _flat(out, "u", (8,), writable=True)
    _cpu(threads).fill_colours(out, int(key), int(first_index), threads)


def xor_flat(words: np.ndarray, key: int, first_index: int, threads: int = 1) -> int:
    """XOR fingerprint of contiguous words [n] from global index ``first_index`` on.

    For callers that hold the content key, ``tag.key(CONTENT, shape, itemsize)``. ``words`` are
    uint8, uint16, uint32 or uint64, the item size of the tensor.
    """
    words = _flat(words, "u", arrays.WORD_SIZES)
    return _cpu(threads).xor_flat(words, int(key), int(first_index), threads)


def linear_flat(words: np.ndarray, key: int, first_index: int, threads: int = 1) -> int:
    """Linear fingerprint of contiguous int64 or uint64 [n] from global index ``first_index`` on.

    ``key`` is the tensor's linear key, ``tag.key(LINEAR, shape, itemsize)``.
    """
    words = _flat(words, "iu", (8,))
    return _cpu(threads).linear_flat(words, int(key), int(first_index), threads)[0]


def _cpu(threads: int):
    """The CPU backend; imported here because numba takes its time."""
    arrays.check_threads(threads)
    with optional_packages():
        from spimpi.fingerprint import cpu

    return cpu


def _flat(words, kinds: str, sizes, writable: bool = False) -> np.ndarray:
    words = as_array(words, writable=writable)
    is_flat = words.ndim == 1 and words.flags.c_contiguous and words.flags.aligned
    if not is_flat or words.dtype.kind not in kinds or words.itemsize not in sizes:
        msg = (
            f"expected a contiguous array with one axis, of kind {kinds!r} and {sizes} bytes an "
            f"item, found dtype {words.dtype}, shape {words.shape}, strides {words.strides}"
        )
        raise UsageError(msg)
    arrays.word_layout(words.dtype)
    return words


def _checked_itemsize(itemsize: int) -> int:
    if itemsize not in arrays.WORD_SIZES:
        msg = f"item sizes are 1, 2, 4 or 8 bytes, found {itemsize}"
        raise UsageError(msg)
    return int(itemsize)


def _checked_shape(shape) -> tuple[int, ...]:
    shape = tuple(int(n) for n in shape)
    if any(n < 0 for n in shape):
        msg = f"a shape has no negative sizes, found {shape}"
        raise UsageError(msg)
    return shape


def _eight_byte_blocks(q: np.ndarray, slab: Slab):
    """The array itself if its items are 8 bytes, else 8-byte copies of blocks of it, and where."""
    if q.dtype.itemsize == 8:
        yield q, slab
        return
    carrier = np.float64 if q.dtype.kind == "f" else np.int64
    if q.size <= _BLOCK_ELEMENTS or q.ndim == 0:
        yield q.astype(carrier), slab
        return
    axis = max(range(q.ndim), key=lambda a: q.shape[a])
    half = q.shape[axis] // 2
    offset = list(slab.offset)
    offset[axis] += half
    before = (slice(None),) * axis
    yield from _eight_byte_blocks(q[(*before, slice(half))], slab)
    yield from _eight_byte_blocks(
        q[(*before, slice(half, None))], Slab(slab.global_shape, tuple(offset))
    )


class _Package(ModuleType):
    """``spimpi.fingerprint`` is this package and, as users type it, the function of that name."""

    def __call__(self, *args, **kwargs) -> int:
        return fingerprint(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
