"""The judge of one tensor's slices, against plain counting of elements."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import Tag
from spimpi.manifest import TensorFacts
from spimpi.manifest.slices import HeldSlice, judge
from spimpi.partition import Slab

TAG = Tag(1069, "w")


def facts_of(x):
    return TensorFacts("U16", x.shape, fingerprint(x, TAG))


def held(x, rank, offset, shape, wrong=None):
    """A rank's slice; ``wrong``: a local index at which one bit is flipped."""
    block = x[tuple(slice(a, a + n) for a, n in zip(offset, shape))].copy()
    if wrong is not None:
        block[wrong] ^= 4
    return HeldSlice(rank, offset, shape, fingerprint(block, TAG, Slab(x.shape, offset)))


def cuts(n, at):
    """(start, size) of the pieces of an axis of n elements, cut at some places."""
    edges = sorted({0, n, *(a for a in at if a <= n)})
    return [(a, b - a) for a, b in zip(edges, edges[1:])]


@st.composite
def splits(draw):
    """A tensor, and a grid of blocks of it, each held by one to three ranks."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    x = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 1 << 16, shape, np.uint16)
    axes = [cuts(n, draw(st.lists(st.integers(1, 5), max_size=2))) for n in shape]
    blocks = [tuple(zip(*block)) for block in product(*axes)]
    ranks = [
        sorted(draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))) for _ in blocks
    ]  # fmt: skip
    return x, blocks, ranks


def all_of(x, blocks, ranks):
    pairs = zip(blocks, ranks)
    return [held(x, r, *block) for block, holders in pairs for r in holders]


@settings(deadline=None)
@given(splits())
def test_any_split_with_any_replicas_holds(split):
    x, blocks, ranks = split
    found = judge("w", facts_of(x), all_of(*split))
    assert not found.failed and not found.uncovered and not found.refused
    assert found.found == found.expected == fingerprint(x, TAG)
    assert found.copied == any(len(r) > 1 for r in ranks)
    assert found.holders == tuple(sorted({r for holders in ranks for r in holders}))


@settings(deadline=None)
@given(splits(), st.data())
def test_one_flipped_bit_is_found_and_its_rank_named_where_it_can_be(split, data):
    x, blocks, ranks = split
    i = data.draw(st.integers(0, len(blocks) - 1))
    slices = all_of(*split)
    position = sum(map(len, ranks[:i])) + data.draw(st.integers(0, len(ranks[i]) - 1))
    bad = slices[position]
    local = tuple(data.draw(st.integers(0, n - 1)) for n in bad.shape)
    slices[position] = held(x, bad.rank, *bad.place, wrong=local)
    found = judge("w", facts_of(x), data.draw(st.permutations(slices)))
    assert found.failed and found.found != found.expected == fingerprint(x, TAG)
    if len(ranks[i]) > 1 or len(found.holders) == 1:
        assert found.wrong == (bad.rank,)
    else:
        assert found.wrong == () and f"{bad.rank}" in found.detail


@settings(deadline=None)
@given(splits(), st.data())
def test_what_is_on_no_rank_is_counted(split, data):
    x, blocks, ranks = split
    gone = data.draw(st.sets(st.integers(0, len(blocks) - 1), min_size=1))
    kept = [i for i in range(len(blocks)) if i not in gone]
    found = judge("w", facts_of(x), all_of(x, [blocks[i] for i in kept], [ranks[i] for i in kept]))
    covered = np.zeros(x.shape, bool)
    for i in kept:
        covered[tuple(slice(a, a + n) for a, n in zip(*blocks[i]))] = True
    assert found.uncovered == (~covered).sum() and not found.failed and found.found is None


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_overlap_that_is_no_replica_is_refused(data):
    """Two random blocks: refused exactly where they share elements and are not the same."""
    x = np.arange(30, dtype=np.uint16).reshape(5, 6)

    def block():
        pairs = [st.tuples(st.integers(0, n), st.integers(0, n)) for n in x.shape]
        edges = [sorted(data.draw(pair)) for pair in pairs]
        return tuple(zip(*[(a, b - a) for a, b in edges]))

    one, other = block(), block()
    seen = np.zeros(x.shape, int)
    for offset, shape in (one, other):
        seen[tuple(slice(a, a + n) for a, n in zip(offset, shape))] += 1
    found = judge("w", facts_of(x), [held(x, 0, *one), held(x, 3, *other)])
    assert bool(found.refused) == (seen.max() > 1 and one != other)
    if found.refused:
        assert "rank 0" in found.refused and "rank 3" in found.refused


def test_copies_that_differ_while_the_rest_is_nowhere_fail_without_a_culprit():
    x = np.arange(8, dtype=np.uint16).reshape(4, 2)
    slices = [held(x, 0, (0, 0), (2, 2)), held(x, 2, (0, 0), (2, 2), wrong=(1, 1))]
    found = judge("w", facts_of(x), slices)
    assert found.failed and found.uncovered == 4 and found.wrong == () and found.expected is None
    assert "ranks 0, 2 differ" in found.detail


def test_copies_none_of_which_fits_are_all_suspects():
    x = np.arange(8, dtype=np.uint16)
    slices = [held(x, r, (0,), (8,), wrong=(r,)) for r in (1, 2)]
    found = judge("w", facts_of(x), slices)
    assert found.failed and found.wrong == () and "none fits the manifest" in found.detail


def test_equal_copies_of_wrong_data_fail():
    """Agreement alone would pass; XOR of two equal copies would be 0."""
    x = np.arange(8, dtype=np.uint16)
    slices = [held(x, r, (0,), (8,), wrong=(3,)) for r in (1, 2)]
    found = judge("w", facts_of(x), slices)
    assert found.failed and "all copies agree with each other" in found.detail


def test_several_wrong_copies_in_several_places_are_all_named():
    x = np.arange(12, dtype=np.uint16)
    slices = [held(x, r, (6 * half,), (6,)) for half in (0, 1) for r in (0, 1, 2)]
    slices[1] = held(x, 1, (0,), (6,), wrong=(0,))
    slices[5] = held(x, 2, (6,), (6,), wrong=(5,))
    found = judge("w", facts_of(x), slices)
    assert found.failed and found.wrong == (1, 2)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_tensors_of_one_element_and_of_none(shape):
    x = np.full(shape, 7, np.uint16)
    found = judge("w", facts_of(x), [held(x, 1, (0,) * len(shape), shape)])
    assert not found.failed and not found.uncovered
    nobody = judge("w", facts_of(x), [])
    assert nobody.uncovered == x.size and not nobody.failed


def test_two_thousand_slices_are_judged_in_a_moment():
    from time import perf_counter

    x = np.zeros((2000, 2), np.uint16)
    slices = [held(x, r, (r, 0), (1, 2)) for r in range(2000)]
    start = perf_counter()
    assert not judge("w", facts_of(x), slices).failed
    assert perf_counter() - start < 5
