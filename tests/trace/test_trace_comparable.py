"""Which fingerprints of two runs of a program say the same of their data, and which cannot tell."""

from dataclasses import replace

import numpy as np
import pytest

from spimpi.bench.synthetic_trace import write_ranks
from spimpi.trace import open as open_trace
from spimpi.trace.analysis.diff import diff
from spimpi.trace.schema import Op, Stage, Status, TensorInfo, blank_events

INTEGERS, FLOATS, LOOSE = range(3)
TENSORS = [
    TensorInfo("counts", (8,), "int64"), TensorInfo("x", (8,), "float32"),
    TensorInfo("blocks", (-1,), "float32"),
]  # fmt: skip


@pytest.fixture
def compared(tmp_path):
    """``compared(a, b)``: diff of two programs; each a list of ranks, a rank a list of checks."""
    made = iter(range(100))

    def run(a, b, topology=None, dtypes=(None, None), **more):
        paths = []
        for ranks, dtype in zip((a, b), dtypes):
            path = tmp_path / f"{next(made)}.h5"
            said = topology or f"tp={len(ranks)},pp=1,dp=1"
            rows = [events_of(checks) for checks in ranks]
            facts = {"run_id": "r", "world": len(ranks), "topology": said, "end_state": "verified"}
            facts |= more
            tensors = [t if dtype is None else replace(t, dtype=dtype) for t in TENSORS]
            write_ranks(path, len(ranks), rows.__getitem__, tensors, facts, "gather")
            paths.append(path)
        with open_trace(paths[0]) as one, open_trace(paths[1]) as two:
            return diff(one, two)

    return run


def check(op, word, tensor=FLOATS, **columns) -> dict:
    return {"op": op, "fingerprint": word, "expected": word, "tensor": tensor, **columns}


def events_of(checks) -> np.ndarray:
    events = blank_events(len(checks))
    events["stage"], events["bytes"] = Stage.PROGRAM, 8
    for row, columns in zip(events, checks):
        for name, value in columns.items():
            row[name] = value
    return events


def ranks_of(op, words, tensor=FLOATS, **columns):
    """A check of each rank; ``groups``: the column sequence of each."""
    groups = columns.pop("groups", [0] * len(words))
    return [[check(op, w, tensor, sequence=g, **columns)] for w, g in zip(words, groups)]


def test_a_check_without_a_fingerprint_is_told_and_nothing_is_the_same(compared):
    """As traces from before had them, of gathers and sums."""
    old = ranks_of(Op.GATHER, [0, 0])
    found = compared(old, old)
    assert found.exit_status == 3 and not len(found.table)
    assert found.notes == ("1 not compared (gather): without a fingerprint in one of the traces",)
    new = ranks_of(Op.GATHER, [5, 6])
    assert compared(old, new).exit_status == compared(new, old).exit_status == 3
    covered_nothing = ranks_of(Op.HANDOFF, [0, 0], bytes=0)
    both = [a + b for a, b in zip(new, covered_nothing)]
    assert compared(new, both).exit_status == 0


def test_a_recovered_program_does_not_tell_which_calls_were_not_checked(compared):
    ranks = ranks_of(Op.BROADCAST, [5, 5])
    assert compared(ranks, ranks).exit_status == 0
    found = compared(ranks, ranks, recovered=True)
    assert found.exit_status == 3 and len(found.notes) == 2 and "was recovered" in found.notes[0]


@pytest.mark.parametrize(
    ("dtypes", "status", "said"),
    [(("int32", "int32"), 0, []), (("int32", "float32"), 1, []),
     (("mixed", "int32"), 3, ["dtypes are not compared (broadcast)"]),
     (("mixed", "mixed"), 0, ["the bits alone"]), (("", "int32"), 0, ["the bits alone"])],
)  # fmt: skip
def test_equal_bits_of_other_dtypes_differ_where_these_are_told(compared, dtypes, status, said):
    ranks = ranks_of(Op.BROADCAST, [5, 5])
    found = compared(ranks, ranks, dtypes=dtypes)
    assert found.exit_status == status
    lines = [*found.notes, *found.remarks]
    assert len(lines) == len(said) and all(a in b for a, b in zip(said, lines))


@pytest.mark.parametrize("op", [Op.GATHER, Op.SCATTER, Op.ALLTOALL, Op.REDUCE_SCATTER])
def test_shares_are_compared_whatever_the_split(compared, op):
    one, three = ranks_of(op, [7], INTEGERS), ranks_of(op, [1, 2, 4], INTEGERS)
    assert compared(one, three).exit_status == 0
    found = compared(one, ranks_of(op, [1, 2, 5], INTEGERS))
    assert found.exit_status == 1 and (found.table["a"][0], found.table["b"][0]) == (7, 6)
    # The same split: another share that cancels does not hide behind the XOR of all.
    resplit = compared(three, ranks_of(op, [2, 1, 4], INTEGERS))
    assert resplit.exit_status == 0  # one group: the whole tensor is what it was


def test_blocks_of_ranks_are_compared_between_equal_numbers_of_ranks_alone(compared):
    two, other = ranks_of(Op.RING, [1, 2], LOOSE), ranks_of(Op.RING, [1, 3], LOOSE)
    assert compared(two, two).exit_status == 0 and compared(two, other).exit_status == 1
    found = compared(two, ranks_of(Op.RING, [1, 2, 4], LOOSE))
    assert found.exit_status == 3 and "(ring): blocks of ranks" in found.notes[0]


def test_sums_of_floats_may_round_otherwise_on_other_numbers_of_ranks(compared):
    one, two = ranks_of(Op.ALLREDUCE_SUM, [7]), ranks_of(Op.ALLREDUCE_SUM, [7, 7])
    assert compared(one, two).exit_status == 0
    rounded = ranks_of(Op.ALLREDUCE_SUM, [8, 8])
    found = compared(one, rounded)
    assert found.exit_status == 3 and "sums of floats" in found.notes[0]
    same_ranks = compared(two, rounded)
    assert same_ranks.exit_status == 1 and "order of the addends" in same_ranks.judgement.reason
    for op, tensor in ((Op.ALLREDUCE_SUM, INTEGERS), (Op.ALLREDUCE_MAX, FLOATS)):
        assert compared(ranks_of(op, [7], tensor), ranks_of(op, [8, 8], tensor)).exit_status == 1


@pytest.mark.parametrize("op", [Op.HANDOFF, Op.AT_REST, Op.MATMUL, Op.MESSAGE])
def test_what_one_rank_holds_is_compared_rank_by_rank(compared, op):
    two = ranks_of(op, [1, 2])
    assert compared(two, two).exit_status == 0
    for others in ([1, 3], [2, 1], [1, 1]):
        assert compared(two, ranks_of(op, others)).exit_status == 1
    found = compared(two, ranks_of(op, [1, 2, 3]))
    assert found.exit_status == 3 and "of what one rank holds" in found.notes[0]
    assert compared(ranks_of(op, [1]), ranks_of(op, [1, 1])).exit_status == 0


def test_messages_are_told_apart_by_their_senders_not_by_the_order_they_came_in(compared):
    def received(*order):
        return [[check(Op.MESSAGE, 10 + peer, step=1, peer=peer) for peer in order]]

    assert compared(received(1, 2), received(2, 1)).exit_status == 0
    swapped = [[check(Op.MESSAGE, 11, step=1, peer=2), check(Op.MESSAGE, 12, step=1, peer=1)]]
    assert compared(received(1, 2), swapped).exit_status == 1


@pytest.mark.parametrize("groups", [[1, 1, 3, 3], [0, 0, 0, 0]])
def test_groups_that_exchanged_their_data_are_seen(compared, groups):
    """[0, 0, 0, 0]: a trace from before, which does not say which ranks made a check."""
    clean = ranks_of(Op.AGREEMENT, [5, 5, 9, 9], groups=groups)
    assert compared(clean, clean).exit_status == 0
    for words in ([9, 9, 5, 5], [5, 5, 5, 9]):
        found = compared(clean, ranks_of(Op.AGREEMENT, words, groups=groups))
        assert found.exit_status == 1 and found.table["differs"].all()
        assert "exchanged" in found.judgement.reason


def test_across_topologies_groups_are_known_by_their_order_or_not_at_all(compared):
    four = ranks_of(Op.AGREEMENT, [5, 5, 9, 9], groups=[1, 1, 3, 3])
    two = ranks_of(Op.AGREEMENT, [5, 9], groups=[1, 2])
    assert compared(four, two).exit_status == 0
    for other in (
        ranks_of(Op.AGREEMENT, [9, 5], groups=[1, 2]), ranks_of(Op.AGREEMENT, [5, 9]),
        ranks_of(Op.AGREEMENT, [5, 5, 9], groups=[1, 2, 3]),
    ):  # fmt: skip
        found = compared(four, other)
        assert found.exit_status == 3 and "which group is which" in found.notes[0]
    assert compared(four, ranks_of(Op.AGREEMENT, [5, 8], groups=[1, 2])).exit_status == 1
    assert compared(four, ranks_of(Op.AGREEMENT, [5, 5], groups=[1, 2])).exit_status == 1
    # The same number of ranks in another grid: which has which part is not known either.
    other_grid = [four[i] for i in (2, 3, 0, 1)]
    assert compared(four, other_grid, "tp=4,pp=1,dp=1").exit_status == 1


def test_a_failed_check_has_the_whole_tensors_fingerprint_on_every_rank(compared):
    held = ranks_of(Op.GATHER, [1, 2])
    failed = [[check(Op.GATHER, 9, verdict=Status.FAILED, peer=1)] for _ in range(2)]
    assert compared(held, failed).exit_status == 1
    right_after_all = [[check(Op.GATHER, 3, verdict=Status.FAILED, peer=1)] for _ in range(2)]
    assert compared(held, right_after_all).n_differ == 0


def test_checks_that_one_run_has_alone_are_told(compared):
    more = ranks_of(Op.AGREEMENT, [5])
    longer = [more[0] + [check(Op.AGREEMENT, 6, INTEGERS)]]
    found = compared(more, longer)
    assert found.exit_status == 3 and found.notes == ("1 tensors of common steps are in B alone",)
    found = compared(more, [more[0] + [check(Op.AGREEMENT, 5, step=1)]])
    assert found.exit_status == 3 and "the 1 that both have are compared" in found.notes[0]


def test_the_last_tokens_of_verify_are_compared_whichever_check_recorded_them(tmp_path):
    found = []
    for word in (7, 7, 8):
        events = blank_events(2)
        events["stage"], events["op"] = [Stage.GOLDEN, Stage.DATA], [Op.CONTENT, Op.AGREEMENT]
        events["fingerprint"] = events["expected"] = [5, word]
        path = tmp_path / f"{len(found)}.h5"
        tensors = [TensorInfo("tokens", (2,), "int64")]
        facts = {"run_id": "r", "model": "tiny", "end_state": "verified"}
        write_ranks(path, 1, [events].__getitem__, tensors, facts, "gather")
        found.append(path)
    for other, status in ((found[1], 0), (found[2], 1)):
        with open_trace(found[0]) as a, open_trace(other) as b:
            assert diff(a, b).exit_status == status
