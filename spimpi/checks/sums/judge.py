"""What all ranks decide of a sum from everybody's words: the verdicts of docs/sums.md.

Every function takes the communicator, the rank's own SumCall and the gathered words [P, W], and is
collective: what is exchanged further depends on these words alone, so that all ranks do the same.
"""

from math import isfinite

import numpy as np
from mpi4py import MPI

from spimpi.checks.sums import (
    float_bound,
    exact as sum_exact,
    report as sum_report,
    search as sum_search,
    words as sum_words,
)
from spimpi.checks.sums.call import (
    BAD, HEADER, HIGH, INTEGRAL, LARGEST, LINEAR, LOW, OWN, PIECES, RESULT, regions,
)  # fmt: skip
from spimpi.checks.verdict import Verdict
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import MASK
from spimpi.reduction import minority
from spimpi.trace.schema import Established


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
    expected, found = (int(everyone[0, i]) for i in (OWN, RESULT))
    if expected == found:
        return _verdict(local, "exact (one rank)")
    detail = "the result of one rank's reduction is not its contribution"
    return sum_report.failure(local, "exact", detail, rank=0, expected=expected, actual=found)


def _disagreement(comm, local, everyone, unsure=None) -> Verdict | None:
    """The failure of an allreduce whose results are not the same on all ranks.

    Of floats that differ, what MPI may give otherwise on each rank is left out (docs/sums.md).
    ``unsure``: elements of a maximum or minimum of which nothing can be asked.
    """
    results = everyone[:, RESULT]
    if local.scattered or not np.ptp(results):
        return None
    if local.dtype.kind not in "iub":
        kept = sum_words.comparable(local.blocks.result, local.op, unsure)
        own = np.array([fingerprint(kept, local.tag)], np.uint64)
        results = np.empty(comm.size, np.uint64)
        comm.Allgather(own, results)
    odd = minority(results)
    if not odd:
        return None
    rank = odd[0] if len(odd) == 1 else None
    detail = f"the results of ranks {sum_report.listed(odd)} differ from the others'"
    return sum_report.failure(local, "agreement", detail, rank=rank)


def _holders(local, everyone) -> list[int]:
    """Ranks whose results are looked at: one of each kind of an allreduce's results."""
    if local.scattered:
        return list(range(len(everyone)))
    results = everyone[:, RESULT]
    if (results == results[0]).all():
        return [0]
    return sorted(np.unique(results, return_index=True)[1].tolist())


def _floats(comm, local, everyone) -> Verdict:
    own, results = regions(everyone, comm.size)
    sizes = local.blocks.sizes
    own = own[:, :, : sizes.size]
    pieces = int(everyone[:, PIECES].max())
    with np.errstate(all="ignore"):
        limit = float_bound.limits(own[:, -1], sizes, comm.size, local.dtype, pieces)
        failing, odd = {}, {}
        holders = _holders(local, everyone)
        largest = float(limit.max(initial=0.0))
        for q in holders:
            bins = local.blocks.bins_of(local.held(q))
            there = results[q, :, : bins.stop - bins.start]
            right = np.abs(float_bound.excess(own[:, :, bins], there)) <= limit[bins]
            # Caches are cold after a large collective, so that every call costs: a bin within a
            # finite limit is neither wrong nor unsure.
            if isfinite(largest) and right.all():
                continue
            wrong = ~right
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
    disagreement = _disagreement(comm, local, everyone) if len(holders) > 1 else None
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
    if not isfinite(largest):
        largest = float(limit.max(initial=0.0, where=np.isfinite(limit)))
    return _verdict(
        local, f"bound (one wrong element is always seen if off by more than {4 * largest:.2g})",
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
        f"the sum is wrong in {sum_report.rows(local, q, ranges)}: its check is off by "
        f"{off[worst]:.3g}, where rounding explains {limit[at][bins][worst]:.3g}"
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
    words = {int(everyone[q, RESULT]) for q in wrong}
    return [rank for rank, word in enumerate(everyone[:, RESULT]) if int(word) in words]


def _integral(comm, local, everyone) -> Verdict | None:
    """The verdict on floats that hold integers whose sums never round; None where they do not."""
    if not everyone[:, INTEGRAL].all():
        return None
    largest = everyone[:, LARGEST].copy().view(np.float64)
    if not sum_exact.never_rounds([float(n) for n in largest], local.dtype):
        return None
    bad = everyone[:, BAD]
    if not bad.any():
        verdict = _by_words(comm, local, everyone, "floats that hold integers", MASK + 1)
        if verdict is not None:
            return verdict
        return _verdict(local, "exact (floats that hold integers; no sum rounds)")
    detail = "contributions are integers whose sums cannot round, but the result is none"
    rank = int(np.flatnonzero(bad)[0]) if np.count_nonzero(bad) == 1 else None
    return sum_report.failure(local, "exact", detail, rank=rank)


def _linear_words(comm, everyone) -> tuple:
    """Everybody's linear fingerprints: of the contributions, and of the results."""
    return everyone[:, HEADER : HEADER + comm.size], everyone[:, LINEAR]


def _differing(local, everyone, modulus, own, results) -> list[int]:
    """The ranks at whose results the words do not add up."""
    return [
        q for q in _holders(local, everyone)
        if sum_exact.differ(own[:, local.held(q)], int(results[q]), modulus)
    ]  # fmt: skip


def _by_words(comm, local, everyone, what, modulus, own=None, results=None) -> Verdict | None:
    """A failure where linear words do not add up, modulo ``modulus``; None where they do."""
    if own is None:
        own, results = _linear_words(comm, everyone)
    wrong = _differing(local, everyone, modulus, own, results)
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
    bits = 8 * local.dtype.itemsize
    if bits < 64 and _differing(local, everyone, MASK + 1, *_linear_words(comm, everyone)):
        low = everyone[:, LOW].view(np.int64).tolist()
        high = everyone[:, HIGH].tolist()
        if not sum_exact.cannot_wrap(low, high, local.dtype):
            return _wrapping(comm, local, everyone, 1 << bits)
    failure = _by_words(comm, local, everyone, "integers", MASK + 1)
    if failure is not None:
        return failure
    return _disagreement(comm, local, everyone) or _verdict(local, "exact (integers)")


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
    return _disagreement(comm, local, everyone) or _verdict(local, strength)


def _bits(comm, local, everyone) -> Verdict:
    own = everyone[:, HEADER : HEADER + comm.size]
    for q in _holders(local, everyone):
        expected = int(np.bitwise_xor.reduce(own[:, local.held(q)]))
        if expected != int(everyone[q, LINEAR]):
            detail = "the XOR of the contributions is another"
            wrong = {q: None}
            culprits = _wrong_ranks(local, everyone, wrong)
            rank = culprits[0] if len(culprits) == 1 else None
            return sum_report.failure(
                local, "exact", detail, rank=rank, expected=expected,
                actual=int(everyone[q, LINEAR]),
            )  # fmt: skip
    return _disagreement(comm, local, everyone) or _verdict(local, "exact (XOR)")


def _extreme(comm, local, everyone) -> Verdict:
    """A maximum or minimum: nobody's is beyond it, and each element is somebody's."""
    x, r = local.blocks.blocks[0].reshape(-1), local.blocks.result.reshape(-1)
    if local.dtype.kind not in "iu":
        x, r = sum_words.widened(x), sum_words.widened(r)
    beyond = x > r if local.op == "MAX" else x < r
    n, is_float = x.size, local.dtype.kind not in "iu"
    maps = np.packbits(np.concatenate([x == r, x != x]) if is_float else x == r)
    comm.Allreduce(MPI.IN_PLACE, maps, op=MPI.BOR)
    owned = np.unpackbits(maps, count=n + n * is_float).astype(bool)
    n_nan = 0
    if is_float:
        # What becomes of an element with a NaN depends on the order: nothing can be asked of it.
        owned, nan = owned[:n] | owned[n:], owned[n:]
        beyond &= ~nan
        n_nan = int(np.count_nonzero(nan))
    disagreement = _disagreement(comm, local, everyone, nan if is_float else None)
    if disagreement is not None:
        return disagreement
    nobody = np.flatnonzero(~owned)
    first = int(np.argmax(beyond)) if beyond.any() else -1
    own = np.array([np.count_nonzero(beyond), first], np.int64)
    counts = np.empty((comm.size, 2), np.int64)
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
    missing = [
        f"{n_nan} elements to which a rank gave NaN are not covered (MPI does not say what becomes "
        "of them)"
    ] * (n_nan > 0)
    return _verdict(local, f"exact ({local.op})", missing)


JUDGES = {
    "one rank": _one_rank,
    "float": _floats,
    "integer": _integers,
    "extreme": _extreme,
    "bits": _bits,
}
