"""NaN, Inf and overflow in sums; bits that MPI may give otherwise on each rank."""

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from planted import worlds
from sums_data import TAG, added, disagreement, dtype_of, own_of

from spimpi import DistributedContext
from spimpi.checks.sums.verify import verify_allreduce

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_what_is_not_finite_must_come_out_as_ieee_says(comm, name):
    for part in worlds(comm, 2):
        xs = own_of(part, name, (20, 40))
        xs[0][1, 1], xs[-1][2, 2], xs[0][3, 3], xs[-1][3, 3] = np.nan, np.inf, np.inf, -np.inf
        with np.errstate(all="ignore"):
            total = added(xs)
        verdict = verify_allreduce(part, xs[part.rank], total, TAG)
        assert verdict.holds and verdict.missing[0].startswith("3 elements")
        for place, value in [((1, 1), 0.0), ((2, 2), np.nan), ((3, 3), np.inf), ((2, 2), -np.inf)]:
            wrong = total.copy()
            wrong[place] = value
            found = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
            assert not found and "1 element is not finite as" in str(found)
        # Elements beside them are still held to the bound.
        wrong = total.copy()
        wrong[1, 2] += np.asarray(50).astype(wrong.dtype)
        found = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
        assert not found and [e.index for e in found.where.elements] == [(1, 2)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["float64", "float16"])
def test_nan_from_finite_contributions_is_a_failure(comm, name, value):
    for part in worlds(comm, 2):
        xs = own_of(part, name)
        wrong = added(xs)
        wrong[4, 4] = value
        found = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
        assert not found and "[4, 4]" in str(found)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_sums_that_overflow_and_the_largest_numbers_are_no_failures(comm, name):
    for part in worlds(comm, 2):
        dtype = dtype_of(name)
        largest = ml_dtypes.finfo(dtype).max
        xs = [np.full((6, 50), largest, dtype) * dtype.type(0.9 if r < 2 else 0)
              for r in range(part.size)]  # fmt: skip
        xs[1] = -xs[1]
        xs[1][2, 2] = xs[0][2, 2]
        with np.errstate(all="ignore"):
            total = added(xs)
        assert np.isinf(total[2, 2])
        verdict = verify_allreduce(part, xs[part.rank], total, TAG)
        assert verdict.holds and "1 element whose sum may have overflowed is" in verdict.missing[0]
        xs[1][2, 2] = -xs[0][2, 2]
        total[2, 2] = 0
        assert not verify_allreduce(part, xs[part.rank], total, TAG).missing
        total[3, 3] = xs[0][3, 3]
        assert not verify_allreduce(part, xs[part.rank], total, TAG, check=False)


# What differs between ranks although MPI added correctly


def _case(comm, name, dtype, n):
    """Addends of which NaN, or the zero that comes out, depend on the order of two operands."""
    x = np.ones(n, dtype)
    if name == "payloads":
        quiet = np.array([np.nan], dtype).view(f"u{x.itemsize}")
        x[:] = (quiet + np.array(1 + comm.rank, quiet.dtype)).view(dtype)
    elif name == "made and given":
        x[:] = (np.inf, -np.inf, np.nan)[comm.rank % 3]
    elif name == "somebody's":
        x[:] = comm.rank
        x[comm.rank :: comm.size] = np.nan
    else:
        x[:] = 0.0
        x[comm.rank :: comm.size] = -0.0
    return x


@pytest.mark.parametrize("case", ["payloads", "made and given", "somebody's", "zeros"])
@pytest.mark.parametrize("name", ["float64", "float32"])
def test_what_mpi_makes_of_nan_and_zeros_is_no_failure(comm, name, case):
    """MPICH gives ranks other bits in most of these cases, Open MPI in none (docs/sums.md)."""
    for part in worlds(comm, 2):
        for op in (MPI.SUM, MPI.MAX, MPI.MIN):
            for n in (1, 2, 3, 4, 17, 1000):
                x = _case(part, case, name, n)
                result = np.empty_like(x)
                part.Allreduce(x, result, op=op)
                assert verify_allreduce(part, x, result, TAG, op=op)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_ranks_may_hold_other_nan_but_nothing_else_that_differs(comm, name):
    for part in worlds(comm, 2):
        last = part.rank == part.size - 1
        xs = own_of(part, name)
        xs[0][1, 1] = np.nan
        total = added(xs)
        total[6, 6] = 0
        for x in xs:
            x[6, 6] = 0
        word = f"u{total.itemsize}"
        if last:
            total.view(word)[1, 1] ^= np.array(1 | 1 << 8 * total.itemsize - 1, word)
        assert np.isnan(total[1, 1].astype(float))
        assert verify_allreduce(part, xs[part.rank], total, TAG)
        for place, value in (((6, 6), -0.0), ((2, 2), None)):
            wrong = total.copy()
            if last:
                further = np.nextafter(wrong[place], dtype_of(name).type(9))
                wrong[place] = further if value is None else value
            verdict = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
            assert not verdict and "differ" in str(verdict)


@pytest.mark.parametrize("op", ["MAX", "MIN"])
def test_of_extremes_zeros_and_elements_with_nan_may_differ_and_nothing_else(comm, op):
    for part in worlds(comm, 2):
        last = part.rank == part.size - 1
        xs = own_of(part, "float64")
        for x in xs:
            x[6, 6] = 0
        xs[0][1, 1], xs[0][6, 6] = np.nan, -0.0
        with np.errstate(invalid="ignore"):
            best = (np.fmax if op == "MAX" else np.fmin).reduce(np.array(xs), axis=0)
        best[6, 6], best[1, 1] = (-0.0, np.nan) if last else (0.0, best[1, 1])
        verdict = verify_allreduce(part, xs[part.rank], best, TAG, op=getattr(MPI, op))
        assert verdict and verdict.missing[0].startswith("1 element to")
        wrong = best.copy()
        wrong[2, 2] += last
        assert not verify_allreduce(
            part, xs[part.rank], wrong, TAG, op=getattr(MPI, op), check=False
        )


# Buffers that were used again before the batch's end: what was recorded of them tells


def _summed_in_a_batch(comm, name, given=None):
    """The verdict on a sum whose last rank has one element a unit off, and whose buffers are
    overwritten before the batch ends. ``given``: a value that rank 0 gives."""
    last = comm.rank == comm.size - 1
    xs = own_of(comm, name)
    if given is not None:
        xs[0][1, 1] = given
    total, x = added(xs), xs[comm.rank]
    if last:
        total[2, 2] = np.nextafter(total[2, 2], dtype_of(name).type(9))
    with DistributedContext(comm) as ctx, ctx.batch():
        verdict = verify_allreduce(comm, x, total, TAG, check=False, ctx=ctx)
        x[:], total[:] = 3, 3
    return verdict


@two
@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16"])
def test_ranks_that_disagree_are_told_by_their_words_where_buffers_are_used_again(comm, name):
    verdict = _summed_in_a_batch(comm, name)
    assert not verdict and disagreement(comm.size) in str(verdict)
    assert "have changed since" in str(verdict)
    assert verdict.where.rank == (comm.size - 1 if comm.size > 2 else None)


@two
@pytest.mark.parametrize("name", ["float64", "float32"])
def test_agreement_beside_nan_is_not_granted_where_buffers_are_used_again(comm, name):
    """Words that differ may do so by their NaN alone: nothing tells any more."""
    verdict = _summed_in_a_batch(comm, name, np.nan)
    assert verdict and "agreed" not in verdict.kinds and "agreement" not in verdict.strength
    assert "whether the ranks agree is not known" in str(verdict)


# What is not covered, by whom, and what it leaves to be established


def test_ranks_that_give_nan_are_named_and_nothing_is_established_of_it(comm):
    for part in worlds(comm, 2):
        culprit = part.size - 1
        for op in (MPI.SUM, MPI.MAX):
            x = np.random.default_rng(part.rank).standard_normal((4, 16)).astype(np.float32)
            if part.rank == culprit:
                x[1, 5] = np.nan
            result = np.empty_like(x)
            part.Allreduce(x, result, op=op)
            verdict = verify_allreduce(part, x, result, TAG, op=op)
            assert verdict.missing[0].startswith(f"1 element to which rank {culprit} gave NaN")
            assert verdict.kinds == ["agreed", "computed"]
            x[:] = np.nan
            part.Allreduce(x, result, op=op)
            verdict = verify_allreduce(part, x, result, TAG, op=op)
            assert "computed" not in verdict.kinds
            assert "64 elements to which ranks 0, 1" in str(verdict)


def test_overflow_explains_no_infinity_of_the_other_sign(comm):
    for part in worlds(comm, 2):
        x = np.full(4, 1.7e308)
        assert not verify_allreduce(part, x, np.full(4, np.inf), TAG).kinds == ["computed"]
        for value in (-np.inf, np.nan):
            wrong = np.array([np.inf, value, np.inf, np.inf])
            assert not verify_allreduce(part, x, wrong, TAG, check=False)
        mixed = x * (-1) ** part.rank
        # Which sums overflow, and to what, depends on the order where both signs can.
        if part.size > 3:
            for value in (np.inf, -np.inf, np.nan):
                assert verify_allreduce(part, mixed, np.full(4, value), TAG)
        # An infinity that was given meets one that comes of overflow.
        given = np.array([np.inf if part.rank == 0 else -1.7e308])
        for value in (np.inf, np.nan):
            assert bool(verify_allreduce(part, given, np.array([value]), TAG, check=False)) == (
                value == np.inf or part.size > 2
            )
