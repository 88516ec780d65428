"""What --inject accepts, and what it says about faults that cannot happen."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from spimpi.errors import UsageError
from spimpi.faults import KINDS, PLACES, Fault, help_text, parse, part_of, validate
from spimpi.topology.grid import parse as grid_of

TINY = SimpleNamespace(
    n_heads=8, n_kv_heads=4, head_dim=16, hidden_size=128, intermediate_size=352, vocab_size=256,
    tie_word_embeddings=False, dtype="bfloat16", qk_norm=False,
)  # fmt: skip
OLMO = SimpleNamespace(**{**vars(TINY), "qk_norm": True})
TIED = SimpleNamespace(**{**vars(TINY), "tie_word_embeddings": True})
LENGTHS = [5, 3, 4, 2]


def check(text, topology="tp=2,pp=2,dp=2", config=TINY, n_steps=4, **options):
    axes = dict(part.split("=") for part in topology.split(","))
    size = 1
    for n in axes.values():
        size *= int(n)
    grid = grid_of(topology, size, config.n_heads, 8)
    fault = parse(text)
    validate(fault, grid, config, LENGTHS, n_steps, **options)
    return fault


def test_the_readme_s_example_is_read():
    fault = parse("bitflip:rank=2,layer=3,tensor=hidden,element=17,bit=30")
    assert fault == Fault("bitflip", 2, "hidden", layer=3, element=17, bit=30)


def test_what_is_left_out_is_the_prefill_the_first_element_and_the_lowest_bit():
    fault = parse("bitflip:rank=0,tensor=logits")
    assert (fault.layer, fault.step, fault.element, fault.bit) == (-1, 0, None, 0)


def whole_spec(kind, place):
    """A fault with every key, for a run of one stage."""
    layer = ",layer=3" if place.in_layer else ""
    step = "" if place.is_weight or place.name == "last_rows" else ",step=1"
    return f"{kind}:rank=1,tensor={place.name}{layer}{step}"


@pytest.mark.parametrize(
    ("kind", "tensor"), [(kind, place.name) for place in PLACES.values() for kind in place.kinds]
)
def test_every_kind_and_place_of_the_table_exists_in_a_run_and_prints_as_it_is_read(kind, tensor):
    config = OLMO if PLACES[tensor].models == "olmo" else TINY
    fault = check(whole_spec(kind, PLACES[tensor]), "tp=2,sp=2", config)
    assert parse(str(fault)) == fault


def test_a_tensor_that_only_the_other_family_has_is_refused():
    for tensor, config, says in (
        ("qk_max", TINY, "no qk_max: only OLMo"),
        ("k_norm", TINY, "no k_norm: only OLMo"),
        ("input_norm", OLMO, "no input_norm: only Llama"),
    ):
        with pytest.raises(UsageError, match=says):
            check(whole_spec("bitflip", PLACES[tensor]), "tp=4,pp=1", config)


def test_each_family_has_the_tensors_of_its_own():
    own = {tensor: place.models for tensor, place in PLACES.items() if place.models}
    assert own == dict.fromkeys(
        ("qk_max", "qk_sum", "qk_normed", "q_norm", "k_norm", "ffn_norm"), "olmo"
    ) | {"input_norm": "llama"}


@pytest.mark.parametrize(("kind", "tensor"), list(product(KINDS, PLACES)))
def test_what_the_table_leaves_out_is_refused_with_what_can_happen(kind, tensor):
    if kind in PLACES[tensor].kinds:
        return
    with pytest.raises(UsageError, match=f"{kind} cannot happen to {tensor} .what can: "):
        parse(whole_spec(kind, PLACES[tensor]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bitflop:rank=0", "did you mean bitflip"),
        ("", "unknown kind ''; known are bitflip"),
        ("bitflip:rank=0,tensor=hiden,layer=1", "did you mean hidden"),
        ("bitflip:rank=0,tensor=hidden,layer=1,elemnt=3", "did you mean element"),
        ("stale:rank=0,tensor=hidden,layer=1,bit=3", "takes no key 'bit'"),
        ("bitflip:tensor=hidden,layer=1", "rank= is missing"),
        ("bitflip:rank=0", "tensor= is missing"),
        ("bitflip:rank=0,tensor=hidden", "needs layer="),
        ("bitflip:rank=0,tensor=logits,layer=1", "belongs to no layer"),
        ("bitflip:rank=0,tensor=q_proj,layer=1,step=0", "leave out step="),
        ("bitflip:rank=-1,tensor=hidden,layer=1", "whole number from 0"),
        ("bitflip:rank=1.5,tensor=hidden,layer=1", "whole number from 0"),
        ("bitflip:rank,tensor=hidden,layer=1", "whole number from 0"),
        ("bitflip:rank=0,rank=1,tensor=hidden,layer=1", "given twice"),
        ("swap:rank=0,tensor=hidden,layer=1,element=4,other=4", "nothing would change"),
    ],
)
def test_malformed_faults_are_refused_with_what_is_known(text, says):
    with pytest.raises(UsageError, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bitflip:rank=8,tensor=hidden,layer=1", "ranks of this run are 0 to 7"),
        ("bitflip:rank=0,tensor=hidden,layer=8", "layers of this model are 0 to 7"),
        ("bitflip:rank=0,tensor=hidden,layer=4", "on ranks 2-3, 6-7; rank 0 has layers 0 to 3"),
        ("bitflip:rank=0,tensor=logits", "logits is on ranks 2-3, 6-7"),
        ("bitflip:rank=2,tensor=embed", "embed is on ranks 0-1, 4-5"),
        ("bitflip:rank=0,tensor=hidden,layer=1,step=4", "0 .the prefill. to 3"),
        ("bitflip:rank=0,tensor=hidden,layer=1,bit=32", "32 bits, 0 to 31"),
        ("bitflip:rank=0,tensor=q_proj,layer=1,bit=16", "16 bits, 0 to 15"),
        ("bitflip:rank=0,tensor=attn_out,layer=1,bit=64", "64 bits, 0 to 63"),
        ("bitflip:rank=0,tensor=hidden,layer=1,element=1792", "1792 elements of shape .14, 128."),
        ("bitflip:rank=0,tensor=hidden,layer=1,element=1024", "row 8, column 0"),
        ("bitflip:rank=0,tensor=ffn,layer=1,element=176", "columns 0 to 175"),
        ("swap:rank=0,tensor=ffn,layer=1,element=0,other=351", "other 351 is row 0, column 351"),
        ("bitflip:rank=4,tensor=hidden,layer=1,element=0", "its first element is 1024"),
    ],
)
def test_a_place_that_does_not_exist_in_this_run_is_refused_with_what_does(text, says):
    with pytest.raises(UsageError, match=says):
        check(text)


@pytest.mark.parametrize(
    "text",
    [
        "drop:rank=0,tensor=attn_out,layer=1",
        "drop:rank=0,tensor=embed",
        "bitflip:rank=0,tensor=ffn_out,layer=1",
        "stale:rank=0,tensor=attn_out,layer=1",
        "bitflip:rank=0,tensor=attn_max,layer=1",
        "replica:rank=0,tensor=resid,layer=1",
        "misplace:rank=0,tensor=up_proj,layer=1",
    ],
)
def test_faults_between_tensor_ranks_need_more_than_one(text):
    check(text, "tp=2")
    with pytest.raises(UsageError, match="tp"):
        check(text, "pp=2")


def test_a_miscomputed_sum_needs_no_second_rank_but_exact_arithmetic():
    check("miscompute:rank=0,tensor=ffn_out,layer=1", "tp=1")
    with pytest.raises(UsageError, match="exact arithmetic"):
        check("miscompute:rank=0,tensor=ffn_out,layer=1", "tp=1", exact=False)
    with pytest.raises(UsageError, match="32 bits"):
        check("bitflip:rank=0,tensor=ffn_out,layer=1,bit=32", "tp=2", exact=False)


def test_two_swapped_elements_must_meet_in_one_microbatch():
    # 8 rows on this rank, two stages: rows 0-3 and 4-7
    check("swap:rank=0,tensor=hidden,layer=1,element=0,other=511")
    with pytest.raises(UsageError, match="rows 0 and 4; .*0 to 3; 4 to 7"):
        check("swap:rank=0,tensor=hidden,layer=1,element=0,other=512")
    with pytest.raises(UsageError, match="in one microbatch"):
        check("swap:rank=0,tensor=hidden,layer=1,other=512")
    with pytest.raises(UsageError, match="give another"):
        check("swap:rank=0,tensor=hidden,layer=1,other=0")


def test_a_score_is_named_by_its_row_and_head():
    check("miscompute:rank=0,tensor=scores,layer=1,element=19", "tp=2")  # row 2, head 3
    with pytest.raises(UsageError, match="columns 0 to 3"):
        check("miscompute:rank=0,tensor=scores,layer=1,element=20", "tp=2")


def test_a_shared_key_value_head_that_is_the_whole_tensor_cannot_be_misplaced():
    one = SimpleNamespace(**{**vars(TINY), "n_kv_heads": 1})
    with pytest.raises(UsageError, match="reads the whole of k_proj"):
        check("misplace:rank=1,tensor=k_proj,layer=1", "tp=4", one)


def test_a_tied_head_is_a_place_of_its_own_only_on_another_stage():
    check("bitflip:rank=1,tensor=lm_head", "pp=2", TIED)
    with pytest.raises(UsageError, match="use tensor=embed_tokens"):
        check("bitflip:rank=0,tensor=lm_head", "tp=2", TIED)


def test_a_swap_or_shift_of_a_single_element_would_change_nothing():
    for kind in ("swap", "misplace"):
        with pytest.raises(UsageError, match="one element of tokens"):
            check(f"{kind}:rank=0,tensor=tokens", "tp=1,dp=4")


@pytest.mark.parametrize(("tp", "sp"), [(1, 1), (2, 1), (3, 1), (5, 1), (8, 1), (1, 2), (2, 5)])
@pytest.mark.parametrize("tensor", PLACES)
@pytest.mark.parametrize("step", [0, 2])
def test_the_parts_of_all_ranks_cover_a_tensor(tensor, tp, sp, step):
    grid = grid_of(f"tp={tp},sp={sp},dp=2", 2 * sp * tp, 8, 8)
    parts = [part_of(tensor, rank, grid, TINY, LENGTHS, step) for rank in range(grid.size)]
    (shape,) = {part.shape for part in parts}
    n = shape[0] * parts[0].width
    for element in {0, n - 1, n // 2, n // 3, 7 * n // 9}:
        assert any(part.holds(element) for part in parts)
    for part in parts:
        if not part.size:
            assert sp > 2  # more sequence ranks than tokens or prompts
            continue
        assert part.holds(part.first) and part.local(part.first) == (0, 0)
        width = part.size // len(part.rows)
        held = [e for e in range(part.first, min(n, part.first + 2 * part.width)) if part.holds(e)]
        cells = [part.local(e) for e in held]
        assert cells == sorted(cells) and all(c < width for _, c in cells)


def test_the_rows_of_a_sequence_rank_may_have_gaps():
    grid = grid_of("sp=2", 2, 8, 8)
    assert part_of("hidden", 1, grid, TINY, LENGTHS).rows == (3, 4, 7, 10, 11, 13)
    assert part_of("hidden", 1, grid, TINY, LENGTHS, 1).rows == range(2, 4)
    assert part_of("kv", 1, grid, TINY, LENGTHS).rows == range(14)
    text = "bitflip:rank=1,tensor=hidden,layer=1,element=640"  # row 5
    with pytest.raises(UsageError, match="rank 1 has rows 3 to 4, 7 to 7, 10 to 11, 13 to 13, "):
        check(text, "sp=2")
    check("swap:rank=1,tensor=kv,layer=1,element=256,other=0", "sp=2")
    with pytest.raises(UsageError, match="rows 0 and 5; .* 0 to 4; 5 to 7; 8 to 11; 12 to 13"):
        check("swap:rank=1,tensor=kv,layer=1,element=0,other=640", "sp=2")
    with pytest.raises(UsageError, match="rows 1 and 0; .* 0 to 0, 2 to 2; 1 to 1, 3 to 3"):
        check("swap:rank=1,tensor=kv,layer=1,element=128,other=0,step=1", "sp=2,pp=2")


def test_gathers_over_sequence_ranks_need_more_than_one():
    for text in ("stale:rank=0,tensor=kv,layer=1", "bitflip:rank=0,tensor=last_rows"):
        check(text, "sp=2")
        with pytest.raises(UsageError, match="only where sp > 1, and here sp=1"):
            check(text, "tp=2")
    with pytest.raises(UsageError, match="in the prefill alone"):
        check("bitflip:rank=0,tensor=last_rows,step=1", "sp=2")


def test_queries_keys_and_values_lie_behind_each_other():
    grid = grid_of("tp=3", 3, 8, 8)
    part = part_of("qkv", 1, grid, TINY, LENGTHS)
    assert part.shape == (14, 256)
    assert part.columns == (range(48, 96), range(144, 176), range(208, 240))
    assert part.local(256 + 144) == (1, 48)
    assert part.local(256 + 239) == (1, 48 + 32 + 31)
    with pytest.raises(ValueError, match="47"):
        part.local(47)


def test_help_names_every_kind_tensor_and_shape():
    text = help_text()
    for word in (*KINDS, *PLACES, "element=", "bit=", "step="):
        assert word in text
    for place in PLACES.values():
        assert place.shape in text


def test_the_page_on_faults_has_every_tensor_as_the_code_has_it():
    page = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    for place in PLACES.values():
        kinds = ", ".join(kind + "\\*" * (kind in place.shared) for kind in place.kinds)
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{place.name}` |")]
        assert f"| {place.shape} |" in row and row.endswith(f"| {kinds} |")
    for kind in KINDS:
        assert f"| `{kind}` |" in page


@pytest.mark.parametrize(
    "text",
    [
        f"bitflip:rank={'9' * 5000},layer=3,tensor=hidden,element=1,bit=3",
        "bitflip:rank=²,layer=3,tensor=hidden",
        "x" * 5000,
        f"bitflip:rank=0,layer=3,tensor={'x' * 5000}",
        f"bitflip:{'x' * 5000}=0",
        "bitflip:rank=0,layer=0,tensor=hidden," + "bit=1," * 5000,
        "bit\x1b[31m:rank=0",
    ],
)
def test_impossible_faults_are_refused_in_a_few_words(text):
    with pytest.raises(UsageError, match="--inject") as caught:
        parse(text)
    assert len(str(caught.value)) <= 800 and "\x1b" not in str(caught.value)
