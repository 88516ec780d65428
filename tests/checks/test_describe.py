"""Words for a corruption: each phrase where its fact holds, and only there."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spimpi import Tag
from spimpi.checks.localisation.boxes import Box, around, name_of
from spimpi.checks.localisation.describe import describe
from spimpi.checks.localisation.findings import BlockFacts, CaseFacts, Origin, Unwritten
from spimpi.checks.verdict import ElementError

F4 = np.dtype(np.float32)
SHAPE = (128, 8)
WHOLE = Box((0, 0), SHAPE)
TAG = Tag(name="hidden", layer=5, step=7)


def error(index, expected, found, dtype=F4, rank=0):
    as_bytes = [np.array(v, dtype).tobytes() for v in (expected, found)]
    return ElementError(tuple(index), *as_bytes, rank)


def flipped(index, mask, value=0.5):
    word = np.float32(value).view(np.uint32) ^ np.uint32(mask)
    return error(index, value, word.view(np.float32))


def some(*errors, **facts):
    """A case of which all wrong elements are known."""
    box = around([e.index for e in errors])
    facts.setdefault("blocks", (BlockFacts(WHOLE, box),))
    return CaseFacts((0,), WHOLE, errors, True, **facts)


def many(*blocks, sample=(), **facts):
    """A case with more wrong elements than were named."""
    return CaseFacts((0,), WHOLE, tuple(sample), False, blocks=blocks, **facts)


def rows(a, b, owner=1, **facts):
    part = Box((64 * owner, 0), (64, 8))
    return BlockFacts(part, Box((a, 0), (b - a, 8)), owner, **facts)


def text(*cases, dtype=F4):
    return describe(cases, TAG, SHAPE, dtype)


def noise(n):
    return [error((3 * i % 128, i % 8), i + 1.25, -2.7 * i - 3) for i in range(n)]


def test_bits_of_one_element():
    assert text(some(flipped((3, 5), 1 << 30))) == "one bit (30) of one element"
    assert text(some(flipped((3, 5), 0b1000100010))) == "3 bits (1, 5, 9) of one element"
    assert text(some(flipped((3, 5), 0x0FFFF))) == "16 bits of one element"


def test_one_bit_that_makes_a_nan_is_still_one_bit():
    inf = float("inf")
    assert text(some(flipped((0, 0), 1, inf))) == "one bit (0) of one element, which became NaN"
    assert text(some(error((0, 0), 1.37, float("nan")))) == "NaN for one element"


def test_zero_for_one_element():
    assert text(some(error((1, 1), 1.5, 0))) == "zero for one element"
    assert text(some(error((1, 1), 2.0, 0))) == "one bit (30) of one element"


def test_the_same_bit_of_some_elements():
    same = [flipped((i, i), 1 << 12, 1.5 + i) for i in range(5)]
    assert text(some(*same)) == "the same bit (12) of 5 elements"
    assert text(some(*same, flipped((7, 7), 1 << 13))) == "6 elements differ, no simple pattern"
    two = [flipped((i, i), 0x1001, 1.5 + i) for i in range(2)]
    assert text(some(*two)) == "the same 2 bits (0, 12) of 2 elements"


def test_a_sample_is_called_a_sample():
    same = [flipped((i, i), 1 << 12) for i in range(4)]
    assert text(many(rows(64, 128), sample=same)) == (
        "more than 4 elements, all in rows 64..128, differ: the same bit (12) of each of the 4 "
        "that were looked at"
    )


def test_two_elements_swapped():
    a, b = error((1, 1), 1.25, -7.5), error((9, 2), -7.5, 1.25)
    assert text(some(a, b)) == "two elements swapped"
    c = error((9, 2), -7.5, 1.5)
    assert text(some(a, c)) == "2 elements differ, no simple pattern"


def test_zeros_and_nan_for_data():
    assert text(many(rows(70, 90, n_zero=160))) == "zeros for data in rows 70..90"
    assert "zeros" not in text(many(rows(70, 90, n_zero=159)))
    assert text(many(rows(70, 90, n_nan=160))) == "NaN for data in rows 70..90"
    assert text(many(rows(70, 90, n_nan=160, n_true_nan=160))).endswith("no simple pattern")
    sample = [flipped((70, 0), 1), flipped((71, 0), 2)]
    assert text(many(rows(70, 90, n_nan=5, n_true_nan=2), sample=sample)) == (
        "more than 2 elements, all in rows 70..90, differ, 3 of them NaN now"
    )


def test_rows_of_another_rank():
    other = Origin(0, Box((0, 0), (64, 8)))
    assert text(many(rows(64, 128, origin=other))) == "rows 64..128 are those of rank 0"
    back = Origin(1, Box((64, 0), (64, 8)))
    both = rows(64, 128, origin=other), rows(0, 64, owner=0, origin=back)
    assert text(many(*both)) == "rows 64..128 and rows 0..64 are swapped"
    mixed = rows(64, 128, origin=other), rows(0, 64, owner=0)
    assert text(many(*mixed)) == (
        "rows 64..128 are those of rank 0; in 1 other block: no simple pattern"
    )
    own = Origin(1, Box((96, 0), (4, 8)))
    assert text(many(rows(64, 68, origin=own))) == "rows 64..68 are rows 96..100"


def test_shards_of_another_step():
    tag = Tag(name="hidden", layer=5, step=6)
    assert text(many(rows(64, 128, earlier=tag))) == "shard of step 6 in step 7"
    assert text(many(rows(0, 64), rows(64, 128), earlier=tag)) == "tensor of step 6 in step 7"
    layer = Tag(name="hidden", layer=4, step=7)
    assert text(many(rows(64, 128, earlier=layer))) == "shard of layer 4 in layer 5"
    both = rows(0, 64, owner=0, earlier=tag), rows(64, 128, earlier=tag)
    assert text(many(*both)) == "the whole tensor: shards of step 6 in step 7"
    two = rows(0, 64, owner=0, earlier=tag), rows(64, 128, earlier=layer)
    assert text(many(*two)) == (
        "rows 0..64: shard of step 6 in step 7; rows 64..128: shard of layer 4 in layer 5"
    )


def test_shifted():
    assert text(many(rows(70, 90, shift=(0, 1)))) == "rows 70..90 shifted by one along axis 0"
    both = rows(0, 64, owner=0), rows(64, 128)
    assert text(many(*both, shift=(1, -1))) == "shifted by minus one along axis 1"


def test_an_unwritten_end():
    end = Unwritten(100, 512, 60, 64)
    assert text(many(rows(76, 128), unwritten=end)) == (
        "from element 100 of 512 on, 60 of 64 elements that were looked at differ, and none "
        "before: as where a buffer was not written to its end"
    )
    zeros = Unwritten(100, 512, 60, 64, n_zero=412, n_true_zero=3)
    case = many(rows(76, 128), unwritten=zeros)
    assert text(case) == "zeros for data from element 100 of 512 to the end"
    assert case.n_wrong == 409


def test_bytes_in_reverse_order():
    pairs = [(v, np.float32(v).byteswap()) for v in (1.5, -3.25, 100.5)]
    errors = [error((i, 2 * i), *pair) for i, pair in enumerate(pairs)]
    assert text(some(*errors)) == "the bytes of 3 elements in reverse order"
    c8 = np.dtype(np.complex64)
    errors = [
        error((i, 0), v, np.complex64(v).byteswap(), dtype=c8) for i, v in enumerate((1.5 + 2j, 3j))
    ]
    assert text(some(*errors), dtype=c8) == "the bytes of 2 elements in reverse order"


def test_where_nothing_is_known_nothing_is_said():
    assert text(some(*noise(5))) == "5 elements differ, no simple pattern"
    assert text(many(rows(70, 90), sample=noise(4))) == (
        "more than 4 elements, all in rows 70..90, differ, no simple pattern"
    )


def test_what_changed_meanwhile_is_said():
    gone = "the difference was gone when the data were read again"
    assert text(many(rows(0, 4), gone=True)) == gone
    assert gone[4:] in text(some(flipped((0, 0), 1), gone=True))


def test_groups_of_ranks():
    one = some(flipped((3, 5), 1))
    other = CaseFacts((1, 3), WHOLE, (flipped((3, 5), 2),), True)
    skipped = CaseFacts((2,), WHOLE, (), False, refined=False)
    assert text(one, other, skipped) == (
        "on rank 0: one bit (0) of one element; on ranks 1, 3 (alike): one bit (1) of one "
        "element; on rank 2: errors in the whole tensor, not looked into"
    )
    assert describe([], TAG, SHAPE, F4) == "nothing differs"


@pytest.mark.parametrize(
    ("box", "shape", "name"),
    [
        (Box((64, 0), (64, 8)), (128, 8), "rows 64..128"),
        (Box((64, 0), (1, 8)), (128, 8), "row 64"),
        (Box((3,), (4,)), (128,), "elements 3..7"),
        (Box((3,), (1,)), (128,), "element 3"),
        (Box((3, 0), (4, 5)), (128, 8), "block [3:7, 0:5]"),
        (Box((0, 0), (128, 8)), (128, 8), "the whole tensor"),
        (Box((), ()), (), "the element"),
    ],
)
def test_blocks_have_names(box, shape, name):
    assert name_of(box, shape) == name


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8))
def test_the_bits_of_an_element_are_those_that_differ(expected, found):
    bits = ElementError((0,), expected, found, 0).bits
    a, b = (np.unpackbits(np.frombuffer(x, np.uint8), bitorder="little") for x in (expected, found))
    assert bits == tuple(np.flatnonzero(a != b))


def test_an_element_in_words():
    assert str(flipped((3, 5), 1 << 30)) == (
        "element [3, 5] on rank 0: expected 0x3f000000, found 0x7f000000 (bits 30)"
    )
