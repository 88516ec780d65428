"""Whether all ranks hold the same result of a sum, and which results there are to look at."""

import numpy as np

from spimpi.checks.failure import used_again
from spimpi.checks.sums import report as sum_report, words as sum_words
from spimpi.checks.sums.call import RESULT
from spimpi.checks.verdict import NO_ELEMENTS, Verdict
from spimpi.fingerprint import fingerprint
from spimpi.reduction import minority
from spimpi.trace.schema import Established
from spimpi.units import ranks_text

ONE_RANK = "on one rank nothing is summed: the result is the contribution, which was compared alone"


def passed(local, everyone, strength, missing=(), n_left_out=0, compared=False) -> Verdict:
    """The verdict on a sum in which nothing is wrong.

    It establishes COMPUTED of what was covered, if that is anything (``n_left_out`` elements were
    not), and AGREED of results that all ranks hold: whose words are the same, or which were
    ``compared`` in what was covered (``disagreement_of``). Of no elements, or on one rank, neither.
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
        if not local.scattered and (covered and compared or not np.ptp(everyone[:, RESULT])):
            strength += ", agreement"
            established |= Established.AGREED
    return Verdict(
        holds=True, established=established, missing=missing, check=local.name, strength=strength,
    )  # fmt: skip


def passed_if_agreed(comm, local, everyone, strength, missing=(), n_left_out=0) -> Verdict:
    """``passed`` of a sum whose results, looked at one by one, are right; or how they disagree."""
    failure = disagreement_of(comm, local, everyone)
    if failure is not None:
        return failure
    return passed(local, everyone, strength, missing, n_left_out)


def can_compare(comm, local, everyone, results_finite: bool) -> bool:
    """Whether ``disagreement_of`` can tell of floats: not where words differ, the arrays have
    changed since, and results hold NaN, which MPI may give otherwise on each rank. Collective."""
    return results_finite or not np.ptp(everyone[:, RESULT]) or not local.reused(comm)


def disagreement_of(comm, local, everyone, unsure=None) -> Verdict | None:
    """The failure of an allreduce whose results are not the same on all ranks.

    Of floats that differ, what MPI may give otherwise on each rank is left out (docs/sums.md). They
    are read for it; where they have changed since their words were made, the words alone tell.
    ``unsure``: elements of a maximum or minimum of which nothing can be asked.
    """
    results = everyone[:, RESULT]
    if local.scattered or not np.ptp(results):
        return None
    reused = ()
    if local.dtype.kind not in "iub" and not (reused := local.reused(comm)):
        kept = sum_words.comparable(local.blocks.result, local.op, unsure)
        own = np.array([fingerprint(kept, local.tag)], np.uint64)
        results = np.empty(comm.size, np.uint64)
        comm.Allgather(own, results)
    odd = minority(results)
    if not odd:
        return None
    rank = odd[0] if len(odd) == 1 else None
    if len(odd) == comm.size:
        detail = f"the results of {ranks_text(odd)} differ, and no majority tells which is right"
    elif rank is not None:
        detail = f"the result of rank {rank} differs from the others'"
    else:
        detail = f"the results of {ranks_text(odd)} differ from the others'"
    if reused:
        detail += f"; {used_again(reused)}: by the words made before"
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
