"""Results that several ranks put together, and replicas that should be equal.

Both take one reduction of a record (reduction.RECORD), and a second, small exchange only where
they fail, to name the rank. The run's own checks; those of the library are made by check.py, for
arrays of anybody's.
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


def compare_assembled(records, comm, share, result) -> Comparison:
    """A result put together from owners' parts: XOR of their shares == everybody's result.

    ``records`` is a RecordReduction; share and result are uint64 fingerprints of what this rank
    contributed and of all that it got. Collective over ``comm``.
    """
    own = empty_records(1)
    own["xor"], own["every"], own["none"] = share, result, ~np.uint64(result)
    return judge(comm, records.merge(comm, own)[0], share, result, lambda: 0)


def judge(comm, merged, share, result, absent) -> Comparison:
    """What a merged record says of one comparison; collective where it failed.

    The XOR of all shares must be everybody's result. share may be None: then all results must only
    be equal. absent(), asked for on a failure alone, is the fingerprint of what stands in the
    result where this rank's contribution is missing.
    """
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
