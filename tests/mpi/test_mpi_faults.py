"""Every fault that --inject knows is caught, and located: step, layer, tensor, rank.

A topology runs at exactly its own world size; the test runs at 1, 2, 3 and 4 ranks.
"""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from mpi_helpers import GROUPED, OLMO, golden_of, quick_fabric, verify

from spimpi.errors import UsageError
from spimpi.faults import KINDS, PLACES, Fault, part_of, validate
from spimpi.topology.data import rows_of
from spimpi.verification import run
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import verify_distributed_inference

pytestmark = pytest.mark.mpi

# Ids from every part of the vocabulary, so that each tensor rank contributes to the embedding.
IDS = ("3,14,1,25,9,2,31", "36,5", "35,8,19,7", "12,24,30,3,17")
N_STEPS = 3
BITS = (0, 30, 12, 31)  # the lowest, one that makes 1.0 infinite, one in the middle, the sign
TOPOLOGIES = {
    1: ["tp=1"],
    2: ["tp=2", "pp=2", "dp=2"],
    3: ["tp=3", "pp=3"],
    4: ["tp=4", "tp=2,pp=2"],
}
# What OLMo has in common with Llama is struck there; these are computed in another way.
AS_IN_LLAMA = ("qkv", "scores", "attn", "resid", "hidden", "post_norm")
LAYER_WEIGHTS = {
    "input_norm": "input_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
    "post_norm": "post_attention_layernorm", "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj", "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm", "ffn_norm": "post_feedforward_layernorm",
}  # fmt: skip
OTHER_WEIGHTS = {
    "embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}  # fmt: skip


def stored_name(fault):
    if fault.layer >= 0:
        return f"model.layers.{fault.layer}.{LAYER_WEIGHTS[fault.tensor]}.weight"
    return OTHER_WEIGHTS[fault.tensor]


def _ids_fed(job, golden, d, step):
    """Token ids that data rank ``d`` looks up in a step."""
    rows = rows_of(job.lengths, job.grid.dp, d, step)
    prompts = np.unique(rows.sequence)
    if step == 0:
        return np.concatenate([job.prompts[p] for p in prompts])
    return golden.tokens[prompts, step - 1]


def _changes_something(fault, job, golden):
    """Whether the place exists there; a dropped share of the embedding must hold a row too."""
    try:
        validate(fault, job.grid, job.config, job.lengths, N_STEPS)
    except UsageError:
        return False
    if (fault.kind, fault.tensor) != ("drop", "embed"):
        return True
    d, _, _, t = job.grid.coordinates(fault.rank)
    starts = np.cumsum([0, *np.full(job.grid.tp, 37 // job.grid.tp)])
    starts += np.minimum(np.arange(job.grid.tp + 1), 37 % job.grid.tp)
    fed = _ids_fed(job, golden, d, fault.step)
    return bool(((fed >= starts[t]) & (fed < starts[t + 1])).any())


def _last_element(fault, job):
    part = part_of(
        fault.tensor, fault.rank, job.grid, job.config, job.lengths, fault.step
    )
    column = [block for block in part.columns if block][-1][-1]
    return part.rows[-1] * part.width + column


def faults_of(job, golden):
    """One fault for every kind, tensor and step (prefill; decoding), on ranks, layers and elements
    that take turns."""
    turn = count()
    for name, place in PLACES.items():
        if job.config.qk_norm and place.models != "olmo" and name not in AS_IN_LLAMA:
            continue
        for kind in place.kinds:
            for step in (0,) if place.is_weight else (0, 2):
                fault = _one(kind, name, step, next(turn), job, golden)
                if fault is not None:
                    yield fault


def _one(kind, name, step, turn, job, golden):
    layers = range(job.config.n_layers) if PLACES[name].in_layer else (-1,)
    bit = BITS[turn % len(BITS)] if "bit" in KINDS[kind][1] else 0
    able = [
        fault
        for rank in range(job.grid.size)
        for layer in layers
        for fault in [Fault(kind, rank, name, layer, step, bit=bit)]
        if _changes_something(fault, job, golden)
    ]
    if not able:
        return None
    fault = able[turn * 5 % len(able)]
    if "element" in KINDS[kind][1] and turn % 2:
        fault = replace(fault, element=_last_element(fault, job))
    return fault


def _cases():
    return [
        (n, topology, facts)
        for n, several in TOPOLOGIES.items()
        for topology in several
        for facts in (GROUPED, OLMO)
    ]


@pytest.mark.wheels
@pytest.mark.parametrize(("n", "topology", "facts"), _cases())
def test_every_fault_is_caught_where_it_was_injected(comm, model, monkeypatch, n, topology, facts):
    if comm.size != n:
        pytest.skip(f"a topology of {n} ranks")
    quick_fabric(monkeypatch)
    name = facts.get("model_type", "grouped")
    wishes = dict(model=str(model(name, **facts)), prompt_ids=IDS, tokens=N_STEPS)
    golden = golden_of(comm, **wishes)
    # Three replicas and more name the odd one among them; of two, the golden run tells which.
    two_replicas = "tp=2" in topology
    if not two_replicas:
        monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    job = prepare(Request(**wishes, topology=topology), n)
    missed, kinds, struck = [], set(), set()
    for fault in faults_of(job, golden):
        kinds.add(fault.kind)
        struck.add(fault.tensor)
        outcome = verify_distributed_inference(
            comm, replace(job, faults=(fault,), golden=golden if two_replicas else None)
        )
        where = outcome.verdict.where
        weight = PLACES[fault.tensor].is_weight
        tensor = stored_name(fault) if weight else fault.tensor
        expected = (1, tensor, fault.step, fault.layer, fault.rank)
        found = where and (
            outcome.exit_status, where.tensor, where.step, where.layer, where.rank
        )  # fmt: skip
        assert comm.allgather(found) == [found] * n
        if found != expected:
            missed.append(f"{fault}: {outcome.exit_status} {outcome.verdict}")
    assert not missed, "\n".join(missed)
    if "tp=2" in topology:
        assert kinds == set(KINDS)
        assert struck >= {p.name for p in PLACES.values() if p.models and p.exists_in(job.config)}


@pytest.mark.mpi(min_size=2)
def test_two_replicas_that_differ_are_both_named_without_a_golden_run(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    if comm.size != 2:
        pytest.skip("two replicas are two ranks")
    wishes = dict(model=str(model("grouped", **GROUPED)), prompt_ids=IDS, tokens=2)
    outcome = verify(
        comm, faults=("replica:rank=1,layer=1,tensor=hidden",), topology="tp=2", **wishes
    )
    where = outcome.verdict.where
    assert outcome.exit_status == 1
    assert (where.tensor, where.step, where.layer, where.rank) == ("hidden", 0, 1, None)
    assert "ranks 0 and 1 differ" in where.detail


@pytest.mark.mpi(min_size=2)
def test_a_fault_that_changes_nothing_is_said_to_be_incomplete(comm, model, monkeypatch):
    """Rank 0 has rows of the embedding, the last rank none: its share can't be dropped."""
    quick_fabric(monkeypatch)
    wishes = dict(model=str(model("grouped", **GROUPED)), prompt_ids=("0,1,0,1",), tokens=1)
    last = comm.size - 1
    outcome = verify(
        comm, faults=(f"drop:rank={last},tensor=embed",), topology=f"tp={comm.size}", **wishes
    )
    assert outcome.exit_status == 3
    assert "changed nothing" in str(outcome.verdict)
