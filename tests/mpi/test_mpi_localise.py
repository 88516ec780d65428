"""Planted errors are located, over real messages, and little is sent for it."""

import numpy as np
import pytest
from localise_cases import DTYPES, Counted, check_findings, plant, random_layout
from mpi4py import MPI

from spimpi import Slab, Tag, TensorPartition, UsageError
from spimpi.checks.localisation.localise import localise
from spimpi.fingerprint import fingerprint
from spimpi.partition import whole

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]

TAG = Tag(name="hidden", layer=5, step=7)
SHAPES = [(), (1,), (0, 5), (977,), (31, 40), (5, 6, 7), (3, 1, 9, 4), (64, 2)]


@pytest.mark.parametrize("seed", range(40))
def test_exactly_the_planted_elements_are_named(comm, seed):
    shape, dtype = SHAPES[seed % len(SHAPES)], DTYPES[seed % len(DTYPES)]
    layout = random_layout(seed, comm.size, shape, dtype)
    plant(layout, seed, [0, 1, 2, 3, 8, 60][seed % 6])
    limit = [16, 2][seed % 5 == 0]
    findings = localise(comm, *layout.arguments(comm.rank), TAG, limit=limit)
    check_findings(findings, layout, limit)


# What an allgather, or an all-to-all, may have left behind ------------------------------------


def values(shape, dtype=np.float32, step=7):
    return np.random.default_rng((3, step)).standard_normal(shape).astype(dtype)


def gathered(comm, spoil, shape=None, dtype=np.float32, dim=0, history=None, tag=TAG, sizes=None):
    """The findings after an allgather along ``dim`` whose results ``spoil(array, rank)`` changed.
    """
    shape = shape or (16 * comm.size, 12)
    truth = values(shape, dtype)
    part = TensorPartition(dim, comm.size, comm.rank, shape[dim], sizes)
    own = truth[(slice(None),) * dim + (slice(part.start, part.stop),)]
    result = truth.copy()
    spoil(result, comm.rank)
    return localise(
        comm, [(own, part.slab(own.shape))], [(result, whole(shape))], tag, history=history
    )


def flip_bit(array, index, bit):
    words = array.view(f"u{array.itemsize}")
    words[index] ^= words.dtype.type(1 << bit)


def last(comm):
    return comm.size - 1


def test_a_clean_result_has_no_findings(comm):
    findings = gathered(comm, lambda x, rank: None)
    assert (findings.elements, findings.n_wrong, findings.ranks) == ((), 0, ())


def test_one_flipped_bit(comm):
    def spoil(x, rank):
        if rank == last(comm):
            flip_bit(x, (3, 5), 30)

    findings = gathered(comm, spoil)
    (error,) = findings.elements
    truth = values((16 * comm.size, 12))[3, 5]
    assert (error.index, error.rank, error.bits) == ((3, 5), last(comm), (30,))
    assert error.expected == truth.tobytes()
    assert findings.text == "one bit (30) of one element"
    assert findings.ranks == (last(comm),)


def test_what_is_wrong_alike_everywhere_is_told_once(comm):
    findings = gathered(comm, lambda x, rank: flip_bit(x, (3, 5), 30))
    assert findings.alike == (tuple(range(comm.size)),)
    assert (findings.n_wrong, findings.elements[0].rank) == (1, 0)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_are_wrong_in_other_ways_are_told_apart(comm):
    def spoil(x, rank):
        if rank < 2:
            flip_bit(x, (rank, 0), 3 + rank)

    findings = gathered(comm, spoil)
    assert [(e.rank, e.index, e.bits) for e in findings.elements] == [
        (0, (0, 0), (3,)),
        (1, (1, 0), (4,)),
    ]
    assert findings.text == (
        "on rank 0: one bit (3) of one element; on rank 1: one bit (4) of one element"
    )


def on(wanted, spoil):
    def only(x, rank):
        if rank == wanted:
            spoil(x)

    return only


def swap(x):
    x[1, 1], x[9, 2] = x[9, 2].copy(), x[1, 1].copy()


def same_bit(x):
    for i in range(5):
        flip_bit(x, (3 * i, i), 12)


def zeros(x):
    x[2:14] = 0


def tail_zeros(x):
    x.reshape(-1)[100:] = 0


def tail(x):
    x.reshape(-1)[100:] += 1


def everything(x):
    x *= 1.37


def not_a_number(x):
    x[4:12, 3] = np.nan
    x[4:12, 5] = np.nan


def much_not_a_number(x):
    x[3:15] = np.nan


def one_not_a_number(x):
    x[5, 5] = np.nan


def byte_order(x):
    x[4:12:2, 3:6] = x[4:12:2, 3:6].byteswap()


def noise(x):
    x[4:12:2, 3:6] *= 1.37


def much_noise(x):
    x[3:15, 1:9] *= 1.37


def one_zero(x):
    x[5, 5] = 0


SHIFTED = "shifted by one along axis"
WORDS = [
    (swap, "two elements swapped"),
    (same_bit, "the same bit (12) of 5 elements"),
    (zeros, "zeros for data in rows 2..14"),
    (one_zero, "zero for one element"),
    (tail_zeros, "zeros for data from element 100 of 192 to the end"),
    (tail, "from element 100 of 192 on, 49 of 49 elements that were looked at differ, and none "
           "before: as where a buffer was not written to its end"),
    (everything, "more than 16 elements, all in the whole tensor, differ, no simple pattern"),
    (one_not_a_number, "NaN for one element"),
    (byte_order, "the bytes of 12 elements in reverse order"),
    (noise, "12 elements differ, no simple pattern"),
    (much_noise, "more than 16 elements, all in block [3:15, 1:9], differ, no simple pattern"),
    (not_a_number, "NaN for 16 elements"),
    (much_not_a_number, "NaN for data in rows 3..15"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "text"), WORDS, ids=[f.__name__ for f, _ in WORDS])
def test_a_corruption_in_words(comm, spoil, text):
    findings = gathered(comm, on(last(comm), spoil), shape=(16, 12), dim=1)
    assert findings.text == text


def test_sparse_errors_up_to_the_end_are_no_unwritten_end(comm):
    findings = gathered(comm, on(0, lambda x: np.add(x[3::4], 1, out=x[3::4])), shape=(256,))
    assert findings.blocks[0][1].offset == (3,)
    assert findings.text.endswith("no simple pattern"), findings.text


def test_wrong_columns_up_to_the_last_are_no_unwritten_end(comm):
    findings = gathered(comm, on(0, lambda x: np.multiply(x[:, 1:], 1.37, out=x[:, 1:])))
    assert findings.text.endswith("no simple pattern"), findings.text


@pytest.mark.mpi(min_size=2)
def test_one_element_that_another_rank_has_too_is_no_origin(comm):
    def spoil(x):
        x[17, 2] = x[1, 2]
        x[3, 3] *= 1.37

    assert gathered(comm, on(0, spoil)).text == "2 elements differ, no simple pattern"


@pytest.mark.mpi(min_size=2)
def test_zeros_are_not_called_another_ranks(comm):
    shape = (16 * comm.size, 12)
    truth = values(shape)
    truth[:16] = 0
    part = TensorPartition(0, comm.size, comm.rank, shape[0])
    own = truth[part.start : part.stop]
    result = truth.copy()
    result[16:32] = 0
    findings = localise(comm, [(own, part.slab(own.shape))], [(result, whole(shape))], TAG)
    assert findings.text == "zeros for data in rows 16..32"
    assert findings.n_wrong == 16 * 12


def test_zeros_are_counted_without_those_that_are_true(comm):
    def spoil(x, rank):
        x[:] = 0

    shape = (16 * comm.size, 3)
    truth = values(shape)
    truth[2:9] = 0
    part = TensorPartition(0, comm.size, comm.rank, shape[0])
    own = truth[part.start : part.stop]
    findings = localise(
        comm, [(own, part.slab(own.shape))], [(np.zeros_like(truth), whole(shape))], TAG
    )
    assert findings.n_wrong == np.count_nonzero(truth)
    assert len(findings.elements) == 16


@pytest.mark.mpi(min_size=2)
def test_rows_of_another_rank(comm):
    def spoil(x):
        x[16:32] = x[:16].copy()

    findings = gathered(comm, on(last(comm), spoil))
    assert findings.text == "rows 16..32 are those of rank 0"
    assert findings.blocks == ((last(comm), Slab((16 * comm.size, 12), (16, 0)), (16, 12)),)


@pytest.mark.mpi(min_size=2)
def test_part_of_the_rows_of_another_rank(comm):
    def spoil(x):
        x[18:23] = x[2:7].copy()

    assert gathered(comm, on(0, spoil)).text == "rows 18..23 are those of rank 0"


@pytest.mark.mpi(min_size=2)
def test_columns_of_another_rank(comm):
    def spoil(x):
        x[:, 16:32] = x[:, :16].copy()

    findings = gathered(comm, on(0, spoil), shape=(12, 16 * comm.size), dim=1)
    assert findings.text == "block [0:12, 16:32] is that of rank 0"


@pytest.mark.mpi(min_size=2)
def test_shards_in_another_order(comm):
    def spoil(x):
        x[:32] = np.concatenate([x[16:32], x[:16]])

    assert gathered(comm, on(0, spoil)).text == "rows 0..16 and rows 16..32 are swapped"


@pytest.mark.mpi(min_size=3)
def test_shards_in_a_cycle(comm):
    def spoil(x):
        x[:48] = np.concatenate([x[16:48], x[:16]])

    assert gathered(comm, on(0, spoil)).text == (
        "rows 0..16 are those of rank 1; rows 16..32 are those of rank 2; "
        "rows 32..48 are those of rank 0"
    )


@pytest.mark.mpi(min_size=2)
def test_one_scalar_a_rank_and_a_contribution_repeated(comm):
    def spoil(x):
        x[1] = x[0]

    findings = gathered(comm, on(last(comm), spoil), shape=(comm.size,))
    assert findings.text == "element 1 is that of rank 0"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("by", [1, -1])
def test_shifted_by_one(comm, axis, by):
    findings = gathered(comm, on(0, lambda x: x.__setitem__(..., np.roll(x, by, axis))))
    sign = "" if by > 0 else "minus "
    assert findings.text.endswith(f"shifted by {sign}one along axis {axis}"), findings.text


def test_a_shard_of_an_earlier_step(comm):
    shape = (16 * comm.size, 12)
    part = TensorPartition(0, comm.size, comm.rank, shape[0])
    history = {}
    for step in range(4, 7):
        tag = Tag(name="hidden", layer=5, step=step)
        own = values(shape, step=step)[part.start : part.stop]
        place = part.slab(own.shape)
        history[tag, place] = fingerprint(own, tag, place)

    def spoil(x):
        x[:16] = values(shape, step=6)[:16]

    text = "shard of step 6 in step 7" if comm.size > 1 else "tensor of step 6 in step 7"
    assert gathered(comm, on(last(comm), spoil), history=history).text == text
    if comm.rank != 0:
        history = None  # the record of the owner is enough
    assert gathered(comm, on(last(comm), spoil), history=history).text == text

    def spoil_more(x):
        spoil(x)
        x[3, 3] += 1

    assert "step" not in gathered(comm, on(last(comm), spoil_more), history=history).text


def test_the_holders_own_earlier_tensor_and_another_layers(comm):
    shape = (16 * comm.size, 12)
    stale = values(shape, step=3)
    tag = Tag(name="keys", layer=4, step=7)
    history = {(tag, whole(shape)): fingerprint(stale, tag)} if comm.rank == last(comm) else {}
    findings = gathered(comm, on(last(comm), lambda x: x.__setitem__(..., stale)), history=history)
    assert findings.text == "tensor 'keys', layer 4 in tensor 'hidden', layer 5"


@pytest.mark.mpi(min_size=2)
def test_an_all_to_all_that_delivered_a_block_to_the_wrong_rank(comm):
    """Rank r holds columns; the block that rank 0 sent it is the one meant for another."""
    n, width = 5, 4
    shape = (n * comm.size, width * comm.size)
    truth = values(shape)
    rows = slice(n * comm.rank, n * comm.rank + n)
    first = width * comm.rank
    held = truth[:, first : first + width].copy()
    if comm.rank == 1:
        held[:n] = truth[:n, :width]
    findings = localise(
        comm,
        [(truth[rows], Slab(shape, (rows.start, 0)))],
        [(held, Slab(shape, (0, first)))],
        TAG,
    )
    assert findings.ranks == (1,)
    assert findings.text == "block [0:5, 4:8] is block [0:5, 0:4]"


def test_uneven_shards_some_of_them_empty(comm):
    sizes = tuple(0 if r % 2 else 7 + r for r in range(comm.size))
    shape = (sum(sizes), 3)
    findings = gathered(comm, on(0, lambda x: flip_bit(x, (6, 2), 1)), shape=shape, sizes=sizes)
    assert [(e.index, e.bits) for e in findings.elements] == [((6, 2), (1,))]


def test_neighbouring_blocks_are_reported_as_one(comm):
    findings = gathered(comm, on(0, lambda x: np.negative(x[4:], out=x[4:])))
    shape = (16 * comm.size, 12)
    assert findings.blocks == ((0, Slab(shape, (4, 0)), (shape[0] - 4, 12)),)


@pytest.mark.mpi(min_size=2)
def test_the_elements_named_are_of_all_ranks_in_turn(comm):
    findings = gathered(comm, lambda x, rank: rank < 2 and np.multiply(x, 3 + rank, out=x))
    named = [e.rank for e in findings.elements]
    assert min(named.count(0), named.count(1)) >= 16 // (2 * comm.size) * comm.size
    owners = {e.index[0] // 16 for e in findings.elements if e.rank == 0}
    assert owners == set(range(min(comm.size, 8)))


@pytest.mark.mpi(min_size=2)
def test_more_wrong_ranks_than_the_limit_are_all_named(comm):
    truth = values((8, 8))
    result = truth.copy()
    result[comm.rank, 2] += 1
    own = [(truth, whole((8, 8)))] if comm.rank == 0 else []
    findings = localise(comm, own, [(result, whole((8, 8)))], TAG, limit=1)
    assert findings.ranks == tuple(range(comm.size))
    assert findings.n_wrong is None and len(findings.elements) == 1
    assert {rank for rank, _, _ in findings.blocks} == set(range(comm.size))


@pytest.mark.mpi(min_size=2)
def test_an_element_with_two_owners_is_refused_on_every_rank(comm):
    truth = values((8, 8))
    whole_tensor = [(truth, whole((8, 8)))]
    with pytest.raises(UsageError, match="rank 0 contributed .* and rank 1"):
        localise(comm, whole_tensor, whole_tensor, TAG)


# What is sent ---------------------------------------------------------------------------------


def sent(comm, n, spoil, limit=16):
    """(calls, bytes) of a rank for a vector of n float32, cut evenly, held by all."""
    part = TensorPartition(0, comm.size, comm.rank, n)
    truth = np.arange(n, dtype=np.float32)
    result = truth.copy()
    spoil(result)
    counted = Counted(comm)
    own = truth[part.start : part.stop]
    findings = localise(
        counted, [(own, part.slab(own.shape))], [(result, whole((n,)))], TAG, limit=limit
    )
    return findings, len(counted.calls), sum(size for _, size in counted.calls)


def test_one_element_of_many_takes_few_rounds_of_few_words(comm):
    def spoil(x):
        if comm.rank == last(comm):
            flip_bit(x, 1_000_001 % x.size, 30)

    traffic = {}
    for power in (8, 12, 16, 20):
        findings, calls, size = sent(comm, 1 << power, spoil)
        assert [e.bits for e in findings.elements] == [(30,)]
        traffic[power] = calls, size
        # agreement, shapes, slabs, owners, elements, fetch: 16 words in each round of elements
        assert calls <= 5 + -(-power // 4)
        assert size <= 600 + 8 * comm.size + 128 * (1 + -(-power // 4))
    # 16 times the data: one round more
    for power in (12, 16, 20):
        assert traffic[power][0] - traffic[power - 4][0] <= 1
        assert traffic[power][1] - traffic[power - 4][1] <= 128 + 32  # longer shapes, too


def test_what_is_sent_does_not_grow_with_what_is_wrong(comm):
    limit = 4
    sizes = {}
    for power in (12, 16, 20):
        _, calls, size = sent(comm, 1 << power, lambda x: np.add(x, comm.rank + 1, out=x), limit)
        sizes[power] = size
        assert calls <= 40
        assert size <= 16 * 8 * 64 * calls
    assert sizes[20] - sizes[16] <= 2 * (sizes[16] - sizes[12]) + 4096
    assert sizes[20] < (1 << 20) * 4 / 50


def test_only_collectives_are_called_on_the_communicator(comm):
    """Counted has no others: no message of a user's can be met, and no rank waits for one alone."""
    findings, *_ = sent(comm, 1000, lambda x: x.fill(1))
    assert isinstance(comm, MPI.Comm) and findings.ranks == tuple(range(comm.size))
