"""What a difference between two runs can be: rounding in another order, or corruption.

docs/trace-diff.md has the derivation, and says what is claimed.
"""

from dataclasses import dataclass
from math import inf, isnan, sqrt

import numpy as np

from spimpi.arithmetic import EXACT, FLOAT32_BLAS, exact_bits
from spimpi.distance import CERTAIN

CANCELLATION = 10.0  # of a matmul's sums, against that of independent numbers
JUMP = 100.0  # times all relative differences before it: evidence of corruption
UNIT = 2.0**-24  # of float32
# The inner size of the matmul that makes a tensor is the width of another.
MADE_FROM = {"qkv": "hidden", "resid": "attn", "hidden": "ffn", "logits": "hidden"}


@dataclass(frozen=True)
class Judgement:
    """What the first difference is: ``verdict`` "same bits", "reordered rounding", "different", or
    "" where none can be claimed; ``limit``: the largest relative difference that rounding
    explains, None where none is known; ``reason`` in words."""

    verdict: str
    relative: float | None
    error: float | None
    limit: float | None
    reason: str

    def __str__(self):
        if self.verdict == "same bits":
            return self.verdict
        if self.relative is None:
            return self.verdict or "of unknown size"
        size = f"relative {self.relative:.1g} ± {self.error:.1g}"
        if self.relative == inf:
            size = "NaN or Inf in one of them"
        return f"{self.verdict} ({size})" if self.verdict else f"{size}, no limit is known"


def judge(
    name: str, relative: float, error: float, a: dict, b: dict, widths: dict, changed=(),
    weight: bool = False,
) -> Judgement:  # fmt: skip
    """What a difference in ``name`` is, where everything before it has equal bits.

    ``relative`` and its ``error``, NaN where there are no sketches; ``a``, ``b``: the runs'
    attributes; ``widths``: the last axis of each tensor; ``changed``: the runs ("A", "B") whose
    check at rest found it changed; ``weight``: it is one of the model's, as it was read.
    """
    known = None if isnan(relative) else relative
    bar = None if isnan(error) else error
    if changed:
        reason = f"it changed in {' and '.join(changed)}'s memory after it was made"
        return Judgement("different", known, bar, 0.0, reason)
    if weight:
        reason = "weights are as they were read: nothing rounds"
        return Judgement("different", known, bar, 0.0, reason)
    ways = a.get("arithmetic"), b.get("arithmetic")
    if None in ways:
        return Judgement("", known, bar, None, "a program's arithmetic is not known")
    if ways[0] == ways[1] == EXACT:
        reason = "both runs compute in exact-1, whose bits no order of the sums changes"
        return Judgement("different", known, bar, 0.0, reason)
    if name == "embed":
        reason = "rows are copied from the embedding: nothing rounds"
        return Judgement("different", known, bar, 0.0, reason)
    if known is None:
        reason = "there are no sketches in both traces (verify --sketch), which tell the size"
        return Judgement("", None, None, None, reason)
    if known == inf:
        return Judgement("different", known, bar, None, "rounding makes no NaN or Inf")
    errors = [_error(way, widths.get(MADE_FROM.get(name))) for way in ways]
    if None in errors:
        reason = f"no limit is known for {name}, or for {ways[0]} against {ways[1]}"
        return Judgement("", known, bar, None, reason)
    inner = widths[MADE_FROM[name]]
    limit = CERTAIN * CANCELLATION * sqrt(inner) * sum(errors)
    verdict = "reordered rounding" if known <= limit else "different"
    reason = (
        f"a matmul of inner size {inner} rounds by up to {limit:.1g}, where its sums cancel at most "
        f"{CANCELLATION:.0f} times as much as those of independent numbers"
    )
    return Judgement(verdict, known, bar, limit, reason)


def _error(arithmetic: str, inner: int | None) -> float | None:
    """The relative error of an addend, or of what it is made of, in an arithmetic."""
    if inner is None or inner < 1:
        return None
    if arithmetic == FLOAT32_BLAS:
        return UNIT
    if arithmetic == EXACT:
        return sqrt(2) * 2.0 ** -exact_bits(inner) + UNIT
    return None


def first_jump(relative: np.ndarray) -> int:
    """The first position whose value is more than JUMP times all before it, -1: none.

    NaN and 0 (not known, equal) are left out.
    """
    known = np.flatnonzero(relative > 0)
    if known.size < 2:
        return -1
    values = relative[known]
    before = np.maximum.accumulate(values)[:-1]
    jumps = np.flatnonzero(values[1:] > JUMP * before)
    return int(known[1:][jumps[0]]) if jumps.size else -1
