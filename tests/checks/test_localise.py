"""Localisation names exactly what was planted: property-based, with threads for ranks."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from localise_cases import DTYPES, check_findings, on_threads, plant, random_layout

from spimpi import Tag, UsageError
from spimpi.checks.localisation.boxes import Box, around, flat_index, flat_range, joined, pieces_of
from spimpi.checks.localisation.localise import localise
from spimpi.fingerprint import cpu  # noqa: F401  (kernels compiled before threads start)
from spimpi.partition import Slab, whole

TAG = Tag(name="hidden", layer=2, step=7)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.tuples(st.integers(0, 700)) | (
    st.tuples(st.integers(1, 40), st.integers(1, 40))
)  # fmt: skip


@QUICK
@given(
    seed=st.integers(0, 2**32),
    n_ranks=st.integers(1, 5),
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    n_errors=st.sampled_from([0, 1, 2, 3, 5, 8, 40, 400]),
    limit=st.sampled_from([1, 2, 4, 16]),
    max_parts=st.sampled_from([1, 5, 64]),
)
def test_exactly_the_planted_elements_are_named(
    seed, n_ranks, shape, dtype, n_errors, limit, max_parts
):
    """``max_parts``: with few, parts of several owners are looked into as one."""
    layout = random_layout(seed, n_ranks, shape, dtype)
    plant(layout, seed, n_errors)

    def work(comm):
        return localise(comm, *layout.arguments(comm.rank), TAG, limit=limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spimpi.checks.localisation.localise.MAX_PARTS", max_parts)
        every = on_threads(n_ranks, work)
    assert all(one == every[0] for one in every)
    check_findings(every[0], layout, limit)


BOXES = st.lists(st.integers(0, 20), max_size=4).flatmap(
    lambda shape: st.tuples(*[st.integers(0, 9)] * len(shape)).map(lambda s: Box(s, tuple(shape)))
)


def _elements(boxes):
    return [
        tuple(a + i for a, i in zip(box.start, index))
        for box in boxes
        for index in np.ndindex(box.shape)
    ]


@QUICK
@given(BOXES, st.integers(1, 16))
def test_a_split_box_is_cut_into_disjoint_parts_that_cover_it(box, ways):
    parts = box.split(ways)
    assert len(parts) <= ways
    assert sorted(_elements(parts)) == _elements([box])
    if box.size > 1 and ways == 16:
        longest = max(box.shape)
        assert max(max(part.shape) for part in parts) <= max(-(-longest // 16), 1) or any(
            n == longest for n in box.shape
        )
        assert all(0 < part.size < box.size for part in parts)


@QUICK
@given(BOXES, st.data())
def test_a_flat_range_is_its_elements_in_row_major_order(box, data):
    first = data.draw(st.integers(0, box.size))
    last = data.draw(st.integers(first, box.size))
    boxes = flat_range(box, first, last)
    assert _elements(boxes) == _elements([box])[first:last]
    assert len(boxes) <= max(1, 2 * len(box.shape) - 1)
    for number, index in enumerate(_elements(boxes), first):
        assert flat_index(index, box) == number


@QUICK
@given(BOXES, st.sets(st.integers(0, 15)))
def test_joined_boxes_have_the_same_elements(box, left_out):
    parts = [part for i, part in enumerate(box.split()) if part.size and i not in left_out]
    assert sorted(_elements(joined(parts))) == sorted(_elements(parts))
    if len(box.shape) == 1 and box.size and not left_out:
        assert joined(parts) == [box]


def test_pieces_are_balanced_and_not_empty():
    for n in range(70):
        pieces = pieces_of(n, 16)
        assert [i for a, b in pieces for i in range(a, b)] == list(range(n))
        assert all(0 < b - a <= -(-n // 16) for a, b in pieces)


def test_the_box_around_elements_is_the_smallest():
    assert around([(3, 5), (1, 9)]) == Box((1, 5), (3, 5))


class Flickering:
    """A communicator of one rank after whose ``n``-th reduction the data become right again."""

    rank, size = 0, 1

    def __init__(self, array, right, n):
        self.array, self.right, self.left = array, right, n

    def Allreduce(self, send, receive, op):
        self.left -= 1
        if self.left == 0:
            self.array[...] = self.right

    def Iallreduce(self, send, receive, op):
        return type("Done", (), {"Test": lambda self: True})()

    def allgather(self, one):
        return [one]


@pytest.mark.parametrize("n", range(1, 12))
def test_data_that_change_while_they_are_looked_at_end_the_search(n):
    truth = np.arange(5000, dtype=np.float32).reshape(50, 100)
    found = truth.copy()
    found[3:20, 7] += 1
    comm = Flickering(found, truth, n)
    place = whole(truth.shape)
    findings = localise(comm, [(truth, place)], [(found, place)], TAG, limit=4)
    assert findings.ranks == (0,)
    assert all(e.expected != e.found for e in findings.elements)
    if n <= 3:
        assert findings.text == "the difference was gone when the data were read again"


X = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.mark.parametrize(
    ("contributed", "held", "message"),
    [
        ([(X, Slab((4, 3), (0, 0)))], [(X, Slab((5, 3), (0, 0)))], "one global shape"),
        ([(X, whole((4, 3)))], [(X.astype(np.float64), whole((4, 3)))], "one dtype"),
        ([(X[:2], Slab((4, 3), (0, 0)))], [(X, whole((4, 3)))], "contributed only 6"),
        ([(X, whole((4, 3))), (X[:1], Slab((4, 3), (2, 0)))], [(X, whole((4, 3)))], "one owner"),
        ([(X, Slab((4, 3), (1, 0)))], [], "does not lie"),
        ([(X.tolist(), whole((4, 3)))], [], "expected a numpy array"),
        ([(X, (0, 0))], [], "expected a Slab"),
    ],
)
def test_what_does_not_fit_is_refused(contributed, held, message):
    with pytest.raises(UsageError, match=message):
        on_threads(1, lambda comm: localise(comm, contributed, held, TAG))


@pytest.mark.parametrize(
    ("of_rank_1", "message"),
    [
        (dict(dtype=np.float64), "rank 0 gave dtype float32, rank 1 gave float64"),
        (dict(shape=(9, 3)), "rank 1 gave"),
        (dict(tag=Tag(name="other")), "rank 1 gave"),
        (dict(limit=3), "rank 0 gave limit 16, rank 1 gave 3"),
        (dict(limit=0), r"limit must .* found 0 \(found by rank 1\)"),
        (dict(history={"step": 1}), "keys of history"),
        (dict(tag="hidden"), "expected a spimpi.Tag"),
    ],
)
def test_what_differs_between_ranks_is_refused_on_all(of_rank_1, message):
    def work(comm):
        own = dict(dtype=np.float32, shape=(4, 3), tag=TAG, limit=16, history=None)
        own |= of_rank_1 if comm.rank == 1 else {}
        block = np.zeros((2, 3), own["dtype"])
        place = Slab(own["shape"], (2 * comm.rank, 0))
        with pytest.raises(UsageError, match=message):
            localise(
                comm, [(block, place)], [], own["tag"], limit=own["limit"], history=own["history"]
            )
        return True

    assert on_threads(2, work) == [True, True]


def test_nothing_at_all_is_right():
    assert on_threads(2, lambda comm: localise(comm, [], [], TAG))[0].n_wrong == 0
