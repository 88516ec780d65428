"""The 60 independently computed cases, on the reference and on the CPU backend, in every split."""

import pytest
from fingerprint_oracle import (
    CASES,
    NAMES,
    element_bits,
    flat_blocks,
    integers_of,
    offset_of,
    tag_of,
    words_of,
)

import spimpi.fingerprint as fp
from spimpi.fingerprint import reference
from spimpi.fingerprint.tag import COLOUR, CONTENT, LINEAR, MASK, PAINT
from spimpi.partition import Slab

pytestmark = pytest.mark.parametrize("case", CASES, ids=NAMES)


def on_reference(case, start, stop):
    words = element_bits(words_of(case))[start:stop]
    return reference.fingerprint(
        tag_of(case), case["shape"], case["itemsize"], enumerate(words, start)
    )


def on_cpu_by_slabs(case, start, stop):
    x, shape = words_of(case), tuple(case["shape"])
    return fp.combine(
        fp.fingerprint(x[block], tag_of(case), Slab(shape, offset_of(block)))
        for block in flat_blocks(shape, start, stop)
    )


def on_cpu_by_flat_ranges(case, start, stop):
    key = tag_of(case).key(CONTENT, case["shape"], case["itemsize"])
    return fp.xor_flat(words_of(case).reshape(-1)[start:stop], key, start)


@pytest.mark.parametrize(
    "backend", [on_reference, on_cpu_by_slabs, on_cpu_by_flat_ranges], ids=lambda f: f.__name__
)
def test_the_whole_and_every_split_have_the_published_fingerprints(case, backend):
    cuts = case["split_at"]
    parts = [backend(case, a, b) for a, b in zip(cuts, cuts[1:])]
    assert [f"{part:016x}" for part in parts] == case["split_fingerprints"]
    assert f"{fp.combine(parts):016x}" == case["fingerprint"]
    assert f"{backend(case, 0, len(case['words'])):016x}" == case["fingerprint"]


def test_every_other_cut_in_two_combines_to_the_published_fingerprint(case):
    n = len(case["words"])
    for cut in range(0, n + 1, max(1, n // 16)):
        parts = [on_cpu_by_flat_ranges(case, 0, cut), on_cpu_by_slabs(case, cut, n)]
        assert f"{fp.combine(parts):016x}" == case["fingerprint"]


def test_the_stream_keys_are_the_published_ones(case):
    keys = {
        CONTENT: "stream_key",
        PAINT: "paint_key",
        LINEAR: "linear_key",
        COLOUR: "colour_key",
    }
    for domain, name in keys.items():
        key = tag_of(case).key(domain, case["shape"], case["itemsize"])
        assert f"{key:016x}" == case[name]


def test_the_linear_fingerprint_is_the_published_one_whole_and_split(case):
    tag, shape, itemsize = tag_of(case), tuple(case["shape"]), case["itemsize"]
    q = integers_of(case)
    whole = fp.linear_fingerprint(q, tag, itemsize=itemsize)
    assert f"{whole:016x}" == case["linear_fingerprint"]
    plain = reference.linear_fingerprint(tag, shape, itemsize, enumerate(case["integers"]))
    assert plain == whole

    key = tag.key(LINEAR, shape, itemsize)
    cuts = case["split_at"]
    by_ranges = by_slabs = 0
    for a, b in zip(cuts, cuts[1:]):
        by_ranges += fp.linear_flat(q.reshape(-1)[a:b], key, a)
        for block in flat_blocks(shape, a, b):
            place = Slab(shape, offset_of(block))
            by_slabs += fp.linear_fingerprint(q[block], tag, place, itemsize)
    assert by_ranges & MASK == by_slabs & MASK == whole


def test_integers_carried_as_floats_have_the_same_linear_fingerprint(case):
    q = integers_of(case).astype("f8")
    found = fp.linear_fingerprint_counted(q, tag_of(case), itemsize=case["itemsize"])
    assert found == (int(case["linear_fingerprint"], 16), 0)


def test_the_expected_fingerprint_is_the_published_one_whole_and_split(case):
    tag, shape, itemsize = tag_of(case), tuple(case["shape"]), case["itemsize"]
    n = len(case["words"])
    plain = reference.colour_field_fingerprint(tag, shape, itemsize, range(n))
    assert f"{plain:016x}" == case["expected_fingerprint"]
    assert fp.colour_field_fingerprint(tag, shape, itemsize) == plain

    cuts = case["split_at"]
    parts = []
    for a, b in zip(cuts, cuts[1:]):
        for block in flat_blocks(shape, a, b):
            sizes = tuple(axis.stop - axis.start for axis in block)
            place = Slab(shape, offset_of(block))
            parts.append(fp.colour_field_fingerprint(tag, sizes, itemsize, place))
    assert fp.combine(parts) == plain


def test_the_colour_words_xor_to_the_expected_fingerprint(case):
    n = len(case["words"])
    words = fp.colours(tag_of(case), case["shape"], case["itemsize"], 0, n)
    assert f"{fp.combine(words):016x}" == case["expected_fingerprint"]
