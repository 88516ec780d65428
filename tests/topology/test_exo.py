"""The four exo rules: the examples that the design fixes, exo's own tests, and what is refused."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spimpi.errors import UsageError
from spimpi.topology.exo import RULES, create_exo_partitions, parse_memory

memories = st.lists(st.integers(1, 600), min_size=1, max_size=24)


def sizes(memory, n_layers, rule):
    return [part.size for part in create_exo_partitions(memory, n_layers, rule)]


@pytest.mark.parametrize("rule", RULES)
def test_18_and_8_gb_split_32_layers_alike_under_all_rules(rule):
    assert sizes([18, 8], 32, rule) == [22, 10]


def test_five_equal_devices_share_the_remainder_from_the_front_under_exo_only():
    assert sizes([16] * 5, 32, "exo") == [7, 7, 6, 6, 6]
    assert sizes([16] * 5, 32, "gay") == [6, 6, 6, 6, 8]


def test_a_small_device_keeps_one_layer_under_exo_and_none_under_gay():
    assert sizes([512, 8], 32, "exo") == [31, 1]
    assert sizes([512, 8], 32, "gay") == [32, 0]


@pytest.mark.parametrize(("rule", "rest"), [("gay", "-2"), ("exo-1.0", "-2")])
def test_a_negative_rest_is_refused_by_name(rule, rest):
    with pytest.raises(UsageError, match=f"'{rule}' leaves the last of 10 devices {rest} of 16"):
        create_exo_partitions([10] * 9 + [1], 16, rule)


@pytest.mark.parametrize(
    ("memory", "n_layers", "expected"),
    [
        ([25, 25, 25, 25], 12, [3, 3, 3, 3]),
        ([25, 25, 50], 12, [3, 3, 6]),
        ([975, 12.5, 12.5], 20, [18, 1, 1]),
        ([1], 10, [10]),
        ([33, 33, 34], 3, [1, 1, 1]),
    ],
)
def test_exo_gives_what_exo_s_own_tests_expect(memory, n_layers, expected):
    assert sizes(memory, n_layers, "exo") == expected


def test_exo_0_sorts_the_ring_by_memory_and_then_name_descending():
    ring = create_exo_partitions([("node1", 3000), ("node2", 1000), ("node3", 6000)], 10, "exo-0")
    assert [(p.device, p.start, p.stop) for p in ring] == [
        ("node3", 0, 6),
        ("node1", 6, 9),
        ("node2", 9, 10),
    ]
    equal = create_exo_partitions([16, 16, 16], 6, "exo-0")
    assert [p.device for p in equal] == [2, 1, 0]


def test_exo_0_cuts_at_the_borders_that_exo_0_does():
    # 3/7, 2/7, 2/7 of 32 layers: borders 0.42857, 0.71428, 0.99999
    ring = create_exo_partitions([("a", 192), ("b", 128), ("c", 128)], 32, "exo-0")
    assert [(p.start, p.stop) for p in ring] == [(0, 13), (13, 22), (22, 32)]


def test_exo_0_leaves_out_a_device_without_layers():
    # borders 0.97710 and 0.99237 of 16 layers: both in the last layer, so the middle one is empty
    ring = create_exo_partitions([512, 8, 4], 16, "exo-0")
    assert [(p.device, p.start, p.stop) for p in ring] == [(0, 0, 15), (2, 15, 16)]


def brute_force_exo(memory, n_layers):
    """exo's rule by repeated steps instead of sorting."""
    total = sum(memory)
    ideal = [m / total * n_layers for m in memory]
    sizes = [int(x) for x in ideal]
    raised = set()
    while sum(sizes) < n_layers:
        i = max(
            (i for i in range(len(memory)) if i not in raised),
            key=lambda i: (ideal[i] - int(ideal[i]), -i),
        )
        sizes[i] += 1
        raised.add(i)
    for i in range(len(sizes)):
        if not sizes[i]:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[i] = 1
    return sizes


@given(memories, st.integers(0, 100))
def test_exo_gives_every_layer_once_and_every_device_one(memory, more):
    n_layers = len(memory) + more
    found = create_exo_partitions(memory, n_layers)
    assert [p.size for p in found] == brute_force_exo(memory, n_layers)
    assert all(p.size >= 1 for p in found)


@given(memories, st.integers(1, 100), st.sampled_from(list(RULES)))
def test_every_rule_covers_the_layers_in_order_or_refuses_by_name(memory, n_layers, rule):
    try:
        ring = create_exo_partitions(memory, n_layers, rule)
    except UsageError as error:
        assert repr(rule) in str(error)
        return
    assert [layer for p in ring for layer in range(p.start, p.stop)] == list(range(n_layers))
    assert all(a.stop == b.start for a, b in zip(ring, ring[1:]))


def test_the_unit_of_memory_does_not_matter():
    assert sum(parse_memory("1.8, 0.8")) == Decimal("2.6")
    for rule in RULES:
        assert sizes(parse_memory("0.1,0.2,0.3"), 7, rule) == sizes([1, 2, 3], 7, rule)


@pytest.mark.parametrize("memory", [[], [0, 1], [-4], [float("nan")], [float("inf")], ["x"]])
def test_memory_that_is_no_positive_number_is_refused(memory):
    with pytest.raises(UsageError):
        create_exo_partitions(memory, 8)


@pytest.mark.parametrize("text", ["", "18,", "18;8", "0", "-1,2", "nan", "inf"])
def test_memory_text_that_makes_no_sense_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="as in 18,8"):
        parse_memory(text)


def test_an_unknown_rule_too_few_layers_and_equal_names_are_refused():
    with pytest.raises(UsageError, match="'exo-2'; known are exo, exo-1.0, exo-0, gay"):
        create_exo_partitions([1], 8, "exo-2")
    with pytest.raises(UsageError, match="'exo' gives each device at least one layer"):
        create_exo_partitions([1] * 9, 8)
    with pytest.raises(UsageError, match="different names"):
        create_exo_partitions([("a", 1), ("a", 2)], 8)


FAR = ["1e999999999", "1e-999999999", "1E+100000000", "1" + "0" * 5000, "0." + "3" * 5000]


@pytest.mark.parametrize("text", FAR)
def test_memory_too_long_to_be_written_out_is_refused_at_once(text):
    with pytest.raises(UsageError, match="as in 18,8") as caught:
        parse_memory("18," + text)
    assert len(str(caught.value)) <= 500
    with pytest.raises(UsageError, match="at most 100 digits"):
        create_exo_partitions([Decimal(text), 8], 8)
