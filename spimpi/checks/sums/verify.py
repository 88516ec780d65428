"""Checks of allreduce and reduce-scatter: docs/sums.md says what each strength proves.

All functions are collective over ``comm``. One Allgather of a few KB, whatever the tensor's size,
carries every rank's words, so that all ranks reach the same verdict on their own; what more is
exchanged, is exchanged where something failed or is not finite, on every rank alike.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from mpi4py import MPI

from spimpi.checks.check import Check, Rule
from spimpi.checks.failure import used_again
from spimpi.checks.pending import require_comm, settle
from spimpi.checks.sums import exact as sum_exact, judge_exact, words as sum_words
from spimpi.checks.sums.call import (
    BAD, HEADER, HIGH, INTEGRAL, LARGEST, LINEAR, LOW, OWN, PIECES, RESULT, SumCall, n_words,
    prepare,
)  # fmt: skip
from spimpi.checks.sums.judge_floats import floats
from spimpi.checks.verdict import Verdict
from spimpi.errors import UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.arrays import check_threads
from spimpi.fingerprint.tag import MASK
from spimpi.trace.schema import Established

JUDGES = {
    "one rank": judge_exact.one_rank,
    "float": floats,
    "integer": judge_exact.integers,
    "extreme": judge_exact.extreme,
    "bits": judge_exact.bits,
}


def verify_allreduce(
    comm, contribution, result, tag, *, op=MPI.SUM, check=True, ctx=None, threads=1
) -> Verdict:
    """Check an allreduce after it ran: ``result`` on every rank is the sum of all that ranks gave.

    Arrays of one shape and dtype on all ranks: with MPI.SUM float64, float32, float16, bfloat16,
    complex or integers; with MPI.MAX and MPI.MIN no complex ones; with MPI.BXOR integers and bools.
    ``verdict.strength`` says how strong the check was (docs/sums.md): agreement of all results,
    and a bound without false alarms for floats, exactness for all else. Establishes AGREED and
    COMPUTED of what it covered; ``missing`` counts the elements that it could not cover (NaN, Inf,
    overflow), and names who gave NaN. UsageError where result and contribution share memory.
    Collective. With ``check`` a failure raises CorruptionError on every rank; what cannot be
    checked raises UsageError on every rank.
    """
    c, build = sum_check(comm, "allreduce", contribution, result, None, tag, op, threads)
    return settle(comm, c, build, check, ctx)


def verify_reduce_scatter(
    comm, contribution, result, partition, tag, *, op=MPI.SUM, check=True, ctx=None, threads=1
) -> Verdict:
    """Check a reduce-scatter after it ran: ``result`` is this rank's shard of the sum.

    ``contribution`` is whole on every rank; ``partition`` says which shard of it ``result`` is:
    one shard a rank, in the order of ranks. With MPI.SUM and MPI.BXOR; dtypes, strengths and
    errors as for ``verify_allreduce``, but there are no replicas to agree. Establishes COMPUTED.
    Collective.
    """
    c, build = sum_check(
        comm, "reduce_scatter", contribution, result, partition, tag, op, threads
    )
    return settle(comm, c, build, check, ctx)


def sum_check(
    comm, name: str, contribution, result, partition, tag, op=MPI.SUM, threads=1
) -> tuple[Check, Callable]:
    """The check of a sum, and what builds it once the sum is complete: for ``settle`` or a Group.

    ``name``: "allreduce", whose ``partition`` is None, or "reduce_scatter". Local.
    """
    return sum_check_of(comm, name, lambda: (contribution, result, partition), tag, op, threads)


def sum_check_of(
    comm, name: str, look: Callable, tag, op=MPI.SUM, threads=1
) -> tuple[Check, Callable]:
    """As ``sum_check``, of arrays that are looked at when the sum is complete: ``look()`` gives
    contribution, result and partition. Local."""
    require_comm(comm)
    c = Check(name, tag, Rule.GATHERED, Established.COMPUTED, threads)
    c.words = np.zeros(n_words(comm.size), np.uint64)

    def build(c):
        local = prepare(comm, c, *look(), op)
        _fill(local, c.words, threads, comm)
        c.got = _word_of_result(local, c)

        def unchanged():
            again = np.zeros_like(c.words)
            _fill(local, again, threads, comm)
            return bool((again == c.words).all())

        def conclude(session, everyone):
            call = replace(local, unchanged=unchanged)
            # A maximum is looked for in the arrays themselves, all else first in the words.
            if c.waits and call.kind == "extreme" and (ranks := call.reused(session.comm)):
                msg = (
                    f"{c.name} of {c.tag.name!r}: {used_again(ranks)}, and MPI.{call.op} is "
                    "compared when the batch ends: keep its arrays until then"
                )
                raise UsageError(msg)
            return JUDGES[call.kind](session.comm, call, everyone)

        c.conclude = conclude

    return c, build


def _word_of_result(local: SumCall, c: Check) -> int:
    """The result's fingerprint, for a trace; that of floats is no word of the check."""
    if local.kind != "float":
        return int(c.words[RESULT])
    blocks = local.blocks
    if c.tracer is None:
        return 0
    return fingerprint(blocks.result, local.tag, blocks.slabs[blocks.own], c.threads)


# What a rank sends


def _fill(local: SumCall, words, threads: int, comm) -> None:
    blocks, tag = local.blocks, local.tag
    slab = blocks.slabs[blocks.own]
    check_threads(threads)
    if local.kind == "float":
        _fill_floats(local, words, threads, comm)
        return
    if local.kind == "integer":
        words[LINEAR], _ = sum_exact.linear(blocks.result, tag, slab, threads)
        for q, (x, place) in enumerate(zip(blocks.blocks, blocks.slabs)):
            words[HEADER + q], _ = sum_exact.linear(x, tag, place, threads)
        bounds = [sum_exact.extremes(x) for x in blocks.blocks]
        words[LOW] = min(low for low, _ in bounds) & MASK
        words[HIGH] = max(high for _, high in bounds)
    if local.kind == "bits":
        words[LINEAR] = sum_exact.xor_word(blocks.result, tag, slab)
        for q, (x, place) in enumerate(zip(blocks.blocks, blocks.slabs)):
            words[HEADER + q] = sum_exact.xor_word(x, tag, place)
    if local.kind in ("one rank", "extreme"):
        words[OWN] = fingerprint(blocks.blocks[0], tag, slab, threads)
    words[RESULT] = fingerprint(blocks.result, tag, slab, threads)


def _fill_floats(local: SumCall, words, threads: int, comm) -> None:
    blocks = local.blocks
    floats = words[HEADER + comm.size :].view(np.float64).reshape(3, -1)  # as call.regions
    pieces = 0
    for q, x in enumerate(blocks.blocks):
        is_own = q == blocks.own
        projected = sum_words.project_block(
            x, blocks.result if is_own else None, blocks.layout.cuts[q], blocks.key, threads
        )
        pieces = max(pieces, projected.pieces)
        floats[:2, blocks.bins_of(q)] = projected.sums[:2]
        if is_own:
            floats[2, : projected.sums.shape[1]] = projected.sums[2]
            if not local.scattered:
                words[RESULT] = sum_words.agreement_word(blocks.result, local.tag, projected)
    words[PIECES] = pieces
    if any(sum_exact.looks_integral(x) for x in blocks.blocks):
        _fill_integral(local, words, threads)


def _fill_integral(local: SumCall, words, threads) -> None:
    """Linear words too, where floats hold integers; every rank's must for them to count."""
    blocks = local.blocks
    n_bad = 0
    for q, (x, slab) in enumerate(zip(blocks.blocks, blocks.slabs)):
        words[HEADER + q], bad = sum_exact.linear(x, local.tag, slab, threads)
        n_bad += bad
    slab = blocks.slabs[blocks.own]
    words[LINEAR], words[BAD] = sum_exact.linear(blocks.result, local.tag, slab, threads)
    words[INTEGRAL] = n_bad == 0
    largest = max(sum_exact.largest_magnitude(x) for x in blocks.blocks)
    words[LARGEST] = np.float64(largest).view(np.uint64)
