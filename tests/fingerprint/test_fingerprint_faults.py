"""Planted faults that a fingerprint must see, and the ones that it cannot."""

from dataclasses import replace

import numpy as np
import pytest

import spimpi.fingerprint as fp
from spimpi.fingerprint import Tag
from spimpi.partition import Slab

TAG = Tag(seed=11, name="model.layers.3.mlp", layer=3, step=5)


@pytest.fixture(params=[1, 2, 4, 8], ids=lambda size: f"{size}-byte")
def tensor(request):
    rng = np.random.default_rng(request.param)
    return rng.integers(0, 256, (24, 20 * request.param), np.uint8).view(f"u{request.param}")


def test_any_single_bit_flip_changes_the_fingerprint(tensor):
    intact = fp.fingerprint(tensor, TAG)
    places = [(0, 0), (0, 1), (11, 7), (23, 19)]
    seen = {intact}
    for place in places:
        for bit in range(8 * tensor.itemsize):
            tensor[place] ^= tensor.dtype.type(1 << bit)
            seen.add(fp.fingerprint(tensor, TAG))
            tensor[place] ^= tensor.dtype.type(1 << bit)
    assert len(seen) == 1 + len(places) * 8 * tensor.itemsize
    assert fp.fingerprint(tensor, TAG) == intact


def test_a_swapped_pair_changes_the_fingerprint(tensor):
    swapped = tensor.copy()
    swapped[2, 3], swapped[17, 5] = tensor[17, 5], tensor[2, 3]
    assert swapped[2, 3] != tensor[2, 3], "the planted swap must move different values"
    assert np.array_equal(np.sort(swapped, axis=None), np.sort(tensor, axis=None))
    assert fp.fingerprint(swapped, TAG) != fp.fingerprint(tensor, TAG)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_shift_by_one_row_or_column_changes_the_fingerprint(tensor, axis):
    assert fp.fingerprint(np.roll(tensor, 1, axis), TAG) != fp.fingerprint(tensor, TAG)


def test_a_shard_that_is_off_by_one_row_changes_the_fingerprint(tensor):
    right = fp.fingerprint(tensor[4:8], TAG, Slab(tensor.shape, (4, 0)))
    assert fp.fingerprint(tensor[5:9], TAG, Slab(tensor.shape, (4, 0))) != right
    assert fp.fingerprint(tensor[4:8], TAG, Slab(tensor.shape, (5, 0))) != right


@pytest.mark.parametrize(
    "change", [{"step": 4}, {"layer": 4}, {"name": "model.layers.3.mlq"}, {"seed": 12}], ids=str
)
def test_a_buffer_of_another_step_layer_name_or_seed_is_told_apart(tensor, change):
    assert fp.fingerprint(tensor, replace(TAG, **change)) != fp.fingerprint(tensor, TAG)


def test_the_same_bytes_in_another_shape_are_another_tensor(tensor):
    assert fp.fingerprint(tensor.reshape(20, 24), TAG) != fp.fingerprint(tensor, TAG)
    assert fp.fingerprint(tensor.reshape(-1).view(np.uint8), TAG) != fp.fingerprint(
        tensor.view(np.uint8), TAG
    )


def test_a_zero_that_changed_its_sign_and_a_nans_payload_are_seen():
    x = np.zeros((3, 4), np.float32)
    negative = x.copy()
    negative[1, 2] = -0.0
    assert np.array_equal(x, negative)
    assert fp.fingerprint(x, TAG) != fp.fingerprint(negative, TAG)
    nan, other_nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    x[0, 0], negative[0, 0], negative[1, 2] = nan, other_nan, 0.0
    assert fp.fingerprint(x, TAG) != fp.fingerprint(negative, TAG)


def test_the_mask_that_cancels_a_single_mix_is_seen_in_8_byte_items():
    """Why 8-byte items are mixed twice: this mask undoes the first shift of a single mix."""
    rng = np.random.default_rng(0)
    mask = np.uint64(0x8000000200000008)
    unseen = 0
    for _ in range(300):
        x = rng.integers(0, 2**64, 1000, np.uint64)
        i, j = rng.choice(1000, 2, replace=False)
        intact = fp.fingerprint(x, TAG)
        x[[i, j]] ^= mask
        unseen += fp.fingerprint(x, TAG) == intact
    assert unseen == 0


def test_two_equal_replicas_cancel():
    """Documented: XOR counts each element once; replicas are compared, never combined."""
    x = np.arange(12.0)
    one = fp.fingerprint(x, TAG)
    assert fp.combine([one, one]) == 0
    assert fp.combine([one, one, one]) == one != 0


def test_a_wrong_integer_anywhere_changes_the_linear_fingerprint():
    q = np.random.default_rng(0).integers(-(2**40), 2**40, (9, 11))
    right = fp.linear_fingerprint(q, TAG)
    for place in [(0, 0), (8, 10), (4, 4)]:
        for bit in range(64):
            wrong = q.copy()
            wrong.view(np.uint64)[place] ^= np.uint64(1 << bit)
            assert fp.linear_fingerprint(wrong, TAG) != right


def test_a_contribution_left_out_of_a_sum_changes_the_linear_fingerprint():
    parts = np.random.default_rng(0).integers(-(2**40), 2**40, (3, 9, 11))
    shares = [fp.linear_fingerprint(part, TAG) for part in parts]
    assert fp.linear_fingerprint(parts.sum(0), TAG) == sum(shares) % 2**64
    assert fp.linear_fingerprint(parts[:2].sum(0), TAG) != sum(shares) % 2**64


@pytest.mark.parametrize(
    "bad", [0.5, 2.0**53 + 2, -(2.0**60), np.inf, -np.inf, np.nan, 5e-324, 2.0**63, 1e300]
)
def test_floats_that_carry_no_integer_are_counted(bad):
    q = np.random.default_rng(0).integers(-(2**53), 2**53, (50, 40)).astype(np.float64)
    q[0, 0], q[0, 1] = 2.0**53, -(2.0**53)
    clean = fp.linear_fingerprint(q, TAG)
    q[3, 7], q[49, 39] = 0.0, 0.0
    without = fp.linear_fingerprint(q, TAG)
    q[3, 7], q[49, 39] = bad, bad
    assert fp.linear_fingerprint_counted(q, TAG) == (without, 2)
    assert without != clean
    with pytest.raises(fp.UsageError, match=r"found 2 elements of 2000 .* step 5"):
        fp.linear_fingerprint(q, TAG)


def test_a_flipped_low_mantissa_bit_of_a_float_is_counted_and_not_truncated_away():
    q = np.full(100, 3.0)
    right = fp.linear_fingerprint(q, TAG)
    q.view(np.uint64)[17] ^= np.uint64(1)
    assert np.array_equal(q.astype(np.int64), np.full(100, 3))
    lin, n_bad = fp.linear_fingerprint_counted(q, TAG)
    assert n_bad == 1 and lin != right


def test_the_expected_fingerprint_is_never_that_of_contents():
    zeros = np.zeros((6, 8), np.float32)
    tag = Tag(1069, "hidden", -1, 0)
    assert fp.fingerprint(zeros, tag) != fp.expected_fingerprint(1069, 6, 8)
