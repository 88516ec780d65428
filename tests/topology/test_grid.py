"""The grid of ranks: order, choice, text, and what is said about a topology that does not fit."""

from decimal import Decimal

import pytest

from spimpi.errors import UsageError
from spimpi.topology.grid import (
    Grid, choose, fitting_sizes, nearest, parse, require_prompts, require_tokens,
)  # fmt: skip

HEADS, LAYERS = 8, 8


@pytest.mark.parametrize("sp", [1, 5])
def test_world_rank_runs_over_tensor_then_sequence_then_pipeline_then_data(sp):
    grid = Grid(2, 3, 4, (1, 1, 1), sp=sp)
    places = [
        (d, p, s, t) for d in range(4) for p in range(3) for s in range(sp) for t in range(2)
    ]
    n = 24 * sp
    assert grid.size == n
    assert [tuple(grid.coordinates(rank)) for rank in range(n)] == places
    assert [grid.rank_of(*place) for place in places] == list(range(n))
    for wrong in (-1, n):
        with pytest.raises(UsageError, match=f"0..{n - 1}"):
            grid.coordinates(wrong)
    for wrong in ((0, 3, 0, 0), (0, 0, sp, 0), (0, 0, -1, 0)):
        with pytest.raises(UsageError, match="no rank at"):
            grid.rank_of(*wrong)


@pytest.mark.parametrize("world_size", range(1, 65))
@pytest.mark.parametrize(("heads", "layers"), [(8, 8), (32, 16), (24, 28), (3, 2)])
def test_a_chosen_grid_uses_every_rank_by_the_written_rule(world_size, heads, layers):
    grid = choose(world_size, heads, layers)
    assert grid.size == world_size
    assert not any(world_size % tp == 0 for tp in range(grid.tp + 1, heads + 1))
    rest = world_size // grid.tp
    assert not any(rest % pp == 0 for pp in range(grid.pp + 1, layers + 1))
    assert grid.tp <= heads and grid.pp <= layers == sum(grid.layer_sizes)
    assert max(grid.layer_sizes) - min(grid.layer_sizes) <= 1


def test_64_ranks_on_the_embedded_shapes_are_8_by_8():
    assert choose(64, HEADS, LAYERS).describe() == (
        "tp=8,pp=8,dp=1: 64 ranks, layers 1+1+1+1+1+1+1+1"
    )
    assert choose(1, HEADS, LAYERS).describe() == "tp=1,pp=1,dp=1: 1 rank, layers 8"


def test_axes_left_out_are_one_and_the_text_round_trips():
    grid = parse("pp=3, tp=2", 6, HEADS, LAYERS)
    assert (grid.tp, grid.pp, grid.dp, grid.layer_sizes) == (2, 3, 1, (3, 3, 2))
    assert grid.sp == 1 and grid.text() == "tp=2,pp=3,dp=1"
    assert parse(grid.text(), 6, HEADS, LAYERS) == grid
    grid = parse("sp=5,dp=2", 10, HEADS, LAYERS)
    assert (grid.tp, grid.sp, grid.pp, grid.dp) == (1, 5, 1, 2)
    assert grid.text() == "tp=1,sp=5,pp=1,dp=2"
    assert parse(grid.text(), 10, HEADS, LAYERS) == grid
    assert parse("tp=2,sp=1,pp=2", 4, HEADS, LAYERS) == parse("tp=2,pp=2", 4, HEADS, LAYERS)
    assert parse(None, 6, HEADS, LAYERS) == choose(6, HEADS, LAYERS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tp=2,pp=2,dp=1", "tp=2,pp=2,dp=2"),
        ("tp=16", "more tensor ranks than the model's 8 heads"),
        ("pp=16", "more pipeline stages than the model's 8 layers"),
        ("tp=2,tp=4", "gives tp twice"),
        ("tp=0,pp=8", "1 or more"),
        ("tp=-2", "1 or more"),
        ("tp=²", "1 or more"),
        ("tp", "as in tp=2,pp=2,dp=2"),
        ("cp=8", "'cp=8'"),
        ("sp=3", "1·3·1·1 = 3 ranks, the world has 8; the nearest that fit 8 ranks: tp=2,sp=4"),
        ("sp=0,tp=8", "sp must be a whole number of 1 or more"),
        ("sp=2,sp=4", "gives sp twice"),
        ("", "found ''"),
        ("ring", "exo, exo-1.0, exo-0, gay"),
    ],
)
def test_a_topology_that_does_not_fit_is_refused_with_what_would(text, says):
    world_size = 16 if "16" in text else 8
    with pytest.raises(UsageError, match=says):
        parse(text, world_size, HEADS, LAYERS)


def test_the_nearest_topologies_keep_the_axes_that_were_asked_for():
    assert nearest(8, {"tp": 2, "pp": 3}, HEADS, LAYERS)[0] == "tp=2,pp=4"
    assert nearest(7, {"tp": 7, "pp": 2}, HEADS, LAYERS)[0] == "tp=7,pp=1"
    assert nearest(16, {"tp": 16}, HEADS, LAYERS)[0] == "tp=8,pp=2"
    for text in nearest(24, {"tp": 5, "dp": 5}, HEADS, LAYERS):
        assert parse(text, 24, HEADS, LAYERS).size == 24


def test_sequence_ranks_are_only_where_they_are_asked_for():
    for asked in ({"tp": 16}, {"pp": 5, "dp": 3}):
        assert not any("sp" in text for text in nearest(16, asked, HEADS, LAYERS))
    for text in nearest(12, {"sp": 5, "tp": 2}, HEADS, LAYERS):
        assert "sp=" in text and parse(text, 12, HEADS, LAYERS).size == 12
    assert choose(997, HEADS, LAYERS).sp == 1


def test_sequence_ranks_without_a_token_are_refused_with_the_nearest_that_fits():
    grid = parse("sp=4,tp=2", 8, HEADS, LAYERS)
    require_tokens(grid, [1, 2, 4], HEADS)
    with pytest.raises(UsageError, match="the longest prompt has 3 tokens.*: tp=4,sp=2,pp=1,dp=1"):
        require_tokens(grid, [1, 3], HEADS)
    grid = parse("sp=3,dp=2", 6, HEADS, LAYERS)
    require_tokens(grid, [3, 1, 4], HEADS)  # data rank 0 has the first two
    with pytest.raises(UsageError, match="the longest prompt of data rank 1 has 2 tokens"):
        require_tokens(grid, [9, 9, 2], HEADS)
    require_tokens(parse("dp=2", 2, HEADS, LAYERS), [1, 1], HEADS)


def test_an_exo_ring_is_a_pipeline_of_all_ranks_by_memory():
    grid = parse("exo", 2, 32, 32, memory=[18, 8])
    assert (grid.tp, grid.pp, grid.dp, grid.layer_sizes) == (1, 2, 1, (22, 10))
    assert grid.describe() == "exo ring (rule exo), tp=1,pp=2,dp=1: 2 ranks, layers 22+10"
    assert parse("exo", 5, 32, 32).layer_sizes == (7, 7, 6, 6, 6)
    assert parse("gay", 5, 32, 32).layer_sizes == (6, 6, 6, 6, 8)
    assert parse("exo", 5, 32, 32, rule="gay") == parse("gay", 5, 32, 32)
    assert parse("exo", 2, 32, 32, memory=[Decimal("1.8"), Decimal("0.8")]).layer_sizes == (22, 10)


def test_an_exo_ring_that_would_leave_ranks_idle_names_the_size_that_fits():
    with pytest.raises(UsageError, match="nearest that fits is 1 rank with memory 512"):
        parse("gay", 2, 8, 32, memory=[512, 8])
    assert parse("exo", 2, 8, 32, memory=[512, 8]).layer_sizes == (31, 1)
    with pytest.raises(UsageError, match="nearest size that fits is 8 ranks"):
        parse("exo", 9, HEADS, LAYERS)
    with pytest.raises(UsageError, match="ranks would be idle"):
        parse("exo-0", 3, 8, 16, memory=[512, 4, 4])


def test_an_exo_ring_needs_one_memory_a_rank_and_memory_needs_a_ring():
    with pytest.raises(UsageError, match="3 ranks, found 2 sizes"):
        parse("exo", 3, 8, 32, memory=[18, 8])
    with pytest.raises(UsageError, match="belong to an exo ring"):
        parse("tp=2", 2, 8, 32, memory=[18, 8])
    with pytest.raises(UsageError, match="descending"):
        parse("exo-0", 2, 8, 32, memory=[8, 18])


def test_data_ranks_without_prompts_are_refused_with_the_nearest_that_fits():
    with pytest.raises(UsageError, match="give 11 prompts, or run on 10 or 12 ranks"):
        require_prompts(choose(11, HEADS, LAYERS), 1, HEADS, asked=False)
    with pytest.raises(UsageError, match="these topologies: .*tp=2,pp=2,dp=1"):
        require_prompts(parse("tp=2,dp=2", 4, HEADS, LAYERS), 1, HEADS)
    require_prompts(choose(11, HEADS, LAYERS), 11, HEADS)
    assert fitting_sizes(11, HEADS, LAYERS, 1) == [10, 12]
    assert fitting_sizes(1000, HEADS, LAYERS, 1) == [64]


def test_a_stage_without_layers_is_no_grid():
    with pytest.raises(UsageError, match="one layer or more"):
        Grid(1, 2, 1, (8, 0))
    with pytest.raises(UsageError, match="1 or more"):
        Grid(0, 1, 1, (8,))


@pytest.mark.parametrize(
    "text",
    ["tp=" + "9" * 5000, "tp=1" + "0" * 400, "tp=²", "x" * 5000, "tp=1,\x1b[31m=2", "tp=-1", "tp=1.0"],
)
def test_a_topology_of_impossible_numbers_is_refused_in_one_line(text):
    with pytest.raises(UsageError) as caught:
        parse(text, 4, 8, 8)
    assert len(str(caught.value)) <= 500 and "\x1b" not in str(caught.value)


def test_a_thousand_memory_sizes_are_counted_in_the_message():
    with pytest.raises(UsageError, match="found 1000 sizes") as caught:
        parse("exo", 4, 8, 8, memory=range(1, 1001))
    assert len(str(caught.value)) <= 500
