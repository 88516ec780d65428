"""Whether all ranks hold the same result of a sum, and which results there are to look at."""

import numpy as np

from spimpi.checks.sums import report as sum_report, words as sum_words
from spimpi.checks.sums.call import RESULT
from spimpi.checks.verdict import NO_ELEMENTS, Verdict
from spimpi.fingerprint import fingerprint
from spimpi.reduction import minority
from spimpi.trace.schema import Established

ONE_RANK = "on one rank nothing is summed: the result is the contribution, which was compared alone"


def passed(local, everyone, strength, missing=(), n_left_out=0) -> Verdict:
    """The verdict on a sum in which nothing is wrong.

    It establishes COMPUTED of what was covered, if that is anything (``n_left_out`` elements were
    not), and AGREED of results that all ranks hold. Of no elements, and on one rank, neither.
    """
    established, missing = Established(0), tuple(missing)
    if not local.n_elements:
        missing = (NO_ELEMENTS,)
    elif len(everyone) == 1:
        missing = (ONE_RANK,)
    else:
        covered = n_left_out < local.n_elements
        if covered:
            established |= Established.COMPUTED
        if not local.scattered:
            strength += ", agreement"
            if covered or not np.ptp(everyone[:, RESULT]):
                established |= Established.AGREED
    return Verdict(
        holds=True, established=established, missing=missing, check=local.name, strength=strength,
    )  # fmt: skip


def disagreement_of(comm, local, everyone, unsure=None) -> Verdict | None:
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


def holders_of(local, everyone) -> list[int]:
    """Ranks whose results are looked at: one of each kind of an allreduce's results."""
    if local.scattered:
        return list(range(len(everyone)))
    results = everyone[:, RESULT]
    if (results == results[0]).all():
        return [0]
    return sorted(np.unique(results, return_index=True)[1].tolist())


def wrong_ranks(local, everyone, wrong) -> list[int]:
    """The ranks that hold a result that fails."""
    if local.scattered:
        return sorted(wrong)
    words = {int(everyone[q, RESULT]) for q in wrong}
    return [rank for rank, word in enumerate(everyone[:, RESULT]) if int(word) in words]
