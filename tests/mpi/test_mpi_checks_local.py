"""Replicas, data at rest, and products of integers."""

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted import FAULTS, corruption, cut, data, refused, same_on_all, worlds

import spimpi
from spimpi import Tag, TensorPartition
from spimpi.checks.matmul import _odd_words
from spimpi.trace.schema import Established

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]

TAG = Tag(name="norm", layer=1, step=5)


def test_equal_replicas_agree_on_any_number_of_ranks(comm):
    """Also on an even one, where their XOR is 0."""
    for part in worlds(comm):
        for x in (data((5, 3)), np.zeros((0, 4)), np.array(2.5), data((3,), np.complex128)):
            verdict = spimpi.verify_replicas(part, x, TAG)
            compares = part.size > 1 and x.size > 0
            assert verdict and verdict.established == (Established.AGREED if compares else 0)
            assert bool(verdict.missing) != compares
            assert verdict.expected == spimpi.fingerprint(x, TAG)


@pytest.mark.parametrize("name", FAULTS)
def test_a_replica_gone_wrong_is_named(comm, name):
    for part in worlds(comm, 3):
        for victim in range(part.size):
            x = data((5, 3))
            if part.rank == victim:
                FAULTS[name](x, data((5, 3), seed=1))
            with corruption(part, victim, "replicas") as caught:
                spimpi.verify_replicas(part, x, TAG)
            assert f"rank {victim} differs from the majority" in str(caught.value)
            assert caught.value.verdict.expected == spimpi.fingerprint(data((5, 3)), TAG)


@pytest.mark.mpi(min_size=2)
def test_of_two_replicas_that_differ_nobody_is_named(comm):
    for part in worlds(comm, 2):
        if part.size == 2:
            with corruption(part, None, "replicas") as caught:
                spimpi.verify_replicas(part, data((3,)) + part.rank, TAG)
            assert "ranks 0, 1 differ, and nothing tells which is right" in str(caught.value)
            assert caught.value.verdict.expected != caught.value.verdict.actual


@pytest.mark.mpi(min_size=2)
def test_replicas_of_other_shapes_are_refused(comm):
    with refused(comm, r"rank 1 gave blocks of global shape \(3,\)"):
        spimpi.verify_replicas(comm, np.ones(3 if comm.rank == 1 else 4), TAG)


def test_data_at_rest_hold_until_they_change(comm):
    for part in worlds(comm):
        shape = (40, 4000)
        where = TensorPartition(0, part.size, part.rank, 40)
        x = cut(data(shape, np.float64), where)
        watch = spimpi.at_rest(x, TAG, where)
        assert watch.fingerprint == spimpi.fingerprint(x, TAG, where)
        assert watch.verify() and watch.verify(part)
        assert watch.verify().established == Established.MOVED
        victim = part.size - 1
        if part.rank == victim:
            x[-1, -1] += 1
            with pytest.raises(spimpi.CorruptionError, match="changed since it was") as caught:
                watch.verify()
            assert caught.value.verdict.actual == spimpi.fingerprint(x, TAG, where)
        else:
            assert watch.verify()
        with corruption(part, victim, "at rest") as caught:
            watch.verify(part)
        assert "along axis 1" in str(caught.value) and "..4000" in str(caught.value)
        assert not watch.verify(part, check=False)


@pytest.mark.parametrize("everywhere", [True, False])
def test_what_is_no_context_is_refused_on_every_rank(comm, everywhere):
    bad = everywhere or comm.rank == comm.size - 1
    with refused(comm, "ctx= is a DistributedContext, or None, found int"):
        spimpi.verify_replicas(comm, np.ones(3), TAG, ctx=3 if bad else None)
    assert spimpi.verify_replicas(comm, np.ones(3), TAG)


@pytest.mark.parametrize("x", [np.array(1.5), np.zeros((0, 3)), np.ones(7), np.ones((3, 4)).T])
def test_small_and_empty_arrays_are_watched_whole(comm, x):
    x = x.copy(order="K")
    watch = spimpi.at_rest(x, TAG)
    assert len(watch.words) == 1 and watch.verify(comm)
    x[...] = 2
    assert bool(watch.verify(comm, check=False)) == (x.size == 0)


def test_what_cannot_be_watched_is_refused(comm):
    with pytest.raises(spimpi.UsageError, match="object"):
        spimpi.at_rest(np.array([object()]), TAG)
    with pytest.raises(spimpi.UsageError, match="expected a spimpi.Tag"):
        spimpi.at_rest(np.ones(3), "cache")
    with pytest.raises(spimpi.UsageError, match="must have"):
        spimpi.at_rest(np.ones(3), TAG, TensorPartition(0, 2, 0, 4))


def _product(rank, dtype=np.float64, rows=6, k=9, n=5):
    rng = np.random.default_rng(rank)
    x = rng.integers(-500, 500, (rows, k)).astype(dtype)
    w = rng.integers(-500, 500, (k, n)).astype(dtype)
    return x, w, x @ w


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.int32])
def test_right_products_hold_and_each_rank_has_its_own_shapes(comm, dtype):
    for part in worlds(comm):
        x, w, y = _product(part.rank, dtype, rows=2 + part.rank, n=3 + part.rank)
        verdict = spimpi.verify_matmul(part, x, w, y, TAG)
        assert verdict and verdict.established == Established.COMPUTED
        assert spimpi.verify_matmul(part, x, np.asfortranarray(w), y, TAG)
        assert spimpi.verify_matmul(part, x[0], w, y[0], TAG)
        assert spimpi.verify_matmul(part, x[None], w, y[None], TAG)
        weight = spimpi.project_weight(w, TAG)
        assert spimpi.verify_matmul(part, x, weight, y, Tag(name="norm", layer=1, step=6))
        assert spimpi.verify_matmul(part, x[:0], w, y[:0], TAG)


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_a_wrong_element_is_named_with_its_rank_and_bytes(comm, dtype):
    for part in worlds(comm):
        for victim in range(part.size):
            x, w, y = _product(part.rank, dtype)
            right = y.copy()
            if part.rank == victim:
                y[4, 2] += 1
            with corruption(part, victim, "matmul") as caught:
                spimpi.verify_matmul(part, x, w, y, TAG)
            (element,) = caught.value.verdict.where.elements
            assert element.index == (4, 2) and element.rank == victim
            if part.rank == victim:
                assert element.expected == right[4, 2].tobytes()
                assert element.found == y[4, 2].tobytes()
            assert "1 row of the product wrong: 4" in str(caught.value)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, 2.0**60])
def test_an_element_of_the_product_that_is_no_integer_is_wrong(comm, value):
    x, w, y = _product(0)
    y[1, 1] = value
    with corruption(comm, 0, "matmul") as caught:
        spimpi.verify_matmul(comm, x, w, y, TAG)
    assert caught.value.verdict.where.elements[0].index == (1, 1)


def test_a_fraction_where_the_product_is_zero_is_wrong(comm):
    """As an integer it would be 0, and right."""
    x, w, y = _product(0)
    x[3], y[3] = 0, 0
    y[3, 0] = 0.5
    with corruption(comm, 0, "matmul") as caught:
        spimpi.verify_matmul(comm, x, w, y, TAG)
    assert caught.value.verdict.where.elements[0].index == (3, 0)


@pytest.mark.parametrize("name", ["flip", "swap", "shift", "zeros", "stale"])
def test_faults_of_a_product_are_found(comm, name):
    for part in worlds(comm):
        x, w, y = _product(part.rank, np.int64)
        previous = _product(77, np.int64)[2]
        if part.rank == 0:
            FAULTS[name](y, previous)
        with corruption(part, 0, "matmul"):
            spimpi.verify_matmul(part, x, w, y, TAG)


def test_floats_that_are_no_integers_or_may_round_are_refused(comm):
    last, at = comm.rank == comm.size - 1, f"rank {comm.size - 1}"
    x, w, y = _product(0)
    half = x.copy()
    half[2, 3] = 0.5
    with refused(comm, f"{at}: x has elements that are not integers.*row 2, column 3.*allreduce"):
        spimpi.verify_matmul(comm, half if last else x, w, y, TAG)
    with refused(comm, "w has elements that are not integers"):
        spimpi.verify_matmul(comm, x, w + (0.25 if last else 0), y, TAG)
    large = x.astype(np.float32) * 1000
    with refused(comm, f"{at}: sums of this product may round in float32"):
        spimpi.verify_matmul(comm, large if last else x, w, (large @ w).astype(np.float32)
                             if last else y, TAG)  # fmt: skip
    with refused(comm, f"{at}: y = x @ w has shapes"):
        spimpi.verify_matmul(comm, x, w, y[:, :2] if last else y, TAG)
    with refused(comm, f"{at}: .*found dtype complex128"):
        spimpi.verify_matmul(comm, x + 0j if last else x, w, y, TAG)
    with refused(comm, f"{at}: a weight has two axes"):
        spimpi.verify_matmul(comm, x, w[0] if last else w, y, TAG)
    assert spimpi.verify_matmul(comm, x, w, y, TAG)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int32])
def test_products_that_wrap_are_refused_and_what_has_room_is_held(comm, dtype):
    last, most = comm.rank == comm.size - 1, np.iinfo(dtype).max
    x = np.ones((6, 3), dtype)
    x[2] = most  # of this row alone the sums have no room
    w = np.array([[1, 2], [3, 0], [1, 0]], dtype)
    with refused(comm, "of this dtype wrap: .* has no room for the sums of . elements? of row"):
        spimpi.verify_matmul(comm, x, w, x @ w, TAG)
    x[2] = 1
    assert spimpi.verify_matmul(comm, x, w, x @ w, TAG)
    x[2] = most if last else 1
    y = x @ w
    y[5, 1] ^= last
    with corruption(comm, comm.size - 1, "matmul") as caught:
        spimpi.verify_matmul(comm, x, w, y, TAG)
    assert [e.index for e in caught.value.verdict.where.elements] == [(5, 1)]
    assert "has no room for the sums" in str(caught.value)


def test_a_wrong_element_after_many_rows_that_wrapped_is_named(comm):
    last = comm.rank == comm.size - 1
    x, w = np.ones((40, 4), np.int8), np.ones((4, 3), np.int8)
    x[:20] = 100  # more rows than are shown
    y = x @ w
    y[30, 1] = 77 if last else 4
    with corruption(comm, comm.size - 1, "matmul") as caught:
        spimpi.verify_matmul(comm, x, w, y, TAG)
    assert [e.index for e in caught.value.verdict.where.elements] == [(30, 1)]
    y[30, 1] = 4
    with refused(comm, "no room for the sums of 60 elements"):
        spimpi.verify_matmul(comm, x, w, y, TAG)


@pytest.mark.parametrize("large", [False, True])
def test_what_has_room_is_held_though_floats_do_not_tell_its_sums(comm, large):
    """Of large terms that cancel, the sums in float64 are too far off to tell right from wrong."""
    x = np.full((30, 3), 1 << 20)
    x[:, 2] = 1
    x[:20, 2] = 1 << 33
    w = np.array([[1 << 40], [-(1 << 40)], [1]]) if large else np.array([[1], [-1], [1]])
    y = (x @ w).astype(np.int32)
    with refused(comm, "int32 has no room for the sums of 20 elements"):
        spimpi.verify_matmul(comm, x, w, y, TAG)
    y[25, 0] += comm.rank == 0
    with corruption(comm, 0, "matmul") as caught:
        spimpi.verify_matmul(comm, x, w, y, TAG)
    assert [e.index for e in caught.value.verdict.where.elements] == [(25, 0)]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("in_batch", [False, True])
def test_a_product_that_wrapped_on_one_rank_hides_no_wrong_one_on_another(comm, in_batch):
    for part in worlds(comm, 2):
        for wraps in range(part.size):
            victim = (wraps + 1) % part.size
            x, w = np.ones((4, 4), np.int8), np.ones((4, 3), np.int8)
            if part.rank == wraps:
                x[0] = 100
            y = x @ w
            if part.rank == victim:
                y[2, 1] = 77
            with corruption(part, victim, "matmul") as caught:
                if in_batch:
                    with spimpi.DistributedContext(part) as ctx, ctx.batch():
                        spimpi.verify_matmul(part, x, w, y, TAG, ctx=ctx)
                else:
                    spimpi.verify_matmul(part, x, w, y, TAG)
            assert [e.index for e in caught.value.verdict.where.elements] == [(2, 1)]
            y[2, 1] = 4
            with refused(part, f": rank {wraps}: products of this dtype wrap"):
                spimpi.verify_matmul(part, x, w, y, TAG)


WIDE = pytest.param(
    "longdouble", marks=pytest.mark.skipif(np.dtype("g").itemsize == 8, reason="is float64 here")
)


@pytest.mark.parametrize("name", [WIDE, "complex128", "clongdouble", "i4,i4", "O"])
@pytest.mark.parametrize("which", ["x", "w", "y", "project_weight"])
def test_dtypes_that_no_product_is_checked_in_are_refused_by_name(comm, which, name):
    """A longdouble holds what neither int64 nor float64 does."""
    last, dtype = comm.rank == comm.size - 1, np.dtype(name)
    given = dict(zip("xwy", (np.zeros((2, 3)), np.zeros((3, 4)), np.zeros((2, 4)))))
    if which == "project_weight":
        with pytest.raises(spimpi.UsageError, match="w of a matmul's check holds integers"):
            spimpi.project_weight(np.zeros((3, 4), dtype), TAG)
        return
    if last:
        given[which] = np.zeros(given[which].shape, dtype)
    found = f"rank {comm.size - 1}: {which} of a matmul's check holds integers.*found dtype "
    with refused(comm, found + re.escape(str(dtype))):
        spimpi.verify_matmul(comm, *given.values(), TAG)


def test_products_of_bool_and_in_the_memory_of_an_input_are_refused(comm):
    x, w = np.ones((2, 3), bool), np.ones((3, 2), bool)
    with refused(comm, "products of this dtype wrap: of bool"):
        spimpi.verify_matmul(comm, x, w, x @ w, TAG)
    assert spimpi.verify_matmul(comm, x, w, x.astype(int) @ w.astype(int), TAG)
    same = np.eye(3)
    with refused(comm, "`x` and `y` share memory.*: give a copy of `x`"):
        spimpi.verify_matmul(comm, same, np.eye(3), same, TAG)
    with refused(comm, "`w` and `y` share memory"):
        spimpi.verify_matmul(comm, np.eye(3), spimpi.project_weight(same, TAG), same, TAG)


def test_an_empty_sum_is_zero(comm):
    x, w = np.empty((2, 0)), np.empty((0, 3))
    assert spimpi.verify_matmul(comm, x, w, np.zeros((2, 3)), TAG).kinds == ["computed"]
    y = np.zeros((2, 3))
    y[1, 2] = comm.rank == comm.size - 1
    with corruption(comm, comm.size - 1, "matmul") as caught:
        spimpi.verify_matmul(comm, x, w, y, TAG)
    (element,) = caught.value.verdict.where.elements
    assert element.index == (1, 2) and caught.value.verdict.where.n_wrong == 1


def test_unsigned_integers_too_large_for_the_floats_of_their_product_are_refused(comm):
    x = np.array([[2**64 - 1]], np.uint64)
    with refused(comm, "sums of this product may round in float64"):
        spimpi.verify_matmul(comm, x, np.array([[1.0]]), np.array([[float(2**64)]]), TAG)


def test_the_odd_words_are_the_linear_fingerprints(comm):
    words = _odd_words(TAG, 9).view(np.uint64)
    units = np.eye(9, dtype=np.int64)
    assert [int(w) for w in words] == [spimpi.linear_fingerprint(row, TAG) for row in units]


@given(st.data())
@settings(
    max_examples=20, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_single_wrong_element_of_any_product_is_found(comm, draw):
    shape = [draw.draw(st.integers(1, 6)) for _ in range(3)]
    x, w, y = _product(3, np.int64, *shape)
    assert spimpi.verify_matmul(comm, x, w, y, TAG)
    row, column = (draw.draw(st.integers(0, n - 1)) for n in y.shape)
    y[row, column] ^= np.int64(1 << draw.draw(st.integers(0, 62)))
    verdict = spimpi.verify_matmul(comm, x, w, y, TAG, check=False)
    assert not verdict and verdict.where.elements[0].index == (row, column)
    same_on_all(comm, str(verdict))
