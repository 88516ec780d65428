"""The row kernels against numpy, and the fingerprints in them against the reference."""

import numpy as np
import pytest

from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import CONTENT, LINEAR, Tag
from spimpi.inference import kernels
from spimpi.inference.config import EMBEDDED_MODEL, load_config
from spimpi.inference.exact import odd_vector
from spimpi.inference.head import argmax
from spimpi.inference.tensors import LAYER_TENSORS, PRODUCTS, REST, Keys, Widths
from spimpi.partition import Slab

RNG = np.random.default_rng(1069)


class Held:
    """What one kernel leaves for the next, and what that finds of it."""

    def __init__(self, width):
        self.weights = odd_vector(np.uint64(5), width).astype(np.uint32)
        self.words = np.zeros((1, 3), np.uint64)
        self.found = np.zeros((1, len(PRODUCTS)), np.uint64)
        self.bad = np.zeros((1, len(PRODUCTS)), np.int64)
        self.arguments = (self.weights, self.words, self.found, self.bad)

    def hold(self, array, slot):
        kernels.hold(array.view(np.uint32), self.weights, self.words, 0, slot)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("columns", [1, 7, 64, 65])
def test_a_block_has_its_share_of_the_global_tensors_fingerprint(columns):
    tag, shape = Tag(1069, "attn", 2, 1), (9, 100)
    x = floats(5, columns)
    keys = np.array([0, tag.key(CONTENT, shape, 4)], np.uint64)
    words = np.zeros(3, np.uint64)
    kernels.fingerprint_block(x.view(np.uint32), keys, 1, 3, 11, 100, words, 2)
    assert int(words[2]) == fingerprint(x, tag, Slab(shape, (3, 11)))
    x[4, columns - 1] = np.nextafter(x[4, columns - 1], np.float32(9))
    kernels.fingerprint_block(x.view(np.uint32), keys, 1, 3, 11, 100, words, 1)
    assert words[1] != words[2]


def test_column_segments_are_fingerprinted_where_they_lie_globally():
    tag, shape = Tag(1, "qkv", 0, 0), (4, 60)
    x = floats(4, 12)
    keys = np.array([tag.key(CONTENT, shape, 4)], np.uint64)
    segments = np.array([(0, 20, 5), (5, 33, 3), (8, 56, 4)], np.int64)
    words = np.zeros(3, np.uint64)
    kernels.fingerprint_segments(x.view(np.uint32), keys, 0, 0, segments, 60, words, 0)
    for word, (local, first, width) in zip(words, segments):
        part = np.ascontiguousarray(x[:, local : local + width])
        assert int(word) == fingerprint(part, tag, Slab(shape, (0, int(first))))


def test_rows_at_their_places_add_up_to_all_rows():
    tag, shape = Tag(1, "embed"), (6, 10)
    x = floats(6, 10)
    keys = np.array([tag.key(CONTENT, shape, 4)], np.uint64)
    words = np.zeros(3, np.uint64)
    first, others = np.array([0, 3, 4]), np.array([5, 1, 2])
    for slot, rows in enumerate((first, others)):
        kernels.fingerprint_rows(x[rows].view(np.uint32), rows, keys, 0, words, slot)
    assert int(words[0] ^ words[1]) == fingerprint(x, tag)
    for start, stop in ((0, 2), (2, 6)):  # rows that a block does not have are left out
        kernels.fingerprint_some_rows(
            x[start:stop].view(np.uint32), others, start, keys, 0, words, 2
        )
    assert words[2] == words[1]
    kernels.fingerprint_rows(x[first[::-1]].view(np.uint32), first, keys, 0, words, 2)
    assert words[2] != words[0]


@pytest.mark.parametrize("half", [0, 1])
def test_a_residual_sum_fingerprints_what_it_used_and_what_it_made(half):
    x, delta, out = floats(3, 8), floats(3, 8), np.empty((3, 8), np.float32)
    keys = RNG.integers(0, 2**63, (2, len(LAYER_TENSORS))).astype(np.uint64)
    found, made = np.zeros((2, 1, 7), np.uint64)
    hidden, word = np.zeros((2, 1), np.uint64)
    held = Held(8)
    held.hold(delta, half)

    def add():
        kernels.add_residual(
            x, delta, np.empty(0, np.float32), 1e-5, out, keys, 0, 4, half, True, found, made,
            hidden, *held.arguments,
        )  # fmt: skip

    add()
    assert (out == x + delta).all() and not held.bad.any()
    used, kept = (("input", 0, "hidden"), ("resid", 1, "resid"))[:: 1 if half == 0 else -1]
    for array, (name, row, key), words in (
        (x, used, found), (out, kept if half == 0 else ("hidden", 1, "hidden"), made),
    ):  # fmt: skip
        place = (keys[row], LAYER_TENSORS.index(key), 4, 0, 8)
        kernels.fingerprint_block(array.view(np.uint32), *place, word, 0)
        assert word[0] == (hidden[0] if name == "hidden" else words[0, REST.index(name)])
    delta[1, 3] = np.nextafter(delta[1, 3], np.float32(9))
    add()
    product = PRODUCTS.index(("attn_out", "ffn_out")[half])
    assert held.bad[0, product] == held.bad.sum() == 1 and held.found[0, product] != 0


def test_what_a_block_made_is_added_after_its_norm():
    x, delta, weight, out = floats(3, 8), floats(3, 8), floats(8), np.empty((3, 8), np.float32)
    normed, held = np.empty_like(delta), Held(8)
    held.hold(delta, 0)
    words = np.zeros((2, 1, 7), np.uint64)
    keys = np.zeros((2, len(LAYER_TENSORS)), np.uint64)
    kernels.add_residual(
        x, delta, weight, 1e-5, out, keys, 0, 0, 0, True, *words, np.zeros(1, np.uint64),
        *held.arguments,
    )  # fmt: skip
    kernels.rmsnorm(delta, weight, 1e-5, normed)
    assert (out == x + normed).all() and not held.bad.any()


@pytest.mark.parametrize("first_layer", [0, 3])
def test_keys_of_a_step_are_those_of_the_tags(first_layer):
    config = load_config(EMBEDDED_MODEL)
    layers = range(first_layer, first_layer + 2)
    w = Widths.of(config)
    keys = Keys(7, config, layers).of_step(5, 33)
    widths = dict(hidden=w.hidden, qkv=w.qkv, attn=w.attn, resid=w.hidden, ffn=w.ffn,
                  attn_out=w.hidden, ffn_out=w.hidden, qk_normed=w.qkv, qk_sum=2,
                  qk_max=2)  # fmt: skip
    for row, layer in enumerate(range(first_layer, first_layer + 2), start=1):
        for column, name in enumerate(LAYER_TENSORS):
            summed = name.endswith(("_out", "_sum"))
            shape = (33, widths[name]) if name in widths else (33,)
            key = Tag(7, name, layer, 5).key(LINEAR if summed else CONTENT, shape, 4 + 4 * summed)
            assert int(keys[row, column]) == key, name
    before = ("embed", -1) if first_layer == 0 else ("hidden", first_layer - 1)
    assert int(keys[0, 0]) == Tag(7, *before, 5).key(CONTENT, (33, w.hidden), 4)


def test_rmsnorm_and_swiglu_are_those_of_the_papers():
    x, weight = floats(3, 40), floats(40)
    out = np.empty_like(x)
    kernels.rmsnorm(x, weight, 1e-5, out)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(out, expected, rtol=2e-7, atol=0)
    gate_up, made = floats(3, 16), np.empty((3, 8), np.float32)
    keys, words = np.zeros((2, len(LAYER_TENSORS)), np.uint64), np.zeros((1, 7), np.uint64)
    held = Held(16)
    held.hold(gate_up, kernels.HELD_GATE_UP)
    kernels.swiglu(gate_up, made, keys, 0, 0, 0, 8, True, words, *held.arguments)
    assert not held.bad.any()
    key = np.zeros(1, np.uint64)
    kernels.fingerprint_block(made.view(np.uint32), keys[1], 4, 0, 0, 8, key, 0)
    assert words[0, REST.index("ffn")] == key[0] != 0
    gate, up = gate_up[:, :8].astype(np.float64), gate_up[:, 8:]
    np.testing.assert_allclose(made, gate / (1 + np.exp(-gate)) * up, rtol=2e-7, atol=0)
    gate_up[2, 15] = -gate_up[2, 15]
    kernels.swiglu(gate_up, made, keys, 0, 0, 0, 8, True, words, *held.arguments)
    assert held.bad[0, PRODUCTS.index("gate_up")] == held.bad.sum() == 1


LOGITS = np.array([[1, 5, 5, 2], [3, 3, 3, 3], [-np.inf] * 4, [0, 9, np.nan, np.inf]], np.float32)


@pytest.mark.parametrize("starts", [[0, 4], [0, 1, 4], [0, 2, 3, 4]])
def test_a_token_is_the_lowest_id_of_the_largest_logit(starts):
    cuts = np.array(starts)
    pieces = [np.ascontiguousarray(LOGITS[:, a:b]) for a, b in zip(starts, starts[1:])]
    many = len(pieces) > 1
    gathered = np.concatenate([p.ravel() for p in pieces]) if many else np.empty(0, np.float32)
    streams = Tag(1, "logits").key(CONTENT, (7, 4), 4), Tag(1, "tokens").key(CONTENT, (7,), 8)
    keys = np.array([(0, 0), streams], np.uint64)
    own, found, tokens = np.empty(4, np.int64), np.zeros(3, np.uint64), np.zeros(3, np.uint64)
    part = len(pieces) - 1
    kernels.check_sampled(
        pieces[part], gathered, cuts, own, keys, 1, 2, part, found, tokens
    )
    assert own.tolist() == [1, 0, 0, 2] == argmax(pieces).tolist()
    whole, place = Tag(1, "logits"), Slab((7, 4), (2, starts[part]))
    assert int(found[2]) == fingerprint(pieces[part], whole, place)
    if many:
        assert int(found[1]) == fingerprint(LOGITS, whole, Slab((7, 4), (2, 0)))
    assert int(tokens[0]) == fingerprint(own, Tag(1, "tokens"), Slab((7,), (2,)))


def test_the_rows_result_does_not_depend_on_the_other_rows():
    x, weight = floats(7, 33), floats(33)
    together, alone = np.empty_like(x), np.empty((1, 33), np.float32)
    kernels.rmsnorm(x, weight, 1e-6, together)
    for row in range(7):
        kernels.rmsnorm(x[row : row + 1], weight, 1e-6, alone)
        assert alone.tobytes() == together[row].tobytes()


def reduced(maxima):
    """What MPI_MAX of the ranks' packed maxima gives, and what each rank then finds wrong."""
    packed = []
    for rank, own in enumerate(maxima):
        words = np.empty(own.size, np.uint64)
        kernels.pack_maxima(own, np.uint64(rank), words)
        packed.append(words)
    return packed, np.maximum.reduce(packed)


def wrong_rows(packed, result, maxima):
    words = np.zeros(1, np.uint64)
    counts = []
    for rank, own in enumerate(maxima):
        n = np.uint64(len(maxima))
        arguments = (packed[rank], result, own.copy(), np.uint64(rank), n, np.uint64(5), 0)
        counts.append(kernels.unpack_maxima(*arguments, words, 0))
    return counts


def test_a_wrong_maximum_is_seen_whichever_way_it_is_wrong():
    maxima = [RNG.integers(1, 2**31, 6).astype(np.uint32) for _ in range(3)]
    packed, result = reduced(maxima)
    assert wrong_rows(packed, result, maxima) == [0, 0, 0]
    true = np.maximum.reduce(maxima)
    assert (result >> np.uint64(32) == true).all()
    for change in (1, -1):
        broken = result.copy()
        broken[2] = int(broken[2]) + (change << 32)
        assert sum(wrong_rows(packed, broken, maxima)) > 0
    lowered = [p.copy() for p in packed]
    lowered[1][0] -= np.uint64(1 << 32)  # what rank 1 sent is no longer its maximum
    assert wrong_rows(lowered, result, maxima)[1] == 1
