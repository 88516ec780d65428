"""Exact attention against plain numpy, its invariance, and its two product checks."""

import numpy as np
import pytest

from spimpi.inference.attention import NO_FAULT, SCORES, Cache, attend, attention_bits
from spimpi.inference.exact import odd_vector
from spimpi.inference.kernels import rope_table
from spimpi.inference.tensors import LAYER_TENSORS, PRODUCTS, QKV, REST

RNG = np.random.default_rng(1069)
HEADS, KV, D, POSITIONS = 4, 2, 16, 24
BITS = attention_bits(D, 64)


def run(qkv, sequences, positions, cache, fault=NO_FAULT, window=POSITIONS):
    cosines, sines = (np.empty((POSITIONS, D // 2), np.float32) for _ in range(2))
    frequencies = (10000.0 ** (-np.arange(D // 2) / (D // 2))).astype(np.float32)
    rope_table(frequencies, cosines, sines)
    out = np.empty((len(qkv), HEADS * D), np.float32)
    product_found, product_expected = np.zeros((2, 1, len(PRODUCTS)), np.uint64)
    product_bad, nonfinite = np.zeros((1, len(PRODUCTS)), np.int64), np.zeros((1, 5), np.int64)
    kv_of_head = np.arange(HEADS) // (HEADS // KV)
    width = (HEADS + 2 * KV) * D
    settings = np.array([D, KV, *BITS, True, width, 0, HEADS * D, QKV, window], np.int64)
    keys = np.zeros((2, len(LAYER_TENSORS)), np.uint64)
    segments, found = np.array([(0, 0, width)]), np.zeros((1, 1), np.uint64)
    attend(
        qkv, np.asarray(sequences), np.asarray(positions), cosines, sines, kv_of_head, settings,
        cache.keys, cache.key_exponents, cache.key_sums, cache.values, cache.value_exponents,
        cache.value_sums, cache.seals, cache.lengths, odd_vector(np.uint64(3), POSITIONS),
        np.asarray(fault), out, keys, 0, 0, segments, found, np.zeros((1, len(REST)), np.uint64), qkv, 0,
        HEADS * D, product_found, product_expected, product_bad, nonfinite,
    )  # fmt: skip
    at = slice(SCORES, SCORES + 2)
    sides = np.stack([product_found[0, at], product_expected[0, at]], axis=1).ravel()
    return out, np.array([*sides, *product_bad[0, at], nonfinite[0, 1]], np.uint64)


def random_rows(n):
    return RNG.standard_normal((n, (HEADS + 2 * KV) * D)).astype(np.float32)


def plain(qkv, window=POSITIONS):
    """Softmax attention of one causal sequence in float64."""
    heads = qkv.reshape(len(qkv), HEADS + 2 * KV, D).astype(np.float64)
    angle = np.arange(len(qkv))[:, None] * 10000.0 ** (-np.arange(D // 2) / (D // 2))
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    low, high = heads[..., : D // 2], heads[..., D // 2 :]
    rotated = np.concatenate([low * c - high * s, high * c + low * s], axis=2)
    out = np.empty((len(qkv), HEADS, D))
    for h in range(HEADS):
        k, v = rotated[:, HEADS + h // 2], heads[:, HEADS + KV + h // 2]
        scores = rotated[:, h] @ k.T / np.sqrt(D)
        ages = np.arange(len(qkv))[:, None] - np.arange(len(qkv))
        scores[(ages < 0) | (ages >= window)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, h] = weights / weights.sum(axis=1, keepdims=True) @ v
    return out.reshape(len(qkv), -1)


def test_attention_is_softmax_attention():
    qkv = random_rows(20)
    out, words = run(qkv, [0] * 20, range(20), Cache.empty(1, KV, POSITIONS, D))
    np.testing.assert_allclose(out, plain(qkv), atol=3e-5)
    assert words[0] == words[1] and words[2] == words[3] and not words[4:].any()


@pytest.mark.parametrize("window", [1, 2, 7, 19, 20])
def test_a_sliding_window_sees_the_last_positions_alone(window):
    qkv = random_rows(20)
    out, words = run(qkv, [0] * 20, range(20), Cache.empty(1, KV, POSITIONS, D), window=window)
    np.testing.assert_allclose(out, plain(qkv, window), atol=3e-5)
    assert words[0] == words[1] and words[2] == words[3] and not words[4:].any()
    whole, _ = run(qkv, [0] * 20, range(20), Cache.empty(1, KV, POSITIONS, D))
    assert out[:window].tobytes() == whole[:window].tobytes()
    assert window == 20 or (out[window:] != whole[window:]).any(axis=1).all()


@pytest.mark.parametrize("window", [POSITIONS, 5])
@pytest.mark.parametrize("cuts", [(0, 20), (0, 7, 8, 20), tuple(range(21))])
def test_prefill_chunks_and_decoding_give_the_same_bits(cuts, window):
    qkv = np.random.default_rng(5).standard_normal((20, (HEADS + 2 * KV) * D)).astype(np.float32)
    whole, _ = run(qkv, [0] * 20, range(20), Cache.empty(1, KV, POSITIONS, D), window=window)
    cache = Cache.empty(1, KV, POSITIONS, D)
    parts = [
        run(np.ascontiguousarray(qkv[a:b]), [0] * (b - a), range(a, b), cache, window=window)
        for a, b in zip(cuts, cuts[1:])
    ]
    assert np.concatenate([out for out, _ in parts]).tobytes() == whole.tobytes()
    assert not any(words[4:].any() for _, words in parts)


def test_a_batch_gives_every_sequence_the_bits_that_it_has_alone():
    first, second = random_rows(6), random_rows(9)
    cache = Cache.empty(2, KV, POSITIONS, D)
    both, _ = run(np.concatenate([first, second]), [0] * 6 + [1] * 9, [*range(6), *range(9)], cache)
    for rows, part in ((first, both[:6]), (second, both[6:])):
        n = len(rows)
        alone, _ = run(rows, [0] * n, range(n), Cache.empty(1, KV, POSITIONS, D))
        assert alone.tobytes() == part.tobytes()


@pytest.mark.parametrize(("product", "index"), [(0, 3), (1, 2 * D + 5)])
def test_one_wrong_integer_of_either_product_is_caught(product, index):
    qkv = random_rows(8)
    _, words = run(qkv, [0] * 8, range(8), Cache.empty(1, KV, POSITIONS, D), (5, product, index))
    assert words[4 + product] == 1 and words[4 + 1 - product] == 0


@pytest.mark.parametrize("window", [POSITIONS, 6])
def test_a_key_that_changes_in_the_cache_is_caught(window):
    qkv = random_rows(8)
    cache = Cache.empty(1, KV, POSITIONS, D)
    run(np.ascontiguousarray(qkv[:7]), [0] * 7, range(7), cache, window=window)
    cache.keys[0, 1, 2, 3] += 1
    _, words = run(np.ascontiguousarray(qkv[7:]), [0], [7], cache, window=window)
    assert words[4] == 1


def _exchange(array, i, j):
    array[[i, j]] = array[[j, i]]


def _heads(cache):
    for array in (cache.keys, cache.key_exponents, cache.key_sums, cache.values,
                  cache.value_exponents, cache.value_sums, cache.seals):  # fmt: skip
        _exchange(array[0], 0, 1)


def _prompts(cache):
    for array in vars(cache).values():
        _exchange(array, 0, 1)


def _positions(cache):
    for array in (cache.values, cache.value_exponents, cache.value_sums):
        _exchange(array[0, 1], 3, 5)


def _key_positions(cache):
    r = odd_vector(np.uint64(3), POSITIONS)
    for array in (cache.keys, cache.key_exponents):
        _exchange(array[0, 1], 3, 5)
    cache.key_sums[0, 1] = (cache.keys[0, 1].astype(np.int64) * r[:, None]).sum(axis=0)


def _key_exponent(cache):
    cache.key_exponents[0, 1, 4] += 1


def _value_exponent_down(cache):
    """The value then counts for nothing, so that its product is right."""
    cache.value_exponents[0, 0, 4] -= 100


@pytest.mark.parametrize("window", [POSITIONS, 6])
@pytest.mark.parametrize(
    "move", [_heads, _prompts, _positions, _key_positions, _key_exponent, _value_exponent_down]
)
def test_what_changes_in_the_cache_together_with_its_sums_is_caught(move, window):
    qkv = np.random.default_rng(8).standard_normal((18, (HEADS + 2 * KV) * D)).astype(np.float32)
    earlier, later = [0] * 8 + [1] * 8, [*range(8), *range(8)]
    cache = Cache.empty(2, KV, POSITIONS, D)
    _, words = run(np.ascontiguousarray(qkv[:16]), earlier, later, cache, window=window)
    assert words[0] == words[1] and words[2] == words[3] and not words[4:].any()
    move(cache)
    _, words = run(np.ascontiguousarray(qkv[16:]), [0, 1], [8, 8], cache, window=window)
    assert words[4] + words[5] > 0 and (words[0] != words[1] or words[2] != words[3])


@pytest.mark.parametrize("positions", [[7], [9]])
def test_a_position_that_does_not_come_next_is_caught(positions):
    qkv, cache = random_rows(9), Cache.empty(1, KV, POSITIONS, D)
    run(np.ascontiguousarray(qkv[:8]), [0] * 8, range(8), cache)
    _, words = run(np.ascontiguousarray(qkv[8:]), [0], positions, cache)
    assert words[4] > 0 and words[0] != words[1]


@pytest.mark.parametrize(("product", "index"), [(0, 3), (1, 2 * D + 5)])
def test_one_wrong_integer_within_a_window_is_caught(product, index):
    fault = (6, product, index)
    cache = Cache.empty(1, KV, POSITIONS, D)
    _, words = run(random_rows(8), [0] * 8, range(8), cache, fault, window=3)
    assert words[4 + product] == 1 and words[4 + 1 - product] == 0


def test_rows_with_nan_are_counted_and_do_not_spread():
    qkv = random_rows(6)
    clean, _ = run(qkv, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2], Cache.empty(2, KV, POSITIONS, D))
    qkv[4, 0] = np.nan
    out, words = run(qkv, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2], Cache.empty(2, KV, POSITIONS, D))
    assert words[6] == 1
    assert out[:4].tobytes() == clean[:4].tobytes()
