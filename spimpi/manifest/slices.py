"""One tensor's slices, as ranks hold them, against its fingerprint in a manifest.

No MPI: whoever judges a tensor knows all places and words of its slices.
"""

from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from spimpi.manifest.format import TensorFacts
from spimpi.units import ranks_text

_COMBINATIONS = 4096  # of copies that differ, tried against the manifest


@dataclass(frozen=True)
class HeldSlice:
    """A slice of a tensor: who holds it, where it lies, its share of the fingerprint."""

    rank: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    word: int

    @property
    def place(self):
        return self.offset, self.shape


@dataclass(frozen=True)
class Judged:
    """What the slices of a tensor say.

    ``found``: the XOR that is compared with ``expected`` (None where the tensor is not covered);
    ``holders``: all ranks that hold some of it; ``wrong``: those that are known to be at fault;
    ``copied``: whether some slice was compared with a copy; ``refused``: why nothing can be said.
    """

    name: str
    holders: tuple[int, ...] = ()
    uncovered: int = 0
    copied: bool = False
    failed: bool = False
    expected: int | None = None
    found: int | None = None
    wrong: tuple[int, ...] = ()
    detail: str = ""
    refused: str = ""


def judge(name: str, facts: TensorFacts, slices: list[HeldSlice]) -> Judged:
    """Compare a tensor's slices, of all ranks, with each other and with its fingerprint.

    Equal places are replicas: they count once and must agree. Other overlaps are refused.
    """
    slices = [s for s in slices if 0 not in s.shape]
    holders = tuple(sorted({s.rank for s in slices}))
    copies: dict[tuple, list[HeldSlice]] = {}
    for one in sorted(slices, key=lambda s: s.rank):
        copies.setdefault(one.place, []).append(one)
    refused = _overlap(name, [group[0] for group in copies.values()])
    if refused:
        return Judged(name, holders, refused=refused)
    copied = any(len(group) > 1 for group in copies.values())
    uncovered = facts.n_elements - sum(prod(shape) for _, shape in copies)
    disputed = [group for group in copies.values() if len({s.word for s in group}) > 1]
    expected = None if uncovered else facts.fingerprint
    if disputed:
        rest = _xor(group[0].word for group in copies.values() if group not in disputed)
        found, wrong, detail = _odd_copies(rest, disputed, expected)
        return Judged(
            name, holders, uncovered, copied, True, expected, found, wrong, detail
        )
    if uncovered:
        return Judged(name, holders, uncovered, copied)
    found = _xor(group[0].word for group in copies.values())
    if found == expected:
        return Judged(name, holders, 0, copied, False, expected, found)
    wrong = holders if len(holders) == 1 else ()
    detail = "" if wrong else f"held by {ranks_text(holders)}"
    if copied:
        detail = "; ".join(filter(None, [detail, "all copies agree with each other"]))
    return Judged(name, holders, 0, copied, True, expected, found, wrong, detail)


def _overlap(name: str, slices: list[HeldSlice]) -> str:
    """Two slices that share elements without being the same, in words; "" where there are none."""
    if len(slices) < 2 or not slices[0].shape:
        return ""
    starts = np.array([s.offset for s in slices])
    stops = starts + np.array([s.shape for s in slices])
    for i in range(len(slices) - 1):
        meets = (starts[i] < stops[i + 1 :]) & (starts[i + 1 :] < stops[i])
        hits = np.flatnonzero(meets.all(axis=1))
        if hits.size:
            one, other = slices[i], slices[i + 1 + int(hits[0])]
            return (
                f"tensor {name}: {_told(one)} and {_told(other)} overlap but are not the same; "
                "give the part that both hold as a slice of its own, on both sides"
            )
    return ""


def _told(s: HeldSlice) -> str:
    block = ", ".join(f"{a}..{a + n}" for a, n in zip(s.offset, s.shape))
    return f"the slice [{block}] of rank {s.rank}"


def _odd_copies(rest: int, disputed, expected) -> tuple[int | None, tuple[int, ...], str]:
    """(XOR with the wrong copies, ranks that hold one, what is known), where the manifest tells.

    ``rest``: XOR of what is not disputed; ``disputed``: groups of copies that differ.
    """
    suspects = sorted({s.rank for group in disputed for s in group})
    unknown = f"copies on {ranks_text(suspects)} differ"
    if expected is None:
        return None, (), f"{unknown}, and the rest of the tensor is on no rank"
    first = rest ^ _xor(group[0].word for group in disputed)
    variants = [sorted({s.word for s in group}) for group in disputed]
    if prod(map(len, variants)) > _COMBINATIONS:
        return first, (), unknown
    right = [choice for choice in product(*variants) if rest ^ _xor(choice) == expected]
    if len(right) != 1:
        return first, (), f"{unknown}, and none fits the manifest"
    wrong = [
        [s for s in group if s.word != word] for group, word in zip(disputed, right[0])
    ]  # fmt: skip
    ranks = sorted({s.rank for group in wrong for s in group})
    told = f"the copy on {ranks_text(ranks)} differs from the manifest's, others fit"
    return rest ^ _xor(group[0].word for group in wrong), tuple(ranks), told


def _xor(words) -> int:
    total = 0
    for word in words:
        total ^= word
    return total
