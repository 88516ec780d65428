"""Painting, on the reference and on the CPU kernels, against the independently computed cases."""

import ml_dtypes
import numpy as np
import pytest
from fingerprint_oracle import CASES, NAMES, element_bits, flat_blocks, offset_of, tag_of, words_of

from spimpi.fingerprint import arrays, combine, painting, painting_cpu, reference
from spimpi.fingerprint.tag import COLOUR, PAINT
from spimpi.partition import Slab

# 1-byte cases are not painted: their paint_bits is 0
PAINTED = [(case, name) for case, name in zip(CASES, NAMES) if case["paint_bits"]]

pytestmark = pytest.mark.parametrize(
    "case", [case for case, _ in PAINTED], ids=[name for _, name in PAINTED]
)


def facts(case):
    return tag_of(case), tuple(case["shape"]), case["itemsize"], case["paint_bits"]


def recoloured(case, x, where, action):
    """The words of a block after painting_cpu's ``action``; they need not be finite numbers."""
    tag, shape, itemsize, n_bits = facts(case)
    x = np.array(x)  # a block of a tensor without axes is a scalar
    memory, walk = arrays.walk_of(x, where)
    action(memory, walk, tag.key(PAINT, shape, itemsize), n_bits)
    return x


def test_the_reference_paints_the_published_words(case):
    tag, shape, itemsize, n_bits = facts(case)
    words = list(enumerate(element_bits(words_of(case))))
    painted = list(reference.painted(tag, shape, itemsize, n_bits, words))
    assert [f"{word:0{2 * itemsize}x}" for word in painted] == case["painted"]
    unpainted = reference.colour_fingerprint(tag, shape, itemsize, n_bits, words)
    assert f"{unpainted:016x}" == case["colour_fingerprint_unpainted"]
    assert not any(reference.residues(tag, shape, itemsize, n_bits, enumerate(painted)))
    intact = reference.colour_fingerprint(tag, shape, itemsize, n_bits, enumerate(painted))
    assert f"{intact:016x}" == case["expected_fingerprint"]


def test_the_kernels_paint_the_published_words_whole_and_split(case):
    published = np.array([int(w, 16) for w in case["painted"]], f"u{case['itemsize']}")
    shape, words = tuple(case["shape"]), words_of(case)
    assert (recoloured(case, words, None, painting_cpu.paint).reshape(-1) == published).all()
    cuts = case["split_at"]
    for a, b in zip(cuts, cuts[1:]):
        for block in flat_blocks(shape, a, b):
            where = Slab(shape, offset_of(block))
            part = recoloured(case, words[block], where, painting_cpu.paint)
            assert (part == published.reshape(shape)[block]).all()


def test_the_kernels_leave_the_references_residues(case):
    tag, shape, itemsize, n_bits = facts(case)
    words = words_of(case)
    expected = reference.residues(tag, shape, itemsize, n_bits, enumerate(element_bits(words)))
    found = recoloured(case, words, None, painting_cpu.to_residues)
    assert list(found.reshape(-1)) == list(expected)


def test_unpainted_and_painted_words_have_the_published_colour_fingerprint_in_every_split(case):
    tag, shape, itemsize, n_bits = facts(case)
    keys = [tag.key(domain, shape, itemsize) for domain in (PAINT, COLOUR)]
    painted = np.array([int(w, 16) for w in case["painted"]], f"u{itemsize}").reshape(shape)
    for words, published in (
        (words_of(case), case["colour_fingerprint_unpainted"]),
        (painted, case["expected_fingerprint"]),
    ):
        parts = []
        for a, b in zip(case["split_at"], case["split_at"][1:]):
            for block in flat_blocks(shape, a, b):
                where = Slab(shape, offset_of(block))
                memory, walk = arrays.walk_of(words[block], where)
                parts.append(painting_cpu.check(memory, walk, *keys, n_bits)[0])
        assert f"{combine(parts):016x}" == published


def test_the_public_functions_give_the_published_words_where_they_are_finite(case):
    tag, shape, itemsize, n_bits = facts(case)
    floats = {8: [np.float64], 4: [np.float32], 2: [np.float16, ml_dtypes.bfloat16]}[itemsize]
    published = np.array([int(w, 16) for w in case["painted"]], f"u{itemsize}").reshape(shape)
    for dtype in floats:
        x = words_of(case).view(dtype)
        exponent = np.array(np.inf, dtype).view(f"u{itemsize}")
        for index in np.ndindex(shape):
            if (words_of(case)[index] & exponent) != exponent:
                where = Slab(shape, index)
                one = np.array(x[tuple(slice(i, i + 1) for i in index)])
                painting.color_hidden_states(one, tag, where, bits=n_bits)
                assert one.view(f"u{itemsize}") == published[index]
