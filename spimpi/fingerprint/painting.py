"""Painting: a known fingerprint on unknown data. docs/painting.md says what it proves.

``color_*`` gives the low bits of each element a colour that binds its upper bits to its place in
the global tensor; the others read the colours back. ``x`` is any float64, float32, float16 or
bfloat16 array (``as_array``), ``where`` its place in the tensor (None: it is all of it), ``bits``
how many low bits are coloured, the same for whoever paints and whoever looks. Nothing here is
collective; formulas: docs/fingerprint.md.
"""

from dataclasses import dataclass

import numpy as np

from spimpi.errors import UsageError
from spimpi.fingerprint import Where, arrays
from spimpi.fingerprint.protocols import as_array
from spimpi.fingerprint.tag import COLOUR, PAINT, Tag
from spimpi.partition import Slab

# mantissa bits (of the format), coloured bits by default (fingerprint.md)
_FORMATS = {"float64": (52, 16), "float32": (23, 8), "float16": (10, 2), "bfloat16": (7, 2)}

# corrupted_elements looks at so many elements at a time
_BLOCK_ELEMENTS = 1 << 18


def color_hidden_states(
    x, tag: Tag, where: Where = None, out=None, bits: int | None = None, threads: int = 1
):
    """Paint a slab of hidden states, in place or into ``out``; returns ``x`` or ``out``.

    Each element changes by at most 2**bits - 1 units in the last place. ``out`` has x's shape and
    dtype. Raises UsageError, and modifies nothing, where an element is Inf or NaN (how many, where
    the first is), for integers, 1-byte floats and complex numbers, and for memory that is
    read-only or in which elements overlap.
    """
    cpu = _cpu(threads)
    target = as_array(x if out is None else out, writable=True)
    source = target if out is None else as_array(x)
    arrays.check_apart(target)
    if (source.shape, source.dtype) != (target.shape, target.dtype):
        msg = (
            f"out must have the shape and dtype of x, {source.shape} and {source.dtype}, "
            f"found {target.shape} and {target.dtype}"
        )
        raise UsageError(msg)
    n_bits = coloured_bits(source.dtype, bits)
    _refuse_nonfinite(source, where, tag, threads)
    if target is not source:
        np.copyto(target, source)
    memory, walk = arrays.walk_of(target, where)
    cpu.paint(memory, walk, tag.key(PAINT, walk.global_shape, walk.wordsize), n_bits, threads)
    if memory is not target:  # items that are not aligned were painted in a copy
        target[...] = memory
    return x if out is None else out


def color_embeddings(
    x, tag: Tag, where: Where = None, out=None, bits: int | None = None, threads: int = 1
):
    """Paint a slab of embeddings: as ``color_hidden_states``, the tag tells tensors apart."""
    return color_hidden_states(x, tag, where, out, bits, threads)


def color_logits(
    x, tag: Tag, where: Where = None, out=None, bits: int | None = None, threads: int = 1
):
    """Paint a slab of logits: as ``color_hidden_states``, the tag tells tensors apart."""
    return color_hidden_states(x, tag, where, out, bits, threads)


def colors_of(
    x, tag: Tag, where: Where = None, bits: int | None = None, threads: int = 1
) -> np.ndarray:
    """The residues of a painted slab: unsigned, of x's shape and item size, 0 where intact."""
    cpu = _cpu(threads)
    x = as_array(x)
    n_bits = coloured_bits(x.dtype, bits)
    residues = np.array(x, order="C", copy=True)
    residues, walk = arrays.walk_of(residues, where)
    key = tag.key(PAINT, walk.global_shape, walk.wordsize)
    cpu.to_residues(residues, walk, key, n_bits, threads)
    return residues.view(f"u{walk.wordsize}")


def color_fingerprint(
    x, tag: Tag, where: Where = None, bits: int | None = None, threads: int = 1
) -> int:
    """A slab's share of the colour fingerprint; the shares combine to ``expected_fingerprint``."""
    return check_colors(x, tag, where, bits, threads).fingerprint


@dataclass(frozen=True)
class Colors:
    """What one pass over a painted slab found: its share of the colour fingerprint, and how many
    elements have a residue."""

    fingerprint: int
    n_corrupted: int


def check_colors(
    x, tag: Tag, where: Where = None, bits: int | None = None, threads: int = 1
) -> Colors:
    """``color_fingerprint`` and the number of elements with a residue, in one pass."""
    cpu = _cpu(threads)
    x = as_array(x)
    n_bits = coloured_bits(x.dtype, bits)
    x, walk = arrays.walk_of(x, where)
    keys = [tag.key(domain, walk.global_shape, walk.wordsize) for domain in (PAINT, COLOUR)]
    return Colors(*cpu.check(x, walk, *keys, n_bits, threads))


def corrupted_elements(
    x,
    tag: Tag,
    where: Where = None,
    bits: int | None = None,
    limit: int | None = None,
    threads: int = 1,
) -> np.ndarray:
    """Global indices, int64 [k, ndim], of the elements with a residue, in row-major order.

    ``limit``: the first so many of them.
    """
    arrays.check_where(where)
    x = as_array(x)
    slab = arrays.slab_of(x.shape, where)
    found, n_found = [np.empty((0, x.ndim), np.int64)], 0
    for block, offset in _blocks(x, slab.offset):
        if limit is not None and n_found >= limit:
            break
        residues = colors_of(block, tag, Slab(slab.global_shape, offset), bits, threads)
        places = np.argwhere(residues) + np.array(offset, np.int64)
        found.append(places)
        n_found += len(places)
    return np.concatenate(found)[:limit]


def coloured_bits(dtype: np.dtype, bits: int | None = None) -> int:
    """How many low bits of an element are coloured; UsageError for dtypes that are not painted."""
    arrays.word_layout(dtype)
    if dtype.name not in _FORMATS:
        msg = (
            f"painting needs float64, float32, float16 or bfloat16, found {dtype}: {_why(dtype)}"
        )
        raise UsageError(msg)
    mantissa, default = _FORMATS[dtype.name]
    n_bits = default if bits is None else bits
    if not isinstance(n_bits, (int, np.integer)) or not 1 <= n_bits <= mantissa:
        msg = f"bits must be 1..{mantissa}, the mantissa of {dtype}, found {bits!r}"
        raise UsageError(msg)
    return int(n_bits)


def _why(dtype: np.dtype) -> str:
    if dtype.kind == "c":
        return "paint x.view(x.real.dtype), whose last axis is twice as long"
    if dtype.kind in "biu":
        return "the low bits of an integer are its value; spimpi.fingerprint takes it as it is"
    return "it has no bits to spare; spimpi.fingerprint takes it as it is"


def _refuse_nonfinite(x: np.ndarray, where, tag: Tag, threads: int) -> None:
    mantissa, _ = _FORMATS[x.dtype.name]
    exponent = ((1 << (8 * x.itemsize - 1)) - 1) & ~((1 << mantissa) - 1)
    memory, walk = arrays.walk_of(x, where)
    n_bad = _cpu(threads).count_nonfinite(memory, walk, exponent, threads)
    if not n_bad:
        return
    slab = arrays.slab_of(x.shape, where)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        local = np.unravel_index(np.argmax(~np.isfinite(x)), x.shape)
    first = tuple(int(i) + start for i, start in zip(local, slab.offset))
    msg = (
        f"painting refuses Inf and NaN, found {n_bad} of {x.size} elements, the first at global "
        f"index {first} ({x[local]}; tensor {tag.name!r}, layer {tag.layer}, step {tag.step}); "
        "nothing was modified"
    )
    raise UsageError(msg)


def _blocks(x: np.ndarray, offset):
    """(block, its global offset): consecutive in row-major order, none of many elements."""
    if x.size <= _BLOCK_ELEMENTS:
        yield x, tuple(offset)
        return
    axis = next(a for a in range(x.ndim) if x.shape[a] > 1)
    half = x.shape[axis] // 2
    later = list(offset)
    later[axis] += half
    before = (slice(None),) * axis
    yield from _blocks(x[(*before, slice(half))], offset)
    yield from _blocks(x[(*before, slice(half, None))], later)


def _cpu(threads: int):
    """The CPU backend; imported here because numba takes its time."""
    arrays.check_threads(threads)
    from spimpi.fingerprint import painting_cpu

    return painting_cpu
