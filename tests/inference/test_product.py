"""What follows a matmul: checked against what the layer holds, scaled back, fingerprinted."""

import numpy as np
import pytest

from spimpi.fingerprint import fingerprint, linear_fingerprint
from spimpi.fingerprint.tag import CONTENT, LINEAR, Tag
from spimpi.inference import exact, product
from spimpi.inference.kernels import pack_maxima, rmsnorm
from spimpi.inference.tensors import LAYER_TENSORS, PRODUCTS, REST
from spimpi.partition import Slab

RNG = np.random.default_rng(1069)
N_ROWS, INNER, OUTER, LAYER, FIRST_ROW = 4, 20, 12, 1, 2


def absmax(x):
    largest = np.empty(len(x), np.uint32)
    exact.row_absmax(x, largest)
    return largest


def projected(wq, r):
    """W^T r mod 2**64 of integers."""
    return (wq.astype(np.int64) * r[:, None]).sum(axis=0)


class Finished:
    """A product of integers with everything that the kernels want and leave."""

    def __init__(self):
        # Rows whose largest is 2**9 are their own integers of 10 bits.
        self.xq = RNG.integers(-500, 500, (N_ROWS, INNER)).astype(float)
        self.xq[:, 3] = 512
        self.x = self.xq.astype(np.float32)
        self.maxima, self.packed = absmax(self.x), np.empty(N_ROWS, np.uint64)
        pack_maxima(self.maxima, np.uint64(1), self.packed)
        wq = RNG.integers(-500, 500, (OUTER, INNER)).astype(np.float32)
        self.y = self.xq @ wq.T.astype(float)
        self.r = exact.odd_vector(np.uint64(5), OUTER)
        self.wq = wq
        self.wr = projected(wq, self.r)
        self.ex = np.full(N_ROWS, 10, np.int32)
        self.ew = RNG.integers(-9, 9, OUTER).astype(np.int32)
        self.out = np.empty((N_ROWS, OUTER), np.float32)
        self.found, self.expected = np.zeros((2, 2, len(PRODUCTS)), np.uint64)
        self.bad = np.zeros((2, len(PRODUCTS)), np.int64)
        self.keys = np.zeros((3, len(LAYER_TENSORS)), np.uint64)
        self.made = np.zeros((2, len(REST)), np.uint64)
        self.weights = exact.odd_vector(np.uint64(6), OUTER).astype(np.uint32)
        self.held = np.zeros((2, 3), np.uint64)

    def stream(self, name, tag, domain, shape, itemsize):
        self.keys[LAYER + 1, LAYER_TENSORS.index(name)] = tag.key(domain, shape, itemsize)

    def project(self, index=4, segments=((0, 0, 0),), n_cols=1, checked=True):
        made = np.zeros((2, len(segments)), np.uint64)
        product.finish_projection(
            self.x, product.NO_NORM, 1e-5, self.wr, self.y, self.r, self.ex, self.ew, 10, self.out,
            checked, LAYER, index, self.found, self.expected, self.bad, self.keys, FIRST_ROW,
            np.array(segments, np.int64), n_cols, made, self.weights, self.held, 2,
        )  # fmt: skip
        return made[LAYER]

    def carry(self, which=0, checked=True):
        sent = np.full(self.y.shape, 7, np.int64)
        product.finish_partial(
            self.x, self.packed, self.maxima, self.wr, self.y, self.r, 10, sent, checked, LAYER, 3, self.found,
            self.expected, self.bad, self.keys, FIRST_ROW, which, self.made,
        )  # fmt: skip
        return sent


@pytest.mark.parametrize("finish", ["project", "carry"])
def test_a_right_product_passes_and_one_wrong_element_fails(finish):
    index = 4 if finish == "project" else 3
    case = Finished()
    getattr(case, finish)()
    assert case.bad[LAYER, index] == 0
    assert case.found[LAYER, index] == case.expected[LAYER, index] != 0
    assert case.found.any(axis=0).sum() == 1  # nothing else was written
    case.y[2, 5] += 1
    getattr(case, finish)()
    assert case.bad[LAYER, index] == 1
    assert case.found[LAYER, index] != case.expected[LAYER, index]


@pytest.mark.parametrize("finish", ["project", "carry"])
def test_an_element_that_is_no_integer_fails(finish):
    case = Finished()
    case.y[0, 0] += 2.0**-20
    getattr(case, finish)()
    assert case.bad[LAYER].sum() == 1


@pytest.mark.parametrize("finish", ["project", "carry"])
@pytest.mark.parametrize("change", [1, 400])
def test_a_product_of_another_input_than_the_layer_holds_fails(finish, change):
    """As if the input had changed between its norm, its scaling and the matmul."""
    case = Finished()
    case.xq[1, 7] += change
    case.y[1] = case.xq[1] @ case.wq.T.astype(float)
    getattr(case, finish)()
    assert case.bad[LAYER].sum() == 1 and (case.found != case.expected).any()


def test_a_product_is_checked_against_the_norm_of_the_layers_input():
    case, weight = Finished(), RNG.uniform(0.5, 2, INNER).astype(np.float32)
    normed, scaled = np.empty_like(case.x), np.empty(case.x.shape)
    rmsnorm(case.x, weight, 1e-5, normed)
    exact.quantize_rows(normed, absmax(normed), 10, scaled, case.ex)
    case.y = scaled @ case.wq.T.astype(float)
    wrong = weight.copy()
    wrong[4] *= 1.5
    for norm, n_bad in ((weight, 0), (wrong, N_ROWS)):
        product.finish_projection(
            case.x, norm, 1e-5, case.wr, case.y, case.r, case.ex, case.ew, 10, case.out, True,
            LAYER, 0, case.found, case.expected, case.bad, case.keys, FIRST_ROW,
            product.NO_SEGMENTS, 1, case.made, case.weights, case.held, product.NOT_HELD,
        )  # fmt: skip
        assert case.bad[LAYER, 0] == n_bad
        if norm is weight:
            wanted = np.empty_like(case.out)
            exact.scale_back(case.y, case.ex, case.ew, 10, wanted)
            assert (case.out == wanted).all() and not case.held.any()


def test_a_row_above_its_global_maximum_fails():
    case = Finished()
    case.maxima[2] -= 1  # the exponent is another, and the row's own maximum larger
    case.carry()
    assert case.bad[LAYER].sum() == 1


def test_a_maximum_that_is_not_the_rows_own_fails_though_all_reduced_it_alike():
    case = Finished()
    case.packed[1] += np.uint64(1 << 32)
    case.carry()
    assert case.bad[LAYER].sum() == 1


@pytest.mark.parametrize("checked", [True, False])
def test_a_projection_is_scaled_back_as_scale_back_does(checked):
    case = Finished()
    case.project(checked=checked)
    wanted = np.empty_like(case.out)
    exact.scale_back(case.y, case.ex, case.ew, 10, wanted)
    assert (case.out == wanted).all()
    assert case.found.any() == checked


def test_column_segments_of_a_projection_are_fingerprinted_where_they_lie_globally():
    case, tag = Finished(), Tag(1, "qkv", 3, 2)
    case.stream("qkv", tag, CONTENT, (9, 60), 4)
    segments = ((0, 20, 5), (5, 33, 3), (8, 56, 4))
    for word, (local, first, width) in zip(case.project(0, segments, 60), segments):
        part = np.ascontiguousarray(case.out[:, local : local + width])
        assert int(word) == fingerprint(part, tag, Slab((9, 60), (FIRST_ROW, first)))


@pytest.mark.parametrize(("which", "name"), [(0, "attn_out"), (1, "ffn_out")])
def test_a_partial_sum_is_carried_with_its_linear_fingerprint(which, name):
    case, tag = Finished(), Tag(1, name, 3, 2)
    case.stream(name, tag, LINEAR, (8, OUTER), 8)
    sent = case.carry(which)
    assert (sent == case.y).all()
    word = int(case.made[LAYER, REST.index(name)])
    assert word == linear_fingerprint(sent, tag, Slab((8, OUTER), (FIRST_ROW, 0)))
    assert (case.carry(which, checked=False) == case.y).all()


@pytest.mark.parametrize(("which", "names"), [(0, ("attn", "attn_out")), (1, ("ffn", "ffn_out"))])
def test_a_sum_is_checked_with_the_fingerprints_of_what_went_in_and_came_out(which, names):
    case, tags = Finished(), [Tag(1, name, 3, 2) for name in names]
    case.stream(names[0], tags[0], CONTENT, (8, 30), 4)
    case.stream(names[1], tags[1], LINEAR, (8, OUTER), 8)
    x = RNG.standard_normal((N_ROWS, 5)).astype(np.float32)
    sent, summed = RNG.integers(-(2**53), 2**53, (2, N_ROWS, OUTER))
    found, sums = np.zeros((2, 2, len(REST)), np.uint64)
    words, bad = np.zeros((2, 3), np.uint64), np.zeros((2, 3), np.int64)
    for checked in (False, True):
        product.finish_sum(
            x.view(np.uint32), sent, summed, case.maxima, case.ew, 10, case.out, checked, LAYER,
            which, FIRST_ROW, 11, 30, case.keys, found, sums, words, bad, case.weights, case.held,
        )  # fmt: skip
        assert found.any() == checked
    wanted = np.empty_like(case.out)
    exact.scale_back(summed, case.ex, case.ew, 10, wanted)
    assert (case.out == wanted).all()
    rows, column = Slab((8, OUTER), (FIRST_ROW, 0)), REST.index(names[1])
    place = Slab((8, 30), (FIRST_ROW, 11))
    assert int(found[LAYER, REST.index(names[0])]) == fingerprint(x, tags[0], place)
    assert int(found[LAYER, column]) == linear_fingerprint(sent, tags[1], rows)
    assert int(sums[LAYER, column]) == linear_fingerprint(summed, tags[1], rows)
