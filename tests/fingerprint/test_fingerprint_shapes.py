"""Partition invariance for any shape, cut, dtype and memory layout, against the reference."""

import ml_dtypes
import numpy as np
import pytest
from fingerprint_oracle import (
    LAYOUTS,
    broadcast,
    brute_fingerprint,
    element_bits,
    gapped,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import spimpi.fingerprint as fp
from spimpi.fingerprint import Tag, reference
from spimpi.partition import Slab, TensorPartition

REAL = [
    np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64,
    np.float16, np.float32, np.float64,
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
]  # fmt: skip
TAG = Tag(seed=7, name="hidden", layer=3, step=2)
PATIENT = settings(max_examples=60, deadline=None)

dtypes = st.sampled_from([np.dtype(t) for t in REAL])
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
layouts = st.sampled_from(sorted(LAYOUTS))
seeds = st.integers(0, 2**32 - 1)


def random_array(shape, dtype, seed) -> np.ndarray:
    """Random bits, NaNs and negative zeros among them (bools stay 0 or 1)."""
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(dtype)
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(n_bytes), dtype).reshape(shape).copy()


@PATIENT
@given(shapes, dtypes, layouts, seeds)
def test_a_fingerprint_is_the_references_whatever_the_memory_layout(shape, dtype, layout, seed):
    x = random_array(shape, dtype, seed)
    laid_out = LAYOUTS[layout](x)
    assert element_bits(laid_out) == element_bits(x)
    assert fp.fingerprint(laid_out, TAG) == brute_fingerprint(x, TAG)


@PATIENT
@given(shapes, dtypes, layouts, seeds, st.data())
def test_a_tensor_cut_into_a_grid_of_blocks_combines_to_the_whole(
    shape, dtype, layout, seed, data
):
    x = LAYOUTS[layout](random_array(shape, dtype, seed))
    blocks = [()]
    for n in shape:
        cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=2)))
        edges = [0, *cuts, n]
        blocks = [(*b, slice(a, z)) for b in blocks for a, z in zip(edges, edges[1:])]
    parts = []
    for block in blocks:
        place = Slab(shape, tuple(axis.start for axis in block))
        parts.append(fp.fingerprint(x[block], TAG, place))
        if dtype.itemsize == 1:  # one size is enough for this slower look at each part
            assert parts[-1] == brute_fingerprint(x[block], TAG, shape, place.offset)
    assert fp.combine(data.draw(st.permutations(parts))) == fp.fingerprint(x, TAG)


@PATIENT
@given(shapes.filter(len), dtypes, seeds, st.integers(1, 7), st.data())
def test_the_shards_of_a_partition_combine_to_the_whole(shape, dtype, seed, n_shards, data):
    x = random_array(shape, dtype, seed)
    dim = data.draw(st.integers(0, len(shape) - 1))
    parts = []
    for shard in range(n_shards):
        part = TensorPartition(dim, n_shards, shard, shape[dim])
        block = x[(*(slice(None),) * dim, slice(part.start, part.stop))]
        parts.append(fp.fingerprint(block, TAG, part))
    assert fp.combine(parts) == fp.fingerprint(x, TAG)


@PATIENT
@given(shapes, st.permutations(range(4)), dtypes, seeds)
def test_a_transposed_view_is_fingerprinted_like_its_copy(shape, order, dtype, seed):
    x = random_array(shape, dtype, seed)
    view = x.transpose([axis for axis in order if axis < len(shape)])
    assert fp.fingerprint(view, TAG) == brute_fingerprint(view, TAG)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (0, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_complex_number_is_two_items_along_a_new_last_axis(dtype, shape, layout):
    parts = random_array((*shape, 2), dtype().real.dtype, 5)
    x = LAYOUTS[layout](parts.view(dtype).reshape(shape))
    assert fp.fingerprint(x, TAG) == brute_fingerprint(parts, TAG)


def test_a_complex_shard_is_placed_by_complex_elements():
    x = random_array((4, 6, 2), np.dtype(np.float32), 9).view(np.complex64)[..., 0]
    parts = [fp.fingerprint(x[:, a:a + 2], TAG, Slab((4, 6), (0, a))) for a in (0, 2, 4)]
    assert fp.combine(parts) == fp.fingerprint(x, TAG)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_a_broadcast_row_counts_once_for_each_place_that_it_stands_in(dtype):
    row = random_array((37,), np.dtype(dtype), 1)
    view = broadcast(row, 5)
    assert fp.fingerprint(view, TAG) == brute_fingerprint(np.tile(row, (5, 1)), TAG)
    assert fp.fingerprint(view.T, TAG) == brute_fingerprint(np.tile(row, (5, 1)).T, TAG)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_overlapping_windows_count_each_place_with_its_own_value(dtype):
    windows = np.lib.stride_tricks.sliding_window_view(random_array((40,), np.dtype(dtype), 6), 9)
    assert fp.fingerprint(windows, TAG) == brute_fingerprint(windows, TAG)
    assert fp.fingerprint(windows.T, TAG) == brute_fingerprint(windows.T, TAG)


@pytest.mark.parametrize("columns", [1, 3, 16, 17, 31, 32, 63, 64, 65, 100])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_a_column_shard_is_the_references_around_every_vector_width(dtype, columns):
    x = random_array((7, 100), np.dtype(dtype), columns)
    shard, place = x[:, 100 - columns :], (0, 100 - columns)
    assert fp.fingerprint(shard, TAG, Slab(x.shape, place)) == brute_fingerprint(
        shard, TAG, x.shape, place
    )


def test_a_numpy_scalar_is_a_tensor_without_axes():
    assert fp.fingerprint(np.float32(1.5), TAG) == brute_fingerprint(np.array(1.5, "f4"), TAG)


def test_an_empty_shard_adds_nothing():
    part = TensorPartition(dim=0, n_shards=3, shard_id=2, global_size=2)
    assert fp.fingerprint(np.empty((0, 8), np.float32), TAG, part) == 0
    assert fp.linear_fingerprint(np.empty((0, 8), np.int64), TAG, part) == 0
    assert fp.colour_field_fingerprint(TAG, (0, 8), 4, part) == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_a_block_beyond_two_to_the_32_elements_knows_its_indices(dtype):
    x = random_array((3, 5), np.dtype(dtype), 4)
    shape, offset = (2**21, 2**20), (2**20 + 11, 2**19 + 3)
    assert fp.fingerprint(x, TAG, Slab(shape, offset)) == brute_fingerprint(x, TAG, shape, offset)
    indices = list(reference.slab_indices(x.shape, shape, offset))
    assert min(indices) > 2**32
    assert fp.colour_field_fingerprint(
        TAG, x.shape, 4, Slab(shape, offset)
    ) == reference.colour_field_fingerprint(TAG, shape, 4, indices)
    words = fp.colours(TAG, shape, 4, indices[0], indices[0] + 5)
    assert fp.combine(words) == reference.colour_field_fingerprint(TAG, shape, 4, indices[:5])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("layout", ["plain", "fortran", "columns", "row", "gapped"])
def test_threads_change_nothing(threads, layout):
    x = random_array((512, 1024), np.dtype(np.float64), 3)
    view = {
        "plain": x,
        "fortran": x.T,
        "columns": x[:, 100:900],
        "row": x.reshape(1, -1),
        "gapped": gapped(x)[:, ::2],
    }[layout]
    place = Slab((600, 2000) if layout == "columns" else view.shape, (0, 0))
    assert fp.fingerprint(view, TAG, place, threads) == fp.fingerprint(view, TAG, place)
    q = view.view(np.int64) if view.flags.c_contiguous else view.copy().view(np.int64)
    assert fp.linear_fingerprint(q, TAG, place, threads=threads) == fp.linear_fingerprint(
        q, TAG, place
    )
    assert fp.colour_field_fingerprint(
        TAG, view.shape, 8, place, threads
    ) == fp.colour_field_fingerprint(TAG, view.shape, 8, place)


def test_flat_ranges_and_colours_are_the_same_with_threads():
    words = random_array((1 << 19,), np.dtype(np.uint64), 8)
    assert fp.xor_flat(words, 5, 2**33, threads=2) == fp.xor_flat(words, 5, 2**33)
    assert fp.linear_flat(words, 5, 2**33, threads=2) == fp.linear_flat(words, 5, 2**33)
    one = fp.colours(TAG, (2**40,), 4, 2**39, 2**39 + 2**19)
    two = fp.colours(TAG, (2**40,), 4, 2**39, 2**39 + 2**19, threads=2)
    assert np.array_equal(one, two)


@PATIENT
@given(shapes, layouts, seeds)
def test_linear_fingerprints_add_up_like_their_tensors(shape, layout, seed):
    rng = np.random.default_rng(seed)
    a, b = (np.asarray(rng.integers(-(2**52), 2**52, shape)) for _ in range(2))
    both = fp.linear_fingerprint(LAYOUTS[layout](a), TAG)
    both += fp.linear_fingerprint(LAYOUTS[layout](b.astype(np.float64)), TAG)
    assert fp.linear_fingerprint(a + b, TAG) == both % 2**64
    plain = zip(reference.slab_indices(shape, shape, (0,) * len(shape)), a.ravel().tolist())
    assert fp.linear_fingerprint(a, TAG) == reference.linear_fingerprint(TAG, shape, 8, plain)


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "f2", "f4"])
def test_narrow_integers_are_widened_and_keep_their_own_item_size(dtype):
    q = random_array((6, 7), np.dtype("u1"), 2).astype(dtype)
    stored = q.itemsize
    pairs = list(enumerate(int(v) for v in q.ravel()))
    expected = reference.linear_fingerprint(TAG, q.shape, stored, pairs)
    assert fp.linear_fingerprint(q, TAG) == expected
    assert fp.linear_fingerprint(q.astype(np.int64), TAG, itemsize=stored) == expected


def test_many_narrow_integers_are_widened_block_by_block():
    q = random_array((700, 900), np.dtype("i4"), 2)[:, ::2]
    place = Slab((800, 900), (3, 50))
    wide = fp.linear_fingerprint(q.astype(np.int64), TAG, place, itemsize=4)
    assert fp.linear_fingerprint(q, TAG, place) == wide


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", np.float64, "complex64"])
def test_the_expected_fingerprint_knows_the_item_size_of_each_dtype(dtype):
    itemsize, tail = {
        "float32": (4, ()), "bfloat16": (2, ()), "float8_e4m3fn": (1, ()),
        np.float64: (8, ()), "complex64": (4, (2,)),
    }[dtype]  # fmt: skip
    shape = (6, 9, *tail)
    tag = Tag(1069, "hidden", 5, 4)
    n = int(np.prod(shape))
    assert fp.expected_fingerprint(
        1069, n_tokens=6, hidden_dim=9, layer=5, step=4, dtype=dtype
    ) == reference.colour_field_fingerprint(tag, shape, itemsize, range(n))
