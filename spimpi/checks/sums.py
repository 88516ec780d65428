"""Checks of allreduce and reduce-scatter: docs/sums.md says what each strength proves.

All functions are collective over ``comm``. One Allgather of a few KB, whatever the tensor's size,
carries every rank's words, so that all ranks reach the same verdict on their own; what more is
exchanged, is exchanged where something failed or is not finite, on every rank alike.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from mpi4py import MPI

from spimpi.checks import float_bound, sum_exact, sum_report, sum_search, sum_words
from spimpi.checks.session import session_of
from spimpi.checks.verdict import Verdict
from spimpi.errors import CorruptionError, SpimpiError, UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import MASK, Tag
from spimpi.partition import Slab, TensorPartition, whole
from spimpi.reduction import minority
from spimpi.trace.schema import Established

_CHECKED = ("SUM", "MAX", "MIN", "BXOR")
_REFUSED = ("BAND", "BOR", "PROD", "LAND", "LOR", "LXOR", "MAXLOC", "MINLOC")

# The header of a rank's words, uint64; then P linear words, then the projections.
_FAILED, _CALL, _RESULT, _OWN, _INTEGRAL, _BAD, _LARGEST, _LOW, _HIGH, _PIECES, _LINEAR = range(11)
_HEADER = 16


@dataclass(frozen=True)
class _Local:
    """What this rank brings to a check: its blocks, and how they are summed."""

    name: str
    op: str
    kind: str  # "one rank", "float", "integer", "extreme", "bits"
    dtype: np.dtype  # of an item
    blocks: sum_words.Blocks
    tag: Tag

    @property
    def scattered(self) -> bool:
        return self.name == "reduce_scatter"

    def held(self, rank: int) -> int:
        """The block that a rank's result is."""
        return rank if self.scattered else 0


def verify_allreduce(
    comm, contribution, result, tag, *, op=MPI.SUM, check=True, ctx=None, threads=1
) -> Verdict:
    """Check an allreduce after it ran: ``result`` on every rank is the sum of ``contribution``s.

    Arrays of one shape and dtype on all ranks: with MPI.SUM float64, float32, float16, bfloat16,
    complex or integers; with MPI.MAX and MPI.MIN no complex ones; with MPI.BXOR integers and bools.
    ``verdict.strength`` says how strong the check was (docs/sums.md): agreement of all results,
    and a bound without false alarms for floats, exactness for all else. Establishes AGREED and
    COMPUTED; ``missing`` counts elements that the check could not cover (NaN, Inf, overflow).
    Collective. With ``check`` a failure raises CorruptionError on every rank; what cannot be
    checked raises UsageError on every rank.
    """
    return _verify(comm, "allreduce", contribution, result, None, tag, op, check, ctx, threads)


def verify_reduce_scatter(
    comm, contribution, result, partition, tag, *, op=MPI.SUM, check=True, ctx=None, threads=1
) -> Verdict:
    """Check a reduce-scatter after it ran: ``result`` is this rank's shard of the sum.

    ``contribution`` is whole on every rank; ``partition`` says which shard of it ``result`` is:
    one shard a rank, in the order of ranks. With MPI.SUM and MPI.BXOR; dtypes, strengths and
    errors as for ``verify_allreduce``, but there are no replicas to agree. Establishes COMPUTED.
    Collective.
    """
    return _verify(
        comm, "reduce_scatter", contribution, result, partition, tag, op, check, ctx, threads
    )


def _verify(comm, name, contribution, result, partition, tag, op, check, ctx, threads) -> Verdict:
    comm = session_of(comm, ctx).comm
    words = np.zeros(_words_of(comm.size), np.uint64)
    local, error, call = None, None, "nothing that could be checked"
    try:
        local, call = _prepare(comm, name, contribution, result, partition, tag, op)
        _fill(local, words, threads, comm)
    except (SpimpiError, OSError) as caught:
        error = caught
    words[_FAILED] = error is not None
    words[_CALL] = _digest(call)
    everyone = np.empty((comm.size, words.size), np.uint64)
    comm.Allgather(words, everyone)
    if everyone[:, _FAILED].any() or np.ptp(everyone[:, _CALL]):
        _refuse(comm, error, call)
    verdict = _JUDGES[local.kind](comm, local, everyone)
    if check and not verdict:
        raise CorruptionError(verdict)
    return verdict


def _refuse(comm, error, call) -> None:
    """The same UsageError on every rank."""
    said = comm.allgather((None if error is None else (type(error), str(error)), call))
    failed = [(rank, *one) for rank, (one, _) in enumerate(said) if one is not None]
    if failed:
        rank, kind, text = failed[0]
        kind = kind if issubclass(kind, UsageError) else UsageError
        raise kind(f"{text} (found by rank {rank})")
    calls = [call for _, call in said]
    other = next(rank for rank, call in enumerate(calls) if call != calls[0])
    msg = (
        f"the ranks do not check the same reduction: rank 0 gave {calls[0]}, "
        f"rank {other} gave {calls[other]}"
    )
    raise UsageError(msg)


def _digest(call: str) -> int:
    return int.from_bytes(blake2b(call.encode(), digest_size=8).digest(), "little")


def _words_of(size: int) -> int:
    return _HEADER + size + 5 * max(float_bound.most_bins(size), size)


def _prepare(comm, name, contribution, result, partition, tag, op) -> tuple[_Local, str]:
    """This rank's part of a check, and a description of the call that all ranks must share."""
    if not isinstance(tag, Tag):
        msg = f"tag must be a spimpi.Tag, found {type(tag).__name__}"
        raise UsageError(msg)
    sum_words.same_arrays(contribution, result)
    x, r = sum_words.items(np.asarray(contribution)), sum_words.items(np.asarray(result))
    op_name = _name_of(op)
    kind = _kind(op_name, x.dtype, name, np.asarray(contribution).dtype)
    if name == "allreduce":
        if x.shape != r.shape:
            msg = (
                f"contribution and result of an allreduce have one shape, "
                f"found {contribution.shape} and {result.shape}"
            )
            raise UsageError(msg)
        parts, slabs, own, cut = (x,), (whole(x.shape),), 0, ""
    else:
        parts, slabs = _shards(comm, x, r, partition)
        own, cut = comm.rank, f", cut {list(partition.all_sizes)} along axis {partition.dim}"
    key = sum_words.sketch_key(tag, x.shape, x.dtype.itemsize)
    most = float_bound.most_bins(comm.size)
    blocks = sum_words.Blocks(parts, slabs, r, own, key, most)
    call = (
        f"{name} by MPI.{op_name} of {np.asarray(contribution).dtype}{list(contribution.shape)}"
        f"{cut} under {tag}"
    )
    kind = "one rank" if comm.size == 1 else kind
    return _Local(name, op_name, kind, x.dtype, blocks, tag), call


def _name_of(op) -> str:
    """The name of an operation that can be checked."""
    for name in _CHECKED + _REFUSED:
        if op == getattr(MPI, name):
            break
    else:
        name = "a user-defined operation"
    if name in _CHECKED:
        return name
    msg = f"no check of MPI.{name} is known: expected one of MPI.{', MPI.'.join(_CHECKED)}"
    raise UsageError(msg)


def _kind(op: str, dtype, name: str, given) -> str:
    is_integer = dtype.kind in "iu"
    is_float = float_bound.format_of(dtype) is not None
    if op == "SUM" and (is_integer or is_float):
        return "integer" if is_integer else "float"
    if op in ("MAX", "MIN") and name == "allreduce" and given.kind != "c":
        if is_integer or is_float:
            return "extreme"
    if op == "BXOR" and (is_integer or dtype.kind == "b"):
        return "bits"
    msg = f"no check of a {name} of {given} by MPI.{op} is known"
    raise UsageError(msg)


def _shards(comm, x, r, partition):
    if not isinstance(partition, TensorPartition):
        msg = f"partition must be a TensorPartition, found {type(partition).__name__}"
        raise UsageError(msg)
    if (partition.n_shards, partition.shard_id) != (comm.size, comm.rank):
        msg = (
            f"a reduce-scatter has one shard a rank: expected shard {comm.rank} of {comm.size}, "
            f"found shard {partition.shard_id} of {partition.n_shards}"
        )
        raise UsageError(msg)
    if partition.slab(r.shape).global_shape != x.shape:
        msg = (
            f"a shard of shape {r.shape} makes a tensor of shape "
            f"{partition.slab(r.shape).global_shape}, but the contribution has {x.shape}"
        )
        raise UsageError(msg)
    parts, slabs = [], []
    for start, stop in zip(partition.starts, partition.starts[1:]):
        parts.append(x[(slice(None),) * partition.dim + (slice(start, stop),)])
        offset = [0] * x.ndim
        offset[partition.dim] = start
        slabs.append(Slab(x.shape, tuple(offset)))
    return tuple(parts), tuple(slabs)


# What a rank sends


def _fill(local: _Local, words, threads: int, comm) -> None:
    blocks, tag = local.blocks, local.tag
    slab = blocks.slabs[blocks.own]
    if threads < 1:
        msg = f"at least one thread is needed, found threads={threads}"
        raise UsageError(msg)
    if local.kind == "float":
        _fill_floats(local, words, threads, comm)
        return
    if local.kind == "integer":
        words[_LINEAR], _ = sum_exact.linear(blocks.result, tag, slab, threads)
        for q, (x, place) in enumerate(zip(blocks.blocks, blocks.slabs)):
            words[_HEADER + q], _ = sum_exact.linear(x, tag, place, threads)
        bounds = [sum_exact.extremes(x) for x in blocks.blocks]
        words[_LOW] = min(low for low, _ in bounds) & MASK
        words[_HIGH] = max(high for _, high in bounds)
    if local.kind == "bits":
        words[_LINEAR] = sum_exact.xor_word(blocks.result, tag, slab)
        for q, (x, place) in enumerate(zip(blocks.blocks, blocks.slabs)):
            words[_HEADER + q] = sum_exact.xor_word(x, tag, place)
    if local.kind == "one rank":
        words[_OWN] = fingerprint(blocks.blocks[0], tag, slab, threads)
    words[_RESULT] = fingerprint(blocks.result, tag, slab, threads)


def _fill_floats(local: _Local, words, threads: int, comm) -> None:
    blocks = local.blocks
    own, result = _regions(words[None], comm.size)
    pieces = 0
    for q, x in enumerate(blocks.blocks):
        is_own = q == blocks.own
        projected = sum_words.project_block(
            x, blocks.result if is_own else None, blocks.cuts[q], blocks.key, threads
        )
        pieces = max(pieces, projected.pieces)
        own[0, :, blocks.bins_of(q)] = projected.sums[:3]
        if is_own:
            result[0, :, : projected.sums.shape[1]] = projected.sums[3:]
            if not local.scattered:
                words[_RESULT] = sum_words.agreement_word(blocks.result, local.tag, projected)
    words[_PIECES] = pieces
    if any(sum_exact.looks_integral(x) for x in blocks.blocks):
        _fill_integral(local, words, threads)


def _fill_integral(local: _Local, words, threads) -> None:
    """Linear words too, where floats hold integers; every rank's must for them to count."""
    blocks = local.blocks
    n_bad = 0
    for q, (x, slab) in enumerate(zip(blocks.blocks, blocks.slabs)):
        words[_HEADER + q], bad = sum_exact.linear(x, local.tag, slab, threads)
        n_bad += bad
    slab = blocks.slabs[blocks.own]
    words[_LINEAR], words[_BAD] = sum_exact.linear(blocks.result, local.tag, slab, threads)
    words[_INTEGRAL] = n_bad == 0
    largest = max(sum_exact.largest_magnitude(x) for x in blocks.blocks)
    words[_LARGEST] = np.float64(largest).view(np.uint64)


def _regions(everyone: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of the words of ranks [n, W]: projections [n, 3, B] and results' [n, 2, B]."""
    bins = max(float_bound.most_bins(size), size)
    sums = everyone[:, _HEADER + size :].view(np.float64).reshape(len(everyone), 5, bins)
    return sums[:, :3], sums[:, 3:]


# What everybody decides


def _verdict(local, strength, missing=()) -> Verdict:
    established = Established.COMPUTED
    if not local.scattered:
        established |= Established.AGREED
        strength += ", agreement"
    return Verdict(
        holds=True, established=established, missing=tuple(missing), check=local.name,
        strength=strength,
    )  # fmt: skip


def _one_rank(comm, local, everyone) -> Verdict:
    expected, found = (int(everyone[0, i]) for i in (_OWN, _RESULT))
    if expected == found:
        return _verdict(local, "exact (one rank)")
    detail = "the result of one rank's reduction is not its contribution"
    return sum_report.failure(local, "exact", detail, rank=0, expected=expected, actual=found)


def _disagreement(local, everyone) -> Verdict | None:
    """The failure of an allreduce whose results are not the same on all ranks."""
    results = everyone[:, _RESULT]
    if local.scattered or not np.ptp(results):
        return None
    odd = minority(results)
    rank = odd[0] if len(odd) == 1 else None
    detail = f"the results of ranks {sum_report.listed(odd)} differ from the others'"
    return sum_report.failure(local, "agreement", detail, rank=rank)


def _holders(local, everyone) -> list[int]:
    """Ranks whose results are looked at: one of each kind of an allreduce's results."""
    if local.scattered:
        return list(range(len(everyone)))
    return sorted(np.unique(everyone[:, _RESULT], return_index=True)[1].tolist())


def _floats(comm, local, everyone) -> Verdict:
    own, results = _regions(everyone, comm.size)
    sizes = local.blocks.sizes
    own = own[:, :, : sizes.size]
    pieces = int(everyone[:, _PIECES].max())
    with np.errstate(all="ignore"):
        limit = float_bound.limits(own[:, 2], sizes, comm.size, local.dtype, pieces)
        failing, odd = {}, {}
        for q in _holders(local, everyone):
            bins = local.blocks.bins_of(local.held(q))
            there = results[q, :, : bins.stop - bins.start]
            wrong = ~(np.abs(float_bound.excess(own[:, :, bins], there)) <= limit[bins])
            unsure = ~np.isfinite(limit[bins]) | ~np.isfinite(there).all(axis=0)
            unsure |= ~np.isfinite(own[:, :, bins]).all(axis=(0, 1))
            failing[q] = np.flatnonzero(wrong.any(axis=0) & ~unsure)
            odd[q] = np.flatnonzero(unsure)
    left_out = {}
    for q, bins in odd.items():
        if bins.size:
            failure, left_out[q] = _not_finite(comm, local, q, bins)
            if failure is not None:
                return failure
    wrong = {q: bins for q, bins in failing.items() if bins.size}
    if wrong:
        return _too_far(comm, local, everyone, wrong, own, results, limit)
    disagreement = _disagreement(local, everyone)
    if disagreement is not None:
        return disagreement
    exact = _integral(comm, local, everyone)
    if exact is not None:
        return exact
    given = max((given for given, _ in left_out.values()), default=0)
    overflowed = max((over for _, over in left_out.values()), default=0)
    if local.scattered:
        given, overflowed = (sum(n) for n in zip((0, 0), *left_out.values()))
    missing = []
    if given:
        missing.append(
            f"{given} elements to which a contribution gave NaN or Inf are not covered by the "
            "bound (they came out as IEEE 754 says)"
        )
    if overflowed:
        missing.append(f"{overflowed} elements whose sum may have overflowed are not covered")
    largest = float(limit[np.isfinite(limit)].max(initial=0.0))
    return _verdict(
        local, f"bound (one wrong element is always seen if off by more than {2 * largest:.2g})",
        missing,
    )  # fmt: skip


def _ranges(local, q, bins) -> list[tuple[int, int]]:
    cuts = local.blocks.cuts[local.held(q)]
    return [(int(cuts[b]), int(cuts[b + 1])) for b in bins]


def _search(comm, local, q, ranges, skip=(), scale=False):
    floats = sum_search.Floats(
        local.blocks, local.held(q), q, local.dtype, np.asarray(skip, np.int64), scale
    )
    return floats, [(start, start, stop) for start, stop in ranges]


def _not_finite(comm, local, q, bins):
    """A failure among bins that hold numbers that are not finite, or (None, what is left out)."""
    ranges = _ranges(local, q, bins)
    sorted_out = sum_search.sort_out(
        comm, local.blocks, local.held(q), q, local.dtype, ranges
    )
    counts = (sorted_out.n_given, sorted_out.n_overflowed)
    if sorted_out.wrong:
        n = len(sorted_out.wrong)
        detail = f"{n} element{'s' * (n > 1)} are not finite as the contributions say"
        return sum_report.found(local, q, sorted_out.wrong, detail), counts
    scale = local.dtype == np.float64
    floats, ranges = _search(comm, local, q, ranges, sorted_out.skip, scale)
    own, result = floats.exchange(comm, ranges)
    failing = [ranges[i] for i in np.flatnonzero(floats.failing(own, result, ranges))]
    if not failing:
        return None, counts
    elements = floats.elements(comm, failing[: sum_search.MOST_RANGES])
    detail = "beside elements that are not finite, others are off by more than rounding explains"
    return sum_report.found(local, q, elements, detail), counts


def _too_far(comm, local, everyone, wrong, own, results, limit) -> Verdict:
    """The failure of a sum that lies further off than rounding can explain."""
    q = min(wrong)
    bins, at = wrong[q], local.blocks.bins_of(local.held(q))
    here = own[:, :, at][:, :, bins]
    there = results[q, :, : at.stop - at.start][:, bins]
    ranges = _ranges(local, q, bins)
    off = np.abs(float_bound.excess(here, there)).max(axis=0)
    worst = int(np.argmax(off / np.maximum(limit[at][bins], 1e-300)))
    detail = (
        f"{sum_report.rows(local, q, ranges)} of the sum are off by up to {off[worst]:.3g}, where "
        f"rounding explains {limit[at][bins][worst]:.3g}"
    )
    blamed = float_bound.blame(here, there, limit[at][bins])
    floats, ranges = _search(comm, local, q, ranges[: sum_search.MOST_RANGES])
    elements = floats.elements(comm, ranges)
    if blamed is not None:
        return sum_report.found(local, q, elements, f"{detail}; {blamed}", rank=blamed.rank)
    culprits = _wrong_ranks(local, everyone, wrong)
    rank = culprits[0] if len(culprits) == 1 else None
    if rank is None and not local.scattered and len(culprits) < comm.size:
        detail += f"; the results of ranks {sum_report.listed(culprits)} are wrong"
    return sum_report.found(local, q, elements, detail, rank=rank)


def _wrong_ranks(local, everyone, wrong) -> list[int]:
    """The ranks that hold a result that fails."""
    if local.scattered:
        return sorted(wrong)
    words = {int(everyone[q, _RESULT]) for q in wrong}
    return [rank for rank, word in enumerate(everyone[:, _RESULT]) if int(word) in words]


def _integral(comm, local, everyone) -> Verdict | None:
    """The verdict on floats that hold integers whose sums never round; None where they do not."""
    if not everyone[:, _INTEGRAL].all():
        return None
    largest = everyone[:, _LARGEST].copy().view(np.float64)
    if not sum_exact.never_rounds([float(n) for n in largest], local.dtype):
        return None
    bad = everyone[:, _BAD]
    if not bad.any():
        verdict = _by_words(comm, local, everyone, "floats that hold integers", MASK + 1)
        if verdict is not None:
            return verdict
        return _verdict(local, "exact (floats that hold integers; no sum rounds)")
    detail = "contributions are integers whose sums cannot round, but the result is none"
    rank = int(np.flatnonzero(bad)[0]) if np.count_nonzero(bad) == 1 else None
    return sum_report.failure(local, "exact", detail, rank=rank)


def _by_words(comm, local, everyone, what, modulus, own=None, results=None) -> Verdict | None:
    """A failure where linear words do not add up, modulo ``modulus``; None where they do."""
    own = everyone[:, _HEADER : _HEADER + comm.size] if own is None else own
    results = everyone[:, _LINEAR] if results is None else results
    wrong = [
        q for q in _holders(local, everyone)
        if sum_exact.differ(own[:, local.held(q)], int(results[q]), modulus)
    ]  # fmt: skip
    if not wrong:
        return None
    q = wrong[0]
    parts = own[:, local.held(q)]
    blamed = None
    if modulus > 1 << 32:  # shorter words would fit some rank by chance
        blamed = sum_exact.blame_words(parts, int(results[q]), modulus)
    detail = f"the sum of {what} is wrong"
    elements = ()
    if local.kind == "integer":
        elements = sum_search.integer_elements(
            comm, local.blocks, local.held(q), q, local.tag, modulus
        )
    expected = sum(int(p) for p in parts) % modulus
    more = {"expected": expected, "actual": int(results[q]) % modulus}
    if blamed is not None:
        detail += f"; {float_bound.Blame(*blamed)}"
        return sum_report.found(local, q, elements, detail, rank=blamed[0], **more)
    culprits = _wrong_ranks(local, everyone, wrong)
    rank = culprits[0] if len(culprits) == 1 else None
    return sum_report.found(local, q, elements, detail, rank=rank, **more)


def _integers(comm, local, everyone) -> Verdict:
    failure = _by_words(comm, local, everyone, "integers", MASK + 1)
    bits = 8 * local.dtype.itemsize
    if failure is not None and bits < 64:
        low = everyone[:, _LOW].view(np.int64).tolist()
        high = everyone[:, _HIGH].tolist()
        if not sum_exact.cannot_wrap(low, high, local.dtype):
            return _wrapping(comm, local, everyone, 1 << bits)
    if failure is not None:
        return failure
    return _disagreement(local, everyone) or _verdict(local, "exact (integers)")


def _wrapping(comm, local, everyone, modulus) -> Verdict:
    """Narrow integers whose sums may have wrapped: seventeen words modulo 2^bits."""
    blocks = local.blocks
    n = len(blocks.blocks)
    words = np.zeros((n + 1, sum_exact.N_WRAPPED), np.uint64)
    for q, (x, slab) in enumerate(zip(blocks.blocks, blocks.slabs)):
        words[q] = sum_exact.wrapped_words(x, local.tag, slab)
    words[n] = sum_exact.wrapped_words(blocks.result, local.tag, blocks.slabs[blocks.own])
    gathered = np.empty((comm.size, *words.shape), np.uint64)
    comm.Allgather(words, gathered)
    for j in range(sum_exact.N_WRAPPED):
        failure = _by_words(
            comm, local, everyone, "integers", modulus, gathered[:, :n, j], gathered[:, n, j]
        )
        if failure is not None:
            return failure
    strength = f"exact (integers, modulo 2^{modulus.bit_length() - 1})"
    return _disagreement(local, everyone) or _verdict(local, strength)


def _bits(comm, local, everyone) -> Verdict:
    own = everyone[:, _HEADER : _HEADER + comm.size]
    for q in _holders(local, everyone):
        expected = int(np.bitwise_xor.reduce(own[:, local.held(q)]))
        if expected != int(everyone[q, _LINEAR]):
            detail = "the XOR of the contributions is another"
            wrong = {q: None}
            culprits = _wrong_ranks(local, everyone, wrong)
            rank = culprits[0] if len(culprits) == 1 else None
            return sum_report.failure(
                local, "exact", detail, rank=rank, expected=expected,
                actual=int(everyone[q, _LINEAR]),
            )  # fmt: skip
    return _disagreement(local, everyone) or _verdict(local, "exact (XOR)")


def _extreme(comm, local, everyone) -> Verdict:
    """A maximum or minimum: nobody's is beyond it, and each element is somebody's."""
    disagreement = _disagreement(local, everyone)
    if disagreement is not None:
        return disagreement
    x, r = local.blocks.blocks[0].reshape(-1), local.blocks.result.reshape(-1)
    if local.dtype.kind not in "iu":
        x, r = sum_words.widened(x), sum_words.widened(r)
    beyond = x > r if local.op == "MAX" else x < r
    nan = x != x
    owned = np.packbits((x == r) | (nan & (r != r)))
    comm.Allreduce(MPI.IN_PLACE, owned, op=MPI.BOR)
    n = x.size
    nobody = np.flatnonzero(~np.unpackbits(owned, count=n).astype(bool))
    first = int(np.argmax(beyond)) if beyond.any() else -1
    own = np.array([np.count_nonzero(beyond), first, np.count_nonzero(nan)], np.int64)
    counts = np.empty((comm.size, 3), np.int64)
    comm.Allgather(own, counts)
    if counts[:, 0].any() or nobody.size:
        rank = int(np.argmax(counts[:, 0] > 0)) if counts[:, 0].any() else None
        place = int(counts[rank, 1]) if rank is not None else int(nobody[0])
        detail = (
            f"rank {rank} gave an element that lies beyond the {local.op}" if rank is not None
            else f"{nobody.size} elements are no rank's own"
        )  # fmt: skip
        detail += f"; the first at {list(local.blocks.index_of(0, place))}"
        return sum_report.failure(local, "exact", detail, rank=None)
    n_nan = int(counts[:, 2].sum())
    missing = [f"{n_nan} NaN were given, of which MPI does not say what becomes"] * (n_nan > 0)
    return _verdict(local, f"exact ({local.op})", missing)


_JUDGES = {
    "one rank": _one_rank,
    "float": _floats,
    "integer": _integers,
    "extreme": _extreme,
    "bits": _bits,
}
