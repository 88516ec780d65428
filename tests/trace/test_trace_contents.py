"""The global fingerprints that a trace holds, and what a difference can be."""

import math

import numpy as np
import pytest

from spimpi.arithmetic import EXACT, FLOAT32_BLAS, exact_bits
from spimpi.distance import distances, relative_distances
from spimpi.trace.analysis import places
from spimpi.trace.analysis.contents import CONTENT, contents, paired
from spimpi.trace.analysis.rounding import JUMP, first_jump, judge
from spimpi.trace.reading.base import Block
from spimpi.trace.schema import EVENT, Op, RankInfo, Stage, Status, TensorInfo, blank_events


class Made:
    """A trace of these events, in blocks of ``size`` rows."""

    attributes = {"end_state": "verified"}

    def __init__(self, events, ranks, size=10**9, names=("a", "b", "c")):
        self.whole = Block(np.asarray(ranks, np.int32), {n: events[n] for n in EVENT.names})
        self.tensors = [TensorInfo(name, (4,), "float32") for name in names]
        self.size, self.ranks = size, [RankInfo(r, "h", 1, "", 0.0, 0, 0, 0) for r in range(5)]

    def blocks(self):
        for start in range(0, len(self.whole), self.size):
            yield self.whole.where(slice(start, start + self.size))


def program(n, seed=0):
    """Events of a program on 5 ranks that checks few tensors many times, and their ranks."""
    rng = np.random.default_rng(seed)
    events = blank_events(n)
    events["stage"], events["op"] = Stage.PROGRAM, rng.choice([Op.ALLGATHER, Op.BROADCAST], n)
    events["step"], events["layer"] = rng.integers(0, 3, n), rng.integers(-1, 2, n)
    events["tensor"] = rng.integers(0, 3, n)
    events["fingerprint"] = rng.integers(1, 4, n, dtype=np.uint64) << np.uint64(60)
    return events, np.sort(rng.integers(0, 5, n))


def by_hand(events, ranks):
    """The same with dictionaries."""
    values, counts = {}, {}
    for event, rank in zip(events, ranks):
        place = tuple(int(event[n]) for n in ("step", "layer", "tensor", "op"))
        number = counts[rank, place] = counts.get((rank, place), -1) + 1
        values.setdefault((*place, number), set()).add(int(event["fingerprint"]))
    return {
        place: int(np.bitwise_xor.reduce(np.array(sorted(v), np.uint64)))
        for place, v in values.items()
    }


@pytest.mark.parametrize("size", [10**9, 1, 7])
def test_a_programs_tensors_are_told_apart_by_place_and_number(size, monkeypatch):
    monkeypatch.setattr(places, "SETTLE", 50)
    events, ranks = program(400)
    held = contents(Made(events, ranks, size))
    names = ("step", "layer", "tensor", "op", "occurrence")
    assert held.n_failed == 0 and held.failure is None
    assert by_hand(events, ranks) == {
        tuple(int(row[n]) for n in names): int(row["fingerprint"]) for row in held.found
    }


def test_shares_of_a_tensor_are_put_together_group_by_group():
    """Ranks 0 and 2 hold one tensor, 1 and 3 another of the same name."""
    events = blank_events(4)
    events["stage"], events["op"] = Stage.PROGRAM, Op.GATHER
    events["fingerprint"], events["sequence"] = [1, 2, 4, 8], [1, 2, 1, 2]
    (found,) = contents(Made(events, [0, 1, 2, 3])).found
    assert found["fingerprint"] == 1 ^ 2 ^ 4 ^ 8
    assert (found["values"], found["groups"], found["rows"]) == (2, 2, 4)
    events["fingerprint"] = [2, 1, 8, 4]
    (exchanged,) = contents(Made(events, [0, 1, 2, 3])).found
    assert exchanged["fingerprint"] == found["fingerprint"]
    assert exchanged["ordered"] != found["ordered"] and exchanged["assigned"] != found["assigned"]
    events["verdict"] = Status.FAILED  # then every rank has the whole tensor's
    (failed,) = contents(Made(events, [0, 1, 2, 3])).found
    assert failed["values"] == 4


def test_a_check_without_a_fingerprint_is_there_unless_it_covered_nothing():
    events = blank_events(3)
    events["stage"], events["tensor"] = Stage.PROGRAM, [0, 1, 1]
    events["bytes"] = [0, 8, 8]
    (found,) = contents(Made(events, [0, 0, 1])).found
    assert (found["tensor"], found["values"], found["rows"]) == (1, 0, 2)


def test_a_tensor_of_many_values_is_bounded():
    many = blank_events(5000)
    many["stage"], many["op"] = Stage.PROGRAM, Op.ALLGATHER
    many["fingerprint"] = np.random.default_rng(0).permutation(5000) + 1
    found = contents(Made(many, np.arange(5000))).found
    assert len(found) == 1
    expected = np.bitwise_xor.reduce(np.arange(1, places.MOST_VALUES + 1))
    assert found["fingerprint"][0] == expected


def test_what_changed_at_rest_is_in_the_fingerprint():
    events = blank_events(3)
    events["stage"], events["op"] = [Stage.GOLDEN, Stage.GOLDEN, Stage.COMPUTE], Op.CONTENT
    events["tensor"], events["fingerprint"] = [0, 1, 1], [10, 12, 6]
    events["op"][2], events["verdict"][2], events["expected"][2] = Op.AT_REST, Status.FAILED, 5
    held = contents(Made(events, [0, 0, 3]))
    assert held.n_failed == 1 and held.failure.tensor == "b" and held.failure.rank == 3
    found = held.found
    assert found["fingerprint"].tolist() == [10, 12 ^ 6 ^ 5]
    assert found["changed"].tolist() == [False, True]


def test_rows_of_equal_places_are_paired():
    a, b = np.zeros(4, CONTENT), np.zeros(3, CONTENT)
    a["step"], b["step"] = [3, 1, 2, 9], [2, 5, 3]
    b["fingerprint"], b["changed"] = 7, True  # no part of a place
    mine, theirs = paired(a, b)
    assert (mine.tolist(), theirs.tolist()) == ([0, 2], [2, 0])
    assert [len(x) for x in paired(a, b[:0])] == [0, 0]


def _runs(*ways):
    return [{"arithmetic": way} for way in ways]


WIDTHS = {"hidden": 512, "attn": 512, "ffn": 2048}


@pytest.mark.parametrize(
    ("name", "relative", "ways", "verdict"),
    [("qkv", 3e-7, (EXACT, FLOAT32_BLAS), "reordered rounding"),
     ("qkv", 0.4, (EXACT, FLOAT32_BLAS), "different"),
     ("resid", 3e-7, (FLOAT32_BLAS, FLOAT32_BLAS), "reordered rounding"),
     ("resid", 3e-7, (EXACT, EXACT), "different"),
     ("resid", math.nan, (EXACT, EXACT), "different"),
     ("resid", math.nan, (EXACT, FLOAT32_BLAS), ""),
     ("resid", math.inf, (EXACT, FLOAT32_BLAS), "different"),
     ("attn", 3e-7, (EXACT, FLOAT32_BLAS), ""),
     ("embed", 3e-7, (EXACT, FLOAT32_BLAS), "different"),
     ("qkv", 3e-7, ("exact-9", FLOAT32_BLAS), ""), ("qkv", 3e-7, (None, None), "")],
)  # fmt: skip
def test_the_verdict_on_a_first_difference(name, relative, ways, verdict):
    judged = judge(name, relative, relative / 4, *_runs(*ways), WIDTHS)
    assert judged.verdict == verdict and judged.reason and str(judged)
    assert judge(name, relative, 0.0, *_runs(*ways), WIDTHS, ["B"]).verdict == "different"
    weight = judge(name, math.nan, math.nan, *_runs(*ways), WIDTHS, weight=True)
    assert weight.verdict == "different" and "read" in weight.reason


def quantised(x, bits):
    """exact-1's integers, scaled back; rows by a power of two above their largest."""
    exponents = np.frexp(np.abs(x).max(axis=1, keepdims=True))[1]
    return np.ldexp(np.rint(np.ldexp(x.astype(np.float64), bits - exponents)), exponents - bits)


@pytest.mark.parametrize("peak", [1, 30])
@pytest.mark.parametrize("inner", [16, 512, 4096])
def test_rounding_of_a_matmul_stays_within_its_limit_and_a_flip_does_not(inner, peak):
    """``peak``: one element of each row is that much larger, as activations have them."""
    rng = np.random.default_rng(inner)
    x, w = (rng.standard_normal((n, inner)).astype(np.float32) for n in (40, 96))
    x[:, 3] *= peak
    exact = (quantised(x, exact_bits(inner)) @ quantised(w, exact_bits(inner)).T).astype(np.float32)
    sums = x @ w.T
    reordered = x[:, ::-1].copy() @ w[:, ::-1].copy().T
    signs = rng.choice([-1.0, 1.0], (8, exact.size))

    def verdict(a, b, *ways):
        projections = (signs @ one.ravel().astype(np.float64) for one in (a, b))
        norm = np.linalg.norm(a.astype(np.float64))
        relative = relative_distances(distances(*projections), norm)
        widths = {"hidden": inner}
        return judge("qkv", float(relative), 0.0, *_runs(*ways), widths).verdict

    assert verdict(exact, sums, EXACT, FLOAT32_BLAS) == "reordered rounding"
    assert verdict(sums, reordered, FLOAT32_BLAS, FLOAT32_BLAS) == "reordered rounding"
    flipped = sums.copy()
    flipped[5, 7] = np.float32(1000 * np.abs(sums).max())
    assert verdict(exact, flipped, EXACT, FLOAT32_BLAS) == "different"
    assert verdict(sums, flipped, FLOAT32_BLAS, FLOAT32_BLAS) == "different"


def test_a_jump_is_more_than_a_hundred_times_all_before_it():
    sizes = np.array([0, np.nan, 1e-7, 3e-7, np.nan, 2.9e-7 * JUMP, 0.5])
    assert first_jump(sizes) == 6
    assert first_jump(sizes[:6]) == -1
    assert first_jump(np.array([0.0, 1e-7, np.inf])) == 2
    assert first_jump(sizes[:3]) == first_jump(sizes[:0]) == -1
