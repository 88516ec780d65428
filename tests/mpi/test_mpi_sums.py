"""Checks of allreduce and reduce-scatter on real MPI sums, clean and with planted faults."""

from math import fsum

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import first_ranks

import spimpi
from spimpi import CorruptionError, Tag, TensorPartition, UsageError
from spimpi.checks.sums.verify import verify_allreduce, verify_reduce_scatter
from spimpi.exact_sum import exact_allreduce, rounded_back
from spimpi.partition import balanced_sizes
from spimpi.trace.schema import Established

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]

TAG = Tag(name="hidden", layer=2, step=1)
FLOATS = ["float64", "float32", "float16", "bfloat16", "complex128", "complex64"]
INTEGERS = ["int64", "uint64", "int32", "uint16", "int8"]


def _dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def _own(comm, name, shape=(13, 21), seed=0):
    """Everybody's contributions, made without communication."""
    dtype, rng = _dtype(name), np.random.default_rng(seed)
    x = rng.standard_normal((comm.size, *shape))
    if dtype.kind == "c":
        x = x + 1j * rng.standard_normal(x.shape)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        x = rng.integers(info.min, info.max, x.shape, dtype, endpoint=True)
    return list(x.astype(dtype))


def _added(xs):
    total = xs[0]
    with np.errstate(over="ignore"):  # integers wrap
        for x in xs[1:]:
            total = (total + x).astype(total.dtype)
    return total


def _worlds(comm, least=1):
    for n in range(least, comm.size + 1):
        with first_ranks(comm, n) as part:
            if part:
                yield part


@pytest.mark.parametrize("name", FLOATS + INTEGERS)
def test_clean_sums_hold_and_say_how_strongly(comm, name):
    for part in _worlds(comm):
        for seed, shape in enumerate([(13, 21), (700,), (2, 3, 5), (), (4, 0), (1, 9)]):
            xs = _own(part, name, shape, seed)
            verdict = verify_allreduce(part, xs[part.rank], _added(xs), TAG)
            assert verdict and not verdict.missing and verdict.check == "allreduce"
            assert verdict.established == Established.AGREED | Established.COMPUTED
            exact = part.size == 1 or name in INTEGERS
            assert verdict.strength.startswith("exact" if exact else "bound")
            assert "agreement" in verdict.strength


@pytest.mark.parametrize("name", ["float64", "float32", "complex128", "int64", "int32"])
def test_what_mpi_sums_holds(comm, name):
    for part in _worlds(comm):
        for n in (1, 1000, 200000):
            xs = _own(part, name, (n,), n)
            if name.startswith("int"):
                xs = [x // 1000 for x in xs]
            total = np.empty_like(xs[0])
            part.Allreduce(xs[part.rank], total, op=MPI.SUM)
            assert verify_allreduce(part, xs[part.rank], total, TAG)
            counts = balanced_sizes(n, part.size)
            shard = np.empty(counts[part.rank], total.dtype)
            part.Reduce_scatter(xs[part.rank], shard, list(counts), op=MPI.SUM)
            cut = TensorPartition(0, part.size, part.rank, n)
            assert verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG)


@pytest.mark.parametrize("name", FLOATS + INTEGERS)
def test_one_wrong_element_on_all_ranks_is_found_and_shown(comm, name):
    for part in _worlds(comm, least=2):
        xs = _own(part, name)
        right = _added(xs)
        wrong = right.copy()
        wrong[5, 7] += np.asarray(60).astype(wrong.dtype)
        with pytest.raises(CorruptionError) as caught:
            verify_allreduce(part, xs[part.rank], wrong, TAG)
        verdict = caught.value.verdict
        assert not verdict and not verdict.established and verdict.where.rank is None
        (element,) = verdict.where.elements
        assert element.index[:2] == (5, 7)
        item = wrong.real if wrong.dtype.kind == "c" else wrong
        assert element.found == item[5, 7].tobytes()
        assert len(set(part.allgather(str(verdict)))) == 1
        assert verify_allreduce(part, xs[part.rank], right, TAG)


@pytest.mark.parametrize("name", ["float64", "bfloat16", "int32"])
def test_a_wrong_replica_is_named(comm, name):
    for part in _worlds(comm, least=2):
        for culprit in range(part.size):
            xs = _own(part, name)
            result = _added(xs)
            if part.rank == culprit:
                result[3, 4] += np.asarray(60).astype(result.dtype)
            verdict = verify_allreduce(part, xs[part.rank], result, TAG, check=False)
            assert not verdict and verdict.where.rank == culprit
            assert [e.index for e in verdict.where.elements] == [(3, 4)]


def test_replicas_that_differ_within_the_bound_do_not_agree(comm):
    for part in _worlds(comm, least=2):
        xs = _own(part, "float64")
        result = _added(xs)
        if part.rank == part.size - 1:
            result[3, 4] = np.nextafter(result[3, 4], np.inf)
        verdict = verify_allreduce(part, xs[part.rank], result, TAG, check=False)
        assert not verdict and verdict.strength == "agreement"
        assert verdict.where.rank == (part.size - 1 if part.size > 2 else None)


@pytest.mark.parametrize("name", ["float64", "float32", "complex64", "int64", "int32"])
@pytest.mark.parametrize("doubled", [False, True])
def test_a_missing_or_doubled_contribution_names_its_rank(comm, name, doubled):
    for part in _worlds(comm, least=2):
        for culprit in range(part.size):
            xs = _own(part, name, seed=culprit)
            if name.startswith("int"):
                xs = [x // 1000 for x in xs]
            others = xs[:culprit] + xs[culprit + 1 :]
            wrong = _added([*xs, xs[culprit]] if doubled else others)
            verdict = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
            assert not verdict and verdict.where.rank == culprit
            said = "counted twice" if doubled else "missing"
            assert f"contribution of rank {culprit} is {said}" in str(verdict)


@pytest.mark.parametrize("name", ["float64", "float16", "complex128", "int64", "int8"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_wrong_shard_is_named_with_its_element(comm, name, dim):
    for part in _worlds(comm, least=2):
        xs = _own(part, name, (13, 21))
        total = _added(xs)
        cut = TensorPartition(dim, part.size, part.rank, total.shape[dim])
        place = slice(cut.start, cut.stop)
        shard = (total[place] if dim == 0 else total[:, place]).copy()
        verdict = verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG)
        assert verdict.established == Established.COMPUTED
        assert "agreement" not in verdict.strength
        culprit = part.size - 1
        if part.rank == culprit:
            shard[1, 2] += np.asarray(60).astype(shard.dtype)
        verdict = verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG, check=False)
        assert not verdict and verdict.where.rank == culprit
        (element,) = verdict.where.elements
        start = TensorPartition(dim, part.size, culprit, total.shape[dim]).start
        assert element.index[:2] == ((start + 1, 2) if dim == 0 else (1, start + 2))


def test_weighted_and_empty_shards(comm):
    for part in _worlds(comm, least=2):
        sizes = (0,) * (part.size - 1) + (9,)
        xs = _own(part, "float64", (9, 4))
        cut = TensorPartition(0, part.size, part.rank, 9, sizes)
        shard = _added(xs)[cut.start : cut.stop]
        assert verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG)
        if part.rank == part.size - 1:
            shard = shard + 1
        assert not verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG, check=False)


# Exactness


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_integers_in_floats_are_summed_with_zero_tolerance(comm, name):
    """A sum that the bound would let pass is found, since integers this small cannot round."""
    for part in _worlds(comm, least=2):
        rng = np.random.default_rng(3)
        xs = list(rng.integers(-9, 9, (part.size, 40, 100)).astype(_dtype(name)))
        total = _added(xs)
        verdict = verify_allreduce(part, xs[part.rank], total, TAG)
        assert verdict.strength.startswith("exact (floats that hold integers")
        wrong = total.copy()
        wrong[3, 4] += np.asarray(1).astype(wrong.dtype)
        assert not verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
        wrong = total.copy()
        wrong[3, 4] += np.asarray(0.25).astype(wrong.dtype)
        assert not verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)


def test_integers_too_large_for_their_floats_are_left_to_the_bound(comm):
    for part in _worlds(comm, least=2):
        xs = [np.full(50, 2.0**24 - 1 - r, np.float32) for r in range(part.size)]
        verdict = verify_allreduce(part, xs[part.rank], _added(xs), TAG)
        assert verdict.strength.startswith("bound")


@pytest.mark.parametrize("name", ["int8", "uint16", "int32"])
def test_narrow_integers_may_wrap_and_are_still_checked(comm, name):
    for part in _worlds(comm, least=2):
        xs = _own(part, name, (30, 30))
        total = _added(xs)
        verdict = verify_allreduce(part, xs[part.rank], total, TAG)
        assert "modulo" in verdict.strength
        rng = np.random.default_rng(5)
        for n in (1, 2, 8):
            wrong = total.copy()
            top = np.array(-1 << 8 * total.itemsize - 1, np.int64).astype(total.dtype)
            wrong.reshape(-1)[rng.choice(900, n, False)] ^= top
            assert not verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)


@pytest.mark.parametrize("op", ["MAX", "MIN"])
@pytest.mark.parametrize("name", ["float64", "float32", "float16", "int32", "uint64"])
def test_extremes_are_exact(comm, op, name):
    for part in _worlds(comm):
        xs = _own(part, name)
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
    for part in _worlds(comm, least=2):
        xs = _own(part, "float64")
        best = np.max(np.array(xs), axis=0)
        xs[0][2, 3] = np.nan
        for value in (np.nan, -1e9):  # what MPI makes of it depends on its order
            best[2, 3] = value
            verdict = verify_allreduce(part, xs[part.rank], best, TAG, op=MPI.MAX)
            assert verdict.holds and verdict.missing[0].startswith("1 elements")
        best[4, 4] = np.nan
        assert not verify_allreduce(part, xs[part.rank], best, TAG, op=MPI.MAX, check=False)


@pytest.mark.parametrize("name", ["uint8", "int32", "uint64", "bool"])
def test_xor_is_exact(comm, name):
    for part in _worlds(comm):
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


# NaN, Inf, overflow


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_what_is_not_finite_must_come_out_as_ieee_says(comm, name):
    for part in _worlds(comm, least=2):
        xs = _own(part, name, (20, 40))
        xs[0][1, 1], xs[-1][2, 2], xs[0][3, 3], xs[-1][3, 3] = np.nan, np.inf, np.inf, -np.inf
        with np.errstate(all="ignore"):
            total = _added(xs)
        verdict = verify_allreduce(part, xs[part.rank], total, TAG)
        assert verdict.holds and verdict.missing[0].startswith("3 elements")
        for place, value in [((1, 1), 0.0), ((2, 2), np.nan), ((3, 3), np.inf), ((2, 2), -np.inf)]:
            wrong = total.copy()
            wrong[place] = value
            found = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
            assert not found and "not finite" in str(found)
        # Elements beside them are still held to the bound.
        wrong = total.copy()
        wrong[1, 2] += np.asarray(50).astype(wrong.dtype)
        found = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
        assert not found and [e.index for e in found.where.elements] == [(1, 2)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["float64", "float16"])
def test_nan_from_finite_contributions_is_a_failure(comm, name, value):
    for part in _worlds(comm, least=2):
        xs = _own(part, name)
        wrong = _added(xs)
        wrong[4, 4] = value
        found = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
        assert not found and "[4, 4]" in str(found)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_sums_that_overflow_and_the_largest_numbers_are_no_failures(comm, name):
    for part in _worlds(comm, least=2):
        dtype = _dtype(name)
        largest = ml_dtypes.finfo(dtype).max
        xs = [np.full((6, 50), largest, dtype) * dtype.type(0.9 if r < 2 else 0)
              for r in range(part.size)]  # fmt: skip
        xs[1] = -xs[1]
        xs[1][2, 2] = xs[0][2, 2]
        with np.errstate(all="ignore"):
            total = _added(xs)
        assert np.isinf(total[2, 2])
        verdict = verify_allreduce(part, xs[part.rank], total, TAG)
        assert verdict.holds and "1 elements whose sum may have overflowed" in verdict.missing[0]
        xs[1][2, 2] = -xs[0][2, 2]
        total[2, 2] = 0
        assert not verify_allreduce(part, xs[part.rank], total, TAG).missing
        total[3, 3] = xs[0][3, 3]
        assert not verify_allreduce(part, xs[part.rank], total, TAG, check=False)


# Bad input


def _refused(comm, words, contribution, result, **more):
    with pytest.raises(UsageError, match=words) as caught:
        verify_allreduce(comm, contribution, result, more.pop("tag", TAG), **more)
    assert len(set(comm.allgather(str(caught.value)))) == 1


def test_bad_input_is_refused_on_every_rank(comm):
    x = np.ones((4, 6))
    last = comm.rank == comm.size - 1
    _refused(comm, "BAND", x, x, op=MPI.BAND)
    _refused(comm, "PROD", x, x, op=MPI.PROD)
    _refused(comm, "no check is known for allreduce of bool", x > 0, x > 0)
    _refused(comm, "complex128 by MPI.MAX", x + 1j, x + 1j, op=MPI.MAX)
    _refused(comm, "float8", *2 * (x.astype(ml_dtypes.float8_e5m2),))
    _refused(comm, "one shape", x, x[:2])
    _refused(comm, "one dtype", x, x.astype("f4"))
    _refused(comm, "spimpi.Tag", x, x, tag="hidden")
    _refused(comm, "expected a numpy array", [1.0], x)
    if comm.size > 1:
        _refused(comm, f"rank {comm.size - 1}: contribution and result", x, x[:2] if last else x)
        _refused(comm, "ranks differ in shape", *2 * (x[:2] if last else x,))
        _refused(comm, "ranks differ in dtype", *2 * (x.astype("f4") if last else x,))
        _refused(comm, "ranks differ in tag", x, x, tag=Tag(name="b") if last else TAG)
        _refused(comm, "ranks differ in settings: rank.* gave op MPI.SUM; rank.* gave op MPI.MAX", x, x, op=MPI.MAX if last else MPI.SUM)
        cut = TensorPartition(0, comm.size, 0, 4)
        with pytest.raises(UsageError, match="one shard a rank"):
            verify_reduce_scatter(comm, x, x[: cut.size], cut, TAG)
    with pytest.raises(UsageError, match="reduce_scatter of float64 by MPI.MAX"):
        cut = TensorPartition(0, comm.size, comm.rank, 4)
        verify_reduce_scatter(comm, x, x[cut.start : cut.stop], cut, TAG, op=MPI.MAX)


def test_layouts_and_threads_change_no_verdict(comm):
    for part in _worlds(comm, least=2):
        xs = _own(part, "float64", (60, 70))
        total = _added(xs)
        layouts = [np.asfortranarray, np.ascontiguousarray, lambda a: a[::-1].copy()[::-1]]
        own = layouts[part.rank % 3](xs[part.rank])
        result = layouts[(part.rank + 1) % 3](total)
        own.flags.writeable = result.flags.writeable = False
        assert verify_allreduce(part, own, result, TAG, threads=1 + part.rank % 2)


def test_no_clean_sum_alarms_over_many_seeds(comm):
    for seed in range(150):
        name = ["float64", "float32", "float16", "bfloat16"][seed % 4]
        xs = _own(comm, name, (1 + seed % 5, 40), seed)
        order = np.random.default_rng(seed).permutation(comm.size)
        assert verify_allreduce(comm, xs[comm.rank], _added([xs[i] for i in order]), TAG)


def test_one_collective_of_fixed_size_is_made_where_all_is_well(comm, monkeypatch):
    calls = []

    class Counting:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            if name[0].isupper() or name in ("allgather", "bcast", "allreduce"):
                calls.append(name)
            return getattr(self.inner, name)

    class Session:
        pass

    session = Session()
    session.comm, session.size = Counting(comm), comm.size
    monkeypatch.setattr("spimpi.checks.pending.session_of", lambda comm, ctx: session)
    xs = _own(comm, "float64", (300, 300))
    assert verify_allreduce(comm, xs[comm.rank], _added(xs), TAG)
    assert calls == ["Allgather"]


# exact_allreduce


def _ragged(name, n_addends, shape=(11, 17), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_addends, *shape)) * 2.0 ** rng.integers(-9, 9, (n_addends, *shape))
    if _dtype(name).kind == "c":
        x = x * (1 - 0.3j)
    return list(x.astype(_dtype(name)))


@pytest.mark.parametrize("name", FLOATS)
def test_an_exact_sum_depends_on_the_addends_alone(comm, name):
    for part in _worlds(comm):
        for seed in range(4):
            n_addends = part.size + 3 * seed
            xs = _ragged(name, n_addends, seed=seed)
            expected = exact_allreduce(MPI.COMM_SELF, xs)
            rng = np.random.default_rng(seed)
            owner = np.concatenate(
                [np.arange(part.size), rng.integers(0, part.size, n_addends - part.size)]
            )
            owner = rng.permutation(owner)
            mine = [x for x, rank in zip(xs, owner) if rank == part.rank]
            found = exact_allreduce(part, mine[::-1], tag=TAG)
            assert found.dtype == xs[0].dtype and found.shape == xs[0].shape
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_an_exact_sum_is_as_near_as_stated(comm, name):
    unit = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    for seed in range(5):
        xs = _ragged(name, 7 * comm.size, seed=seed)
        found = exact_allreduce(comm, xs[comm.rank :: comm.size]).astype(float)
        wide = [x.astype(float) for x in xs]
        largest = np.max(np.abs(wide), axis=(0, 2))
        for row in range(11):
            for column in range(17):
                exact = fsum(x[row, column] for x in wide)
                bound = len(xs) * 2.0**-52 * largest[row] + 1.001 * unit[name] * abs(exact)
                assert abs(found[row, column] - exact) <= bound + 2.0**-24 * (name == "float16")


def test_an_exact_sum_is_rounded_once():
    """Against rational numbers: halves between two numbers of the dtype, and just beside them."""
    for name in ("float64", "float32", "float16", "bfloat16"):
        dtype = _dtype(name)
        digits = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}[name]
        top = 61
        values = []
        for low in (0, 1, -1, 3, 1 << 9):
            for lead in (1 << digits, (1 << digits) + 1, (1 << digits) + 2, (1 << digits) + 3):
                for tail in (0, 1 << (top - digits - 2), 1 << (top - digits - 1)):
                    values.append((lead << (top - digits - 1)) + tail + low)
        q = np.array([*values, *(-v for v in values), 0], np.int64).reshape(1, -1)
        found = rounded_back(q, np.array([0]), 52, dtype)
        for value, one in zip(q[0].tolist(), found[0]):
            spacing = 1 << max(0, abs(value).bit_length() - digits)
            quotient, rest = divmod(abs(value), spacing)
            up = rest * 2 > spacing or (rest * 2 == spacing and quotient % 2 == 1)
            nearest = (quotient + up) * spacing * (1 if value >= 0 else -1)
            assert float(one) == nearest * 2.0**-52
        assert not np.signbit(found[0, -1].astype(float))


def test_exact_sums_in_place_and_of_odd_shapes(comm):
    for shape in [(), (5,), (3, 0), (2, 3, 4)]:
        x = np.full(shape, 0.1 * (comm.rank + 1))
        expected = exact_allreduce(comm, x)
        assert exact_allreduce(comm, x, x) is x
        assert x.tobytes() == expected.tobytes()
    tiny = np.array([[5e-324, -5e-324], [2.0**-1022, 0.0]])
    assert exact_allreduce(comm, tiny).tolist() == (tiny * comm.size).tolist()
    huge = np.array([1e308, 1.0])
    assert exact_allreduce(comm, huge)[0] == (1e308 if comm.size == 1 else np.inf)


def test_exact_sums_refuse_what_has_no_exact_sum(comm):
    x = np.ones((3, 4))
    for value in (np.nan, np.inf):
        bad = x.copy()
        if comm.rank == comm.size - 1:
            bad[1, 2] = value
        with pytest.raises(UsageError, match=f"row 1, given by rank {comm.size - 1}"):
            exact_allreduce(comm, bad)
    with pytest.raises(UsageError, match="an exact sum is of float64"):
        exact_allreduce(comm, np.arange(3))
    with pytest.raises(UsageError, match="one shape"):
        exact_allreduce(comm, [x, x[:1]])
    with pytest.raises(UsageError, match="at least one addend"):
        exact_allreduce(comm, [])
    if comm.size > 1:
        with pytest.raises(UsageError, match="do not add the same"):
            exact_allreduce(comm, x[: 2 + (comm.rank == 1)])


@pytest.mark.parametrize("fault", ["flip", "missing", "replica", "maximum"])
def test_a_faulty_mpi_cannot_spoil_an_exact_sum(comm, fault, monkeypatch):
    if comm.size < 2:
        pytest.skip("needs two ranks")

    class Faulty:
        rank, size = comm.rank, comm.size

        def __getattr__(self, name):
            return getattr(comm, name)

        def Allreduce(self, send, receive, op):
            comm.Allreduce(send, receive, op=op)
            if op == MPI.MAX and fault == "maximum":
                receive += 1 << 32
            if op == MPI.SUM and send is not MPI.IN_PLACE:
                if fault == "flip":
                    receive.reshape(-1)[3] ^= 1 << 40
                if fault == "missing":
                    receive -= comm.bcast(send, 1)
                if fault == "replica" and comm.rank == 1:
                    receive.reshape(-1)[0] += 1

    class Session:
        pass

    session = Session()
    session.comm = Faulty()
    monkeypatch.setattr("spimpi.exact_sum.session_of", lambda comm, ctx: session)
    x = np.random.default_rng(comm.rank).standard_normal((4, 9))
    words = {"flip": "not the sum", "missing": "rank 1 is missing", "replica": "not the sum",
             "maximum": "maxima of the rows"}  # fmt: skip
    with pytest.raises(CorruptionError, match=words[fault]) as caught:
        exact_allreduce(comm, x, tag=TAG)
    if fault == "replica":
        assert caught.value.verdict.where.rank == 1


def test_the_names_are_spimpis():
    for name in ("verify_allreduce", "verify_reduce_scatter", "exact_allreduce", "sketch"):
        assert callable(getattr(spimpi, name))
