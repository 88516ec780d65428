"""What each check sees and misses: every check × every fault, by planting them.

Serial: a tensor is cut into shards in memory, one of them is corrupted, and each check's own
functions decide. What is measured are the functions; that the checks apply them to what really
moved is what the multi-rank tests show. The tables stand in docs/what-pass-means.md.
"""

from collections import Counter

import numpy as np

from spimpi.bench.planted import MOVEMENT, SHAPE, random_tensors, words_of
from spimpi.checks.sums import float_bound
from spimpi.checks.sums.words import project_block, sketch_key
from spimpi.fingerprint import combine, expected_fingerprint, fingerprint, linear_fingerprint
from spimpi.fingerprint.painting import color_fingerprint, color_hidden_states
from spimpi.fingerprint.tag import MASK, Tag
from spimpi.partition import TensorPartition

SHARDS = (2, 3, 4, 8)
DTYPES = ("uint8", "float16", "bfloat16", "float32", "int32", "float64", "int64", "complex64")
PAINTED = ("float16", "bfloat16", "float32", "float64")
SUMMED = ("bfloat16", "float32", "float64")
TRIALS, CLEAN = 1_000_000, 1_000_000
OTHERS_EVERY = 20  # of so many trials one is also given to today's checksums


def measure(n_trials: int = TRIALS, n_clean: int = CLEAN) -> dict:
    """The three tables as Markdown; a cell is missed / tried. Local."""
    return {
        "Moved data": markdown(content_trials(n_trials, n_clean)),
        "Painted data": markdown(painting_trials(n_trials // 5)),
        "Sums": markdown(sum_trials(n_trials // 20)),
    }


def markdown(table: dict) -> str:
    """A table {fault: {check: (missed, tried)}} as Markdown."""
    checks = list(next(iter(table.values())))
    lines = ["", f"| fault | {' | '.join(checks)} |", "|---" * (len(checks) + 1) + "|"]
    for fault, row in table.items():
        cells = (f"{row[c][0]:,} / {row[c][1]:,}" if row[c][1] else "" for c in checks)
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return "\n".join(lines)


# What people use today


def xor_of_words(x) -> int:
    """What a plain checksum does: XOR of 8-byte words, the rest zero-padded."""
    data = np.ascontiguousarray(x).tobytes()
    data += b"\0" * (-len(data) % 8)
    return int(np.bitwise_xor.reduce(np.frombuffer(data, np.uint64)))


def sum_of_words(x) -> int:
    """Sum of the elements' bits modulo 2**64."""
    return int(words_of(np.ascontiguousarray(x)).sum(dtype=np.uint64))


def todays_checksums() -> dict:
    """name -> digest of an array; torch.hash_tensor where there is a torch that has it."""
    checksums = {"XOR of words": xor_of_words, "sum of words": sum_of_words}
    try:
        import torch

        hash_tensor = torch.hash_tensor
    except (ImportError, AttributeError):
        return checksums

    def digest(x):
        words = words_of(np.ascontiguousarray(x))
        signed = words.view(f"i{words.itemsize}" if words.itemsize > 1 else "u1")
        return int(hash_tensor(torch.from_numpy(signed)).numpy())

    return {"torch.hash_tensor": digest, **checksums}


# Moved data


def content_trials(n_trials: int, n_clean: int, seed: int = 1069) -> dict:
    """Faults on shards of a moved tensor: what fingerprints and today's checksums miss.

    n_trials are shared by faults, dtypes and shard counts. Returns {fault: {check: (missed,
    tried)}}; trials in which the fault changed no bit are not counted. The last row, "nothing",
    counts false alarms.
    """
    rng = np.random.default_rng(seed)
    others = todays_checksums()
    table = {}
    for fault, plant in {**MOVEMENT, "nothing: false alarms": None}.items():
        counts, wanted = Counter(), n_trials // len(MOVEMENT) if plant else n_clean
        per_case = -(-wanted // (len(DTYPES) * len(SHARDS)))
        for dtype in DTYPES:
            for n_shards in SHARDS:
                for i in range(per_case):
                    asked = {} if i % OTHERS_EVERY else others
                    _movement(rng, dtype, n_shards, plant, asked, counts)
        table[fault] = {
            check: (counts[check], counts[check, "tried"]) for check in ("fingerprint", *others)
        }
    return table


def _movement(rng, dtype, n_shards, plant, others, counts) -> None:
    whole, earlier = random_tensors(dtype, 2, rng)
    tag = Tag(name="hidden", layer=int(rng.integers(32)), step=int(rng.integers(100)))
    arrived = _shards(whole, earlier, n_shards, plant, rng)
    gathered = np.concatenate([shard for shard, _ in arrived])
    if plant and gathered.tobytes() == whole.tobytes():
        return

    def note(check, differs):
        counts[check, "tried"] += 1
        counts[check] += differs != bool(plant)

    found = combine(fingerprint(shard, tag, part) for shard, part in arrived)
    note("fingerprint", found != fingerprint(whole, tag))
    for name, digest in others.items():
        note(name, digest(gathered) != digest(whole))


def _shards(whole, earlier, n_shards, plant, rng) -> list[tuple[np.ndarray, TensorPartition]]:
    """Copies of the shards, one of them corrupted."""
    hit, arrived = int(rng.integers(n_shards)), []
    for shard_id in range(n_shards):
        part = TensorPartition(0, n_shards, shard_id, SHAPE[0])
        rows = slice(part.start, part.stop)
        shard = whole[rows].copy()
        if plant and shard_id == hit:
            plant(shard=shard, whole=whole, earlier=earlier, rows=rows, rng=rng)
        arrived.append((shard, part))
    return arrived


# Painted data


def painting_trials(n_trials: int, seed: int = 1069) -> dict:
    """Faults on painted tensors, by dtype; the last row has the rate that one element should have."""
    rng = np.random.default_rng(seed)
    table = {}
    for fault, plant in {**MOVEMENT, "nothing: false alarms": None}.items():
        counts = Counter()
        for dtype in PAINTED:
            for i in range(-(-n_trials // (len(MOVEMENT) * len(PAINTED)))):
                _painting(rng, dtype, SHARDS[i % len(SHARDS)], plant, counts)
        table[fault] = {dtype: (counts[dtype], counts[dtype, "tried"]) for dtype in PAINTED}
    return table


def _painting(rng, dtype, n_shards, plant, counts) -> None:
    step = int(rng.integers(1, 100))
    tag, before = (Tag(name="hidden", layer=3, step=s) for s in (step, step - 1))
    whole, earlier = random_tensors(dtype, 2, rng)
    color_hidden_states(whole, tag)
    color_hidden_states(earlier, before)
    arrived = _shards(whole, earlier, n_shards, plant, rng)
    if plant and np.concatenate([shard for shard, _ in arrived]).tobytes() == whole.tobytes():
        return
    expected = expected_fingerprint(tag.seed, *SHAPE, 3, "hidden", step, dtype)
    found = combine(color_fingerprint(shard, tag, part) for shard, part in arrived)
    counts[dtype, "tried"] += 1
    counts[dtype] += (found != expected) != bool(plant)


# Sums


def _bit(result, rng, **_):
    MOVEMENT["1 bit of one element"](shard=result, rng=rng)


def _unit(result, rng, **_):
    place = tuple(int(rng.integers(n)) for n in result.shape)
    result[place] = np.nextafter(result[place], result.dtype.type(np.inf))


SUM_FAULTS = {
    "1 bit of one element of the result": _bit,
    "one unit in the last place of one element": _unit,
    "two elements of the result swapped": lambda result, rng, **_: MOVEMENT[
        "two elements swapped"
    ](shard=result, rng=rng),
    "result shifted": lambda result, rng, **_: MOVEMENT["shard shifted by some elements"](
        shard=result, rng=rng
    ),
    "a contribution dropped": lambda result, parts, add, **_: result.__setitem__(
        ..., add(parts[1:])
    ),
    "a contribution counted twice": lambda result, parts, add, **_: result.__setitem__(
        ..., add([*parts, parts[0]])
    ),
    "zeros for the result": lambda result, **_: result.fill(0),
    "NaN in one element": lambda result, **_: result.reshape(-1).__setitem__(0, np.nan),
}


FLOATS_ONLY = ("one unit in the last place of one element", "NaN in one element")


def sum_trials(n_trials: int, seed: int = 1069) -> dict:
    """Faults on the result of a sum of 2 to 8 contributions of normal floats.

    Columns: the bound, by dtype (missed, tried); of those, errors in one element above the size
    that is always seen; the linear fingerprint of integers; agreement of two ranks' results, of
    which one has the fault.
    """
    rng = np.random.default_rng(seed)
    table = {}
    for fault, plant in {**SUM_FAULTS, "nothing: false alarms": None}.items():
        counts = Counter()
        for dtype in SUMMED:
            for i in range(-(-n_trials // (len(SUM_FAULTS) * len(SUMMED)))):
                n_ranks = SHARDS[i % len(SHARDS)]
                _sum(rng, dtype, n_ranks, plant, counts)
                if fault not in FLOATS_ONLY:
                    _integers(rng, n_ranks, plant, counts)
        names = [f"bound, {d}" for d in SUMMED]
        names += ["bound, above its stated size", "exact (integers)", "agreement"]
        table[fault] = {name: (counts[name], counts[name, "tried"]) for name in names}
    return table


def _float_sum(parts):
    total = parts[0].copy()
    for part in parts[1:]:
        total = (total + part).astype(part.dtype)  # rounded after each addition
    return total


def _sum(rng, dtype, n_ranks, plant, counts) -> None:
    tag = Tag(name="delta", layer=2, step=int(rng.integers(100)))
    parts = random_tensors(dtype, n_ranks, rng)
    right = _float_sum([parts[i] for i in rng.permutation(n_ranks)])
    result = right.copy()
    if plant:
        plant(result=result, parts=parts, add=_float_sum, rng=rng)
    if plant and result.tobytes() == right.tobytes():
        return

    def note(check, differs):
        counts[check, "tried"] += 1
        counts[check] += bool(differs) != bool(plant)

    wrong, limit = _beyond_bound(parts, result, tag)
    note(f"bound, {dtype}", wrong)
    with np.errstate(invalid="ignore"):
        errors = np.abs(result.astype(float) - right.astype(float))
    if np.count_nonzero(errors) == 1 and errors.max() > 4 * limit:
        note("bound, above its stated size", wrong)
    note("agreement", fingerprint(result, tag) != fingerprint(right, tag))


def _integers(rng, n_ranks, plant, counts) -> None:
    tag = Tag(name="delta", layer=2, step=int(rng.integers(100)))
    parts = [rng.integers(-(2**40), 2**40, SHAPE) for _ in range(n_ranks)]
    total = np.add.reduce(parts)
    right = total.copy()
    if plant:
        plant(result=total, parts=parts, add=np.add.reduce, rng=rng)
    if plant and total.tobytes() == right.tobytes():
        return
    expected = sum(linear_fingerprint(q, tag) for q in parts) & MASK
    counts["exact (integers)", "tried"] += 1
    counts["exact (integers)"] += (linear_fingerprint(total, tag) != expected) != bool(plant)


def _beyond_bound(parts, result, tag) -> tuple[bool, float]:
    """Whether the bound is exceeded, and its largest limit; as sums.judge decides."""
    cuts = float_bound.bins_of(SHAPE, float_bound.most_bins(len(parts)))
    key = sketch_key(tag, SHAPE, result.dtype.itemsize)
    own = np.stack([project_block(x, None, cuts, key).sums for x in parts])
    there = project_block(result, result, cuts, key).sums[2:]
    limit = float_bound.limits(own[:, -1], np.diff(cuts), len(parts), result.dtype)
    with np.errstate(invalid="ignore"):
        far = ~(np.abs(float_bound.excess(own, there)) <= limit)
    return bool(far.any()), float(limit.max())
