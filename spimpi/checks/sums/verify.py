"""Checks of allreduce and reduce-scatter: docs/sums.md says what each strength proves.

All functions are collective over ``comm``. One Allgather of a few KB, whatever the tensor's size,
carries every rank's words, so that all ranks reach the same verdict on their own; what more is
exchanged, is exchanged where something failed or is not finite, on every rank alike.
"""

from hashlib import blake2b

import numpy as np
from mpi4py import MPI

from spimpi.checks.sums import exact as sum_exact, words as sum_words
from spimpi.checks.session import session_of
from spimpi.checks.sums.call import (
    BAD, CALL, FAILED, HEADER, HIGH, INTEGRAL, LARGEST, LINEAR, LOW, OWN, PIECES, RESULT, SumCall,
    n_words, prepare, regions,
)  # fmt: skip
from spimpi.checks.sums.judge import JUDGES
from spimpi.checks.verdict import Verdict
from spimpi.errors import CorruptionError, SpimpiError, UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import MASK


def verify_allreduce(
    comm, contribution, result, tag, *, op=MPI.SUM, check=True, ctx=None, threads=1
) -> Verdict:
    """Check an allreduce after it ran: ``result`` on every rank is the sum of all that ranks gave.

    Arrays of one shape and dtype on all ranks: with MPI.SUM float64, float32, float16, bfloat16,
    complex or integers; with MPI.MAX and MPI.MIN no complex ones; with MPI.BXOR integers and bools.
    ``verdict.strength`` says how strong the check was (docs/sums.md): agreement of all results,
    and a bound without false alarms for floats, exactness for all else. Establishes AGREED and
    COMPUTED; ``missing`` counts elements that the check could not cover (NaN, Inf, overflow).
    Collective. With ``check`` a failure raises CorruptionError on every rank; what cannot be
    checked raises UsageError on every rank.
    """
    return _verify(comm, "allreduce", contribution, result, None, tag, op, check, ctx, threads)


def verify_reduce_scatter(
    comm, contribution, result, partition, tag, *, op=MPI.SUM, check=True, ctx=None, threads=1
) -> Verdict:
    """Check a reduce-scatter after it ran: ``result`` is this rank's shard of the sum.

    ``contribution`` is whole on every rank; ``partition`` says which shard of it ``result`` is:
    one shard a rank, in the order of ranks. With MPI.SUM and MPI.BXOR; dtypes, strengths and
    errors as for ``verify_allreduce``, but there are no replicas to agree. Establishes COMPUTED.
    Collective.
    """
    return _verify(
        comm, "reduce_scatter", contribution, result, partition, tag, op, check, ctx, threads
    )


def _verify(comm, name, contribution, result, partition, tag, op, check, ctx, threads) -> Verdict:
    comm = session_of(comm, ctx).comm
    words = np.zeros(n_words(comm.size), np.uint64)
    local, error, call = None, None, "nothing that could be checked"
    try:
        local, call = prepare(comm, name, contribution, result, partition, tag, op)
        _fill(local, words, threads, comm)
    except (SpimpiError, OSError) as caught:
        error = caught
    except (TypeError, ValueError, OverflowError, MemoryError) as caught:
        error = UsageError(f"{type(caught).__name__}: {caught}")
    words[FAILED] = error is not None
    words[CALL] = _digest(call)
    everyone = np.empty((comm.size, words.size), np.uint64)
    comm.Allgather(words, everyone)
    if everyone[:, FAILED].any() or np.ptp(everyone[:, CALL]):
        _refuse(comm, error, call)
    verdict = JUDGES[local.kind](comm, local, everyone)
    if check and not verdict:
        raise CorruptionError(verdict)
    return verdict


def _refuse(comm, error, call) -> None:
    """The same UsageError on every rank."""
    said = comm.allgather((None if error is None else (type(error), str(error)), call))
    failed = [(rank, *one) for rank, (one, _) in enumerate(said) if one is not None]
    if failed:
        rank, kind, text = failed[0]
        kind = kind if issubclass(kind, UsageError) else UsageError
        raise kind(f"{text} (found by rank {rank})")
    calls = [call for _, call in said]
    other = next(rank for rank, call in enumerate(calls) if call != calls[0])
    msg = (
        f"the ranks do not check the same reduction: rank 0 gave {calls[0]}, "
        f"rank {other} gave {calls[other]}"
    )
    raise UsageError(msg)


def _digest(call: str) -> int:
    return int.from_bytes(blake2b(call.encode(), digest_size=8).digest(), "little")


# What a rank sends


def _fill(local: SumCall, words, threads: int, comm) -> None:
    blocks, tag = local.blocks, local.tag
    slab = blocks.slabs[blocks.own]
    if threads < 1:
        msg = f"at least one thread is needed, found threads={threads}"
        raise UsageError(msg)
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
    if local.kind == "one rank":
        words[OWN] = fingerprint(blocks.blocks[0], tag, slab, threads)
    words[RESULT] = fingerprint(blocks.result, tag, slab, threads)


def _fill_floats(local: SumCall, words, threads: int, comm) -> None:
    blocks = local.blocks
    own, result = regions(words[None], comm.size)
    pieces = 0
    for q, x in enumerate(blocks.blocks):
        is_own = q == blocks.own
        projected = sum_words.project_block(
            x, blocks.result if is_own else None, blocks.cuts[q], blocks.key, threads
        )
        pieces = max(pieces, projected.pieces)
        own[0, :, blocks.bins_of(q)] = projected.sums[:2]
        if is_own:
            result[0, :, : projected.sums.shape[1]] = projected.sums[2:]
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
