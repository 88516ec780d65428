"""Results that several ranks put together, and replicas that should be equal.

Both take one reduction of a record (reduction.RECORD), and a second, small exchange only where
they fail, to name the rank.
"""

from dataclasses import dataclass

import numpy as np

from spimpi.reduction import empty_records, minority


@dataclass(frozen=True)
class Comparison:
    """What a group of ranks found: the word that was expected, and the rank of the group that
    differs, -1 where none is singled out."""

    wrong: bool
    expected: np.uint64
    rank: int = -1


class Comparisons:
    """Several comparisons over one group of ranks, in one reduction under way.

    Each is (share, result, absent): the XOR of all shares must be everybody's result. share (a
    uint64 fingerprint of what this rank contributed) may be None: then all results must only be
    equal. absent(), asked for on a failure alone, is the fingerprint of what stands in the result
    where this rank's contribution is missing. Starting and finishing are collective over ``comm``.
    """

    def __init__(self, records, comm, pairs):
        self.comm, self.pairs = comm, pairs
        self._own = empty_records(len(pairs))
        for record, (share, result, _) in zip(self._own, pairs):
            record["xor"] = 0 if share is None else share
            record["every"], record["none"] = result, ~np.uint64(result)
        self._merged = np.empty_like(self._own)
        self._request = records.start(comm, self._own, self._merged)

    def finish(self) -> list[Comparison]:
        """What was found, one Comparison for each pair."""
        self._request.Wait()
        return [
            judge(self.comm, merged, *pair) for merged, pair in zip(self._merged, self.pairs)
        ]


def judge(comm, merged, share, result, absent) -> Comparison:
    """What a merged record says of one comparison (see Comparisons). Collective where it failed:
    all ranks see the same record."""
    differ = merged["every"] != ~merged["none"]
    expected = merged["every"] if share is None else merged["xor"]
    if not differ and expected == merged["every"]:
        return Comparison(False, expected)
    words = np.empty((comm.size, 2), np.uint64)
    without = result if share is None else np.uint64(share) ^ np.uint64(absent())
    comm.Allgather(np.array([without, result], np.uint64), words)
    if share is None:
        odd = minority(words[:, 1])
        return Comparison(True, expected, odd[0] if len(odd) == 1 else -1)
    # The contributions tell what is right, so that of two ranks the wrong one is known too.
    odd = np.flatnonzero(words[:, 1] != expected)
    if odd.size == comm.size:
        # All agree on a wrong result: a contribution that is missing from it is what differs.
        odd = np.flatnonzero(words[:, 0] == expected ^ words[0, 1])
    return Comparison(True, expected, int(odd[0]) if odd.size == 1 else -1)


def nothing() -> int:
    """The share of a contribution that leaves nothing behind where it is missing."""
    return 0


def compare_assembled(records, comm, share, result, absent=nothing) -> Comparison:
    """A result put together from owners' parts: XOR of their shares == everybody's result.

    ``records`` is a RecordReduction; the words are as for Comparisons. Collective over ``comm``.
    """
    return Comparisons(records, comm, [(share, result, absent)]).finish()[0]
