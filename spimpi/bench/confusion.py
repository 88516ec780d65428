"""What each check sees and misses: every check × every fault, by planting them.

Serial: a tensor is cut into shards in memory, one of them is corrupted, and each check's own
functions decide. What is compared are the functions; that the checks apply them to what really
moved is what the multi-rank tests show. The tables stand in docs/what-pass-means.md.
"""

from collections import Counter
from functools import partial

import numpy as np

from spimpi.fingerprint import combine, fingerprint
from spimpi.fingerprint.tag import Tag
from spimpi.partition import TensorPartition

SHAPE = (24, 20)  # small, so that there can be many; a fingerprint does not know sizes
SHARDS = (2, 3, 4, 8)
DTYPES = ("uint8", "float16", "bfloat16", "float32", "int32", "float64", "int64", "complex64")
CARELESS = ("torch.hash_tensor", "XOR of words", "sum of words")


def words_of(x) -> np.ndarray:
    """The elements' bits as flat unsigned words; they share the array's memory."""
    return x.reshape(-1).view(f"u{min(x.itemsize, 8)}")


# Faults: each changes a shard in place, given the whole tensor and the shard's rows, and random
# numbers. They change bits, not values, so that all dtypes have them.


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


def random_tensor(dtype, rng) -> np.ndarray:
    """Data as activations have them (normal), or small integers."""
    kind = np.dtype(_dtype(dtype))
    values = rng.standard_normal(SHAPE)
    if kind.kind in "iu":
        return (40 * values).astype(np.int64).astype(kind)
    if kind.kind == "c":
        return (values + 1j * rng.standard_normal(SHAPE)).astype(kind)
    return values.astype(kind)


def _dtype(name):
    if name != "bfloat16":
        return name
    import ml_dtypes

    return ml_dtypes.bfloat16


def xor_of_words(x) -> int:
    """What a plain checksum does: XOR of 8-byte words, the rest zero-padded."""
    data = np.ascontiguousarray(x).tobytes()
    data += b"\0" * (-len(data) % 8)
    return int(np.bitwise_xor.reduce(np.frombuffer(data, np.uint64)))


def sum_of_words(x) -> int:
    """Sum of the elements' bits modulo 2**64."""
    return int(words_of(np.ascontiguousarray(x)).sum(dtype=np.uint64))


def torch_hash():
    """torch.hash_tensor of an array's bits, None where torch is missing or has no such function."""
    try:
        import torch
    except ImportError:
        return None
    if not hasattr(torch, "hash_tensor"):
        return None

    def digest(x):
        words = words_of(np.ascontiguousarray(x))
        signed = words.view(f"i{words.itemsize}" if words.itemsize > 1 else "u1")
        return int(torch.hash_tensor(torch.from_numpy(signed)).numpy())

    return digest


def content_trials(n_trials: int, seed: int = 1069) -> dict:
    """Faults on shards of a moved tensor: what fingerprints and today's checksums miss.

    n_trials a fault, shared by all dtypes and shard counts. Returns {fault: {check: (missed,
    tried)}}; trials in which the fault changed no bit are not counted. One row, "clean", has the
    false alarms: differences where nothing was changed.
    """
    rng = np.random.default_rng(seed)
    careless = dict(zip(CARELESS, (torch_hash(), xor_of_words, sum_of_words)))
    careless = {name: digest for name, digest in careless.items() if digest}
    table = {}
    per_case = -(-n_trials // (len(DTYPES) * len(SHARDS)))
    for fault, plant in {**MOVEMENT, "nothing": None}.items():
        counts = Counter()
        for dtype in DTYPES:
            for n_shards in SHARDS:
                for _ in range(per_case):
                    _one_movement(rng, dtype, n_shards, plant, careless, counts)
        checks = ("fingerprint", *careless)
        table[fault] = {check: (counts[check], counts["tried"]) for check in checks}
    return table


def _one_movement(rng, dtype, n_shards, plant, careless, counts) -> None:
    whole, earlier = random_tensor(dtype, rng), random_tensor(dtype, rng)
    tag = Tag(name="hidden", layer=int(rng.integers(32)), step=int(rng.integers(100)))
    hit = int(rng.integers(n_shards))
    arrived, expected = [], fingerprint(whole, tag)
    for shard_id in range(n_shards):
        part = TensorPartition(0, n_shards, shard_id, SHAPE[0])
        rows = slice(part.start, part.stop)
        shard = whole[rows].copy()
        if plant and shard_id == hit:
            plant(shard=shard, whole=whole, earlier=earlier, rows=rows, rng=rng)
        arrived.append((shard, part))
    gathered = np.concatenate([shard for shard, _ in arrived])
    changed = gathered.tobytes() != whole.tobytes()
    if plant and not changed:
        return
    counts["tried"] += 1
    found = combine(fingerprint(shard, tag, part) for shard, part in arrived)
    counts["fingerprint"] += (found != expected) != bool(plant)
    for name, digest in careless.items():
        counts[name] += (digest(gathered) != digest(whole)) != bool(plant)
