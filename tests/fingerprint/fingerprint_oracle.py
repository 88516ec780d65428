"""Brute force for the tests: the elements of an array, one by one, into the plain reference."""

import json
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from spimpi.fingerprint import Tag, reference

VECTORS = Path(__file__).parent.parent / "data" / "fingerprint-v1.json"
CASES = json.loads(VECTORS.read_text())["cases"]
NAMES = [f"{i}-{c['name']}-{'x'.join(map(str, c['shape']))}" for i, c in enumerate(CASES)]


def tag_of(case) -> Tag:
    return Tag(int(case["seed"], 16), case["name"], case["layer"], case["step"])


def words_of(case) -> np.ndarray:
    words = [int(word, 16) for word in case["words"]]
    return np.array(words, dtype=f"u{case['itemsize']}").reshape(case["shape"])


def integers_of(case) -> np.ndarray:
    return np.array(case["integers"], dtype=np.int64).reshape(case["shape"])


def element_bits(x: np.ndarray, wordsize: int | None = None) -> list[int]:
    """The bits of each word of an array in row-major order, by way of its bytes."""
    raw = x.tobytes(order="C")
    size = wordsize or x.itemsize
    return [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]


def brute_fingerprint(x, tag, global_shape=None, offset=None) -> int:
    """What the reference says of a block of a real-valued tensor."""
    global_shape = x.shape if global_shape is None else global_shape
    offset = (0,) * x.ndim if offset is None else offset
    indices = reference.slab_indices(x.shape, global_shape, offset)
    return reference.fingerprint(tag, global_shape, x.itemsize, zip(indices, element_bits(x)))


def flat_blocks(shape, start: int, stop: int):
    """Index ranges (one slice an axis) of blocks that together are a flat element range."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = 1
    for n in shape[1:]:
        inner *= n
    while start < stop:
        row, within = divmod(start, inner)
        if within == 0 and stop - start >= inner:
            rows = (stop - start) // inner
            yield (slice(row, row + rows), *(slice(0, n) for n in shape[1:]))
            start += rows * inner
        else:
            end = min(stop, (row + 1) * inner)
            for rest in flat_blocks(shape[1:], within, end - row * inner):
                yield (slice(row, row + 1), *rest)
            start = end


def offset_of(block) -> tuple[int, ...]:
    return tuple(axis.start for axis in block)


def misaligned(x: np.ndarray) -> np.ndarray:
    """A copy whose items lie one byte off their alignment, as fields of packed records do."""
    record = np.zeros(x.shape, dtype=[("head", "u1"), ("body", x.dtype)])
    record["body"] = x
    return record["body"]


def gapped(x: np.ndarray) -> np.ndarray:
    """A copy with unused items between its elements, along every axis."""
    host = np.zeros([2 * n for n in x.shape], dtype=x.dtype)
    view = host[(..., *(slice(None, None, 2) for _ in x.shape))]
    view[...] = x
    return view


def backwards(x: np.ndarray) -> np.ndarray:
    """A copy that lies backwards in memory along every axis."""
    reverse = (..., *(slice(None, None, -1) for _ in x.shape))
    return np.array(x[reverse], order="C")[reverse]


def read_only(x: np.ndarray) -> np.ndarray:
    copy = np.array(x)
    copy.flags.writeable = False
    return copy


LAYOUTS = {
    "plain": lambda x: np.array(x, order="C"),
    "fortran": lambda x: np.array(x, order="F"),
    "gapped": gapped,
    "backwards": backwards,
    "read-only": read_only,
    "misaligned": misaligned,
}


def broadcast(row: np.ndarray, n: int) -> np.ndarray:
    """n times the same row, in the memory of one."""
    return as_strided(row, (n, *row.shape), (0, *row.strides))
