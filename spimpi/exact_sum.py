"""A sum of floats over ranks whose bits depend on the addends alone: docs/sums.md.

The addends are scaled by a power of two a row, rounded to integers and added as int64: MPI's
algorithm, the number of ranks and how addends are spread over them change nothing.
"""

from math import prod

import numpy as np
from mpi4py import MPI

from spimpi.checks.check import Check, Rule
from spimpi.checks.pending import built, context_of, require_comm
from spimpi.checks.sums import exact as sum_exact, report as sum_report, words as sum_words
from spimpi.checks.sums.agreement import ONE_RANK
from spimpi.checks.sums.float_bound import format_of
from spimpi.checks.session import session_of
from spimpi.checks.verdict import NO_ELEMENTS, Verdict
from spimpi.errors import CorruptionError, UsageError
from spimpi.fingerprint import arrays, as_array, fingerprint, linear_fingerprint
from spimpi.fingerprint.tag import MASK, Tag
from spimpi.one_traceback import told_by_rank_0
from spimpi.reduction import minority, together
from spimpi.trace.schema import Established
from spimpi.units import counted, ranks_text

_PIECE = 1 << 17  # elements that are widened at a time
_BITS = 62  # of a sum
_HEADROOM = 10  # 2**10 addends need no more of them
_LEAST = -1074  # float64's smallest number is 2**-1074
_NO_EXPONENT = -2000  # of a row of zeros
_NOT_FINITE = 3000
_BIAS = 1 << 12  # makes exponents positive, to be reduced with their owner in the low half


class _Subject:
    """What sum_report says of a failure here."""

    name, scattered, op = "exact_allreduce", False, "SUM"

    def __init__(self, tag):
        self.tag = tag


def scaled_bits(n_addends: int) -> int:
    """Bits b of the scaled integers: n_addends * 2**b <= 2**62."""
    return _BITS - max(_HEADROOM, (n_addends - 1).bit_length())


def exact_allreduce(comm, sendbuf, recvbuf=None, tag=None, *, ctx=None) -> np.ndarray:
    """Sum of float arrays over all ranks, the same bits for any number of ranks and any split.

    ``sendbuf``: a float64, float32, float16, bfloat16 or complex array, or a list of them where
    this rank has several addends; all of one shape and dtype. ``recvbuf``: an array for the result
    (it may be sendbuf itself), returned; else a new one. ``tag``: the sum's name in messages.
    Error of an element: A * 2**-b times the largest absolute value of its row (last axis) over all
    A addends, b = 52 up to 1024 addends, and one rounding. Checked with zero tolerance:
    CorruptionError on every rank. UsageError on every rank for NaN or Inf, and for arrays that do
    not fit, or a ``recvbuf`` whose elements share memory. Collective.
    Proof and sources: docs/sums.md.
    """
    require_comm(comm, "an exact sum")
    tag = Tag(name="exact_allreduce") if tag is None else tag
    kinds = Established.COMPUTED | Established.AGREED
    c = Check("exact_allreduce", tag, Rule.GATHERED, kinds)
    ctx = context_of(c, ctx)
    session = session_of(comm, ctx)
    session.judge_requests()
    comm = session.comm
    c.tracer = None if ctx is None else ctx.tracer
    try:
        with told_by_rank_0(comm.rank):
            result = _summed(comm, sendbuf, recvbuf, c)
    except CorruptionError as error:
        if c.tracer is not None:
            c.tracer.record(c, error.verdict, comm)
        raise
    if c.tracer is not None:
        c.got = fingerprint(result, tag)
        some = result.size > 0
        missing = () if some and comm.size > 1 else (ONE_RANK if some else NO_ELEMENTS,)
        kinds = Established(0) if missing else kinds
        c.tracer.record(c, Verdict(True, kinds, missing=missing, check=c.name), comm)
    if recvbuf is None:
        return result
    as_array(recvbuf, writable=True)[...] = result
    return recvbuf


def _summed(comm, sendbuf, recvbuf, c: Check) -> np.ndarray:
    """The sum as a new array, checked. Collective."""
    tag = c.tag
    given, addends = None, ()

    def build(c):
        nonlocal given, addends
        given, addends = _addends(sendbuf, recvbuf)
        c.of(given.shape, given.dtype)
        c.n_bytes = sum(x.nbytes for x in addends)

    built(c, build)
    with together(comm):
        if c.error is not None:
            raise c.error
    _same_everywhere(comm, given, tag)
    x = addends[0]
    exponents = _row_exponents(comm, addends, tag)
    count = np.array([len(addends)], np.int64)
    comm.Allreduce(MPI.IN_PLACE, count, op=MPI.SUM)
    b = scaled_bits(int(count[0]))
    with together(comm):
        if b < 24:
            msg = f"too many addends for an exact sum: {count[0]}"
            raise UsageError(msg)
    exponents = np.maximum(exponents, b + _LEAST)
    own = quantized(addends, exponents, b)
    total = np.empty_like(own)
    comm.Allreduce(own, total, op=MPI.SUM)
    result = rounded_back(total, exponents, b, x.dtype)
    _check(comm, own, total, result, tag, x.dtype)
    return result.view(given.dtype).reshape(given.shape)


def _addends(sendbuf, recvbuf):
    """The first array as given, and the items of all."""
    many = list(sendbuf) if isinstance(sendbuf, (list, tuple)) else [sendbuf]
    if not many:
        msg = "every rank must give at least one addend, found an empty list"
        raise UsageError(msg)
    many = [as_array(x) for x in many]
    for x in [*many, *([] if recvbuf is None else [as_array(recvbuf, writable=True)])]:
        arrays.word_layout(x.dtype)
        if (x.dtype, x.shape) != (many[0].dtype, many[0].shape):
            msg = (
                f"addends and result have one shape and dtype, found {many[0].dtype}"
                f"{list(many[0].shape)} and {x.dtype}{list(x.shape)}"
            )
            raise UsageError(msg)
    if recvbuf is not None:
        arrays.check_apart(as_array(recvbuf))
    parts = [_numbers(np.asarray(x)) for x in many]
    if format_of(parts[0].dtype) is None:
        msg = (
            f"an exact sum is of float64, float32, float16, bfloat16 or complex arrays, found "
            f"{many[0].dtype} (integers need none: MPI.SUM of them is exact)"
        )
        raise UsageError(msg)
    return many[0], parts


def _numbers(x) -> np.ndarray:
    """The floats of an array; a complex row is one of twice as many."""
    if x.dtype.kind != "c":
        return x
    parts = sum_words.items(x)
    return parts.reshape(*x.shape[:-1], 2 * x.shape[-1]) if x.ndim else parts


def _same_everywhere(comm, given, tag) -> None:
    calls = comm.allgather(f"{given.dtype}{list(given.shape)} under {tag}")
    for rank, call in enumerate(calls):
        if call != calls[0]:
            msg = (
                f"the ranks do not add the same arrays: rank 0 gave {calls[0]}, "
                f"rank {rank} gave {call}"
            )
            raise UsageError(msg)


def _rows(x) -> np.ndarray:
    return x.reshape(prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)


def row_exponents(x) -> np.ndarray:
    """The least e with |x| < 2**e of each row (last axis), int64; special values for zeros, NaN."""
    rows = _rows(sum_words.widened(x))
    if not rows.shape[1]:
        return np.full(len(rows), _NO_EXPONENT)
    with np.errstate(invalid="ignore"):
        largest = np.abs(rows).max(axis=1).astype(np.float64)  # NaN where there is one
    _, exponents = np.frexp(np.where(np.isfinite(largest), largest, 0.0))
    exponents = np.where(largest == 0, _NO_EXPONENT, exponents.astype(np.int64))
    return np.where(np.isfinite(largest), exponents, _NOT_FINITE)


def _row_exponents(comm, addends, tag) -> np.ndarray:
    """The exponents of the global rows: their maxima, with owners so that each rank can check."""
    own = np.max([row_exponents(x) for x in addends], axis=0)
    coded = ((own + _BIAS) << 32) + (comm.size - comm.rank)
    total = np.empty_like(coded)
    comm.Allreduce(coded, total, op=MPI.MAX)
    exponents, owner = (total >> 32) - _BIAS, comm.size - (total & 0xFFFFFFFF)
    wrong = (exponents < own) | ((owner == comm.rank) & (exponents != own))
    wrong |= (owner < 0) | (owner >= comm.size)
    bad = np.flatnonzero(exponents == _NOT_FINITE)
    first = -1 if not bad.size else int(bad[0])
    found = comm.allgather((bool(wrong.any()), fingerprint(total, tag)))
    if any(one for one, _ in found) or len({word for _, word in found}) > 1:
        detail = "the maxima of the rows that MPI.MAX gave are not those of the addends"
        raise CorruptionError(sum_report.failure(_Subject(tag), "exact", detail))
    if first >= 0:
        msg = (
            f"no exact sum of NaN or Inf: {counted(bad.size, 'row')} with some in {tag.name!r}, the "
            f"first is row {first}, given by rank {int(owner[first])}"
        )
        raise UsageError(msg)
    return exponents


def quantized(addends, exponents, b: int) -> np.ndarray:
    """Σ x * 2**(b - e), each rounded half to even, int64 of the addends' shape."""
    total = np.zeros(addends[0].shape, np.int64)
    rows = _rows(total)
    for x in addends:
        source = _rows(x)
        step = max(1, _PIECE // max(1, source.shape[1]))
        for at in range(0, len(rows), step):
            wide = source[at : at + step].astype(np.float64)
            shift = (b - exponents[at : at + step, None]).astype(np.int32)
            rows[at : at + step] += np.rint(np.ldexp(wide, shift)).astype(np.int64)
    return total


def rounded_back(total, exponents, b: int, dtype) -> np.ndarray:
    """total * 2**(e - b), rounded once to the dtype; a zero is +0.0."""
    dtype = np.dtype(dtype)
    q = total
    if dtype != np.float64:
        # Round to odd where float64 has no room: the one rounding is then that to the dtype.
        large = np.abs(q) >> 53 != 0
        odd = (q >> 10 | ((q & 1023) != 0)) << 10
        q = np.where(large, odd, q)
    wide = q.astype(np.float64)
    with np.errstate(over="ignore"):
        rows = _rows(wide)
        np.ldexp(rows, (exponents - b).astype(np.int32)[:, None], out=rows)
        if dtype.itemsize == 2 and dtype != np.float16:
            wide = _odd_float32(wide)
        return wide.astype(dtype) + np.zeros((), dtype)


def _odd_float32(wide) -> np.ndarray:
    """float64 rounded to odd to float32, from which bfloat16 rounds as from the float64."""
    narrow = wide.astype(np.float32)
    back = narrow.astype(np.float64)
    bits = np.array(narrow, ndmin=1).view(np.uint32).reshape(narrow.shape).copy()
    bits = np.where(np.abs(back) > np.abs(wide), bits - np.uint32(1), bits)
    return np.where(back != wide, bits | np.uint32(1), bits).astype(np.uint32).view(np.float32)


def _check(comm, own, total, result, tag, dtype) -> None:
    """Linear fingerprints add up; all ranks hold the same sums and results."""
    words = np.zeros(3, np.uint64)
    itemsize = dtype.itemsize
    words[0] = linear_fingerprint(own, tag, itemsize=itemsize)
    words[1] = linear_fingerprint(total, tag, itemsize=itemsize)
    words[2] = fingerprint(result, tag)
    everyone = np.empty((comm.size, 3), np.uint64)
    comm.Allgather(words, everyone)
    parts = [int(word) for word in everyone[:, 0]]
    wrong = [r for r in range(comm.size) if sum_exact.differ(parts, int(everyone[r, 1]))]
    if wrong:
        detail = "the integers that MPI.SUM gave are not the sum of the addends"
        blamed = sum_exact.blame_words(parts, int(everyone[wrong[0], 1]))
        rank = wrong[0] if len(wrong) == 1 and comm.size > 1 else None
        if blamed is not None:
            rank, doubled = blamed
            what = "counted twice" if doubled else "missing"
            detail += f"; the contribution of rank {rank} is {what}"
        verdict = sum_report.failure(
            _Subject(tag), "exact", detail, rank, expected=sum(parts) & MASK,
            actual=int(everyone[wrong[0], 1]),
        )  # fmt: skip
        raise CorruptionError(verdict)
    odd = minority(everyone[:, 2])
    if odd:
        detail = f"{ranks_text(odd)} rounded the same sum to other bits"
        rank = odd[0] if len(odd) == 1 else None
        raise CorruptionError(sum_report.failure(_Subject(tag), "exact", detail, rank))
