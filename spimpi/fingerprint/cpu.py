"""Fingerprints on CPUs: numba kernels over a table of axes, and the threads that share them.

There are three kernels, so that a rank has little to load at start-up. Each takes a rectangle of
the walk (rows ``row0``..``row1`` of its outer axes, ``lo``..``hi`` of the innermost one): that is
what threads divide among themselves. The loops are plain on purpose; LLVM vectorises them.
Keys are uint64 and wrap: ``axes[:, 2]`` holds steps of the element key, not of the index.
"""

import os
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from spimpi.fingerprint.arrays import Walk, plan_flat
from spimpi.fingerprint.tag import GOLDEN as _GOLDEN
from spimpi.fingerprint.tag import MASK
from spimpi.fingerprint.words import GOLDEN, ONE, ZERO, close, mix, mix_open
from spimpi.jit import inlined, kernel

_BYTES = "Array(uint8, 1, 'C', True)"
_TABLE = "Array(uint64, 2, 'C', True)"
_RECTANGLE = f"{_TABLE}, uint64, uint64, uint64, uint64"
TWO = np.uint64(2)
_LARGEST = 2.0**53

NO_DATA = 0  # "item size" of the colour field
INT64, FLOAT64 = 0, 1

# A thread is worth waking for this many bytes (its start takes as long as reading them).
_PIECE_BYTES = 1 << 20
_PIECES_PER_THREAD = 4


# Rows of a shard lie apart, and the processor's own prefetcher loses them: the kernel asks for the
# lines of a row that comes this many bytes later.
_AHEAD_BYTES = 4096
_LINE_BYTES = 64


@intrinsic
def _prefetch(typing_context, data, place):
    """Ask for the cache line at byte ``place``; a place outside the array does no harm."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.gep(array.data, [arguments[1]])
        word = ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [pointer.type],
            ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word]),
        )
        builder.call(prefetch, [pointer, word(0), word(3), word(1)])  # read, keep, data
        return context.get_dummy_value()

    return types.void(data, place), generate


@inlined
def _lookahead(axes, itemsize):
    """(how many bytes on the row to prefetch starts, how many of its bytes to ask for)."""
    if axes.shape[0] == 1 or itemsize == NO_DATA:
        return 0, 0
    row_bytes = max(1, np.int64(axes[-1, 0]) * itemsize)
    rows = max(1, _AHEAD_BYTES // row_bytes)
    # one line more: a row may start in the middle of one
    return rows * np.int64(axes[-2, 1]) * itemsize, min(row_bytes, _AHEAD_BYTES) + _LINE_BYTES


@inlined
def _row_start(axes, row):
    """Memory place (words) and key step of a row: its number's digits in the outer axes."""
    place, step = ZERO, ZERO
    for axis in range(axes.shape[0] - 2, -1, -1):
        digit = row
        if axis > 0:  # the outermost digit needs no division
            digit = row % axes[axis, 0]
            row = row // axes[axis, 0]
        place += digit * axes[axis, 1]
        step += digit * axes[axis, 2]
    return place, step


@inlined
def _run(words, place, stride, n, key, step):
    """Open XOR of a run of 1-, 2- or 4-byte words."""
    total = ZERO
    if stride != ONE:
        for j in range(n):
            total ^= mix_open((key + j * step) ^ np.uint64(words[place + j * stride]))
        return total
    # Both halves at once: two streams keep more cache lines on their way (+20% from memory).
    # One total for both: the processor XORs three words at once.
    half = n // TWO
    middle, later = place + half, key + half * step
    for j in range(half):
        first = mix_open(key ^ np.uint64(words[place + j]))
        total ^= first ^ mix_open(later ^ np.uint64(words[middle + j]))
        key += step
        later += step
    if n > half + half:
        total ^= mix_open(later ^ np.uint64(words[middle + half]))
    return total


@inlined
def _run8(words, place, stride, n, key, step):
    """Open XOR of a run of 8-byte words, in two streams like ``_run``."""
    total = ZERO
    if stride != ONE:
        for j in range(n):
            own = key + j * step
            total ^= mix_open(mix(own ^ words[place + j * stride]) ^ own)
        return total
    half = n // TWO
    middle, later = place + half, key + half * step
    for j in range(half):
        first = mix_open(mix(key ^ words[place + j]) ^ key)
        total ^= first ^ mix_open(mix(later ^ words[middle + j]) ^ later)
        key += step
        later += step
    if n > half + half:
        total ^= mix_open(mix(later ^ words[middle + half]) ^ later)
    return total


@inlined
def _run_colours(n, key, step):
    total = ZERO
    for _ in range(n):
        total ^= mix_open(key)
        key += step
    return total


@kernel(f"uint64({_BYTES}, int64, uint64, {_RECTANGLE})")
def _xor(data, itemsize, key, axes, row0, row1, lo, hi):
    """XOR fingerprint of a rectangle; ``key`` is the element key at the walk's start."""
    stride, step = axes[-1, 1], axes[-1, 2]
    # Three views, of which at most one is read: the others lose a remainder of their size.
    halves = data[: data.size // 2 * 2].view(np.uint16)
    quads = data[: data.size // 4 * 4].view(np.uint32)
    octets = data[: data.size // 8 * 8].view(np.uint64)
    total = ZERO
    n = hi - lo
    ahead, span = _lookahead(axes, itemsize)
    for row in range(row0, row1):
        place, own = _row_start(axes, row)
        place += lo * stride
        own += key + lo * step
        later = np.int64(place) * itemsize + ahead
        for byte in range(0, span, _LINE_BYTES):
            _prefetch(data, later + byte)
        if itemsize == 8:
            total ^= _run8(octets, place, stride, n, own, step)
        elif itemsize == 4:
            total ^= _run(quads, place, stride, n, own, step)
        elif itemsize == 2:
            total ^= _run(halves, place, stride, n, own, step)
        elif itemsize == 1:
            total ^= _run(data, place, stride, n, own, step)
        else:
            total ^= _run_colours(n, own, step)
    return close(total)


@kernel(f"UniTuple(uint64, 2)({_BYTES}, int64, uint64, {_RECTANGLE})")
def _linear(data, carrier, key, axes, row0, row1, lo, hi):
    """(linear fingerprint, elements that are no integers of at most 2**53) of a rectangle.

    Such elements add nothing to the fingerprint.
    """
    stride, step = axes[-1, 1], axes[-1, 2]
    integers, floats = data.view(np.int64), data.view(np.float64)
    total, bad = ZERO, ZERO
    n = hi - lo
    for row in range(row0, row1):
        place, own = _row_start(axes, row)
        place += lo * stride
        own += key + lo * step
        if carrier == INT64:
            for j in range(n):
                weight = mix(own + j * step) | ONE
                total += weight * np.uint64(integers[place + j * stride])
        else:
            for j in range(n):
                value = floats[place + j * stride]
                is_good = abs(value) <= _LARGEST and np.trunc(value) == value
                integer = np.int64(value if is_good else 0.0)
                bad += ZERO if is_good else ONE
                total += (mix(own + j * step) | ONE) * np.uint64(integer)
    return total, bad


@kernel("void(uint64[::1], uint64)")
def _colours(out, key):
    """Colour words, the first at element key ``key``."""
    for j in range(np.uint64(out.size)):
        out[j] = mix(key + j * GOLDEN)


class _Memory:
    """Raw bytes as a numpy array, read-only; whoever uses it keeps the owner alive."""

    def __init__(self, address, n_bytes):
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (n_bytes,),
            "data": (address, True),
        }


_NOTHING = np.empty(0, np.uint8)
_NOTHING.flags.writeable = False


def _bytes_of(x: np.ndarray, walk: Walk) -> np.ndarray:
    return np.asarray(_Memory(x.ctypes.data + walk.low, walk.extent))


def _first_key(key: int, index: int) -> np.uint64:
    return np.uint64((key + (index + 1) * _GOLDEN) & MASK)


def xor(x: np.ndarray, walk: Walk, key: int, threads: int = 1) -> int:
    """XOR fingerprint of the array's elements in the stream ``key``."""
    return _xor_walk(x, walk, _first_key(key, walk.first), threads)


def xor_flat(words: np.ndarray, key: int, first_index: int, threads: int = 1) -> int:
    """XOR fingerprint of a contiguous run of words at global index ``first_index``."""
    walk = plan_flat(words.size, words.itemsize)
    return _xor_walk(words, walk, _first_key(key, first_index), threads)


def _xor_walk(x, walk, first_key, threads) -> int:
    if not walk.size:
        return 0
    arguments = (_bytes_of(x, walk), walk.wordsize, first_key, walk.axes)
    return _xor_all(_divided(_xor, arguments, walk, threads))


def xor_colours(walk: Walk, key: int, threads: int = 1) -> int:
    """XOR of the colour words of the walk's elements."""
    if not walk.size:
        return 0
    arguments = (_NOTHING, NO_DATA, _first_key(key, walk.first), walk.axes)
    return _xor_all(_divided(_xor, arguments, walk, threads))


def linear(x: np.ndarray, walk: Walk, key: int, threads: int = 1) -> tuple[int, int]:
    """(linear fingerprint, bad elements) of an array of int64 (or uint64) or float64."""
    return _linear_walk(x, walk, _first_key(key, walk.first), threads)


def linear_flat(words: np.ndarray, key: int, first_index: int, threads: int = 1) -> tuple[int, int]:
    """``linear`` of a contiguous run at global index ``first_index``."""
    walk = plan_flat(words.size, 8)
    return _linear_walk(words, walk, _first_key(key, first_index), threads)


def _linear_walk(x, walk, first_key, threads) -> tuple[int, int]:
    if not walk.size:
        return 0, 0
    carrier = FLOAT64 if x.dtype.kind == "f" else INT64
    arguments = (_bytes_of(x, walk), carrier, first_key, walk.axes)
    parts = _divided(_linear, arguments, walk, threads)
    return sum(lin for lin, _ in parts) & MASK, sum(bad for _, bad in parts)


def fill_colours(out: np.ndarray, key: int, first_index: int, threads: int = 1) -> None:
    """Write the colour words from ``first_index`` on into a contiguous uint64 array."""
    cuts = _cuts(out.size, _n_pieces(out.nbytes, threads))
    jobs = [(out[a:b], _first_key(key, first_index + int(a))) for a, b in cuts]
    _each(_colours, jobs, threads)


def _xor_all(parts) -> int:
    total = 0
    for part in parts:
        total ^= part
    return total


def _divided(kernel_, arguments, walk: Walk, threads: int) -> list:
    """The kernel's results over rectangles that together are the walk."""
    pieces = _n_pieces(walk.size * walk.wordsize, threads)
    rows, run = np.uint64(walk.rows), np.uint64(walk.run)
    if pieces == 1:
        return [kernel_(*arguments, ZERO, rows, ZERO, run)]
    if walk.rows >= pieces:
        jobs = [(*arguments, a, b, ZERO, run) for a, b in _cuts(walk.rows, pieces)]
    else:
        jobs = [(*arguments, ZERO, rows, a, b) for a, b in _cuts(walk.run, pieces)]
    return _each(kernel_, jobs, threads)


def _n_pieces(n_bytes: int, threads: int) -> int:
    """More pieces than threads, as they may share their cores; one where it is not worth it."""
    if threads == 1:
        return 1
    pieces = min(threads * _PIECES_PER_THREAD, n_bytes // _PIECE_BYTES)
    return max(1, pieces - pieces % threads if pieces > threads else pieces)


def _cuts(total: int, pieces: int) -> list[tuple[np.uint64, np.uint64]]:
    at = [np.uint64(total * i // pieces) for i in range(pieces + 1)]
    return list(zip(at, at[1:]))


def _each(kernel_, jobs, threads: int) -> list:
    if len(jobs) == 1:
        return [kernel_(*job) for job in jobs]
    return list(_pool(threads).map(lambda job: kernel_(*job), jobs))


@lru_cache(maxsize=4)
def _pool(threads: int):
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(threads, thread_name_prefix="spimpi-fingerprint")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
