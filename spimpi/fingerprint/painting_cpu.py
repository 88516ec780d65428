"""Painting on CPUs: the numba kernels, over the same walks and by the same threads as cpu.py.

A module of its own because ``spimpi verify`` paints nothing and should load nothing for it.
"""

import numpy as np

from spimpi.fingerprint import cpu
from spimpi.fingerprint.arrays import Walk, plan_field
from spimpi.fingerprint.cpu import _RECTANGLE, _lookahead, _prefetch, _row_start
from spimpi.fingerprint.dlpack import Memory
from spimpi.fingerprint.tag import MASK
from spimpi.fingerprint.words import ONE, ZERO, close, mix, mix_open
from spimpi.jit import inlined, kernel
from spimpi.partition import Slab

_READ = "Array(uint8, 1, 'C', True)"
_WRITE = "Array(uint8, 1, 'C')"
_TWO = np.uint64(2)


@inlined
def _colour(own, hi, low):
    """The colour of a 2- or 4-byte element with the upper bits ``hi``."""
    return mix(own ^ hi) & low


@inlined
def _colour8(own, hi, low):
    return mix(mix(own ^ hi) ^ own) & low


@inlined
def _recolour_run(words, place, stride, n, own, step, low, kept):
    high = ~low
    if stride == ONE:
        for j in range(n):
            bits = np.uint64(words[place + j])
            words[place + j] = (bits & kept) ^ _colour(own + j * step, bits & high, low)
    else:
        for j in range(n):
            bits = np.uint64(words[place + j * stride])
            words[place + j * stride] = (bits & kept) ^ _colour(own + j * step, bits & high, low)


@inlined
def _recolour_run8(words, place, stride, n, own, step, low, kept):
    high = ~low
    if stride == ONE:
        for j in range(n):
            bits = words[place + j]
            words[place + j] = (bits & kept) ^ _colour8(own + j * step, bits & high, low)
    else:
        for j in range(n):
            bits = words[place + j * stride]
            words[place + j * stride] = (bits & kept) ^ _colour8(own + j * step, bits & high, low)


@kernel(f"void({_WRITE}, int64, uint64, uint64, uint64, {_RECTANGLE})")
def _recolour(data, itemsize, key, low, kept, axes, row0, row1, lo, hi):
    """Each element becomes (its bits & kept) ^ its colour, in the mask ``low`` of the low bits.

    kept = ~low paints; kept = low leaves the residues.
    """
    stride, step = axes[-1, 1], axes[-1, 2]
    halves = data[: data.size // 2 * 2].view(np.uint16)
    quads = data[: data.size // 4 * 4].view(np.uint32)
    octets = data[: data.size // 8 * 8].view(np.uint64)
    n = hi - lo
    for row in range(row0, row1):
        place, own = _row_start(axes, row)
        place += lo * stride
        own += key + lo * step
        if itemsize == 8:
            _recolour_run8(octets, place, stride, n, own, step, low, kept)
        elif itemsize == 4:
            _recolour_run(quads, place, stride, n, own, step, low, kept)
        else:
            _recolour_run(halves, place, stride, n, own, step, low, kept)


@inlined
def _check_run(words, place, stride, n, own, step, low, delta):
    """(open XOR of the coloured residues, elements with a residue) of a run."""
    high = ~low
    total, bad = ZERO, ZERO
    if stride == ONE:
        for j in range(n):
            bits = np.uint64(words[place + j])
            residue = (bits & low) ^ _colour(own, bits & high, low)
            total ^= mix_open((own + delta) ^ residue)
            bad += ZERO if residue == ZERO else ONE
            own += step
    else:
        for j in range(n):
            bits = np.uint64(words[place + j * stride])
            residue = (bits & low) ^ _colour(own, bits & high, low)
            total ^= mix_open((own + delta) ^ residue)
            bad += ZERO if residue == ZERO else ONE
            own += step
    return total, bad


@inlined
def _check_run8(words, place, stride, n, own, step, low, delta):
    high = ~low
    total, bad = ZERO, ZERO
    for j in range(n):
        bits = words[place + j * stride]
        residue = (bits & low) ^ _colour8(own, bits & high, low)
        total ^= mix_open((own + delta) ^ residue)
        bad += ZERO if residue == ZERO else ONE
        own += step
    return total, bad


@kernel(f"UniTuple(uint64, 2)({_READ}, int64, uint64, uint64, uint64, {_RECTANGLE})")
def _check(data, itemsize, key, low, delta, axes, row0, row1, lo, hi):
    """(colour fingerprint, elements with a residue) of a rectangle.

    ``delta`` is the colour key less the paint key: the element keys differ by it everywhere.
    """
    stride, step = axes[-1, 1], axes[-1, 2]
    halves = data[: data.size // 2 * 2].view(np.uint16)
    quads = data[: data.size // 4 * 4].view(np.uint32)
    octets = data[: data.size // 8 * 8].view(np.uint64)
    total, bad = ZERO, ZERO
    n = hi - lo
    ahead, span = _lookahead(axes, itemsize)
    for row in range(row0, row1):
        place, own = _row_start(axes, row)
        place += lo * stride
        own += key + lo * step
        later = np.int64(place) * itemsize + ahead
        for byte in range(0, span, 64):
            _prefetch(data, later + byte)
        if itemsize == 8:
            part, found = _check_run8(octets, place, stride, n, own, step, low, delta)
        elif itemsize == 4:
            part, found = _check_run(quads, place, stride, n, own, step, low, delta)
        else:
            part, found = _check_run(halves, place, stride, n, own, step, low, delta)
        total ^= part
        bad += found
    return close(total), bad


@inlined
def _count_run(words, place, stride, n, exponent):
    bad = ZERO
    if stride == ONE:
        for j in range(n):
            bad += ONE if words[place + j] & exponent == exponent else ZERO
    else:
        for j in range(n):
            bad += ONE if words[place + j * stride] & exponent == exponent else ZERO
    return bad


@kernel(f"uint64({_READ}, int64, uint64, {_RECTANGLE})")
def _nonfinite(data, itemsize, exponent, axes, row0, row1, lo, hi):
    """Elements whose exponent bits are all ones: Inf and NaN."""
    stride = axes[-1, 1]
    halves = data[: data.size // 2 * 2].view(np.uint16)
    quads = data[: data.size // 4 * 4].view(np.uint32)
    octets = data[: data.size // 8 * 8].view(np.uint64)
    bad = ZERO
    n = hi - lo
    for row in range(row0, row1):
        place, _ = _row_start(axes, row)
        place += lo * stride
        if itemsize == 8:
            bad += _count_run(octets, place, stride, n, exponent)
        elif itemsize == 4:
            bad += _count_run(quads, place, stride, n, np.uint32(exponent))
        else:
            bad += _count_run(halves, place, stride, n, np.uint16(exponent))
    return bad


def paint(x: np.ndarray, walk: Walk, key: int, n_bits: int, threads: int = 1) -> None:
    """Colour the low ``n_bits`` of each element in place; no two elements may share memory."""
    low = (1 << n_bits) - 1
    _recolour_all(x, walk, key, low, ~low & MASK, threads)


def to_residues(x: np.ndarray, walk: Walk, key: int, n_bits: int, threads: int = 1) -> None:
    """Replace each element's bits by its residue, in place."""
    low = (1 << n_bits) - 1
    _recolour_all(x, walk, key, low, low, threads)


def _recolour_all(x, walk, key, low, kept, threads):
    if not walk.size:
        return
    memory = Memory(x, x.ctypes.data + walk.low, "|u1", (walk.extent,), None, False)
    first = cpu._first_key(key, walk.first)
    arguments = (
        np.asarray(memory), walk.wordsize, first, np.uint64(low), np.uint64(kept), walk.axes,
    )  # fmt: skip
    cpu._divided(_recolour, arguments, walk, threads)


def check(
    x: np.ndarray, walk: Walk, paint_key: int, colour_key: int, n_bits: int, threads: int = 1
) -> tuple[int, int]:
    """(colour fingerprint, number of elements with a residue) of the array's elements."""
    if not walk.size:
        return 0, 0
    first = cpu._first_key(paint_key, walk.first)
    low, delta = np.uint64((1 << n_bits) - 1), np.uint64((colour_key - paint_key) & MASK)
    arguments = (cpu._bytes_of(x, walk), walk.wordsize, first, low, delta, walk.axes)
    parts = cpu._divided(_check, arguments, walk, threads)
    return cpu._xor_all(word for word, _ in parts), int(sum(bad for _, bad in parts))


def count_nonfinite(x: np.ndarray, walk: Walk, exponent: int, threads: int = 1) -> int:
    """How many elements are Inf or NaN; ``exponent`` is the mask of the exponent's bits."""
    if not walk.size:
        return 0
    arguments = (cpu._bytes_of(x, walk), walk.wordsize, np.uint64(exponent), walk.axes)
    return int(sum(cpu._divided(_nonfinite, arguments, walk, threads)))


def colour_range(key: int, start: int, stop: int, threads: int = 1) -> int:
    """XOR of the colour words of a range of global indices, in the colour stream ``key``."""
    walk = plan_field((stop - start,), 8, Slab((stop,), (start,)))
    return cpu.xor_colours(walk, key, threads)
