"""The verdict on a sum of floats by docs/sums.md's bound.

``floats`` takes the communicator, the rank's own SumCall and the gathered words [P, W], and is
collective: what is exchanged further depends on these words alone, so that all ranks do the same.
"""

from dataclasses import dataclass

import numpy as np

from spimpi.checks.failure import used_again
from spimpi.checks.sums import float_bound, report as sum_report, search as sum_search
from spimpi.checks.sums.agreement import (
    can_compare, disagreement_of, holders_of, passed, wrong_ranks,
)  # fmt: skip
from spimpi.checks.sums.call import HEADER, INTEGRAL, PIECES, RESULT, regions
from spimpi.checks.sums.judge_exact import integral
from spimpi.checks.verdict import Verdict
from spimpi.fingerprint import projections
from spimpi.units import are, counted, listed, ranks_text, verb


def _within(comm, local, everyone) -> float:
    """The largest limit where an allreduce's results agree and lie within theirs: what most do.

    Caches are cold after a large collective, so that every call costs. -1 where it is not as simple.
    """
    head = everyone[:, : PIECES + 1].tolist()
    first = head[0]
    for one in head:
        if one[RESULT] != first[RESULT] or one[PIECES] != first[PIECES]:
            return -1.0
    if local.scattered or all(one[INTEGRAL] for one in head):
        return -1.0
    layout = local.blocks.layout
    factors = float_bound.factors(layout.longest, comm.size, local.dtype, first[PIECES])
    at = HEADER + comm.size
    words = np.ascontiguousarray(everyone).view(np.float64)  # of a batch they are a part
    stride = (everyone.shape[1] - at) // 3
    return projections.largest_limit(words, at, stride, layout.sizes, *factors)


def floats(comm, local, everyone) -> Verdict:
    """The verdict on a sum of floats."""
    largest = _within(comm, local, everyone)
    if largest < 0:
        return _looked_into(comm, local, everyone)
    return passed(local, everyone, _strength(largest))


def _strength(largest) -> str:
    return f"bound (one wrong element is always seen if off by more than {4 * largest:.2g})"


@dataclass
class _LeftOut:
    """Elements of which the bound says nothing: how many, and why, in numbers."""

    n: int = 0
    n_given: int = 0
    givers: tuple[int, ...] = ()
    n_overflowed: int = 0
    reused: tuple[int, ...] = ()  # ranks whose arrays could not be read again for them

    def plus(self, other, scattered) -> "_LeftOut":
        """Of two holders' results: shards add up, replicas hold the same."""
        join = sum if scattered else max
        numbers = (
            join((getattr(self, name), getattr(other, name)))
            for name in ("n", "n_given", "n_overflowed")
        )
        n, n_given, n_overflowed = numbers
        givers = tuple(sorted({*self.givers, *other.givers}))
        return _LeftOut(n, n_given, givers, n_overflowed, other.reused)

    def told(self) -> list[str]:
        if self.reused:
            return [
                f"{counted(self.n)} in rows with NaN or Inf {verb(self.n)} not covered: "
                f"{used_again(self.reused)}"
            ]
        said = []
        if self.n_given:
            said.append(
                f"{counted(self.n_given)} to which {ranks_text(self.givers)} gave NaN or Inf "
                f"{verb(self.n_given)} not covered by the bound (the result is as IEEE 754 says)"
            )
        if self.n_overflowed:
            said.append(
                f"{counted(self.n_overflowed)} whose sum may have overflowed "
                f"{verb(self.n_overflowed)} not covered"
            )
        return said


def _looked_into(comm, local, everyone) -> Verdict:
    own, results = regions(everyone, comm.size)
    sizes = local.blocks.layout.sizes
    own = own[:, :, : sizes.size]
    pieces = int(everyone[:, PIECES].max())
    with np.errstate(all="ignore"):
        limit = float_bound.limits(own[:, -1], sizes, comm.size, local.dtype, pieces)
        failing, odd = {}, {}
        holders = holders_of(local, everyone)
        for q in holders:
            bins = local.blocks.bins_of(local.held(q))
            there = results[q, :, : bins.stop - bins.start]
            wrong = ~(np.abs(float_bound.excess(own[:, :, bins], there)) <= limit[bins])
            unsure = ~np.isfinite(limit[bins]) | ~np.isfinite(there).all(axis=0)
            unsure |= ~np.isfinite(own[:, :, bins]).all(axis=(0, 1))
            failing[q] = np.flatnonzero(wrong.any(axis=0) & ~unsure)
            odd[q] = np.flatnonzero(unsure)
    left_out = _LeftOut()
    for q, bins in odd.items():
        if bins.size:
            failure, more = _not_finite(comm, local, q, bins)
            if failure is not None:
                return failure
            left_out = left_out.plus(more, local.scattered)
    wrong = {q: bins for q, bins in failing.items() if bins.size}
    if wrong:
        return _too_far(comm, local, everyone, wrong, own, results, limit)
    compared = local.scattered or can_compare(comm, local, everyone, np.isfinite(results).all())
    if compared:
        disagreement = disagreement_of(comm, local, everyone)
        if disagreement is not None:
            return disagreement
    exact = integral(comm, local, everyone)
    if exact is not None:
        return exact
    largest = float(limit.max(initial=0.0, where=np.isfinite(limit)))
    missing = left_out.told()
    if not compared:
        missing.append(
            "whether the ranks agree is not known: their results differ in bits, perhaps of NaN "
            f"alone, and {used_again(local.reused(comm))}"
        )
    return passed(local, everyone, _strength(largest), missing, left_out.n, compared)


def _ranges(local, q, bins) -> list[tuple[int, int]]:
    cuts = local.blocks.layout.cuts[local.held(q)]
    return [(int(cuts[b]), int(cuts[b + 1])) for b in bins]


def _search(comm, local, q, ranges, skip=(), scale=False):
    floats = sum_search.Floats(
        local.blocks, local.held(q), q, local.dtype, np.asarray(skip, np.int64), scale
    )
    return floats, [(start, start, stop) for start, stop in ranges]


def _not_finite(comm, local, q, bins):
    """A failure among bins that hold numbers that are not finite, or (None, what is left out)."""
    ranges = _ranges(local, q, bins)
    reused = local.reused(comm)
    if reused:
        return None, _LeftOut(n=sum(stop - start for start, stop in ranges), reused=reused)
    sorted_out = sum_search.sort_out(
        comm, local.blocks, local.held(q), q, local.dtype, ranges
    )
    left_out = _LeftOut(
        len(sorted_out.skip), sorted_out.n_given, sorted_out.givers, sorted_out.n_overflowed
    )
    if sorted_out.wrong:
        detail = f"{are(len(sorted_out.wrong))} not finite as the contributions say"
        if sorted_out.givers:
            detail += f" (NaN or Inf were given by {ranks_text(sorted_out.givers)})"
        return sum_report.found(local, q, sorted_out.wrong, detail), left_out
    scale = local.dtype == np.float64
    floats, ranges = _search(comm, local, q, ranges, sorted_out.skip, scale)
    own, result = floats.exchange(comm, ranges)
    failing = [ranges[i] for i in np.flatnonzero(floats.failing(own, result, ranges))]
    if not failing:
        return None, left_out
    elements = floats.elements(comm, failing[: sum_search.MOST_RANGES])
    detail = "beside elements that are not finite, others are off by more than rounding explains"
    return sum_report.found(local, q, elements, detail), left_out


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
    elements = ()
    if reused := local.reused(comm):
        detail += f"; {used_again(reused)}: which elements are wrong is not known"
    else:
        floats, ranges = _search(comm, local, q, ranges[: sum_search.MOST_RANGES])
        elements = floats.elements(comm, ranges)
    if blamed is not None:
        return sum_report.found(local, q, elements, f"{detail}; {blamed}", rank=blamed.rank)
    culprits = wrong_ranks(local, everyone, wrong)
    rank = culprits[0] if len(culprits) == 1 else None
    if rank is None and not local.scattered and len(culprits) < comm.size:
        detail += f"; the results of ranks {listed(culprits)} are wrong"
    return sum_report.found(local, q, elements, detail, rank=rank)
