"""The norm of a row that tensor ranks shard: exact, however the row is cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spimpi.fingerprint import fingerprint, linear_fingerprint
from spimpi.fingerprint.tag import CONTENT, LINEAR, Tag
from spimpi.inference.exact import exponent_of
from spimpi.inference.qk_norm import normalise, row_maxima, square_bits, sum_squares
from spimpi.inference.tensors import LAYER_TENSORS, QK_NORMED, QK_SUM, QKV, REST
from spimpi.topology.tensor import tensor_shards

D = 4
EPS = 1e-6


def local_columns(shard):
    """(where queries end, first and last owned key column, where keys end), and global columns."""
    held, owned = shard.kv_heads, shard.owned_kv_heads
    n_q = shard.heads.size * D
    first = n_q + (owned.start - held.start) * D
    k_global, v_global = shard.n_heads * D, (shard.n_heads + shard.n_kv_heads) * D
    heads = range(shard.heads.start * D, shard.heads.stop * D)
    blocks = [heads, *(range(g + held.start * D, g + held.stop * D) for g in (k_global, v_global))]
    columns = np.array([n_q, first, first + len(owned) * D, n_q + len(held) * D], np.int64)
    return columns, np.concatenate([np.array(block) for block in blocks])


class Results:
    """Keys of one layer's tensors, and room for what the kernels find."""

    def __init__(self, rows, width):
        self.keys = np.zeros((2, len(LAYER_TENSORS)), np.uint64)
        shapes = {"qkv": ((rows, width), 4, CONTENT), "qk_sum": ((rows, 2), 8, LINEAR),
                  "qk_normed": ((rows, width), 4, CONTENT)}  # fmt: skip
        for name, (shape, size, domain) in shapes.items():
            self.keys[1, LAYER_TENSORS.index(name)] = Tag(7, name).key(domain, shape, size)
        self.segments_found = np.zeros((1, 1), np.uint64)
        self.found, self.sums, self.made = np.zeros((3, 1, len(REST)), np.uint64)
        self.max_words, self.max_bad = np.zeros((1, 3), np.uint64), np.zeros((1, 3), np.int64)


def norm(qkv, weight, tp=1, n_heads=6, n_kv=2, fault=None, n_bits=None, larger=None):
    """QK norm over tp shards, their maxima and sums put together as MPI would; (out, results).

    qkv, weight: global. ``fault(sums of every shard)`` may change what is sent, ``larger(maxima)``
    those of the global rows.
    """
    rows, width = qkv.shape
    shards = tensor_shards(tp, n_heads, n_kv, 8, 8)
    widths = np.array([n_heads * D, n_kv * D], np.int64)
    if n_bits is None:
        n_bits = [square_bits(int(k)) for k in widths]
    n_bits = np.array(n_bits, np.int64)
    places = [local_columns(shard) for shard in shards]
    parts = [np.ascontiguousarray(qkv[:, at]) for _, at in places]
    maxima = np.zeros((tp, rows, 2), np.uint32)
    for part, (columns, _), own in zip(parts, places, maxima):
        row_maxima(part, columns, own)
    largest = maxima.max(axis=0)
    if larger:
        larger(largest)
    results = Results(rows, width)
    sent = np.zeros((tp, rows, 2), np.int64)
    for part, (columns, _), own in zip(parts, places, sent):
        sum_squares(part, columns, n_bits, largest, own, True, results.keys, 0, 0, results.made)
    if fault:
        fault(sent)
    summed, out, bad = sent.sum(axis=0), np.array(qkv), 0
    for part, (columns, at), own in zip(parts, places, sent):
        local = np.ascontiguousarray(weight[at[: columns[3]]])
        segments = np.array([(0, 0, part.shape[1])]) if tp == 1 else np.empty((0, 3), np.int64)
        bad = normalise(
            part, columns, n_bits, widths, local, EPS, largest, own, summed, True, results.keys, 0,
            0, segments, width, results.segments_found, results.found, results.sums, results.made,
            tp == 1, results.max_words, results.max_bad,
        )  # fmt: skip
        out[:, at] = part
    return out, results, summed, bad


def rows(n, n_heads=6, n_kv=2, seed=1, scale=1.0):
    rng = np.random.default_rng(seed)
    width = (n_heads + 2 * n_kv) * D
    qkv = (rng.standard_normal((n, width)) * scale).astype(np.float32)
    return qkv, rng.uniform(0.5, 1.5, (n_heads + n_kv) * D).astype(np.float32)


def expected(qkv, weight, n_heads=6, n_kv=2):
    """transformers' RMSNorm of queries and of keys, in float64."""
    out = qkv.astype(np.float64)
    for start, stop in ((0, n_heads * D), (n_heads * D, (n_heads + n_kv) * D)):
        part = out[:, start:stop]
        mean = (part**2).mean(axis=1, keepdims=True)
        out[:, start:stop] = part / np.sqrt(mean + EPS) * weight[start:stop]
    return out


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e15])
def test_it_is_the_rmsnorm_of_queries_and_of_keys_and_leaves_values(scale):
    qkv, weight = rows(5, scale=scale)
    out, _, _, bad = norm(qkv, weight)
    np.testing.assert_allclose(out, expected(qkv, weight), rtol=3e-7, atol=0)
    assert bad == 0 and (out[:, 8 * D :] == qkv[:, 8 * D :]).all()


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 4), (6, 2), (6, 3), (8, 2), (8, 1)]),
    tp=st.integers(1, 8), seed=st.integers(0, 1 << 30), spread=st.floats(0, 60),
)  # fmt: skip
def test_every_cut_gives_the_bits_of_the_whole_row(heads, tp, seed, spread):
    qkv, weight = rows(3, *heads, seed=seed)
    powers = np.random.default_rng(seed).uniform(-spread, spread, qkv.shape)
    qkv = (qkv * 2.0**powers).astype(np.float32)
    whole, _, sums, _ = norm(qkv, weight, 1, *heads)
    cut, _, cut_sums, _ = norm(qkv, weight, min(tp, heads[0]), *heads)
    assert (sums == cut_sums).all() and cut.tobytes() == whole.tobytes()


@pytest.mark.parametrize("width", [1, 2, 3, 63, 64, 65, 2048, 4096, 5120, 8192, 1 << 20])
def test_no_sum_of_squares_overflows_and_one_bit_more_could(width):
    bits = square_bits(width)
    assert width * 4**bits <= 2**62 and bits >= 20
    assert 2 ** (width - 1).bit_length() * 4 ** (bits + 1) > 2**62


def test_the_largest_possible_row_is_summed_without_overflow():
    """All elements the largest float32 below a power of two: they round up to 2**b."""
    qkv = np.full((1, 10 * D), np.nextafter(np.float32(2), np.float32(0)), np.float32)
    _, _, sums, _ = norm(qkv, np.ones(8 * D, np.float32))
    for total, width in zip(sums[0], (6 * D, 2 * D)):
        q = round(float(qkv[0, 0]) * 2 ** (square_bits(width) - 1))
        assert int(total) == width * q * q > 0


def test_the_relative_error_is_below_its_bound():
    """docs/exact-arithmetic.md: 2 sqrt(K) 2**-b + K 2**-2b of a sum of squares."""
    rng = np.random.default_rng(5)
    width, bits = 6 * D, 12  # few bits, so that the rounding is seen
    worst = 0.0
    for _ in range(200):
        qkv, weight = rows(4, seed=int(rng.integers(1 << 30)))
        qkv[:, 0] *= np.float32(2.0 ** rng.integers(0, 14))
        _, _, sums, _ = norm(qkv, weight, n_bits=[bits, bits])
        queries = qkv[:, :width].astype(np.float64)
        true = (queries**2).sum(axis=1)
        exponents = [exponent_of(np.abs(row).max().view(np.uint32)) for row in qkv[:, :width]]
        found = sums[:, 0] * 4.0 ** (np.array(exponents) - bits)
        worst = max(worst, float(np.abs(found / true - 1).max()))
    assert 1e-6 < worst < 2 * width**0.5 * 2**-bits + width * 4.0**-bits


def test_a_row_with_nan_or_inf_becomes_zeros_and_is_counted():
    for wrong in (np.nan, np.inf, -np.inf):
        qkv, weight = rows(4)
        qkv[1, 3] = qkv[3, 6 * D + 1] = wrong
        clean, _, _, _ = norm(*rows(4))
        out, _, _, bad = norm(qkv, weight)
        assert bad == 2
        assert not out[1, : 6 * D].any() and not out[3, 6 * D : 8 * D].any()
        kept = [0, 2]
        assert out[kept].tobytes() == clean[kept].tobytes()


def test_a_row_of_zeros_stays_zeros():
    qkv, weight = rows(2)
    qkv[0] = 0
    out, _, _, bad = norm(qkv, weight)
    assert bad == 0 and not out[0].any() and not np.signbit(out[0]).any()


def test_fingerprints_are_those_of_what_went_in_and_of_what_came_out():
    qkv, weight = rows(5)
    out, r, sums, _ = norm(qkv, weight)
    assert int(r.segments_found[0, 0]) == fingerprint(qkv, Tag(7, "qkv"))
    assert int(r.made[0, REST.index("qk_normed")]) == fingerprint(out, Tag(7, "qk_normed"))
    linear = linear_fingerprint(sums, Tag(7, "qk_sum"))
    at = REST.index("qk_sum")
    assert int(r.made[0, at]) == int(r.found[0, at]) == int(r.sums[0, at]) == linear
    assert (QKV, QK_NORMED, QK_SUM) == tuple(
        LAYER_TENSORS.index(name) for name in ("qkv", "qk_normed", "qk_sum")
    )


def test_a_sum_that_changes_after_it_was_made_is_seen():
    def flip(sent):
        sent[0, 2, 1] ^= 1 << 40

    _, r, _, _ = norm(*rows(5), fault=flip)
    at = REST.index("qk_sum")
    assert r.made[0, at] != r.found[0, at] == r.sums[0, at]


def test_a_maximum_or_a_sum_that_is_not_of_the_row_leaves_no_word_that_its_last_use_has():
    at = REST.index("qk_normed")

    def flip(sent):
        sent[0, 2, 1] ^= 1 << 40

    def double(maxima):
        maxima[1, 0] += 1 << 23

    def lower(maxima):
        maxima[1, 0] -= 1 << 23

    out, right, _, _ = norm(*rows(5))
    for tp, faults in ((1, (dict(fault=flip), dict(larger=double), dict(larger=lower))),
                       (2, (dict(fault=flip), dict(larger=lower)))):  # fmt: skip
        assert norm(*rows(5), tp)[0].tobytes() == out.tobytes()
        for fault in faults:
            changed, found, _, _ = norm(*rows(5), tp, **fault)
            if tp == 1:
                word = fingerprint(changed, Tag(7, "qk_normed"))
                assert int(found.made[0, at]) == word ^ (1 << 64) - 1
    assert int(right.made[0, at]) == fingerprint(out, Tag(7, "qk_normed"))
