"""``spimpi trace locate``: roots, consequences, what failures share; against a plain oracle."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from trace_samples import failing, some_events, write_journal, write_trace

from spimpi.cli import main
from spimpi.trace.analysis import locate as module
from spimpi.trace.analysis.locate import locate
from spimpi.trace.analysis.order import program_order
from spimpi.trace.analysis.reach import Flow, classify, failures_of, reached_by, tells
from spimpi.trace.reading.base import Block
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
    op = rng.choice(ops)
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
    golden = rows["stage"] == Stage.GOLDEN
    source = ~golden | ~reach[~golden].any(axis=0)
    assert (tells(f) == source).all()
    assert (classify(f) == ~reach[source].any(axis=0)).all()


def test_one_flip_is_one_root_and_what_follows_its_consequence():
    flip = event("qkv", Op.AT_REST, 1, 0, rank=1)
    later = [
        event("resid", Op.AGREEMENT, 1, 0, rank=0),
        event("hidden", Op.CONTENT, 1, 1, stage=Stage.GOLDEN),
        event("tokens", Op.AGREEMENT, 2, rank=3),
    ]
    found = located(*later, flip)
    (root,) = found.roots
    assert (root.failure.step, root.failure.layer, root.failure.tensor) == (1, 0, "qkv")
    assert (root.at_fault, root.suspects, root.seen) == (1, (1,), 1)
    assert found.at_fault == (1,)
    reached = root.reached
    assert (reached.failures, reached.steps, reached.layers, reached.ranks) == (3, (1, 2), (0, 1), 2)
    assert found.first == root.failure and found.n_consequences == 3 and found.n_failed == 4
    assert [f.tensor for f in found.consequences] == ["resid", "hidden", "tokens"]
    assert (found.verdict, found.exit_status, found.flow_known) == ("corrupted", 1, True)


@pytest.mark.parametrize(
    "other",
    [
        event("ffn", Op.MATMUL, 2, 1, rank=0),  # wrong inputs multiplied rightly pass
        event("hidden", Op.HANDOFF, 2, 1, rank=2),  # so do they when they are handed on
        event("resid", Op.AGREEMENT, 2, 1, rank=5),  # of another data rank
        event("resid", Op.AGREEMENT, 2, 1, microbatch=1),  # of other prompts
        event("embed", Op.AGREEMENT, 1, rank=0),  # earlier in the program
        event("w.0", Op.CONTENT, stage=Stage.WEIGHTS, layer=0),
        event("fabric.sum", Op.ALLREDUCE_SUM, stage=Stage.FABRIC),
        event("resid", Op.AGREEMENT, 2, 1, repeat=1),
    ],
    ids=["matmul", "hand-off", "data rank", "microbatch", "earlier", "weights", "fabric", "repeat"],
)
def test_what_no_data_flow_explains_is_a_root_of_its_own(other):
    found = located(event("qkv", Op.AT_REST, 1, 0, rank=1), other)
    assert (found.n_roots, found.n_consequences) == (2, 0)


def test_a_golden_comparison_that_one_data_rank_explains_is_no_cause_in_another():
    first = event("qkv", Op.AT_REST, 0, 0, rank=1)
    golden = event("hidden", Op.CONTENT, 0, 1, stage=Stage.GOLDEN)
    other = event("resid", Op.AGREEMENT, 1, 0, rank=5)
    assert located(first, golden, other).n_roots == 2
    assert located(golden, other).n_roots == 1  # unexplained, it may be of any


def test_a_sum_that_arrived_wrong_is_one_failure_however_many_ranks_saw_it():
    seen = [event("attn", Op.ALLREDUCE_SUM, 1, 0, rank=rank, peer=1) for rank in (0, 1)]
    (root,) = located(*seen).roots
    assert (root.at_fault, root.seen) == (1, 2)
    held = event("attn", Op.AT_REST, 1, 0, rank=1)  # the addend itself had changed
    found = located(*seen, held)
    assert (found.n_roots, found.n_consequences) == (1, 2) and found.roots[0].failure.op == "at rest"


def test_a_hand_off_has_two_suspects_and_the_golden_run_decides_between_replicas():
    (root,) = located(event("hidden", Op.HANDOFF, 1, 1, rank=2, peer=0)).roots
    assert (root.at_fault, root.suspects) == (-1, (2, 0))
    differ = [event("resid", Op.AGREEMENT, 1, 1, rank=rank) for rank in (2, 3)]
    (root,) = located(*differ).roots
    assert (root.at_fault, root.suspects) == (-1, (2, 3))
    golden = event("resid", Op.CONTENT, 1, 1, stage=Stage.GOLDEN)
    (root,) = located(*differ, golden).roots
    assert root.at_fault == 2  # of which the golden fingerprint is
    golden[0]["verdict"] = Status.VERIFIED
    (root,) = located(*differ, golden).roots
    assert root.at_fault == 3


def test_failures_that_share_a_host_say_so():
    hosts = ["n01", "n01", "n07", "n07", "n02", "n02", "n03", "n03"]
    broken = [event("qkv", Op.MATMUL, step, 0, rank=2 + step % 2) for step in range(7)]
    found = located(*broken, event("ffn", Op.MATMUL, 1, 1, rank=5), hosts=hosts)
    shared = {(s.kind, s.value): s.roots for s in found.shared}
    assert shared[("host", "n07")] == 7 and shared[("rank", "2")] == 4
    assert shared[("layer", "0")] == 7 and shared[("tensor", "qkv")] == 7
    assert shared[("op", "matmul")] == 8 and ("host", "n02") not in shared
    assert [(p.host, p.roots, p.named, p.recorded) for p in found.hosts] == [
        ("n07", 7, 7, 7), ("n02", 1, 1, 1),
    ]  # fmt: skip
    assert [(p.name, p.roots) for p in found.ranks] == [("rank 2", 4), ("rank 3", 3), ("rank 5", 1)]


def test_of_many_failures_the_earliest_are_looked_at_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(module, "KEPT", 10)
    rng = np.random.default_rng(0)
    many = [event("qkv", Op.MATMUL, int(step), 0, rank=int(step) % 8) for step in rng.permutation(64)]
    found = located(*many, n=3)
    assert (found.n_failed, found.n_roots, found.unclassified) == (64, 10, 54)
    assert [root.failure.step for root in found.roots] == [0, 1, 2]
    assert sum(place.recorded for place in located(*many, n=8).ranks) == 64


def test_of_a_program_only_its_order_is_known():
    more = {"stage": Stage.PROGRAM}
    first = event("qkv", Op.AT_REST, 1, 0, rank=1, **more)
    found = located(first, event("resid", Op.AGREEMENT, 2, 1, rank=7, microbatch=3, **more))
    assert (found.n_roots, found.n_consequences, found.flow_known) == (1, 1, False)
    found = located(first, event("attn", Op.ALLGATHER, 2, 0, rank=1, **more))
    assert found.n_roots == 2


def run(capfd, *args):
    status = main(["trace", "locate", *map(str, args)])
    return status, capfd.readouterr().out


def test_the_command_says_it_in_words_and_in_json(tmp_path, one, driver, capfd):
    path = tmp_path / "run.h5"
    events = failing(some_events(100), 60, step=7, layer=3, tensor=1, op=Op.MATMUL, stage=Stage.COMPUTE)
    write_trace(one, path, events, driver, end_state="failed")
    status, text = run(capfd, path)
    assert status == 1
    assert text.startswith("the first failure: step 7, layer 3, hidden: matmul on rank 0 (")
    assert "at fault: rank 0 (" in text and "can have caused: no later failure" in text
    assert "1 independent, 0 can be consequences" in text
    status, text = run(capfd, path, "--json")
    found = json.loads(text)
    assert status == 1 and found["exit_status"] == 1 and found["roots"][0]["at_fault"] == 0
    assert found["first"]["tensor"] == "hidden" and found["n_events"] == 100


def test_exit_status_without_a_failure(tmp_path, one, capfd):
    write_trace(one, tmp_path / "run.h5", some_events(20))
    status, text = run(capfd, tmp_path / "run.h5")
    assert status == 0 and "VERIFIED" in text
    write_journal(one, tmp_path / "killed.h5", some_events(20))
    (tmp_path / "killed.h5.journal").joinpath("rank-00000.journal").open("r+b").truncate(1500)
    status, text = run(capfd, tmp_path / "killed.h5")
    assert status == 3 and text.startswith("INCOMPLETE: what failed in what is missing")
    assert run(capfd, tmp_path / "absent.h5")[0] == 2
    assert run(capfd, tmp_path / "run.h5", "--failures", "-1")[0] == 2
