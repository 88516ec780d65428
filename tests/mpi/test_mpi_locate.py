"""``spimpi trace locate`` on traces of real runs: a planted fault is one root, two are two."""

from dataclasses import replace

import pytest
from mpi_helpers import GROUPED, golden_of, on_rank_0, quick_fabric
from test_mpi_faults import IDS, N_STEPS, faults_of, stored_name

import spimpi.trace
from spimpi.faults import PLACES, Fault
from spimpi.trace.analysis.locate import locate
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import verify_distributed_inference
from spimpi.verification.tracing import Tracer

pytestmark = pytest.mark.mpi

TOPOLOGIES = {2: ["tp=2"], 3: ["tp=3", "pp=3", "dp=3"], 4: ["tp=2,pp=2"]}
EVERY = 13  # of the faults that are injected in test_mpi_faults.py


def _located(comm, job, path):
    """What ``locate`` finds in the trace of a run, on every rank."""
    tracer = Tracer(comm.rank, path, "auto", True, "test", "run-1")
    verify_distributed_inference(comm, job, tracer=tracer)

    def read():
        with spimpi.trace.open(path) as trace:
            return locate(trace)

    return on_rank_0(comm, read)


def _place(fault):
    tensor = stored_name(fault) if PLACES[fault.tensor].is_weight else fault.tensor
    return fault.step, fault.layer, tensor, fault.rank


def _found(located):
    tensor = {"attn": "attn_max", "ffn": "ffn_max"}
    return [
        (r.failure.step, r.failure.layer,
         tensor.get(r.failure.tensor, r.failure.tensor) if met(r.failure) else r.failure.tensor,
         r.at_fault)
        for r in located.roots
    ]  # fmt: skip


def met(failure):
    return failure.nonfinite and failure.expected == failure.found


@pytest.fixture
def job_of(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    wishes = dict(model=str(model("grouped", **GROUPED)), prompt_ids=IDS, tokens=N_STEPS)
    golden = golden_of(comm, **wishes)

    def make(topology):
        return replace(prepare(Request(**wishes, topology=topology), comm.size), golden=golden)

    return make


@pytest.mark.parametrize(
    ("n", "topology"), [(n, topology) for n, several in TOPOLOGIES.items() for topology in several]
)
def test_a_planted_fault_is_the_only_root(comm, job_of, mpi_tmp_path, n, topology):
    if comm.size != n:
        pytest.skip(f"a topology of {n} ranks")
    job = job_of(topology)
    wrong, followed = [], 0
    for fault in list(faults_of(job, job.golden))[::EVERY]:
        located = _located(comm, replace(job, faults=(fault,)), mpi_tmp_path / "run.h5")
        followed += located.n_consequences
        assert located.flow_known and not located.unclassified
        found = _found(located)
        if fault.tensor == "tokens":  # the stage that embeds them looks at them too, for itself
            found = [place for place in found if place[:3] != _place(fault)[:3]] + [_place(fault)] * (
                _place(fault) in found
            )
        if found != [_place(fault)]:
            wrong.append(f"{fault}: {_found(located)}")
    assert not wrong, "\n".join(wrong)
    assert followed > 20


@pytest.mark.mpi(min_size=2)
def test_two_planted_faults_are_two_roots(comm, job_of, mpi_tmp_path):
    """The second is in the reach of the first, but by its check not a consequence."""
    last = comm.size - 1
    first = Fault("bitflip", 0, "attn", 0, 0, bit=22)
    for second in (
        Fault("miscompute", last, "attn", 2, 1),
        Fault("bitflip", last, "ffn", 2, 2, bit=3),
    ):
        job = replace(job_of(f"pp={comm.size}" if comm.size < 4 else "tp=2,pp=2"), faults=(first, second))
        located = _located(comm, job, mpi_tmp_path / "run.h5")
        assert _found(located) == [_place(first), _place(second)]
        assert located.n_consequences > 10


def test_replicas_of_other_prompts_are_independent(comm, job_of, mpi_tmp_path):
    """Nothing flows between data ranks, so agreement that fails in both failed twice."""
    if comm.size != 4:
        pytest.skip("a topology of 4 ranks")
    faults = (Fault("replica", 1, "hidden", 0, 0), Fault("replica", 3, "resid", 1, 2))
    located = _located(comm, replace(job_of("tp=2,dp=2"), faults=faults), mpi_tmp_path / "run.h5")
    assert [place[:3] for place in _found(located)] == [(0, 0, "hidden"), (2, 1, "resid")]
    assert [1 in root.suspects or 3 in root.suspects for root in located.roots] == [True, True]
