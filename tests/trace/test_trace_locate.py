"""``spimpi trace locate``: roots, consequences, what failures share; against a plain oracle."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from trace_samples import failing, some_events, write_journal, write_trace

import spimpi.trace
from spimpi.cli import main
from spimpi.trace import locate as module
from spimpi.trace.base import Block
from spimpi.trace.locate import locate
from spimpi.trace.order import program_order
from spimpi.trace.reach import Flow, classify, failures_of, reached_by
from spimpi.trace.schema import EVENT, Op, RankInfo, Stage, Status, TensorInfo, blank_events

PROGRAM = ("embed", "qkv", "kv", "attn", "attn_max", "resid", "ffn", "hidden", "logits", "tokens")
NAMES = ("fabric.sum", "w.0", "w.0 exact-1 integers", *PROGRAM)
ROW = {name: row for row, name in enumerate(NAMES)}
TP, PP, DP = 2, 2, 2
FLOW = Flow(list(NAMES), ROW["qkv"], TP * PP, TP)
AFTER = ("logits", "tokens")


def event(tensor, op, step=0, layer=-1, microbatch=0, stage=Stage.TENSOR, rank=0, **more):
    """(a failed check's row, its rank)."""
    row = blank_events(1)[0]
    row["step"], row["layer"], row["microbatch"] = step, layer, microbatch
    row["stage"], row["op"], row["tensor"] = stage, op, ROW[tensor]
    row["verdict"], row["expected"] = Status.FAILED, 1
    for name, value in more.items():
        row[name] = value
    return row, rank


def in_order(events, flow=FLOW):
    """Failures of ``event`` rows, in program order."""
    rows = np.array([row for row, _ in events], EVENT)
    ranks = np.array([rank for _, rank in events], np.int64)
    order = program_order(rows, ranks, flow.first_layered, flow.names)
    columns = {name: rows[name][order] for name in EVENT.names}
    return failures_of(columns, ranks[order], flow)


@dataclass
class _Memory:
    """A trace that was never written."""

    events: list
    hosts: list
    world: int = TP * PP * DP
    complete: bool = True

    def __post_init__(self):
        self.attributes = {"topology": f"tp={TP},pp={PP},dp={DP}", "world": self.world}
        self.tensors = [TensorInfo(name, (1,), "float32") for name in NAMES]
        self.ranks = [
            RankInfo(rank, self.hosts[rank], 1, "", 0.0, 0, 0, 0) for rank in range(self.world)
        ]
        self.problems = self.missing = self.damage = []

    def blocks(self, columns):
        for rank in range(self.world):
            rows = np.array([row for row, at in self.events if at == rank], EVENT)
            yield Block(np.full(len(rows), rank, np.int32), {name: rows[name] for name in columns})


def located(*events, hosts=None, n=10):
    layers = [(row.copy(), rank) for row, rank in [event("qkv", Op.MATMUL, layer=0)]]
    for row, _ in layers:
        row["verdict"] = Status.VERIFIED
    return locate(_Memory([*layers, *events], hosts or ["n"] * 8), n)


# The oracle: one pair of failures at a time, in the words of docs/trace-locate.md.


def _place(row):
    """(step, tensor's turn in the step) as numbers that compare."""
    name = NAMES[row["tensor"]]
    if name in AFTER:
        turn = (10**6, ROW[name])
    else:
        turn = (int(row["layer"]), ROW[name])
    return (int(row["step"]), *turn)


def _met(row):
    return row["nonfinite"] > 0 and row["fingerprint"] == row["expected"]


def _before(a, b):
    """Whether a's check stands before b's in program order."""
    phases = {Stage.FABRIC: 0, Stage.WEIGHTS: 1}
    ops = [Op.MATMUL, Op.AT_REST, Op.ALLREDUCE_MAX, Op.ALLREDUCE_SUM, Op.ALLREDUCE_BOR,
           Op.ALLGATHER, Op.AGREEMENT, Op.HANDOFF, "met", Op.CONTENT]  # fmt: skip

    def key(row):
        met = _met(row)
        step, layer, tensor = _place(row)
        if met and NAMES[row["tensor"]] == "attn":
            tensor = ROW["attn_max"]
        op = ops.index("met") if met else ops.index(Op(int(row["op"])))
        return int(row["repeat"]), phases.get(Stage(int(row["stage"])), 2), step, layer, tensor, op

    return key(a) < key(b)


def _data(row, part, microbatch):
    """What data a check of movement is about."""
    name = NAMES[row["tensor"]].split(" ")[0]
    repeat, step, layer, _ = (int(row["repeat"]), *_place(row))
    if row["stage"] == Stage.WEIGHTS:
        return ("weights", layer, name, part)
    if row["op"] == Op.ALLREDUCE_BOR and row["stage"] != Stage.FABRIC:
        return (2, repeat, step - 1, 10**6, "tokens", part, None)
    name = {"kv": "qkv", "attn_max": "attn"}.get(name, name)
    phase = 0 if row["stage"] == Stage.FABRIC else 2
    return (phase, repeat, step, layer, name, part, microbatch)


def _reaches(a, rank_a, b, rank_b):
    if not _before(a, b):
        return False
    fabric, weights = ([row["stage"] == stage for row in (a, b)] for stage in (Stage.FABRIC, Stage.WEIGHTS))
    early = [f or w for f, w in zip(fabric, weights)]

    def part(row, rank):
        return None if row["stage"] in (Stage.GOLDEN, Stage.FABRIC) else rank // (TP * PP)

    def microbatch(row, is_early):
        whole = is_early or NAMES[row["tensor"]] in AFTER or row["stage"] == Stage.GOLDEN
        return None if whole else int(row["microbatch"])

    def is_value(row, is_early):
        return not is_early and (
            row["op"] == Op.AGREEMENT or row["stage"] == Stage.GOLDEN or _met(row)
        )

    values = [is_value(row, e) for row, e in zip((a, b), early)]
    parts = part(a, rank_a), part(b, rank_b)
    rows = microbatch(a, early[0]), microbatch(b, early[1])
    tokens = not early[0] and NAMES[a["tensor"]] == "tokens"
    if not values[1]:
        if b["op"] in (Op.MATMUL, Op.AT_REST):
            return False
        return (not values[0] or tokens) and _data(a, parts[0], rows[0]) == _data(b, parts[1], rows[1])
    if fabric[0] or (None not in parts and parts[0] != parts[1]):
        return False
    if weights[0]:
        return True
    if a["repeat"] != b["repeat"]:
        return False
    if None in rows:
        return True
    if a["step"] == 0:
        return b["step"] > 0 or rows[1] >= rows[0]
    return rows[0] == rows[1]


def _random_event(rng):
    stage = Stage(rng.choice([Stage.FABRIC, Stage.WEIGHTS, Stage.GOLDEN] + [Stage.TENSOR] * 6))
    names, ops = PROGRAM, [Op.MATMUL, Op.AT_REST, Op.ALLREDUCE_SUM, Op.ALLGATHER, Op.HANDOFF,
                           Op.AGREEMENT, Op.AGREEMENT, Op.ALLREDUCE_BOR]  # fmt: skip
    if stage == Stage.FABRIC:
        names, ops = ["fabric.sum"], [Op.ALLREDUCE_SUM, Op.ALLGATHER]
    elif stage == Stage.WEIGHTS:
        names, ops = ["w.0", "w.0 exact-1 integers"], [Op.CONTENT, Op.AGREEMENT]
    elif stage == Stage.GOLDEN:
        ops = [Op.CONTENT]
    tensor = rng.choice(names)
    layered = tensor in PROGRAM[1:-2]
    op = rng.choice(["embed"]) if False else rng.choice(ops)
    if op == Op.ALLREDUCE_BOR:
        tensor, layered = "embed", False
    more = {}
    if op == Op.AT_REST and rng.random() < 0.5:
        more = {"nonfinite": 1, "fingerprint": 1}
    return event(
        tensor, op, int(rng.integers(3)), int(rng.integers(2)) if layered else -1,
        int(rng.integers(3)), stage, int(rng.integers(8)), repeat=int(rng.integers(2)), **more,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_roots_and_what_they_reach_are_those_of_a_plain_oracle(seed):
    rng = np.random.default_rng(seed)
    f = in_order([_random_event(rng) for _ in range(int(rng.integers(1, 25)))])
    rows = np.zeros(len(f), EVENT)
    for name in EVENT.names:
        rows[name] = f[name]
    reach = np.array(
        [[_reaches(a, i, b, j) for b, j in zip(rows, f.rank)] for a, i in zip(rows, f.rank)]
    )
    found = np.array([reached_by(f, i) for i in range(len(f))])
    assert (found == reach).all(), [(rows[i], rows[j]) for i, j in np.argwhere(found != reach)[:3]]
    assert (classify(f) == ~reach.any(axis=0)).all()
