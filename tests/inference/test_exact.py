"""Exact arithmetic against Python's unbounded integers and fractions."""

from fractions import Fraction

import numpy as np
import pytest

from spimpi.errors import UsageError
from spimpi.fingerprint.tag import GOLDEN, MASK, mix
from spimpi.inference import exact

CUTS = (2, 3, 5, 7, 64)
INF_BITS = 0x7F800000


def integers(shape, b, seed=0, dtype=np.float64):
    """Integers of at most 2**b, both ends included."""
    return np.random.default_rng(seed).integers(-(2**b), 2**b, shape, endpoint=True).astype(dtype)


def floats(shape, seed=0):
    """float32 of very different sizes from row to row."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-20, 20, (shape[0], 1))).astype("f4")


def product(xq, wq):
    out = np.full((len(xq), len(wq)), np.nan)
    exact.matmul(xq, wq, out, exact.Scratch.for_matrices([wq.shape]))
    return out


def big_product(xq, wq):
    x, w = xq.astype(np.int64).astype(object), wq.astype(np.int64).astype(object)
    return x @ w.T


def absmax(x):
    out = np.empty(len(x), np.uint32)
    exact.row_absmax(x, out)
    return out


def quantized(x, b, largest=None):
    xq, exps = np.full(x.shape, np.nan), np.full(len(x), 99, np.int32)
    n_bad = exact.quantize_rows(x, absmax(x) if largest is None else largest, b, xq, exps)
    return xq, exps, n_bad


def signed(word):
    return (int(word) + 2**63) % 2**64 - 2**63


def linear_weights(key, n, first=0):
    return [mix((key + (i + 1) * GOLDEN) & MASK) | 1 for i in range(first, first + n)]


def shuffled_parts(n, n_parts, seed):
    """A cut of range(n) into parts, uneven and in random order, perhaps empty ones."""
    rng = np.random.default_rng(seed)
    return np.split(rng.permutation(n), np.sort(rng.integers(0, n + 1, n_parts - 1)))


def check_product(xq, wr, y, r):
    """(rows that fail, the first or -1, elements that are no exact sum; both sides over the rows)."""
    sides = [(*exact.row_product(a, r), exact.row_input(b, wr)) for a, b in zip(y, xq)]
    bad = [i for i, (left, n_wrong, right) in enumerate(sides) if left != right or n_wrong]
    left, n_wrong, right = (sum(int(v) for v in column) for column in zip(*sides))
    return len(bad), bad[0] if bad else -1, n_wrong, left % 2**64, right % 2**64


def projected(wq, r):
    """W^T r mod 2**64 of integers."""
    return (wq.astype(np.int64) * r[:, None]).sum(axis=0)


class Checked:
    """A product with all that its check wants, to plant faults in."""

    def __init__(self, n_rows=5, k=37, n=29, key=77):
        b = exact.bits(k)
        self.xq, self.wq = integers((n_rows, k), b, 1), integers((n, k), b, 2, np.float32)
        self.y = product(self.xq, self.wq)
        self.r = exact.odd_vector(key, n)
        self.wr = projected(self.wq, self.r)
        self.found, self.expected = np.zeros(2, np.uint64), np.zeros(2, np.uint64)

    def check(self):
        *counts, left, right = check_product(self.xq, self.wr, self.y, self.r)
        self.found[1], self.expected[1] = left, right
        return tuple(counts)


# bits


def test_bits_are_the_ones_of_the_specification():
    sizes = (1, 32, 33, 64, 1024, 2048, 2049, 2816, 28672, 131072)
    assert [exact.bits(k) for k in sizes] == [24, 24, 23, 23, 21, 21, 20, 20, 19, 18]


def test_no_sum_exceeds_2_to_53_and_one_more_bit_would():
    for k in [*range(1, 300), *(2**i + d for i in range(8, 40) for d in (-1, 0, 1))]:
        b = exact.bits(k)
        assert k * 2 ** (2 * b) <= 2**53
        rounded_up = 2 ** (k - 1).bit_length()
        assert b == 24 or rounded_up * 2 ** (2 * b + 2) > 2**53


def test_an_inner_size_below_one_is_refused():
    with pytest.raises(UsageError, match="found 0"):
        exact.bits(0)


# Scaling


def test_row_absmax_orders_nan_and_inf_above_all_numbers():
    x = np.array([[1, -3], [0, -0.0], [np.inf, 1], [np.nan, np.inf], [-1e-45, 0]], np.float32)
    largest = absmax(x)
    assert largest[:2].view(np.float32).tolist() == [3.0, 0.0]
    assert largest[2] == INF_BITS and largest[3] > INF_BITS
    assert largest[4] == 1
    assert absmax(np.array([[-np.nan]], np.float32))[0] > INF_BITS
    assert absmax(np.empty((3, 0), np.float32)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("b", [18, 21, 24])
def test_integers_are_the_scaled_values_rounded_half_to_even(b):
    x = np.concatenate([floats((20, 33)), np.float32(1e-38) * floats((4, 33), 1) / 1e20])
    x[5] = np.arange(33) * np.float32(2.0**-24) + np.float32(0.5)  # halves for b < 24
    x[6, :] = np.finfo(np.float32).max
    x[7, :] = np.finfo(np.float32).smallest_subnormal
    x[8, 1:] = 0
    x[9, :3] = [1, 2**-25, -(2**-25)]  # become zeros next to a one
    xq, exps, n_bad = quantized(x, b)
    assert n_bad == 0
    for row, values in enumerate(x):
        e = int(exps[row])
        top = max(abs(Fraction(float(v))) for v in values)
        assert top < Fraction(2) ** e and top >= Fraction(2) ** (e - 1) or top == 0 == e
        for i, value in enumerate(values):
            assert xq[row, i] == round(Fraction(float(value)) * Fraction(2) ** (b - e))
    assert np.abs(xq).max() <= 2**b
    assert not np.signbit(xq[xq == 0]).any()


def test_rounding_may_reach_two_to_the_b_and_no_more():
    x = np.array([[np.nextafter(np.float32(1), np.float32(0)), -0.99999994]], np.float32)
    assert quantized(x, 20)[0].tolist() == [[2**20, -(2**20)]]
    assert quantized(x, 24)[0].tolist() == [[2**24 - 1, 1 - 2**24]]


def test_a_zero_row_is_zeros_with_exponent_zero():
    xq, exps, n_bad = quantized(np.array([[0.0, -0.0], [0, 2]], np.float32), 21)
    assert (exps.tolist(), n_bad) == ([0, 2], 0)
    assert xq[0].tolist() == [0, 0] and not np.signbit(xq[0]).any()


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_counted_and_zeroed(value):
    x = floats((4, 9))
    x[2, 5] = value
    xq, exps, n_bad = quantized(x, 21)
    assert n_bad == 1 and exps[2] == 0 and not xq[2].any()
    clean = quantized(np.delete(x, 2, 0), 21)[0]
    assert (np.delete(xq, 2, 0) == clean).all()


def test_the_exponent_is_that_of_the_global_row_however_it_is_cut():
    x = floats((6, 128))
    whole, exps, _ = quantized(x, 21)
    for n_parts in CUTS:
        parts = shuffled_parts(128, n_parts, n_parts)
        largest = np.max([absmax(np.ascontiguousarray(x[:, p])) for p in parts], axis=0)
        assert (largest == absmax(x)).all()
        for p in parts:
            xq, part_exps, _ = quantized(np.ascontiguousarray(x[:, p]), 21, largest)
            assert (xq == whole[:, p]).all() and (part_exps == exps).all()


def test_slices_and_read_only_arrays_are_scaled_without_a_copy():
    wide = floats((12, 64))
    wide.setflags(write=False)
    for view in (wide[:, 7:40], wide[::3], wide[2:9, :1], wide[::-1, 60:]):
        copy = np.ascontiguousarray(view)
        assert (absmax(view) == absmax(copy)).all()
        assert (quantized(view, 21)[0] == quantized(copy, 21)[0]).all()


def test_rows_whose_elements_are_apart_are_refused():
    for view in (floats((8, 8)).T, floats((8, 8))[:, ::2]):
        with pytest.raises(ValueError, match="adjacent"):
            absmax(view)
        with pytest.raises(ValueError, match="adjacent"):
            quantized(view, 21, np.ones(len(view), np.uint32))


@pytest.mark.parametrize("shape", [(300, 700), (3, 70000), (0, 5), (5, 1)])
def test_weights_are_scaled_like_rows_and_carried_as_float32(shape):
    w = floats(shape)
    largest = exact.weight_absmax(w)
    wq, exps, n_bad, first = exact.quantize_weights(w, largest, 24)
    expected, expected_exps, _ = quantized(w, 24)
    assert wq.dtype == np.float32 and exps.dtype == np.int32
    assert (wq == expected).all() and (exps == expected_exps).all()
    assert (n_bad, first) == (0, -1)


def test_weight_rows_that_are_not_finite_are_counted_and_the_first_is_named():
    w = floats((500, 300))
    w[[123, 321], [7, 299]] = np.nan, np.inf
    assert exact.quantize_weights(w, exact.weight_absmax(w), 20)[2:] == (2, 123)


# The product


@pytest.mark.parametrize(
    ("n_rows", "k", "n"),
    [(1, 1, 1), (1, 17, 4), (2, 64, 9), (3, 33, 8), (4, 40, 7), (7, 129, 6), (9, 8, 70)],
)
def test_kernel_and_blas_give_what_big_integers_give(n_rows, k, n):
    b = exact.bits(k)
    xq, wq = integers((n_rows, k), b, 1), integers((n, k), b, 2, np.float32)
    expected = big_product(xq, wq)
    by_kernel, by_blas = np.full((n_rows, n), np.nan), np.full((n_rows, n), np.nan)
    exact._multiply(xq, wq, by_kernel)
    exact._multiply_by_blas(xq, wq, by_blas, exact.Scratch.for_matrices([(n, k)]))
    assert (by_kernel == expected).all() and (by_blas == expected).all()
    assert (product(xq, wq) == expected).all()


@pytest.mark.parametrize("by_blas", [False, True])
@pytest.mark.parametrize("k", [300, 8192])
def test_many_rows_over_several_blocks_and_tiles(by_blas, k):
    b, n_rows, n = exact.bits(k), 37, 277
    xq, wq = integers((n_rows, k), b, 1), integers((n, k), b, 2, np.float32)
    y = np.full((n_rows, n), np.nan)
    if by_blas:
        exact._multiply_by_blas(xq, wq, y, exact.Scratch.for_matrices([(n, k), (3, 5)]))
    else:
        exact._multiply(xq, wq, y)
    assert (y.astype(np.int64) == xq.astype(np.int64) @ wq.astype(np.int64).T).all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0, 4), (20, 0, 4), (2, 5, 0), (20, 5, 0)])
def test_empty_shards_give_zeros_of_the_right_shape(shape):
    n_rows, k, n = shape
    assert (product(np.empty((n_rows, k)), np.empty((n, k), np.float32)) == 0).all()
    y = np.full((n_rows, n), np.nan)
    wq = np.empty((n, k), np.float32)
    exact._multiply_by_blas(np.empty((n_rows, k)), wq, y, exact.Scratch.for_matrices([(n, k)]))
    assert (y == 0).all()


def test_a_scratch_for_other_shapes_is_refused():
    xq, wq, y = np.zeros((20, 64)), np.zeros((8, 64), np.float32), np.zeros((20, 8))
    with pytest.raises(UsageError, match=r"holds 64 float64.*need 512"):
        exact._multiply_by_blas(xq, wq, y, exact.Scratch.for_matrices([(2, 32)]))


@pytest.mark.parametrize("k", [32, 64, 2048])
def test_the_largest_sums_reach_2_to_53_and_are_exact(k):
    b = exact.bits(k)
    xq, wq = np.full((18, k), 2.0**b), np.full((5, k), 2.0**b, np.float32)
    wq[1], wq[2, 0] = -(2.0**b), 2.0**b - 1
    expected = big_product(xq, wq)
    assert abs(expected).max() in (2**53, 2**52)
    by_kernel, by_blas = np.empty((18, 5)), np.empty((18, 5))
    exact._multiply(xq, wq, by_kernel)
    exact._multiply_by_blas(xq, wq, by_blas, exact.Scratch.for_matrices([wq.shape]))
    assert (by_kernel == expected).all() and (by_blas == expected).all()


@pytest.fixture(scope="module")
def cut_me():
    k = 260
    x, w = floats((40, k), 1), floats((70, k), 2)
    b = exact.bits(k)
    wq, ew, _, _ = exact.quantize_weights(w, exact.weight_absmax(w), b)
    xq, ex, _ = quantized(x, b)
    return x, w, xq, wq, ex, ew, b, product(xq, wq)


@pytest.mark.parametrize("n_parts", CUTS)
def test_any_cut_of_the_inner_size_sums_to_the_same_bits(cut_me, n_parts):
    *_, xq, wq, _, _, _, whole = cut_me
    total = np.zeros(whole.shape, np.int64)
    for p in shuffled_parts(xq.shape[1], n_parts, n_parts):
        part = product(np.ascontiguousarray(xq[:, p]), np.ascontiguousarray(wq[:, p]))
        total += part.astype(np.int64)
    assert (total == whole).all()


@pytest.mark.parametrize("n_parts", CUTS)
def test_any_cut_of_rows_or_columns_gives_the_same_bits(cut_me, n_parts):
    *_, xq, wq, _, _, _, whole = cut_me
    for p in shuffled_parts(len(xq), n_parts, n_parts):  # decoding: a few rows at a time
        assert (product(xq[p], wq) == whole[p]).all()
    for p in shuffled_parts(len(wq), n_parts, n_parts):
        assert (product(xq, wq[p]) == whole[:, p]).all()


def test_float32_sums_do_vary_with_the_cut(cut_me):
    x, w = cut_me[:2]
    parts = np.array_split(np.arange(x.shape[1]), 3)
    assert (sum(x[:, p] @ w[:, p].T for p in parts) != x @ w.T).any()


def test_the_result_is_within_the_bound_of_the_scaled_rounding(cut_me):
    x, w, _, _, ex, ew, b, y = cut_me
    out = np.empty(y.shape, np.float32)
    exact.scale_back(y, ex, ew, b, out)
    true = x.astype(np.float64) @ w.astype(np.float64).T
    # |x - xq 2^(e-b)| <= 2^(e-b-1): K products of two such values, and one float32 rounding.
    scale = 2.0 ** (ex[:, None] + ew[None, :])
    bound = x.shape[1] * scale * (2.0**-b + 2.0 ** (-2 * b - 2)) + np.abs(true) * 2.0**-24
    assert (np.abs(out - true) <= bound).all()
    typical = np.sqrt(np.mean(((out - true) / scale) ** 2)) / np.sqrt(np.mean((true / scale) ** 2))
    assert typical < 3e-6


# The check of a product


def test_odd_vector_is_the_linear_stream():
    key = 2**64 - 3
    r = exact.odd_vector(key, 100)
    assert [int(v) % 2**64 for v in r] == linear_weights(key, 100)
    assert (r % 2 == 1).all()


@pytest.mark.parametrize("shape", [(1, 1), (4, 9), (7, 33), (30, 64)])
def test_projected_weights_are_those_of_big_integers(shape):
    w, b, r = floats(shape, 3), 20, exact.odd_vector(5, shape[0])
    w[0, 0] = 0
    own = exact.weight_absmax(w)
    for largest in (own, own + np.uint32(2 << 23)):  # of whole rows; of rows with more elsewhere
        wq, exps, n_bad, _ = exact.quantize_weights(w, largest, b)
        expected = big_product(wq.T, r[None, :].astype(object))[:, 0]
        found, n_wrong = exact.project_weights(w, own, largest, exps, b, r)
        assert found.tolist() == [signed(v) for v in expected] and n_bad == n_wrong == 0


def test_rows_of_weights_that_were_scaled_wrong_are_counted():
    w, b, r = floats((6, 9), 4), 20, exact.odd_vector(5, 6)
    own = exact.weight_absmax(w)
    _, exps, _, _ = exact.quantize_weights(w, own, b)

    def n_wrong(w=w, own=own, largest=own, exps=exps):
        return exact.project_weights(w, own, largest, exps, b, r)[1]

    at = np.arange(6) == 2
    assert n_wrong() == 0
    assert n_wrong(exps=exps + at.astype(np.int32)) == 1
    assert n_wrong(own=own + at.astype(np.uint32)) == 1
    assert n_wrong(largest=own - at.astype(np.uint32)) == 1
    assert n_wrong(largest=own + at.astype(np.uint32) * np.uint32(1 << 23)) == 1  # another exponent
    assert n_wrong(w=w * np.where(at, np.float32(0.999), np.float32(1))[:, None]) == 1
    w = w.copy()
    w[3, 1] = np.nan  # counted by quantize_weights; all of the row's integers are zeros
    _, exps, n_bad, _ = exact.quantize_weights(w, exact.weight_absmax(w), b)
    assert n_bad == 1 and n_wrong(w, *[exact.weight_absmax(w)] * 2, exps) == 0


def test_a_right_product_passes_and_both_sides_are_the_sum_over_the_rows():
    c = Checked()
    assert c.check() == (0, -1, 0)
    expected = int((big_product(c.xq, c.wq) @ c.r.astype(object)).sum()) % 2**64
    assert c.found.tolist() == c.expected.tolist() == [0, expected]


@pytest.mark.parametrize("power", [*range(0, 54, 3), 53])
@pytest.mark.parametrize("sign", [-1, 1])
def test_one_value_that_is_off_by_a_power_of_two_is_always_found(power, sign):
    c = Checked()
    c.xq[3] = c.y[3] = 0  # so that the wrong value, too, is at most 2**53
    assert c.check() == (0, -1, 0)
    c.y[3, 11] += sign * 2.0**power
    assert c.check() == (1, 3, 0)
    assert c.found[1] != c.expected[1]


@pytest.mark.parametrize("column", [0, 7, 8, 16, 28])
def test_off_by_one_is_found_in_every_part_of_the_vectors(column):
    c = Checked()
    for row in range(5):
        c.y[row, column] += 1
    assert c.check() == (5, 0, 0)


@pytest.mark.parametrize(
    "value", [0.5, -3.25, 2.0**53 + 2, -(2.0**60), 1e300, 5e-324, np.nan, np.inf, -np.inf]
)
def test_a_value_that_is_no_exact_sum_is_counted_and_fails_its_row(value):
    c = Checked()
    c.y[2, 4] = c.y[4, 28] = value
    assert c.check() == (2, 2, 2)


def test_a_half_that_truncation_would_hide_is_found():
    c = Checked()
    c.y[1, 3] += np.copysign(0.5, c.y[1, 3])
    assert c.check() == (1, 1, 1)


def test_a_swap_of_two_values_is_found():
    c = Checked()
    c.y[2, [3, 9]] = c.y[2, [9, 3]]
    assert c.check() == (1, 2, 0)


def test_a_wrong_weight_or_projection_fails_every_row_that_uses_it():
    c = Checked()
    c.xq[:, 5] = 1
    c.y = product(c.xq, c.wq)
    c.wr[5] += 1
    assert c.check() == (5, 0, 0)
    c.wr[5] -= 1
    c.wq[7, 5] += 1
    c.y = product(c.xq, c.wq)
    assert c.check() == (5, 0, 0)


def test_a_miscomputed_product_of_float32_is_found():
    c = Checked()
    c.y = (c.xq.astype(np.float32) @ c.wq.T).astype(np.float64)  # sums rounded to 24 bits
    assert c.check()[0] == 5


def test_errors_of_the_same_high_power_are_missed_only_as_often_as_said():
    # Two errors of 2**60 cancel where 2**60 * (r_i + r_j) vanishes: odds of 2**-3 for a = 60.
    # Through y such errors cannot come (at most 2**53), so the two sides are compared directly.
    r = exact.odd_vector(3, 4096).reshape(2048, 2).astype(object)
    missed = sum((2**60 * (a + b)) % 2**64 == 0 for a, b in r)
    assert abs(missed / 2048 - 2**-3) < 0.04


# The way back


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_scaling_back_rounds_once(dtype):
    y = integers((9, 31), 53, 7)
    ex = np.array([0, 5, -148, 128, 60, -60, 128, 0, -148], np.int32)
    ew = np.linspace(-148, 128, 31).astype(np.int32)
    out, b = np.empty(y.shape, np.float32), 20
    exact.scale_back(y.astype(dtype), ex, ew, b, out)
    for (row, col), value in np.ndenumerate(y):
        true = Fraction(int(value)) * Fraction(2) ** int(ex[row] + ew[col] - 2 * b)
        assert out[row, col] == nearest_float32(true)


def nearest_float32(true):
    """Round a fraction to float32, halves to even, through denormals and to inf."""
    if true == 0:
        return 0.0
    size = abs(true)
    e = size.numerator.bit_length() - size.denominator.bit_length()
    e -= size < Fraction(2) ** e  # now 2**e <= size < 2**(e+1)
    unit = Fraction(2) ** max(e - 23, -149)
    rounded = round(true / unit) * unit
    if abs(rounded) >= 2**128:
        return np.inf if true > 0 else -np.inf
    return float(rounded)


@pytest.mark.parametrize("exponent", [-2000, 2000, 2**30, -(2**30)])
def test_exponents_beyond_float64_give_zero_or_inf(exponent):
    y, out = np.array([[3.0, -3.0, 0.0]]), np.empty((1, 3), np.float32)
    exact.scale_back(y, np.array([exponent], np.int32), np.zeros(3, np.int32), 20, out)
    assert out.tolist() == ([[0, 0, 0]] if exponent < 0 else [[np.inf, -np.inf, 0]])


def test_a_zero_comes_back_as_plus_zero():
    y = np.array([[-0.0, 0.0, -1.0]])
    out = np.full((1, 3), np.nan, np.float32)
    # The last one underflows from below.
    exact.scale_back(y, np.array([-148], np.int32), np.array([0, 0, -148], np.int32), 20, out)
    assert out.view(np.uint32).tolist() == [[0, 0, 0]]
