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


def compare_assembled(records, comm, share, result, absent=lambda: 0) -> Comparison:
    """A result put together from owners' parts: XOR of their shares == everybody's result.

    share: fingerprint (uint64) of what this rank contributed; result: of what it now holds;
    absent(): of what stands in the result where the contribution is missing, asked for on a
    failure alone. ``records`` is a RecordReduction. Collective over ``comm``.
    """
    own = empty_records(1)
    own["xor"], own["every"], own["none"] = share, result, ~result
    merged = records.merge(comm, own)[0]
    wrong = merged["every"] != ~merged["none"] or merged["xor"] != merged["every"]
    if not wrong:
        return Comparison(False, merged["xor"])
    words = _everyone(comm, np.uint64(share) ^ np.uint64(absent()), result)
    # The contributions tell what is right, so that of two ranks the wrong one is known too.
    odd = [int(rank) for rank in np.flatnonzero(words[:, 1] != merged["xor"])]
    if len(odd) == comm.size:
        # All agree on a wrong result: a contribution that is missing from it is what differs.
        difference = merged["xor"] ^ words[0, 1]
        odd = [int(rank) for rank in np.flatnonzero(words[:, 0] == difference)]
    return Comparison(True, merged["xor"], odd[0] if len(odd) == 1 else -1)


def compare_replicas(records, comm, word) -> Comparison:
    """All ranks hold the same bits: one AND of (f, ~f). Collective over ``comm``."""
    own = empty_records(1)
    own["every"], own["none"] = word, ~word
    merged = records.merge(comm, own)[0]
    if merged["every"] == ~merged["none"]:
        return Comparison(False, merged["every"])
    odd = minority(_everyone(comm, word, word)[:, 1])
    return Comparison(True, merged["every"], odd[0] if len(odd) == 1 else -1)


def _everyone(comm, share, result) -> np.ndarray:
    words = np.empty((comm.size, 2), np.uint64)
    comm.Allgather(np.array([share, result], np.uint64), words)
    return words
