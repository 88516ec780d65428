"""Fingerprints over a communicator, against what a gather of everybody's words gives."""

import time
from functools import reduce
from operator import xor

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import first_ranks

import spimpi
from spimpi import reduction as reductions
from spimpi.context import DistributedContext
from spimpi.errors import CorruptionError, IncompleteError, SpimpiError, UsageError
from spimpi.reduction import (
    ALL_ONES, RECORD, RecordReduction, agree, blocks, dissenters, empty_records,
    ireduce_fingerprints, isum_words, minority, reduce_fingerprints, sum_words, together,
)  # fmt: skip
from spimpi.topology.grid import choose

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]

MASK = (1 << 64) - 1


def _own(comm, n, seed=7):
    """n words of this rank, large ones among them; and everybody's, made without communication."""
    rng = np.random.default_rng(seed)
    everyone = rng.integers(0, 1 << 64, (comm.size, n), np.uint64, endpoint=False)
    return [int(w) for w in everyone[comm.rank]], [[int(w) for w in row] for row in everyone]


def _worlds(comm):
    for n in range(1, comm.size + 1):
        with first_ranks(comm, n) as part:
            if part:
                yield part


def test_one_and_many_fingerprints_are_xored(comm):
    for part in _worlds(comm):
        own, everyone = _own(part, 5)
        expected = [reduce(xor, column) for column in zip(*everyone)]
        assert reduce_fingerprints(part, own) == expected
        assert reduce_fingerprints(part, own[0]) == expected[0]
        assert reduce_fingerprints(part, tuple(own)) == expected
        assert reduce_fingerprints(part, []) == []


def test_sums_are_taken_modulo_two_to_the_64(comm):
    for part in _worlds(comm):
        own, everyone = _own(part, 4)
        expected = [sum(column) & MASK for column in zip(*everyone)]
        assert sum_words(part, own) == expected
        assert sum_words(part, own[1]) == expected[1]
        assert sum_words(part, MASK) == part.size * MASK & MASK


def test_several_reductions_in_flight_give_what_the_blocking_ones_give(comm):
    for part in _worlds(comm):
        own, _ = _own(part, 6)
        pending = [ireduce_fingerprints(part, own), isum_words(part, own)]
        pending += [ireduce_fingerprints(part, own[2]), isum_words(part, own[3])]
        found = [p.wait() for p in reversed(pending)][::-1]
        assert found[0] == reduce_fingerprints(part, own)
        assert found[1] == sum_words(part, own)
        assert found[2:] == [found[0][2], found[1][3]]


def test_replicas_agree_only_where_all_bits_are_equal(comm):
    """With even and odd numbers of ranks: two equal replicas would cancel under XOR."""
    for part in _worlds(comm):
        last = part.rank == part.size - 1
        for word in (0, MASK, 1 << 63, 0x1234):
            assert agree(part, word) is True
            if part.size > 1:
                assert agree(part, word ^ last) is False
                assert agree(part, [word, word ^ (last << 63), word]) == [True, False, True]


def test_the_rank_that_differs_is_named_by_the_majority(comm):
    for part in _worlds(comm):
        assert dissenters(part, 42) == []
        if part.size < 2:
            continue
        for odd in range(part.size):
            found = dissenters(part, 42 + (part.rank == odd))
            assert found == ([odd] if part.size > 2 else [0, 1])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([5], []), ([5, 5], []), ([5, 6], [0, 1]), ([5, 6, 5], [1]), ([6, 5, 5], [0]),
        ([1, 2, 3], [0, 1, 2]), ([5, 5, 6, 6], [0, 1, 2, 3]), ([5, 6, 5, 5], [1]),
        ([6, 5, 7, 5, 5], [0, 2]), ([5, 6, 7, 5], [0, 1, 2, 3]), ([MASK, 0, MASK], [1]),
    ],
)  # fmt: skip
def test_a_minority_differs_from_what_more_than_half_hold(words, expected):
    assert minority(np.array(words, np.uint64)) == expected


def _merged_by_hand(records):
    """Records of all ranks, [ranks, n], merged with Python's integers."""
    merged = empty_records(records.shape[1])
    for i in range(records.shape[1]):
        column = [dict(zip(RECORD.names, (int(v) for v in record))) for record in records[:, i]]
        merged[i]["xor"] = reduce(xor, (r["xor"] for r in column))
        merged[i]["total"] = sum(r["total"] for r in column) & MASK
        merged[i]["every"] = reduce(int.__and__, (r["every"] for r in column))
        merged[i]["none"] = reduce(int.__and__, (r["none"] for r in column))
        merged[i]["count"] = sum(r["count"] for r in column) & MASK
        merged[i]["place"] = min(r["place"] for r in column)
    return merged


@pytest.mark.parametrize("n", [1, 3, 1000, 50000])
def test_records_merge_as_a_gather_of_all_of_them_says(comm, n):
    """Also where the library cuts the message in pieces, and in any order of the ranks."""
    for part in _worlds(comm):
        rng = np.random.default_rng(n)
        words = rng.integers(0, 1 << 64, (part.size, min(n, 1000), 6), np.uint64)
        everyone = np.ascontiguousarray(words).view(RECORD)[..., 0]
        expected = np.resize(_merged_by_hand(everyone), n)
        reduction = RecordReduction()
        for order in (range(part.size), reversed(range(part.size))):
            mine = list(order)[part.rank]
            own = np.ascontiguousarray(np.resize(everyone[mine], n))
            kept = own.copy()
            assert np.array_equal(reduction.merge(part, own), expected)
            assert np.array_equal(own, kept)
        reduction.free()


def test_empty_records_change_nothing(comm):
    reduction = RecordReduction()
    records = empty_records(2, 3)
    if comm.rank == comm.size - 1:
        records[1, 2] = (1, 2, 3, 4, 5, 6)
    merged = reduction.merge(comm, records)
    assert tuple(merged[1, 2]) == (1, 2, 3, 4, 5, 6)
    assert tuple(merged[0, 0]) == (0, 0, ALL_ONES, ALL_ONES, 0, ALL_ONES)
    reduction.free()


def test_a_process_may_check_on_more_communicators_than_mpi4py_has_operations(comm):
    array, duplicates = np.arange(8.0), [comm.Dup() for _ in range(80)]
    for i, duplicate in enumerate(duplicates):
        assert spimpi.verify_replicas(duplicate, array, spimpi.Tag(name="w", step=i))
    for duplicate in duplicates:
        duplicate.Free()


def test_blocks_of_two_ranks_are_counts_not_a_displacement(comm):
    for part in _worlds(comm):
        counts = [3 * r + 1 for r in range(part.size)]
        result = np.full(sum(counts), -1)
        part.Allgatherv(np.full(counts[part.rank], part.rank), blocks(result, counts))
        assert result.tolist() == [r for r, n in enumerate(counts) for _ in range(n)]


@pytest.mark.parametrize(
    ("error", "kind"), [(UsageError("no"), UsageError), (IncompleteError("no"), IncompleteError),
                        (OSError("no"), UsageError), (CorruptionError("no"), SpimpiError)],
)  # fmt: skip
def test_an_error_on_one_rank_is_raised_on_all(comm, error, kind):
    for culprit in range(comm.size):
        with pytest.raises(kind, match="no") as caught, together(comm):
            if comm.rank == culprit:
                raise error
        said = comm.allgather((type(caught.value), str(caught.value)))
        assert len(set(said)) == 1
        # What carries a verdict has the rank in that.
        told = culprit > 0 and not isinstance(error, CorruptionError)
        assert ("found by rank" in said[0][1]) == told
    # Nothing is left over from the errors.
    assert sum_words(comm, 1) == comm.size


@pytest.mark.mpi(min_size=2)
def test_an_early_error_waits_for_ranks_that_come_late(comm, monkeypatch):
    """However late: the library's checks look at no clock, and all ranks raise one error."""
    monkeypatch.setattr(reductions, "within", None)
    calls = {
        "together": lambda x: _together(comm, x),
        "exact_allreduce": lambda x: spimpi.exact_allreduce(comm, x),
        "localise": lambda x: spimpi.localise(comm, [(x, None)], [], spimpi.Tag(name="x")),
    }
    for call in calls.values():
        for culprit in range(comm.size):
            if comm.rank != culprit:
                time.sleep(0.1)
            with pytest.raises(UsageError) as caught:
                call([1.0] if comm.rank == culprit else np.ones(3))
            assert len(set(comm.allgather(str(caught.value)))) == 1


def _together(comm, x):
    with together(comm):
        spimpi.as_array(x)


def test_the_lowest_rank_speaks_where_several_meet_errors(comm):
    with pytest.raises(UsageError, match="rank 0 says"), together(comm):
        msg = f"rank {comm.rank} says"
        raise UsageError(msg)


def test_communicators_and_operations_are_given_back(comm):
    """Two hundred contexts: none of them may use up communicators, operations or datatypes.

    MPICH has 2048 communicators, so a context that kept its seven would end here.
    """
    users = RecordReduction.users
    for _ in range(400):
        with DistributedContext(comm, choose(comm.size, 8, 8)) as ctx:
            made = (ctx.world, ctx.tensor, ctx.pipeline, ctx.data, ctx.replica, ctx.node)
    for given_back in made:
        assert given_back == MPI.COMM_NULL
    assert RecordReduction.users == users
    op, datatype = RecordReduction._shared
    last = users == 0  # this process's other sessions, made by earlier tests, are gone too
    assert last == (op == MPI.OP_NULL) == (datatype == MPI.DATATYPE_NULL)


def test_what_all_share_is_given_back_once_however_often_one_frees_it(comm):
    first, second = RecordReduction(), RecordReduction()
    users = RecordReduction.users
    first.free()
    first.free()
    assert RecordReduction.users == users - 1
    merged = second.merge(comm, empty_records(2))
    assert (merged["every"] == ALL_ONES).all()
    second.free()
