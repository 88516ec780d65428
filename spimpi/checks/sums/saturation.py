"""Sums of narrow integers that their dtype has no room for, on an MPI that saturates.

The MPI standard leaves overflow open. Most libraries wrap; Open MPI adds int8, uint8, int16 and
uint16 with instructions that saturate, and what is left over at the end of a buffer without them.
So where a sum is not the wrapped one, its elements are added once more, as int64, and each is
judged alone.
"""

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from spimpi.checks.sums.search import MOST_RANGES, Element
from spimpi.checks.sums.words import flat
from spimpi.units import are

_PIECE = 1 << 17
WRONG, AT_LIMIT, UNEXPLAINED, OPEN = range(4)  # a rank's counts


@dataclass(frozen=True)
class Saturation:
    """What a result holds where it is not the wrapped sum: ``wrong``, by holder, and ``n`` elements
    that MPI leaves open. ``saturates``: whether these look like those of an MPI that saturates."""

    wrong: dict[int, list[Element]]
    n: int
    saturates: bool
    n_wrong: int

    def told(self, dtype) -> str:
        return (
            f"this MPI saturates: {are(self.n)} not covered, for whose sum {dtype} has no room: "
            "MPI leaves that open, and the result is not the wrapped sum"
        )


def look(comm, local, holders) -> Saturation:
    """Judge each element of the holders' results. Collective; the same on every rank."""
    own = np.zeros(4, np.int64)
    judged = []  # (first place, values, wrapped sums, codes) of pieces in which something differs
    for block, x in enumerate(local.blocks.blocks):
        for start in range(0, x.size, _PIECE):
            values = flat(x, start, min(start + _PIECE, x.size)).astype(np.int64)
            sums = np.stack([np.maximum(values, 0), np.minimum(values, 0)])
            comm.Allreduce(MPI.IN_PLACE, sums, op=MPI.SUM)
            if comm.rank in holders and local.held(comm.rank) == block:
                r = flat(local.blocks.result, start, start + len(values)).astype(np.int64)
                wrapped, codes = _judged(r, *sums, local.dtype)
                if codes.any():
                    judged.append((start, r, wrapped, codes))
    for *_, codes in judged:
        own += [np.count_nonzero(codes == 1 + kind) for kind in range(4)]
    counts = np.empty((comm.size, 4), np.int64)
    comm.Allgather(own, counts)
    n_wrong, n_limit, n_unexplained, n_open = counts.sum(axis=0).tolist()
    saturates = n_limit > 0 and n_limit >= n_unexplained
    # Two addends are added once: then there is nothing but wrapping and saturating. Of more, some
    # steps may do the one and some the other.
    fatal = [WRONG]
    if not saturates:
        fatal += [AT_LIMIT, UNEXPLAINED, OPEN]
    elif comm.size == 2:
        fatal += [UNEXPLAINED]
    mine = [
        Element(start + int(i), wrapped[i].astype(local.dtype), r[i].astype(local.dtype))
        for start, r, wrapped, codes in judged
        for i in np.flatnonzero(np.isin(codes, [1 + kind for kind in fatal]))[:MOST_RANGES]
    ]
    wrong = {q: found for q, found in enumerate(comm.allgather(mine[:MOST_RANGES])) if found}
    left = counts[:, [kind for kind in range(4) if kind not in fatal]].sum(axis=1)
    n = int(left.sum() if local.scattered else left.max())
    return Saturation(wrong, n, saturates, int(counts[:, fatal].sum()))


def _judged(r, up, down, dtype) -> tuple[np.ndarray, np.ndarray]:
    """(the wrapped sums, 0 where r is it, else 1 + one of the kinds above) of some elements.

    ``up``, ``down``: the sums of all positive and of all negative addends.
    """
    info = np.iinfo(dtype)
    total = up + down
    wrapped = total.astype(dtype).astype(np.int64)
    over, under = up > info.max, down < info.min
    # A sum that saturates above loses what goes beyond, and can then fall by ``down`` at most;
    # one that may saturate at both ends can come out as anything.
    low = np.where(over, np.minimum(total, info.max + down), np.maximum(total, info.min))
    high = np.where(under, np.maximum(total, info.min + up), np.minimum(total, info.max))
    low, high = np.where(under & over, info.min, low), np.where(under & over, info.max, high)
    explained = (low <= r) & (r <= high)
    at_limit = (over & (r == info.max)) | (under & (r == info.min))
    kinds = np.where(at_limit, AT_LIMIT, np.where(explained, OPEN, UNEXPLAINED))
    return wrapped, np.where(r == wrapped, 0, 1 + np.where(over | under, kinds, WRONG))
