"""Everything is held, and counted once: heads, columns, words, layers, rows and prompts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spimpi.errors import UsageError
from spimpi.topology.data import last_rows, prompt_block, rows_of
from spimpi.topology.grid import Grid, choose
from spimpi.topology.pipeline import Schedule, microbatches, schedule, stage_of, stage_ranges
from spimpi.topology.sequence import last_row_holders, split_rows
from spimpi.topology.tensor import TensorShard, tensor_shards

SHAPES = [(8, 4), (32, 8), (24, 8), (6, 1), (7, 7)]


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), SHAPES)
def test_heads_are_held_where_they_are_used_and_owned_once_at_every_tp(n_heads, n_kv_heads):
    for tp in range(1, n_heads + 1):
        shards = tensor_shards(tp, n_heads, n_kv_heads, 352, 257)
        assert [h for s in shards for h in range(s.heads.start, s.heads.stop)] == [*range(n_heads)]
        assert [h for s in shards for h in s.owned_kv_heads] == [*range(n_kv_heads)]
        for shard in shards:
            used = {h * n_kv_heads // n_heads for h in range(shard.heads.start, shard.heads.stop)}
            assert set(shard.kv_heads) == used
            assert set(shard.owned_kv_heads) <= used
        for head in range(n_kv_heads):
            holders = shards[0].holders(head)
            assert holders == tuple(s.rank for s in shards if head in s.kv_heads)
            assert head in shards[holders[0]].owned_kv_heads


def test_three_ranks_over_eight_heads():
    shards = tensor_shards(3, 8, 4, 352, 256)
    assert [(s.heads.start, s.heads.stop) for s in shards] == [(0, 3), (3, 6), (6, 8)]
    assert [[*s.kv_heads] for s in shards] == [[0, 1], [1, 2], [3]]
    assert [[*s.owned_kv_heads] for s in shards] == [[0, 1], [2], [3]]
    assert shards[0].holders(1) == (0, 1)


def test_with_one_key_value_head_only_the_lowest_rank_owns():
    shards = tensor_shards(4, 8, 1, 352, 256)
    assert [[*s.owned_kv_heads] for s in shards] == [[0], [], [], []]
    assert shards[0].holders(0) == (0, 1, 2, 3)
    assert [s.owned_kv(16).size for s in shards] == [16, 0, 0, 0]


@pytest.mark.parametrize("tp", [1, 2, 3, 5, 6, 7, 8])
def test_columns_and_words_are_covered_once_in_balanced_blocks(tp):
    shards = tensor_shards(tp, 8, 4, 353, 256)
    for blocks, total in (
        ([s.ffn(1) for s in shards], 353),
        ([s.vocabulary() for s in shards], 256),
        ([s.q(16) for s in shards], 128),
        ([s.owned_kv(16) for s in shards], 64),
    ):
        assert [i for b in blocks for i in range(b.start, b.stop)] == [*range(total)]
    sizes = [s.ffn().size for s in shards]
    assert max(sizes) - min(sizes) <= 1


def test_more_tensor_ranks_than_heads_and_odd_groups_are_refused():
    with pytest.raises(UsageError, match="9 tensor ranks are more than the model's 8 heads"):
        TensorShard(0, 9, 8, 4, 352, 256)
    with pytest.raises(UsageError, match="multiple"):
        TensorShard(0, 2, 8, 3, 352, 256)
    with pytest.raises(UsageError, match="0..1"):
        TensorShard(2, 2, 8, 4, 352, 256)
    with pytest.raises(UsageError, match="0..3"):
        TensorShard(0, 2, 8, 4, 352, 256).holders(4)


@pytest.mark.parametrize("layer_sizes", [(8,), (3, 3, 2), (31, 1), (1,) * 8])
def test_every_layer_has_one_stage(layer_sizes):
    ranges = stage_ranges(layer_sizes)
    assert [layer for r in ranges for layer in r] == [*range(sum(layer_sizes))]
    for p, stage in enumerate(ranges):
        assert all(stage_of(layer_sizes, layer) == p for layer in stage)
    with pytest.raises(UsageError):
        stage_of(layer_sizes, sum(layer_sizes))


@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 2))
def test_microbatches_cover_the_rows_with_two_in_flight_where_there_are_two_rows(n_rows, pp, step):
    blocks = microbatches(n_rows, pp, step)
    assert [row for start, stop in blocks for row in range(start, stop)] == [*range(n_rows)]
    assert all(stop > start for start, stop in blocks)
    wanted = 1 if pp == 1 else 2 if step else max(2, pp)
    assert len(blocks) == min(n_rows, wanted)
    sizes = [stop - start for start, stop in blocks]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 6), st.integers(1, 5))
def test_hand_offs_are_numbered_without_gap_in_the_order_of_the_run(pp, prefill, decode, n_steps):
    link = schedule(pp, prefill, decode, n_steps)
    steps = [len(microbatches(decode if s else prefill, pp, s)) for s in range(n_steps)]
    places = [(step, m) for step, n in enumerate(steps) for m in range(n)]
    assert [link.sequence(*place) for place in places] == [*range(len(places))]
    assert [link.place(i) for i in range(len(places))] == places
    assert link.per_link == len(places)
    assert link.handoffs == (pp - 1) * len(places)


def test_a_schedule_refuses_what_is_not_in_it():
    link = Schedule(2, 2, 1, 3)
    for wrong in (lambda: link.sequence(3, 0), lambda: link.sequence(1, 1), lambda: link.place(4)):
        with pytest.raises(UsageError):
            wrong()


lengths_and_dp = st.lists(st.integers(1, 9), min_size=1, max_size=12).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.integers(1, len(lengths)))
)


@given(lengths_and_dp, st.integers(0, 3))
def test_data_ranks_hold_each_row_once_and_know_what_it_is(lengths_dp, step):
    lengths, dp = lengths_dp
    expected = [
        (i, n + step - 1) for i, n in enumerate(lengths)
    ] if step else [(i, j) for i, n in enumerate(lengths) for j in range(n)]  # fmt: skip
    blocks = [rows_of(lengths, dp, d, step) for d in range(dp)]
    found = [pair for b in blocks for pair in zip(b.sequence.tolist(), b.position.tolist())]
    assert found == expected
    assert [r for b in blocks for r in range(b.start, b.stop)] == [*range(len(expected))]
    assert {b.total for b in blocks} == {len(expected)}
    for block in blocks:
        assert block.size == block.sequence.size
        ends = [lengths[s] + max(step, 1) - 1 - (step == 0) for s in np.unique(block.sequence)]
        chosen = last_rows(block)
        assert block.position[chosen].tolist() == [
            lengths[s] + step - 1 for s in block.sequence[chosen]
        ]
        assert len(chosen) == len(ends)


lengths_and_grid = lengths_and_dp.flatmap(
    lambda pair: st.tuples(
        st.just(pair[0]), st.just(pair[1]), st.integers(1, 6), st.integers(1, 4)
    )
)


@given(lengths_and_grid, st.integers(0, 3))
def test_sequence_ranks_hold_each_row_once_and_adjacent_in_every_microbatch(facts, step):
    lengths, dp, sp, pp = facts
    grid = Grid(1, pp, dp, (1,) * pp, sp=sp)
    rows = []
    for d in range(dp):
        split = split_rows(lengths, grid, d, step)
        plain = rows_of(lengths, dp, d, step)
        own = [split.rows_of(s) for s in range(sp)]
        assert sorted(np.concatenate(own)) == [*range(plain.start, plain.stop)]
        gathered = [split.gathered(m) for m in range(len(split.pieces))]
        assert sorted(np.concatenate(gathered)) == [*range(plain.start, plain.stop)]
        assert {len(piece) for piece in split.pieces} == {sp}
        for s in range(sp):
            assert (np.diff(own[s]) > 0).all()
            assert split.own(s) == [piece[s] for piece in split.pieces]
        for piece, together in zip(split.pieces, gathered):
            sizes = [stop - start for start, stop in piece]
            assert min(sizes) >= 0 and max(sizes) <= split.most_rows
            # Keys are appended in the order in which they are gathered, hence of their positions.
            at = together - plain.start
            for prompt in np.unique(plain.sequence[at]):
                of_prompt = plain.position[at][plain.sequence[at] == prompt]
                assert (np.diff(of_prompt) == 1).all()
            if sp > 1 and step == 0:
                assert np.unique(plain.sequence[at]).size == 1 and max(sizes) - min(sizes) <= 1
        if sp > 1 and step > 0:
            assert max(map(len, own)) - min(map(len, own)) <= 1
            n = len(own[0])
            assert len(split.pieces) == min(n, 2 if pp > 1 else 1)
        if sp > 1 and step == 0:
            holders = last_row_holders(split)
            ends = [prompt[-1] for prompt in gathered]
            assert all(end in own[s] for end, s in zip(ends, holders))
        rows += [row for s in range(sp) for row in own[s]]
    assert sorted(rows) == [*range(len(lengths) if step else sum(lengths))]


def test_a_prompt_of_128_tokens_over_two_ranks():
    split = split_rows([128], Grid(1, 1, 1, (1,), sp=2), 0)
    assert split.pieces == [[(0, 64), (64, 128)]]
    split = split_rows([3, 5], Grid(1, 1, 1, (1,), sp=4), 0)
    assert split.pieces == [[(0, 1), (1, 2), (2, 3), (3, 3)], [(3, 5), (5, 6), (6, 7), (7, 8)]]
    assert last_row_holders(split) == [2, 3]


def test_fewer_prompts_than_data_ranks_are_refused():
    with pytest.raises(UsageError, match="need at least 3 prompts, found 2"):
        prompt_block(2, 3, 0)
    with pytest.raises(UsageError, match="one token or more"):
        rows_of([3, 0], 1, 0)


@pytest.mark.parametrize("world_size", range(1, 65))
def test_at_every_world_size_each_piece_of_work_has_exactly_one_owner(world_size):
    grid = choose(world_size, 8, 8)
    lengths = [3 + i % 4 for i in range(grid.dp + 1)]
    n_rows = sum(lengths)
    stages = stage_ranges(grid.layer_sizes)
    owned = Counter()
    for rank in range(world_size):
        d, p, _, t = grid.coordinates(rank)
        shard = TensorShard(t, grid.tp, 8, 4, 352, 256)
        rows = rows_of(lengths, grid.dp, d)
        for layer in stages[p]:
            owned["q"] += len(range(shard.heads.start, shard.heads.stop)) * rows.size
            owned["kv"] += len(shard.owned_kv_heads) * rows.size
            owned["ffn"] += shard.ffn().size * rows.size
        if p == grid.pp - 1:
            owned["logits"] += shard.vocabulary().size * prompt_block(len(lengths), grid.dp, d).size
    assert owned["q"] == 8 * 8 * n_rows
    assert owned["kv"] == 8 * 4 * n_rows
    assert owned["ffn"] == 8 * 352 * n_rows
    assert owned["logits"] == 256 * len(lengths)
