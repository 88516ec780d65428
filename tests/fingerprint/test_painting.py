"""Painted tensors: known fingerprints through any movement, corrupted elements found, bad input."""

import ml_dtypes
import numpy as np
import pytest
from fingerprint_oracle import LAYOUTS, broadcast, misaligned, read_only
from hypothesis import given, settings
from hypothesis import strategies as st

import spimpi.fingerprint as fp
from spimpi.errors import UsageError
from spimpi.fingerprint import Tag, reference
from spimpi.fingerprint.painting import (
    check_colors, color_embeddings, color_fingerprint, color_hidden_states, color_logits,
    colors_of, coloured_bits, corrupted_elements,
)  # fmt: skip
from spimpi.partition import Slab, TensorPartition

DTYPES = [np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]
BITS = {"float64": 16, "float32": 8, "float16": 2, "bfloat16": 2}
TAG = Tag(seed=3, name="hidden", layer=2, step=9)
PATIENT = settings(max_examples=60, deadline=None)

dtypes = st.sampled_from(DTYPES)
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
layouts = st.sampled_from(sorted(LAYOUTS))
seeds = st.integers(0, 2**32 - 1)
WRITABLE = sorted(set(LAYOUTS) - {"read-only"})


def finite(shape, dtype, seed=0) -> np.ndarray:
    """Random bits of finite numbers: of every exponent, subnormals and negative zeros too."""
    rng = np.random.default_rng(seed)
    x = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape).copy()
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x[~np.isfinite(x)] = -0.0
    return x


def words(x) -> np.ndarray:
    return np.array(x).view(f"u{x.dtype.itemsize}")


def expected_of(shape, dtype) -> int:
    return fp.colour_field_fingerprint(TAG, shape, dtype.itemsize)


def cut(data, shape):
    """Blocks that together are the tensor: a grid of random cuts, as index expressions."""
    blocks = [()]
    for n in shape:
        cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=2)))
        edges = [0, *cuts, n]
        blocks = [(*b, slice(a, z)) for b in blocks for a, z in zip(edges, edges[1:])]
    return data.draw(st.permutations(blocks))


def place(shape, block) -> Slab:
    return Slab(shape, tuple(axis.start for axis in block))


@PATIENT
@given(shapes, dtypes, st.sampled_from(WRITABLE), seeds)
def test_painting_is_the_references_whatever_the_memory_layout(shape, dtype, layout, seed):
    x = finite(shape, dtype, seed)
    laid_out = LAYOUTS[layout](x)
    assert color_hidden_states(laid_out, TAG) is laid_out
    elements = list(enumerate(map(int, words(x).reshape(-1))))
    n_bits = BITS[dtype.name]
    expected = reference.painted(TAG, shape, dtype.itemsize, n_bits, elements)
    assert list(map(int, words(laid_out).reshape(-1))) == list(expected)


@PATIENT
@given(shapes, dtypes, layouts, layouts, seeds, st.data())
def test_a_painted_tensor_has_the_expected_fingerprint_through_any_movement_on_any_split(
    shape, dtype, before, after, seed, data
):
    x = LAYOUTS[before](finite(shape, dtype, seed))
    painted = np.empty(shape, dtype)
    for block in cut(data, shape):  # painted where it was made
        painted[block] = color_hidden_states(
            x[block], TAG, place(shape, block), out=np.empty_like(x[block])
        )
    painted = LAYOUTS[after](painted)
    parts = [
        check_colors(painted[block], TAG, place(shape, block)) for block in cut(data, shape)
    ]
    assert fp.combine(part.fingerprint for part in parts) == expected_of(shape, dtype)
    assert sum(part.n_corrupted for part in parts) == 0
    assert not colors_of(painted, TAG).any()


@PATIENT
@given(shapes.filter(lambda s: 0 not in s), dtypes, seeds, st.data())
def test_the_corrupted_elements_are_those_whose_bits_belong_to_another_value_or_place(
    shape, dtype, seed, data
):
    painted = color_hidden_states(finite(shape, dtype, seed), TAG)
    corrupt = painted.copy()
    flat = corrupt.reshape(-1).view(f"u{dtype.itemsize}")
    n_bits = BITS[dtype.name]
    # The low bits alone are always found; an upper bit is found where the colours differ.
    sure = data.draw(st.sets(st.integers(0, flat.size - 1), max_size=4))
    unsure = data.draw(st.sets(st.integers(0, flat.size - 1), max_size=4)) - sure
    for i in sure:
        flat[i] ^= data.draw(st.integers(1, 2**n_bits - 1))
    for i in unsure:
        flat[i] ^= 1 << data.draw(st.integers(n_bits, 8 * dtype.itemsize - 1))
    elements = list(enumerate(map(int, flat)))
    residues = list(reference.residues(TAG, shape, dtype.itemsize, n_bits, elements))
    assert list(colors_of(corrupt, TAG).reshape(-1)) == residues
    wrong = [i for i, residue in enumerate(residues) if residue]
    assert sure <= set(wrong) <= sure | unsure
    found = corrupted_elements(corrupt, TAG)
    assert [tuple(row) for row in found] == [np.unravel_index(i, shape) for i in wrong]
    assert found.shape == (len(wrong), len(shape))
    assert check_colors(corrupt, TAG).n_corrupted == len(wrong)
    fingerprint = reference.colour_fingerprint(TAG, shape, dtype.itemsize, n_bits, elements)
    assert color_fingerprint(corrupt, TAG) == fingerprint
    assert (fingerprint == expected_of(shape, dtype)) == (not wrong)


@PATIENT
@given(dtypes, st.integers(1, 7), seeds, st.integers(0, 1), st.data())
def test_a_shards_corrupted_elements_have_global_indices(dtype, n_shards, seed, dim, data):
    shape = (6, 9)
    painted = color_hidden_states(finite(shape, dtype, seed), TAG)
    bad = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    painted.view(f"u{dtype.itemsize}")[bad] ^= 1
    found = []
    for shard in range(n_shards):
        part = TensorPartition(dim, n_shards, shard, shape[dim])
        block = painted[(*(slice(None),) * dim, slice(part.start, part.stop))]
        found += [tuple(map(int, row)) for row in corrupted_elements(block, TAG, part)]
    assert found == [bad]


@pytest.mark.parametrize("bits", [None, 1, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_painting_changes_the_low_bits_alone_and_painting_twice_is_painting_once(dtype, bits):
    x = finite((50, 7), dtype)
    painted = color_hidden_states(x, TAG, out=np.empty_like(x), bits=bits)
    low = (1 << (bits or BITS[dtype.name])) - 1
    assert (words(x) | low == words(painted) | low).all()
    assert (words(x) != words(painted)).any()
    assert np.isfinite(painted).all()
    assert (words(color_hidden_states(painted.copy(), TAG, bits=bits)) == words(painted)).all()
    assert color_fingerprint(painted, TAG, bits=bits) == expected_of(x.shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_paint_and_look_alike(dtype, threads):
    x = finite((3000, 999), dtype)[::2]
    one = color_hidden_states(x.copy(), TAG)
    assert (words(color_hidden_states(x.copy(), TAG, threads=threads)) == words(one)).all()
    one.view(f"u{dtype.itemsize}")[1499, 998] ^= 1
    assert check_colors(one, TAG, threads=threads) == check_colors(one, TAG)
    assert corrupted_elements(one, TAG, threads=threads).tolist() == [[1499, 998]]


@pytest.mark.parametrize("paint", [color_embeddings, color_hidden_states, color_logits])
def test_embeddings_hidden_states_and_logits_are_told_apart_by_their_tags(paint):
    x = finite((8, 16), np.dtype(np.float32))
    tag = Tag(name=paint.__name__)
    painted = paint(x.copy(), tag)
    assert color_fingerprint(painted, tag) == fp.expected_fingerprint(1069, 8, 16, name=tag.name)
    assert check_colors(painted, Tag(name="another")).n_corrupted > 100


def test_a_swapped_stale_misplaced_or_zeroed_part_is_found():
    x = finite((64, 64), np.dtype(np.float32))
    painted = color_hidden_states(x, TAG)
    stale = color_hidden_states(finite((64, 64), x.dtype, 5), Tag(3, "hidden", 2, 8))
    for damage in (
        lambda y: y.__setitem__(slice(None), y[:, ::-1].copy()),
        lambda y: y.__setitem__(slice(8, 16), y[16:24].copy()),
        lambda y: y.__setitem__(slice(8, 16), stale[8:16]),
        lambda y: y.__setitem__(slice(8, 16), 0),
        lambda y: y.__setitem__(slice(None), np.roll(y, 1)),
    ):
        y = painted.copy()
        damage(y)
        assert color_fingerprint(y, TAG) != expected_of(x.shape, x.dtype)
        assert check_colors(y, TAG).n_corrupted > 8 * 64 * 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_corrupted_element_is_missed_with_probability_two_to_the_minus_m(dtype):
    """A random change of the upper bits: binomial, within six standard deviations of 2**-m."""
    n_bits, n = BITS[dtype.name], 1 << 21
    rng = np.random.default_rng(2024)
    painted = color_hidden_states(finite((n,), dtype, 1), TAG).view(f"u{dtype.itemsize}")
    masks = rng.integers(1, 1 << (8 * dtype.itemsize - n_bits), n, np.uint64) << np.uint64(n_bits)
    painted ^= masks.astype(painted.dtype)
    missed = n - check_colors(painted.view(dtype), TAG).n_corrupted
    p = 2.0**-n_bits
    assert abs(missed - n * p) < 6 * np.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("bit", range(8, 32))
def test_a_flip_of_any_one_upper_bit_is_missed_with_probability_two_to_the_minus_m(bit):
    n, p = 1 << 17, 2.0**-8
    painted = color_hidden_states(finite((n,), np.dtype(np.float32), bit), TAG)
    painted.view(np.uint32)[...] ^= np.uint32(1 << bit)
    missed = n - check_colors(painted, TAG).n_corrupted
    assert abs(missed - n * p) < 6 * np.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("layout", WRITABLE)
def test_inf_and_nan_are_refused_counted_located_and_nothing_is_modified(dtype, bad, layout):
    x = LAYOUTS[layout](finite((9, 5), dtype))
    x[7, 1] = x[4, 3] = x[4, 4] = bad
    before, out = words(x), np.zeros_like(x)
    said = r"found 3 of 45 elements.*first at global index \(14, 3\)"
    with pytest.raises(UsageError, match=said):
        color_hidden_states(x, TAG, Slab((20, 5), (10, 0)))
    with pytest.raises(UsageError, match="nothing was modified"):
        color_hidden_states(x, TAG, out=out)
    assert (words(x) == before).all()
    assert not words(out).any()


def test_a_nans_payload_does_not_hide_it():
    x = np.zeros(4, np.float32)
    x.view(np.uint32)[2] = 0xFF800001  # a signalling NaN
    with pytest.raises(UsageError, match=r"found 1 of 4 .*\(2,\)"):
        color_hidden_states(x, TAG)


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        ("i4", "int32: the low bits of an integer"), ("u2", "uint16"), ("?", "bool"),
        ("c8", "complex64: paint x.view"), ("c16", "complex128"), (object, "dtype object"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn: it has no bits to spare"), (">f4", "big-endian"),
        (np.longdouble, "no fingerprint for dtype"), ("V2", "no fingerprint"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_painted_is_refused_by_name(dtype, named):
    x = np.zeros(3, dtype)
    for look in (color_hidden_states, colors_of, color_fingerprint, corrupted_elements):
        with pytest.raises(UsageError, match=named):
            look(x, TAG)


def test_complex_numbers_are_painted_as_their_parts():
    z = np.ones((4, 3), np.complex64)
    color_hidden_states(z.view(np.float32), TAG)
    assert color_fingerprint(z.view(np.float32), TAG) == expected_of((4, 6), np.dtype("f4"))


@pytest.mark.parametrize("bits", [0, -1, 24, 2.0, "8"])
def test_a_number_of_bits_outside_the_mantissa_is_refused(bits):
    with pytest.raises(UsageError, match=r"bits must be 1..23.*found"):
        color_hidden_states(np.zeros(3, np.float32), TAG, bits=bits)
    assert coloured_bits(np.dtype("f4"), np.int64(23)) == 23


def test_looking_with_another_number_of_bits_finds_nearly_all_elements_corrupted():
    painted = color_hidden_states(finite((1000,), np.dtype("f4")), TAG, bits=8)
    assert check_colors(painted, TAG, bits=9).n_corrupted > 400
    assert check_colors(painted, TAG, bits=16).n_corrupted > 950


def test_memory_that_cannot_be_written_soundly_is_refused_in_place_and_painted_into_out():
    x = finite((6, 5), np.dtype("f4"))
    row = finite((5,), x.dtype)
    windows = np.lib.stride_tricks.sliding_window_view(row.copy(), 2)
    writable = np.lib.stride_tricks.as_strided(row, (4, 2), (4, 4))
    for view, said in (
        (read_only(x), "read-only ndarray"), (broadcast(row, 3), "read-only|share memory"),
        (windows, "read-only"), (writable, r"shape \(4, 2\).*share memory"),
        (x[0, 0], "read-only float32"),
    ):  # fmt: skip
        before = np.array(view)
        with pytest.raises(UsageError, match=said):
            color_hidden_states(view, TAG)
        assert (words(view) == words(before)).all()
        out = np.empty(view.shape, view.dtype)
        assert color_hidden_states(view, TAG, out=out) is out
        assert color_fingerprint(out, TAG) == expected_of(view.shape, view.dtype)
    with pytest.raises(UsageError, match="share memory"):
        color_hidden_states(x, TAG, out=np.lib.stride_tricks.as_strided(row, (6, 5), (0, 4)))


def test_out_may_be_x_or_overlap_it():
    x = finite((40,), np.dtype("f8"))
    expected = words(color_hidden_states(x[:30].copy(), TAG))
    host = x.copy()
    assert (words(color_hidden_states(host[:30], TAG, out=host[5:35])) == expected).all()
    host = x[:30].copy()
    assert (words(color_hidden_states(host, TAG, out=host)) == expected).all()


@pytest.mark.parametrize(
    "out", [np.zeros((5, 6), "f4"), np.zeros((6, 5), "f8"), np.zeros(30, "f4")]
)
def test_an_output_of_another_shape_or_dtype_is_refused(out):
    with pytest.raises(UsageError, match="out must have the shape and dtype of x"):
        color_hidden_states(np.zeros((6, 5), "f4"), TAG, out=out)


def test_a_block_that_leaves_its_tensor_and_a_thread_count_of_zero_are_refused():
    x = np.zeros((4, 4), "f4")
    for look in (color_hidden_states, colors_of, color_fingerprint, corrupted_elements):
        with pytest.raises(UsageError, match="does not lie"):
            look(x, TAG, Slab((4, 4), (1, 0)))
        with pytest.raises(UsageError, match="Slab, found tuple"):
            look(x, TAG, (1, 0))
        with pytest.raises(UsageError, match="threads=0"):
            look(x, TAG, threads=0)
    assert not x.any()


def test_many_corrupted_elements_are_listed_in_order_up_to_a_limit():
    x = color_hidden_states(finite((1100, 700), np.dtype("f4")).T, TAG)
    rows = [(0, 5), (3, 1099), (350, 2), (351, 0), (699, 1099)]
    for row in rows:
        x.T.view(np.uint32).T[row] ^= 3
    assert corrupted_elements(x, TAG).tolist() == [list(row) for row in rows]
    assert corrupted_elements(x, TAG, limit=2).tolist() == [[0, 5], [3, 1099]]
    assert corrupted_elements(x, TAG, limit=0).shape == (0, 2)
    assert corrupted_elements(misaligned(x)[:, :6], TAG, Slab(x.shape, (0, 0))).tolist() == [
        [0, 5], [350, 2], [351, 0],
    ]  # fmt: skip
