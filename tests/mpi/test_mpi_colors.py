"""Painted tensors over a communicator: through any movement, at any size of the world."""

import re
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpi_helpers import first_ranks

import spimpi
from spimpi.checks.colors import LISTED, Held, is_clean, judge
from spimpi.errors import CorruptionError, UsageError
from spimpi.fingerprint import colour_field_fingerprint
from spimpi.partition import Slab, TensorPartition
from spimpi.reduction import reduce_fingerprints
from spimpi.trace.schema import Established

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
TAG = spimpi.Tag(name="hidden", layer=3, step=7)
SHAPE = (13, 9)


def worlds(comm):
    for n in range(1, comm.size + 1):
        with first_ranks(comm, n) as part:
            if part:
                yield part


def tensor(dtype=np.float32, shape=SHAPE, seed=1):
    """The whole tensor before it is painted, the same on every rank."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def painted(dtype=np.float32, shape=SHAPE, tag=TAG):
    return spimpi.color_hidden_states(tensor(dtype, shape), tag)


def cut(comm, dim, shape=SHAPE, sizes=None):
    part = TensorPartition(dim, comm.size, comm.rank, shape[dim], sizes)
    return part, (*(slice(None),) * dim, slice(part.start, part.stop))


def same_error(comm, kind, action):
    """The text of an error that every rank must raise alike."""
    with pytest.raises(kind) as caught:
        action()
    texts = comm.allgather(str(caught.value))
    assert len(set(texts)) == 1
    return texts[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: np.dtype(t).name)
def test_rows_painted_by_their_ranks_are_intact_after_an_alltoall_to_columns(comm, dtype):
    for part in worlds(comm):
        rows, mine = cut(part, 0)
        shard = spimpi.color_hidden_states(tensor(dtype)[mine], TAG, rows)
        words = f"u{shard.dtype.itemsize}"
        everyone = np.concatenate(part.allgather(shard.view(words))).view(dtype)
        columns, own = cut(part, 1)
        verdict = spimpi.verify_colors(part, everyone[own], TAG, columns)
        itemsize = np.dtype(dtype).itemsize
        assert verdict
        assert verdict.established == Established.MOVED
        expected = colour_field_fingerprint(TAG, SHAPE, itemsize)
        assert verdict.expected == verdict.actual == expected
        share = spimpi.color_fingerprint(everyone[own], TAG, columns)
        assert reduce_fingerprints(part, share) == expected
        assert f"2**-{ {8: 16, 4: 8, 2: 2}[itemsize]}" in verdict.strength


def test_the_expected_fingerprint_is_known_before_the_program_runs(comm):
    expected = spimpi.expected_fingerprint(1069, 13, 9, layer=3, name="hidden", step=7)
    part, mine = cut(comm, 0)
    verdict = spimpi.verify_colors(comm, painted()[mine], TAG, part)
    assert verdict.actual == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: np.dtype(t).name)
def test_corrupted_elements_are_listed_with_rank_and_global_index_on_every_rank(comm, dtype):
    bad = [(0, 0), (6, 4), (12, 8)]
    for part in worlds(comm):
        corrupt = painted(dtype)
        for index in bad:
            corrupt.view(f"u{corrupt.itemsize}")[index] ^= 1
        rows, mine = cut(part, 0)
        verdict = spimpi.verify_colors(part, corrupt[mine], TAG, rows, check=False)
        assert not verdict
        assert verdict.established == Established(0)
        assert verdict.expected == colour_field_fingerprint(TAG, SHAPE, corrupt.itemsize)
        assert verdict.actual != verdict.expected
        elements = verdict.where.elements
        assert [e.index for e in elements] == bad
        starts = part.allgather(rows.start)
        owners = [max(r for r, a in enumerate(starts) if a <= i) for i, _ in bad]
        assert [e.rank for e in elements] == owners
        assert [e.found for e in elements] == [corrupt[i].tobytes() for i in bad]
        assert (verdict.where.rank is None) == (len(set(owners)) > 1)
        look = partial(spimpi.verify_colors, part, corrupt[mine], TAG, rows)
        text = same_error(part, CorruptionError, look)
        assert f"element [6, 4] on rank {owners[1]}: found 0x" in text
        assert elements[1].bits == ()  # nobody knows what it was
        assert str(part.allgather(verdict)[0]) == str(verdict)


@pytest.mark.mpi(min_size=2)
def test_a_fault_on_the_last_rank_alone_names_it(comm):
    rows, mine = cut(comm, 0)
    shard = painted()[mine]
    if comm.rank == comm.size - 1:
        shard.view(np.uint32)[0, 2] ^= 4
    verdict = spimpi.verify_colors(comm, shard, TAG, rows, check=False)
    assert verdict.where.rank == verdict.where.recorded_by == comm.size - 1
    start = comm.bcast(rows.start, comm.size - 1)
    assert [e.index for e in verdict.where.elements] == [(start, 2)]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("fault", ["stale", "misplaced", "swapped", "zeros", "unpainted"])
def test_a_shard_of_another_time_or_place_is_found_and_described(comm, fault):
    shape = (64, 16)
    rows, mine = cut(comm, 0, shape)
    whole = painted(shape=shape)
    shard = whole[mine].copy()
    if comm.rank == 1:
        if fault == "stale":
            shard = painted(shape=shape, tag=replace(TAG, step=6))[mine]
        elif fault == "misplaced":
            shard = whole[: rows.size].copy()
        elif fault == "swapped":
            shard = shard[::-1]
        elif fault == "zeros":
            shard[...] = 0
        else:
            shard = tensor(shape=shape)[mine]
    verdict = spimpi.verify_colors(comm, shard, TAG, rows, check=False)
    assert not verdict
    assert verdict.where.rank == 1
    assert len(verdict.where.elements) == LISTED
    assert "whole slab is of another place" in verdict.where.detail


@pytest.mark.mpi(min_size=2)
def test_replicas_count_once_and_all_are_looked_at(comm):
    whole = painted()
    for part in worlds(comm):
        assert spimpi.verify_colors(part, whole, TAG)  # every rank has it all
        if part.size < 2:
            continue
        corrupt = whole.copy()
        corrupt.view(np.uint32)[3, 4] ^= part.rank == part.size - 1
        verdict = spimpi.verify_colors(part, corrupt, TAG, check=False)
        assert (verdict.holds, verdict.where.rank) == (False, part.size - 1)
        assert verdict.where.elements[0].index == (3, 4)
        half = TensorPartition(0, 2, part.rank % 2, SHAPE[0])
        shard = whole[half.start : half.stop].copy()
        assert spimpi.verify_colors(part, shard, TAG, half)
        if part.rank == part.size - 1:
            shard.view(np.uint32)[1, 1] ^= 1
        verdict = spimpi.verify_colors(part, shard, TAG, half, check=False)
        assert not verdict
        assert verdict.where.rank == part.size - 1
        start = part.bcast(half.start, part.size - 1)
        assert verdict.where.elements[0].index == (1 + start, 1)


@pytest.mark.mpi(min_size=2)
def test_empty_and_weighted_slabs(comm):
    sizes = (0,) * (comm.size - 1) + (13,)
    rows, mine = cut(comm, 0, sizes=sizes)
    assert spimpi.verify_colors(comm, painted()[mine], TAG, rows)
    empty = np.zeros((0, 9), np.float32)
    assert spimpi.verify_colors(comm, empty, TAG, Slab((0, 9), (0, 0)))


@pytest.mark.mpi(min_size=2)
def test_slabs_that_overlap_or_leave_elements_out_are_refused_on_every_rank(comm):
    whole = painted()

    def look(start, stop):
        where = Slab(SHAPE, (start, 0))
        return partial(spimpi.verify_colors, comm, whole[start:stop], TAG, where)

    # rank 1 one row early, the last one row short, and rank 0's rows on every rank
    rows, _ = cut(comm, 0)
    early = look(rows.start - (comm.rank == 1), rows.stop)
    text = same_error(comm, UsageError, early)
    assert re.search(r"rank 0 gave .* and rank 1 gave .* overlap in part", text)
    short = look(rows.start, rows.stop - (comm.rank == comm.size - 1))
    assert "108 of the 117 elements" in same_error(comm, UsageError, short)
    first = TensorPartition(0, comm.size, 0, 13)
    same = look(0, first.size)
    assert f"{9 * first.size} of the 117" in same_error(comm, UsageError, same)


@pytest.mark.mpi(min_size=2)
def test_two_copies_of_one_half_do_not_pass_for_the_whole(comm):
    """Their numbers of elements add up, and their fingerprints cancel."""
    whole = painted(shape=(8, 4))
    with first_ranks(comm, 2) as part:
        if part:
            look = partial(spimpi.verify_colors, part, whole[:4], TAG, Slab((8, 4), (0, 0)))
            assert "16 of the 32 elements" in same_error(part, UsageError, look)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(x=np.zeros((13, 9), np.float64)), "0.* gave dtype float32; rank 1 .* float64"),
        (dict(x=np.zeros((13, 8), np.float32)), r"shape \(13, 9\); rank 1 .* shape \(13, 8\)"),
        (dict(tag=replace(TAG, step=8)), "0.* gave Tag.*step=7.*; rank 1 gave Tag.*step=8"),
        (dict(bits=9), "0.* gave bits 8; rank 1 gave bits 9"),
        (dict(x=np.zeros((13, 9), np.int32)), "rank 1: .*int32"),
        (dict(x=[1.0, 2.0]), "rank 1: .*found list: convert"),
        (dict(where=(0, 1)), "rank 1: .*Slab, found tuple"),
        (dict(where=Slab((13, 9), (1, 0))), "rank 1: .*does not lie"),
        (dict(tag="hidden"), "rank 1: expected a spimpi.Tag, found str"),
        (dict(threads=0), "rank 1: .*threads=0"),
    ],
    ids=lambda w: "-".join(w) if isinstance(w, dict) else "",
)
def test_what_one_rank_gives_wrong_is_refused_on_every_rank(comm, wrong, said):
    given = dict(x=painted(), tag=TAG, where=None, bits=None, threads=1)
    if comm.rank == 1:
        given |= wrong

    def look():
        x, tag, where = given.pop("x"), given.pop("tag"), given.pop("where")
        spimpi.verify_colors(comm, x, tag, where, **given)

    assert re.search(said, same_error(comm, UsageError, look))


def test_what_all_ranks_give_wrong_is_refused_too(comm):
    look = partial(spimpi.verify_colors, comm, np.zeros(3, np.int8), TAG)
    assert "int8" in same_error(comm, UsageError, look)


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.data())
def test_any_cut_into_slabs_verifies_and_any_planted_set_is_found(comm, data):
    """The draws are derandomised, so that every rank draws the same."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    cuts = [data.draw(st.integers(0, shape[dim])) for _ in range(comm.size - 1)]
    edges = [0, *sorted(cuts), shape[dim]]
    sizes = tuple(b - a for a, b in zip(edges, edges[1:]))
    places = st.tuples(*(st.integers(0, n - 1) for n in shape))
    bad = sorted(data.draw(st.sets(places, max_size=5)))
    whole = painted(dtype, shape)
    for index in bad:
        whole.view(f"u{dtype.itemsize}")[index] ^= 1
    part, mine = cut(comm, dim, shape, sizes)
    verdict = spimpi.verify_colors(comm, whole[mine], TAG, part, check=False)
    assert bool(verdict) == (not bad)
    if bad:
        assert [e.index for e in verdict.where.elements] == bad
        assert all(edges[e.rank] <= e.index[dim] < edges[e.rank + 1]
                   for e in verdict.where.elements)  # fmt: skip


def test_many_corrupted_elements_are_counted_and_the_first_are_listed(comm):
    rows, mine = cut(comm, 0)
    corrupt = painted()
    corrupt.view(np.uint32)[...] ^= 1
    verdict = spimpi.verify_colors(comm, corrupt[mine], TAG, rows, check=False)
    assert [e.index for e in verdict.where.elements] == [divmod(i, 9) for i in range(LISTED)]
    counts = map(int, re.findall(r"(\d+) of \d+ elements on rank", verdict.where.detail))
    assert sum(counts) == 117


def test_a_context_lends_its_reduction(comm):
    from spimpi.context import DistributedContext
    from spimpi.topology.grid import choose

    with DistributedContext(comm, choose(comm.size, 4, 2)) as ctx:
        assert spimpi.verify_colors(ctx.world, painted(), TAG, ctx=ctx)


def test_each_of_the_ranks_words_counts():
    words = np.array([[90, 7, 5, 0], [9, 84, 7, 0]], np.uint64)
    assert is_clean(words, 12)
    for column, wrong in enumerate((91, 6, 4, 1)):
        changed = words.copy()
        changed[0, column] = wrong
        assert not is_clean(changed, 12)


def test_a_fingerprint_that_no_element_explains_is_a_failure():
    """A rank whose processor computed its share wrongly: the residues are all zero."""
    held = Held(0, "node1", "float32", (4,), 8, TAG, (0,), (4,), fingerprint=5)
    verdict = judge([held], expected=6)
    assert not verdict
    assert "computed its fingerprint wrongly" in str(verdict.where)
    assert judge([held], expected=5)
