"""Sums that are checked with zero tolerance: integers, floats that hold them, MAX, MIN and BXOR."""

import numpy as np
import pytest
from mpi4py import MPI
from planted import worlds
from sums_data import TAG, added, disagreement, dtype_of, own_of

from spimpi import DistributedContext, TensorPartition
from spimpi.checks.sums.agreement import disagreement_of
from spimpi.checks.sums.call import RESULT, prepare
from spimpi.checks.sums.verify import sum_check, verify_allreduce, verify_reduce_scatter

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_integers_in_floats_are_summed_with_zero_tolerance(comm, name):
    """A sum that the bound would let pass is found, since integers this small cannot round."""
    for part in worlds(comm, 2):
        rng = np.random.default_rng(3)
        xs = list(rng.integers(-9, 9, (part.size, 40, 100)).astype(dtype_of(name)))
        total = added(xs)
        verdict = verify_allreduce(part, xs[part.rank], total, TAG)
        assert verdict.strength.startswith("exact (floats that hold integers")
        wrong = total.copy()
        wrong[3, 4] += np.asarray(1).astype(wrong.dtype)
        assert not verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
        wrong = total.copy()
        wrong[3, 4] += np.asarray(0.25).astype(wrong.dtype)
        assert not verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)


def test_integers_too_large_for_their_floats_are_left_to_the_bound(comm):
    for part in worlds(comm, 2):
        xs = [np.full(50, 2.0**24 - 1 - r, np.float32) for r in range(part.size)]
        verdict = verify_allreduce(part, xs[part.rank], added(xs), TAG)
        assert verdict.strength.startswith("bound")


@pytest.mark.parametrize("name", ["int8", "uint16", "int32"])
def test_narrow_integers_may_wrap_and_are_still_checked(comm, name):
    for part in worlds(comm, 2):
        xs = own_of(part, name, (30, 30))
        total = added(xs)
        verdict = verify_allreduce(part, xs[part.rank], total, TAG)
        assert "modulo" in verdict.strength
        rng = np.random.default_rng(5)
        for n in (1, 2, 8):
            wrong = total.copy()
            top = np.array(-1 << 8 * total.itemsize - 1, np.int64).astype(total.dtype)
            wrong.reshape(-1)[rng.choice(900, n, False)] ^= top
            assert not verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)


def _saturated(xs):
    """Sums as instructions make them that saturate; the last three elements are added without."""
    info = np.iinfo(xs[0].dtype)
    total = xs[0].astype(np.int64)
    for x in xs[1:]:
        total = np.clip(total + x, info.min, info.max)
    total.reshape(-1)[-3:] = added([x.reshape(-1)[-3:] for x in xs])
    return total.astype(xs[0].dtype)


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("full", [False, True])
def test_an_mpi_that_saturates_is_noted_and_what_does_not_overflow_is_held(comm, name, full):
    for part in worlds(comm, 2):
        xs = own_of(part, name, (9, 11))
        info = np.iinfo(name)
        if not full:  # all overflow above, but one row
            xs = [np.full_like(x, info.max - 10) for x in xs]
            for x in xs:
                x[4] = 1
        total = _saturated(xs)
        verdict = verify_allreduce(part, xs[part.rank], total, TAG)
        assert verdict and "this MPI saturates" in str(verdict), str(verdict)
        assert verdict.kinds == ["agreed", "computed"]
        sums = np.sum([x.astype(np.int64) for x in xs], axis=0)
        fits = np.ones(sums.shape, bool)
        for bad in (lambda x: np.maximum(x, 0), lambda x: np.minimum(x, 0)):
            one_sided = np.sum([bad(x.astype(np.int64)) for x in xs], axis=0)
            fits &= (info.min <= one_sided) & (one_sided <= info.max)
        place = tuple(np.argwhere(fits)[0])
        wrong = total.copy()
        wrong[place] ^= 1
        verdict = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
        assert not verdict and [e.index for e in verdict.where.elements] == [place]
        assert verdict.where.n_wrong == 1 and "this MPI saturates" in str(verdict)
        if not full:  # neither the wrapped sum nor the limit, and two addends are added once
            wrong = total.copy()
            wrong[0, 0] ^= 64
            verdict = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
            assert bool(verdict) == (part.size > 2)
        cut = TensorPartition(0, part.size, part.rank, 9)
        shard = total[cut.start : cut.stop].copy()
        assert verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG)
        if cut.start <= place[0] < cut.stop:
            shard[place[0] - cut.start, place[1]] ^= 1
        verdict = verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG, check=False)
        assert not verdict and [e.index for e in verdict.where.elements] == [place]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("in_batch", [False, True])
def test_ranks_that_disagree_where_a_sum_has_no_room_fail(comm, in_batch):
    """What MPI makes of an overflow is open, but it is one result: saturated here, wrapped there."""
    x = np.full(64, 100, np.int8)
    total = np.full(64, 127, np.int8)
    if comm.rank == comm.size - 1:
        total[:] = added([x] * comm.size)
    if not in_batch:
        verdict = verify_allreduce(comm, x, total, TAG, check=False)
    else:
        with DistributedContext(comm) as ctx, ctx.batch():
            verdict = verify_allreduce(comm, x, total, TAG, check=False, ctx=ctx)
            x[:], total[:] = 3, 3
    assert not verdict and disagreement(comm.size) in str(verdict)
    assert verdict.where.rank == (comm.size - 1 if comm.size > 2 else None)


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16", "int32"])
def test_what_this_mpi_makes_of_sums_without_room_is_no_failure(comm, name):
    for part in worlds(comm, 2):
        for n in (1, 5, 64, 1000):
            x = np.full(n, np.iinfo(name).max - 10, name)
            result = np.empty_like(x)
            part.Allreduce(x, result)
            assert verify_allreduce(part, x, result, TAG)
            x = own_of(part, name, (n,))[part.rank]
            part.Allreduce(x, result)
            assert verify_allreduce(part, x, result, TAG)


@pytest.mark.parametrize("op", ["MAX", "MIN"])
@pytest.mark.parametrize("name", ["float64", "float32", "float16", "int32", "uint64"])
def test_extremes_are_exact(comm, op, name):
    for part in worlds(comm):
        xs = own_of(part, name)
        best = (np.max if op == "MAX" else np.min)(np.array(xs), axis=0)
        mpi_op = getattr(MPI, op)
        assert verify_allreduce(part, xs[part.rank], best, TAG, op=mpi_op).strength.startswith(
            "exact"
        )
        for factor in (2, -1):
            wrong = best.copy()
            wrong[2, 3] = np.asarray(factor).astype(wrong.dtype) * wrong[2, 3] + np.asarray(
                1
            ).astype(wrong.dtype)
            assert not verify_allreduce(part, xs[part.rank], wrong, TAG, op=mpi_op, check=False)


def test_an_extreme_of_nan_is_left_out_and_the_rest_checked(comm):
    for part in worlds(comm, 2):
        xs = own_of(part, "float64")
        best = np.max(np.array(xs), axis=0)
        xs[0][2, 3] = np.nan
        for value in (np.nan, xs[1][2, 3]):  # what MPI makes of it depends on its order
            best[2, 3] = value
            verdict = verify_allreduce(part, xs[part.rank], best, TAG, op=MPI.MAX)
            said = "1 element to which rank 0 gave NaN is not covered (NaN or"
            assert verdict.holds and verdict.missing[0].startswith(said)
        for value in (-1e9, 1e9, np.inf):  # but not out of nothing
            best[2, 3] = value if part.rank == part.size - 1 else np.nan
            verdict = verify_allreduce(part, xs[part.rank], best, TAG, op=MPI.MAX, check=False)
            assert not verdict and f"on rank {part.size - 1}; the first at [2, 3]" in str(verdict)
            assert "1 element to which rank 0 gave NaN is neither NaN nor" in str(verdict)
        best[2, 3] = np.nan
        best[4, 4] = np.nan
        assert not verify_allreduce(part, xs[part.rank], best, TAG, op=MPI.MAX, check=False)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("op", ["MAX", "MIN"])
def test_a_rank_whose_own_extreme_cannot_be_right_is_named(comm, op):
    """Also where there is no majority: NaN of numbers, or what its own addend is beyond."""
    for part in worlds(comm, 2):
        for victim in range(part.size):
            x = np.arange(4.0) + 1
            beyond = -1e9 if op == "MAX" else 1e9
            for value in (np.nan, beyond):
                best = x.copy()
                if part.rank == victim:
                    best[2] = value
                verdict = verify_allreduce(part, x, best, TAG, op=getattr(MPI, op), check=False)
                assert not verdict and verdict.where.rank == victim
                assert disagreement(part.size, victim) in str(verdict)
            # Of an invented value nothing tells which of two is right.
            best = x.copy()
            if part.rank == victim:
                best[2] = -beyond
            verdict = verify_allreduce(part, x, best, TAG, op=getattr(MPI, op), check=False)
            assert not verdict and verdict.where.rank == (victim if part.size > 2 else None)


@pytest.mark.parametrize("name", ["uint8", "int32", "uint64", "bool"])
def test_xor_is_exact(comm, name):
    for part in worlds(comm):
        rng = np.random.default_rng(1)
        xs = [rng.integers(0, 2, (7, 9)).astype(name) for _ in range(part.size)]
        total = np.bitwise_xor.reduce(np.array(xs), axis=0)
        assert verify_allreduce(part, xs[part.rank], total, TAG, op=MPI.BXOR)
        wrong = total.copy()
        wrong[2:4, 3] ^= wrong.dtype.type(1)
        assert not verify_allreduce(part, xs[part.rank], wrong, TAG, op=MPI.BXOR, check=False)
        cut = TensorPartition(0, part.size, part.rank, 7)
        shard = total[cut.start : cut.stop]
        assert verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG, op=MPI.BXOR)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_bits_that_differ_between_ranks_are_a_disagreement(comm, dtype):
    """The words of the sum aside, which see it too."""
    x = np.ones(9, dtype)
    check, _ = sum_check(comm, "allreduce", x, x, None, TAG, MPI.BXOR)
    local = prepare(comm, check, x, x.copy(), None, MPI.BXOR)
    if comm.rank == 1:
        local.blocks.result[3] = 0
    everyone = np.zeros((comm.size, check.words.size), np.uint64)
    everyone[1, RESULT] = 1
    assert disagreement_of(comm, local, everyone).where.check == "allreduce"
