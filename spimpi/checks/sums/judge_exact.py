"""The verdicts on sums whose result is determined: integers, XOR, MAX and MIN, one rank (docs/sums.md).

Every function takes the communicator, the rank's own SumCall and the gathered words [P, W], and is
collective: what is exchanged further depends on these words alone, so that all ranks do the same.
"""

from dataclasses import replace

import numpy as np
from mpi4py import MPI

from spimpi.checks.failure import used_again
from spimpi.checks.sums import (
    float_bound,
    exact as sum_exact,
    report as sum_report,
    saturation,
    search as sum_search,
    words as sum_words,
)
from spimpi.checks.sums.agreement import (
    disagreement_of, holders_of, passed, passed_if_agreed, wrong_ranks,
)  # fmt: skip
from spimpi.checks.sums.call import BAD, HEADER, HIGH, INTEGRAL, LARGEST, LINEAR, LOW, OWN, RESULT
from spimpi.checks.verdict import Verdict
from spimpi.fingerprint.tag import MASK
from spimpi.units import are, counted, ranks_text, verb

_PIECE = 1 << 17  # elements of a rank's addends that are shown to all at a time


def one_rank(comm, local, everyone) -> Verdict:
    expected, found = (int(everyone[0, i]) for i in (OWN, RESULT))
    if expected == found:
        return passed(local, everyone, "exact (one rank)")
    detail = "the result of one rank's reduction is not its contribution"
    return sum_report.failure(local, "exact", detail, rank=0, expected=expected, actual=found)


def integral(comm, local, everyone) -> Verdict | None:
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
        return passed(local, everyone, "exact (floats that hold integers; no sum rounds)")
    detail = "contributions are integers whose sums cannot round, but the result is none"
    rank = int(np.flatnonzero(bad)[0]) if np.count_nonzero(bad) == 1 else None
    return sum_report.failure(local, "exact", detail, rank=rank)


def _linear_words(comm, everyone) -> tuple:
    """Everybody's linear fingerprints: of the contributions, and of the results."""
    return everyone[:, HEADER : HEADER + comm.size], everyone[:, LINEAR]


def _differing(local, everyone, modulus, own, results) -> list[int]:
    """The ranks at whose results the words do not add up."""
    return [
        q for q in holders_of(local, everyone)
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
    if local.kind == "integer" and (reused := local.reused(comm)):
        detail += f"; {used_again(reused)}: which elements are wrong is not known"
    elif local.kind == "integer":
        elements = sum_search.integer_elements(
            comm, local.blocks, local.held(q), q, local.tag, modulus
        )
    expected = sum(int(p) for p in parts) % modulus
    more = {"expected": expected, "actual": int(results[q]) % modulus}
    if blamed is not None:
        detail += f"; {float_bound.Blame(*blamed)}"
        return sum_report.found(local, q, elements, detail, rank=blamed[0], **more)
    culprits = wrong_ranks(local, everyone, wrong)
    rank = culprits[0] if len(culprits) == 1 else None
    return sum_report.found(local, q, elements, detail, rank=rank, **more)


def integers(comm, local, everyone) -> Verdict:
    bits = 8 * local.dtype.itemsize
    if bits < 64 and _differing(local, everyone, MASK + 1, *_linear_words(comm, everyone)):
        low = everyone[:, LOW].view(np.int64).tolist()
        high = everyone[:, HIGH].tolist()
        if not sum_exact.cannot_wrap(low, high, local.dtype):
            return _wrapping(comm, local, everyone, 1 << bits)
    failure = _by_words(comm, local, everyone, "integers", MASK + 1)
    if failure is not None:
        return failure
    return passed_if_agreed(comm, local, everyone, "exact (integers)")


def _wrapping(comm, local, everyone, modulus) -> Verdict:
    """Narrow integers whose sums may have wrapped: seventeen words modulo 2^bits."""
    blocks = local.blocks
    if reused := local.reused(comm):
        left_out = f"sums that may have wrapped are not covered: {used_again(reused)}"
        return passed_if_agreed(
            comm, local, everyone, "exact (integers)", [left_out], local.n_elements
        )
    n = len(blocks.blocks)
    words = np.zeros((n + 1, sum_exact.N_WRAPPED), np.uint64)
    for q, (x, slab) in enumerate(zip(blocks.blocks, blocks.slabs)):
        words[q] = sum_exact.wrapped_words(x, local.tag, slab)
    words[n] = sum_exact.wrapped_words(blocks.result, local.tag, blocks.slabs[blocks.own])
    gathered = np.empty((comm.size, *words.shape), np.uint64)
    comm.Allgather(words, gathered)
    strength, missing, n_left_out = f"exact (integers, modulo 2^{modulus.bit_length() - 1})", (), 0
    for j in range(sum_exact.N_WRAPPED):
        words = modulus, gathered[:, :n, j], gathered[:, n, j]
        if not _differing(local, everyone, *words):
            continue
        looked = saturation.look(comm, local, holders_of(local, everyone))
        if looked.wrong:
            return _wrong_narrow(local, everyone, looked, *words)
        strength, missing, n_left_out = "exact (integers)", [looked.told(local.dtype)], looked.n
        break
    return passed_if_agreed(comm, local, everyone, strength, missing, n_left_out)


def _wrong_narrow(local, everyone, looked, modulus, own, results) -> Verdict:
    """The failure of narrow integers of which some are wrong whatever MPI does on overflow."""
    q = min(looked.wrong)
    detail = "the sum of integers is wrong"
    if looked.saturates:
        detail += f" ({looked.told(local.dtype)})"
    culprits = wrong_ranks(local, everyone, looked.wrong)
    return sum_report.found(
        local, q, looked.wrong[q], detail, rank=culprits[0] if len(culprits) == 1 else None,
        expected=sum(int(p) for p in own[:, local.held(q)]) % modulus,
        actual=int(results[q]) % modulus,
        n_wrong=looked.n_wrong if len(looked.wrong) == 1 else None,
    )  # fmt: skip


def bits(comm, local, everyone) -> Verdict:
    own = everyone[:, HEADER : HEADER + comm.size]
    for q in holders_of(local, everyone):
        expected = int(np.bitwise_xor.reduce(own[:, local.held(q)]))
        if expected != int(everyone[q, LINEAR]):
            detail = "the XOR of the contributions is another"
            wrong = {q: None}
            culprits = wrong_ranks(local, everyone, wrong)
            rank = culprits[0] if len(culprits) == 1 else None
            return sum_report.failure(
                local, "exact", detail, rank=rank, expected=expected,
                actual=int(everyone[q, LINEAR]),
            )  # fmt: skip
    return passed_if_agreed(comm, local, everyone, "exact (XOR)")


def extreme(comm, local, everyone) -> Verdict:
    """A maximum or minimum: nobody's is beyond it, and each element is somebody's.

    What becomes of an element with a NaN depends on the order: it is NaN, or somebody's.
    """
    x, r = local.blocks.blocks[0].reshape(-1), local.blocks.result.reshape(-1)
    if local.dtype.kind not in "iu":
        x, r = sum_words.widened(x), sum_words.widened(r)
    beyond = x > r if local.op == "MAX" else x < r
    n, is_float = x.size, local.dtype.kind not in "iu"
    maps = np.packbits(np.concatenate([x == r, x != x]) if is_float else x == r)
    comm.Allreduce(MPI.IN_PLACE, maps, op=MPI.BOR)
    owned = np.unpackbits(maps, count=n + n * is_float).astype(bool)
    nan, n_nan, givers = None, 0, ()
    if is_float:
        owned, nan = owned[:n], owned[n:]
        n_nan = int(np.count_nonzero(nan))
        beyond &= ~nan
    if n_nan:
        invented, givers = _beside_nan(comm, x, r, np.flatnonzero(nan))
        if invented:
            rank, place, many = invented
            detail = (
                f"{counted(many)} to which {ranks_text(givers)} gave NaN {verb(many)} neither NaN "
                f"nor any rank's own on rank {rank}; the first at "
                f"{list(local.blocks.index_of(0, place))}"
            )
            return sum_report.failure(local, "exact", detail)
        owned = owned | nan
    disagreement = disagreement_of(comm, local, everyone, nan)
    if disagreement is not None:
        # Of numbers a NaN is no result, nor is what lies below this rank's own.
        is_wrong = bool(beyond.any() or is_float and (~nan & (r != r)).any())
        return _by_itself(comm, disagreement, is_wrong)
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
            else f"{are(nobody.size)} no rank's own"
        )  # fmt: skip
        detail += f"; the first at {list(local.blocks.index_of(0, place))}"
        return sum_report.failure(local, "exact", detail, rank=None)
    missing = [
        f"{counted(n_nan)} to which {ranks_text(givers)} gave NaN {verb(n_nan)} not covered (NaN "
        "or some rank's own: MPI does not say which)"
    ] * (n_nan > 0)
    strength = f"exact ({local.op})"
    return passed(local, everyone, strength, missing, n_nan, compared=True)


def _by_itself(comm, disagreement, is_wrong: bool) -> Verdict:
    """A disagreement, and the one rank whose result ``is_wrong`` by itself. Collective."""
    wrong = np.empty(comm.size, np.uint8)
    comm.Allgather(np.array([is_wrong], np.uint8), wrong)
    where = disagreement.where
    if where.rank is not None or np.count_nonzero(wrong) != 1:
        return disagreement
    rank = int(np.argmax(wrong))
    detail = f"{where.detail}; that of rank {rank} cannot be right"
    return replace(disagreement, where=replace(where, rank=rank, detail=detail))


def _beside_nan(comm, x, r, places):
    """((rank, place, how many) of a result that is neither NaN nor somebody's own, or None; the
    ranks that gave NaN), at places to which somebody gave NaN. Collective."""
    found = r[places]
    odd = ~np.isnan(found) & (x[places] != found)
    # All ranks' results may differ here: each looks among the addends of all.
    for rank in range(comm.size):
        for start in range(0, len(places), _PIECE):
            part = slice(start, start + _PIECE)
            theirs = np.ascontiguousarray(x[places[part]])
            comm.Bcast(theirs.view(np.uint8), root=rank)
            odd[part] &= theirs != found[part]
    own = [np.isnan(x[places]).any(), np.count_nonzero(odd), places[np.argmax(odd)]]
    counts = np.empty((comm.size, 3), np.int64)
    comm.Allgather(np.array(own, np.int64), counts)
    bad = np.flatnonzero(counts[:, 1])
    invented = (int(bad[0]), int(counts[bad[0], 2]), int(counts[bad[0], 1])) if bad.size else None
    return invented, np.flatnonzero(counts[:, 0]).tolist()
