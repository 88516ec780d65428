"""Faults on tensors in memory, for the confusion matrix: each changes a block in place.

A fault gets what it needs by keyword: ``shard``, the block; ``rng``; ``whole``, the tensor, of which
the block is ``rows``; ``earlier``, the same tensor a step before; of a sum, ``without()`` and
``doubled()``: the sum with one contribution missing, and with one counted twice. Faults of moved
data change bits, not values, so that all dtypes have them.
"""

from functools import lru_cache, partial

import numpy as np

from spimpi.fingerprint.arrays import dtype_of

SHAPE = (24, 20)  # small, so that there can be many; a fingerprint does not know sizes


def words_of(x) -> np.ndarray:
    """The elements' bits as flat unsigned words; they share the array's memory."""
    return x.reshape(-1).view(f"u{min(x.itemsize, 8)}")


def flip_one_element(k, shard, rng, **_):
    words = words_of(shard)
    place = rng.integers(words.size)
    for bit in rng.choice(8 * words.itemsize, k, replace=False):
        words[place] ^= words.dtype.type(1 << int(bit))


def same_bit(shard, rng, **_):
    words = words_of(shard)
    n = min(int(rng.integers(2, 65)), words.size)
    places = rng.choice(words.size, n, replace=False)
    words[places] ^= words.dtype.type(1 << int(rng.integers(8 * words.itemsize)))


def periodic(shard, rng, **_):
    words = words_of(shard)
    period = int(rng.integers(1, max(words.size // 2, 2)))
    start = int(rng.integers(period))
    words[start::period] ^= words.dtype.type(1 << int(rng.integers(8 * words.itemsize)))


def swap(shard, rng, **_):
    words = words_of(shard)
    i, j = rng.choice(words.size, 2, replace=False)
    words[[i, j]] = words[[j, i]]


def shifted(shard, rng, **_):
    words = words_of(shard)
    words[:] = np.roll(words, int(rng.integers(1, words.size)))


def swapped_rows(shard, rng, **_):
    i, j = rng.choice(len(shard), 2, replace=False) if len(shard) > 1 else (0, 0)
    shard[[i, j]] = shard[[j, i]]


def stale(shard, earlier, rows, **_):
    shard[:] = earlier[rows]


def truncated(shard, rng, earlier, rows, **_):
    words, old = words_of(shard), words_of(np.ascontiguousarray(earlier[rows]))
    kept = int(rng.integers(words.size))
    words[kept:] = old[kept:]


def repeated(shard, whole, rows, **_):
    other = 0 if rows.start else len(whole) - len(shard)
    shard[:] = whole[other : other + len(shard)]


def misplaced(shard, whole, rows, **_):
    by = -1 if rows.start else 1
    shard[:] = whole[rows.start + by : rows.stop + by]


def zeros(shard, **_):
    words_of(shard)[:] = 0


def nan(shard, rng, **_):
    words = words_of(shard)
    words[rng.integers(words.size)] = np.iinfo(words.dtype).max  # a NaN where it is a float


MOVEMENT = {
    **{f"{k} bit{'s' * (k > 1)} of one element": partial(flip_one_element, k) for k in range(1, 9)},
    "the same bit of 2 to 64 elements": same_bit,
    "the same bit of every n-th element": periodic,
    "two elements swapped": swap,
    "two rows swapped": swapped_rows,
    "shard shifted by some elements": shifted,
    "shard of the step before": stale,
    "shard truncated, its end of the step before": truncated,
    "another rank's shard in its place": repeated,
    "shard off by one row": misplaced,
    "zeros for data": zeros,
    "one element all ones (NaN)": nan,
}


def another_replica(shard, earlier, rows, **_):
    shard[:] = earlier[rows]


def dropped(shard, rows, without, **_):
    shard[:] = without()[rows]


def counted_twice(shard, rows, doubled, **_):
    shard[:] = doubled()[rows]


def one_unit(shard, rng, **_):
    """The next larger float of one element."""
    flat = shard.reshape(-1).view(shard.real.dtype)
    place = rng.integers(flat.size)
    flat[place] = np.nextafter(flat[place], flat.dtype.type(np.inf))


REPLICA = {"a wrong replica": another_replica}
CONTRIBUTION = {"a contribution dropped": dropped, "a contribution counted twice": counted_twice}
ROUNDING = {"one unit in the last place of one element": one_unit}
# These strike all of a tensor that a rank holds whole, the others a block of it.
STRIKE_ALL = frozenset({another_replica, dropped, counted_twice})

N_TENSORS = 64


@lru_cache
def tensors(dtype: str) -> tuple[np.ndarray, ...]:
    """Tensors of SHAPE, read-only: data as activations have them, or small integers."""
    return tuple(_random_tensor(dtype, np.random.default_rng(i)) for i in range(N_TENSORS))


def _random_tensor(dtype, rng) -> np.ndarray:
    kind = dtype_of(dtype)
    values = rng.standard_normal(SHAPE)
    if kind.kind in "iu":
        made = (40 * values).astype(np.int64).astype(kind)
    elif kind.kind == "c":
        made = (values + 1j * rng.standard_normal(SHAPE)).astype(kind)
    else:
        made = values.astype(kind)
    made.flags.writeable = False
    return made
