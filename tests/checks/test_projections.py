"""The kernels of projections against plain Python's integers and fractions, from the docs alone."""

from fractions import Fraction
from math import ulp

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spimpi.checks.sums import float_bound, exact as sum_exact, words as sum_words
from spimpi.checks.sums.sketch import combine_sketches, compare_sketches, sketch
from spimpi.errors import UsageError
from spimpi.fingerprint import Tag, fingerprint, projections
from spimpi.fingerprint.tag import GOLDEN, LINEAR, MASK, SKETCH, mix
from spimpi.partition import Slab, TensorPartition

TAG = Tag(name="hidden", layer=3, step=1)
DTYPES = [np.dtype(d) for d in ("f8", "f4", "f2", ml_dtypes.bfloat16)]


def word(key, i):
    return mix((key + (i + 1) * GOLDEN) & MASK)


def coefficient(key, i):
    """The sign and the 52 lowest bits of the odd word: ±(2^52 + bits) / 2^53."""
    w = word(key, i) | 1
    magnitude = Fraction((1 << 52) + w % (1 << 52), 1 << 53)
    return -magnitude if w >> 63 else magnitude


def oracle(values, key, cuts):
    """Exact projection and norm of each bin, as fractions."""
    out = []
    for a, b in zip(cuts, cuts[1:]):
        x = [Fraction(float(v)) for v in values[a:b]]
        t = sum((coefficient(key, i) * v for i, v in enumerate(x)), Fraction(0))
        out.append((t, sum(map(abs, x), Fraction(0))))
    return out


def test_coefficients_are_uniform_between_a_half_and_one_of_either_sign():
    w = np.empty(20000)
    projections.coefficients(np.uint64(12345), 3, w)
    assert [Fraction(v) for v in w[:50]] == [coefficient(12345, 3 + i) for i in range(50)]
    assert np.all((np.abs(w) >= 0.5) & (np.abs(w) < 1))
    eighths = np.bincount((np.abs(w) * 16).astype(int) * 2 + (w < 0), minlength=32)[16:]
    assert np.all(np.abs(eighths - 1250) < 5 * 1250**0.5)


def hash_oracle(values, key, cuts):
    """docs/sums.md's two hashes of each bin's bits, by plain integers."""
    out = []
    for a, b in zip(cuts, cuts[1:]):
        plain = keyed = 0
        for i, q in enumerate(values[a:b].view(f"u{values.itemsize}").tolist()):
            k, low = word(key, i) | 1, (1 << 32) - 1
            plain += q
            if values.itemsize == 4:
                keyed += k * q
            else:
                keyed += ((q + k) & low) * (((q >> 32) + (k >> 32)) & low)
        out.append((plain & MASK, keyed & MASK))
    return out


@pytest.mark.parametrize("dtype", ["f8", "f4"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 300, 1024, 1041, 5000])
def test_the_bits_are_hashed_as_the_page_says(dtype, n):
    x = np.random.default_rng(n).standard_normal(n).astype(dtype)
    cuts = np.array([0, n // 3, n], np.int64) if n > 2 else np.array([0, n], np.int64)
    sums, hashes = np.zeros((3, cuts.size - 1)), np.zeros((2, cuts.size - 1), np.uint64)
    projections.project_both(x, x, 0, cuts, np.uint64(77), sums, hashes)
    assert list(zip(*hashes.tolist())) == hash_oracle(x, 77, cuts)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2500), st.integers(1, 9), st.integers(0, 2**32), st.sampled_from(DTYPES),
    st.integers(0, 60), st.integers(1, 3),
)  # fmt: skip
def test_projections_lie_within_their_rounding_of_the_exact_ones(
    n, n_bins, seed, dtype, spread, threads
):
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal(n) * 2.0 ** (spread / 4 * rng.standard_normal(n))
    x = np.clip(wide, -6e4, 6e4).astype(dtype)
    cuts = float_bound.bins_of((n,), n_bins)
    key = sum_words.sketch_key(TAG, (n,), dtype.itemsize)
    found = sum_words.project_block(x, x[::-1].copy(), cuts, key, threads)
    alone = sum_words.project_block(x, None, cuts, key)
    mirrored = oracle(x[::-1], key, cuts)
    for b, (t, norm) in enumerate(oracle(x, key, cuts)):
        size = int(cuts[b + 1] - cuts[b])
        allowed = float_bound.phi(projections.rounds(size) + found.pieces, 2.0**-53)
        for sums in (found.sums, alone.sums):
            assert abs(Fraction(sums[0, b]) - t) <= allowed * norm
            assert abs(Fraction(sums[1, b]) - norm) <= allowed * norm
        assert abs(Fraction(found.sums[2, b]) - mirrored[b][0]) <= allowed * mirrored[b][1]


@pytest.mark.parametrize("n, roundings", [(15, 14), (1024, 63), (5000, 63)])
def test_terms_are_rounded_as_often_as_the_bound_allows_for(n, roundings):
    """The worst case: each addition to a lane's first element loses all of its other term."""
    x = np.full(n, 0.999 * 2.0**-53)
    x[: projections.WIDTH] = 1.0 if n > projections.WIDTH else x[0]
    x[0] = 1.0
    cuts = np.array([0, n], np.int64)
    found = sum_words.project_block(x, x, cuts, 5)
    exact = sum(Fraction(v) for v in x)
    off = (exact - Fraction(found.sums[1, 0])) / exact * 2**53
    assert roundings * 0.9 < off < projections.rounds(n)


def test_bins_are_whole_rows_or_parts_of_one():
    for shape, most in [((100, 7), 16), ((3, 1000), 64), ((5,), 16), ((), 16), ((4, 5, 6), 256),
                        ((16, 3), 16), ((17, 3), 16), ((1, 1), 16), ((2, 0, 3), 16)]:  # fmt: skip
        cuts = float_bound.bins_of(shape, most)
        n = int(np.prod(shape))
        assert cuts[0] == 0 and cuts[-1] == n and np.all(np.diff(cuts) > 0)
        assert len(cuts) - 1 <= most
        columns = shape[-1] if shape else 1
        for a, b in zip(cuts, cuts[1:]):
            first, last = a // columns, (b - 1) // columns
            assert first == last or (a % columns == 0 and b % columns == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["C", "F", "reversed", "strided", "read-only", "unaligned"])
def test_memory_layout_changes_nothing(dtype, order, monkeypatch):
    monkeypatch.setattr(sum_words, "_PIECE", 300)
    x = np.random.default_rng(5).standard_normal((23, 41)).astype(dtype)
    y = {
        "C": x, "F": x.copy("F"), "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
        "strided": np.repeat(x, 2, axis=1)[:, ::2], "read-only": x.copy(),
    }.get(order)  # fmt: skip
    if order == "unaligned":
        raw = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:]
        y = raw.view(dtype).reshape(x.shape)
    if order == "read-only":
        y.flags.writeable = False
    cuts = float_bound.bins_of(x.shape, 16)
    plain = sum_words.project_block(x, x, cuts, 7)
    found = sum_words.project_block(y, y, cuts, 7)
    np.testing.assert_allclose(found.sums, plain.sums, rtol=1e-13, atol=1e-12)
    assert found.word == plain.word


def test_pieces_cover_each_element_once_and_in_order():
    for shape in [(7,), (3, 5), (2, 3, 4), (1, 9, 1), (4, 0), (), (2, 1, 30)]:
        x = np.arange(int(np.prod(shape))).reshape(shape)
        for limit in (1, 4, 7, 100):
            parts = list(sum_words.pieces_of(shape, limit))
            runs = [np.asarray(x[index]).reshape(-1) for _, index in parts]
            starts = [first for (first, _), run in zip(parts, runs) if run.size]
            assert [int(run[0]) for run in runs if run.size] == starts
            assert np.array_equal(np.concatenate(runs), x.reshape(-1))


@pytest.mark.parametrize("dtype", ["f8", "f4"])
def test_the_agreement_word_sees_every_bit_and_every_pair_of_equal_flips(dtype):
    rng = np.random.default_rng(11)
    x = rng.standard_normal((9, 70)).astype(dtype)
    cuts = float_bound.bins_of(x.shape, 16)
    bits = 8 * x.itemsize

    def agreement(y):
        return sum_words.project_block(x, y, cuts, 99).word

    right = agreement(x)
    assert agreement(x.copy()) == right
    unsigned = f"u{x.itemsize}"
    for bit in range(bits):
        mask = np.array(1 << bit, unsigned)
        # In one bin (a row), too: there two flips of the top bit cancel under odd weights.
        same_bin = 70 * int(rng.integers(9)) + rng.choice(70, 2, False)
        for places in ([rng.integers(630)], rng.choice(630, 8, False), same_bin):
            y = x.copy()
            y.reshape(-1).view(unsigned)[places] ^= mask
            assert agreement(y) != right
    y = x.copy()
    y[[2, 3]] = y[[3, 2]]
    assert agreement(y) != right
    y = np.where(x == x[0, 0], -x, x)
    assert agreement(y) != right


def test_a_negative_zero_is_another_agreement_but_the_same_sum():
    x, y = np.zeros(40), np.zeros(40)
    y[7] = -0.0
    cuts = float_bound.bins_of((40,), 16)
    a, b = (sum_words.project_block(x, z, cuts, 3) for z in (x, y))
    assert a.word != b.word
    assert np.array_equal(a.sums, b.sums)


# Integers


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4"])
def test_wrapped_words_add_up_modulo_the_items_bits(dtype):
    rng = np.random.default_rng(3)
    info = np.iinfo(dtype)
    xs = [rng.integers(info.min, info.max, (6, 20), dtype, endpoint=True) for _ in range(5)]
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    slab = Slab((6, 20), (0, 0))
    modulus = 1 << 8 * total.itemsize
    words = [sum_exact.wrapped_words(x, TAG, slab) for x in xs]
    found = sum_exact.wrapped_words(total, TAG, slab)
    for j in range(sum_exact.N_WRAPPED):
        assert sum_exact.differ([w[j] for w in words], int(found[j]), modulus) == 0
    key = TAG.key(LINEAR, (6, 20), total.itemsize)
    first = sum((word(key, i) | 1) * int(v) for i, v in enumerate(total.flat)) & MASK
    fifth = sum((word(key, i) >> 4) * int(v) for i, v in enumerate(total.flat)) & MASK
    assert (int(found[0]), int(found[5])) == (first, fifth)
    total[4, 5] ^= -1 << (8 * total.itemsize - 1) if info.min else 1 << (8 * total.itemsize - 1)
    wrong = sum_exact.wrapped_words(total, TAG, slab)
    assert sum_exact.differ([w[0] for w in words], int(wrong[0]), modulus) != 0


def test_two_top_bits_are_missed_by_one_word_of_sixteen_in_two_only():
    """The worst pattern: two errors of 2^(b-1). Odd weights cannot see it, the others can."""
    rng = np.random.default_rng(4)
    slab = Slab((64,), (0,))
    missed = 0
    for seed in range(2000):
        tag = Tag(seed=seed)
        x = rng.integers(-128, 128, 64).astype(np.int8)
        y = x.copy()
        y[rng.choice(64, 2, False)] ^= -128
        a, b = (sum_exact.wrapped_words(z, tag, slab) for z in (x, y))
        seen = [(int(p) - int(q)) % 256 != 0 for p, q in zip(a, b)]
        assert not seen[0]
        missed += not any(seen)
    assert missed <= 1  # 2^-16 each


def gf_multiply(a, b):
    product = 0
    for bit in range(64):
        product ^= (a << bit) * (b >> bit & 1)
    for bit in range(127, 63, -1):
        if product >> bit & 1:
            product ^= ((1 << 64) + 27) << (bit - 64)
    return product


def test_the_xor_word_is_a_product_in_gf_2_64():
    rng = np.random.default_rng(2)
    x = rng.integers(0, 1 << 64, 30, np.uint64)
    y = rng.integers(0, 1 << 64, 30, np.uint64)
    slab = Slab((30,), (0,))
    key = TAG.key(LINEAR, (30,), 8)
    expected = 0
    for i, v in enumerate(x.tolist()):
        expected ^= gf_multiply(word(key, i), v)
    assert sum_exact.xor_word(x, TAG, slab) == expected
    both = [sum_exact.xor_word(z, TAG, slab) for z in (x, y, x ^ y)]
    assert both[0] ^ both[1] == both[2]


# Sketches


def sketch_oracle(values, indices, key):
    """Exact projections and sum of squares, from docs/fingerprint.md."""
    sums = [Fraction(0)] * 8
    squares = Fraction(0)
    for v, i in zip(values, indices):
        x, w = Fraction(float(v)), word(key, i)
        sums = [s - x if w >> j & 1 else s + x for j, s in enumerate(sums)]
        squares += x * x
    return sums, squares


def nearly(found, exact, magnitude):
    return abs(Fraction(found) - exact) <= 2 * ulp(float(abs(exact))) + magnitude * 2.0**-100


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 1),
    st.sampled_from(DTYPES), st.integers(0, 2**32),
)  # fmt: skip
def test_a_sketch_is_what_the_page_says_and_adds_up_over_shards(
    rows, columns, n_shards, dim, dtype, seed
):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-3, 4)).astype(dtype)
    whole = sketch(x, TAG)
    key = TAG.key(SKETCH, (rows, columns), dtype.itemsize)
    sums, squares = sketch_oracle(x.reshape(-1), range(x.size), key)
    magnitude = Fraction(float(np.abs(x.astype(float)).sum()))
    for found, exact in zip(whole.projections, sums):
        assert nearly(found, exact, magnitude)
    assert abs(Fraction(whole.sum_squares) - squares) <= squares * 2.0**-50
    assert whole.absmax == float(np.abs(x.astype(float)).max())
    assert (whole.nonfinite, whole.n_elements, whole.key) == (0, x.size, key)
    assert whole.fingerprint == fingerprint(x, TAG)
    shards = []
    for shard in range(n_shards):
        part = TensorPartition(dim, n_shards, shard, x.shape[dim])
        cut = slice(part.start, part.stop)
        shards.append(sketch(x[cut] if dim == 0 else x[:, cut], TAG, part))
    joined = combine_sketches(shards)
    assert joined.fingerprint == whole.fingerprint and joined.absmax == whole.absmax
    for found, exact in zip(joined.projections, sums):
        assert abs(Fraction(found) - exact) <= n_shards * magnitude * 2.0**-52


def test_elements_that_are_not_finite_are_counted_and_left_out():
    x = np.array([1.0, np.nan, -2.0, np.inf, -np.inf, 0.5])
    found = sketch(x, TAG)
    key = TAG.key(SKETCH, (6,), 8)
    sums, squares = sketch_oracle([1.0, -2.0, 0.5], [0, 2, 5], key)
    assert found.nonfinite == 3
    assert found.projections == tuple(float(s) for s in sums)
    assert found.sum_squares == float(squares) and found.absmax == 2.0


def test_complex_numbers_and_integers_have_sketches():
    x = np.random.default_rng(1).standard_normal((4, 6)) * (1 + 2j)
    parts = np.stack([x.real, x.imag], axis=-1)
    assert sketch(x, TAG).projections == sketch(parts, TAG).projections
    q = np.arange(12).reshape(3, 4)
    assert sketch(q, TAG).projections == sketch(q.astype(float), TAG).projections
    with pytest.raises(UsageError, match="no sketch of float8"):
        sketch(np.zeros(3, ml_dtypes.float8_e4m3fn), TAG)


def test_the_estimated_distance_has_the_error_that_the_page_states():
    """Over 400 seeds: the mean square is right within 4 standard errors, and spreads as stated."""
    rng = np.random.default_rng(9)
    x = rng.standard_normal(500)
    y = x + 1e-3 * rng.standard_normal(500)
    true = float(np.sum((x - y) ** 2))
    estimates = []
    for seed in range(400):
        tag = Tag(seed=seed)
        found = compare_sketches(sketch(x, tag), sketch(y, tag))
        assert found.verdict == ""
        estimates.append(found.distance**2 / true)
    assert abs(np.mean(estimates) - 1) < 4 * 0.5 / 20
    assert 0.4 < np.std(estimates) < 0.6


def test_same_bits_needs_equal_fingerprints():
    x = np.random.default_rng(1).standard_normal(64)
    y = x.copy()
    y[3] = np.nextafter(y[3], 9)
    assert str(compare_sketches(sketch(x, TAG), sketch(x.copy(), TAG))) == "same bits"
    assert compare_sketches(sketch(x, TAG), sketch(y, TAG)).verdict == ""
    z = np.zeros(64)
    w = z.copy()
    w[5] = -0.0
    assert compare_sketches(sketch(z, TAG), sketch(w, TAG)).verdict == ""


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
@pytest.mark.parametrize("n_addends", [2, 3, 16])
def test_reordered_sums_are_told_from_different_ones(dtype, n_addends):
    for seed in range(30):
        rng = np.random.default_rng(seed)
        xs = list(rng.standard_normal((n_addends, 300)).astype(dtype))
        sums = []
        for _ in range(2):
            total = np.zeros(300, dtype)
            for i in rng.permutation(n_addends):
                total = total + xs[i]
            sums.append(total)
        tag = Tag(seed=seed)
        a, b = (sketch(s, tag) for s in sums)
        addends = [sketch(x, tag) for x in xs]
        found = compare_sketches(a, b, addends)
        assert found.verdict in ("same bits", "reordered rounding")
        other = (sums[0].astype(float) * (1 + 40 * found.limit)).astype(dtype)
        assert compare_sketches(a, sketch(other, tag), addends).verdict == "different"
        if dtype != "f2":  # in which a missing addend of 16 is about as large as the limit
            without = sketch(sums[0] - xs[0], tag)
            assert compare_sketches(a, without, addends).verdict == "different"


def test_sketches_of_other_tensors_are_refused():
    x = np.ones(6)
    narrow = sketch(x.astype("f4"), TAG)
    for other in (sketch(x, Tag(name="other")), sketch(np.ones(7), TAG), narrow):
        with pytest.raises(UsageError, match="different tensors"):
            compare_sketches(sketch(x, TAG), other)
    with pytest.raises(UsageError, match="addends"):
        compare_sketches(sketch(x, TAG), sketch(2 * x, TAG), [])
