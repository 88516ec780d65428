"""What is printed is what was chosen: tokens that change anywhere on their way are noticed.

Without a golden run, which would see most of it. Each test strikes the running program.
"""

from dataclasses import replace

import numpy as np
import pytest
from mpi_helpers import GROUPED, IDS, golden_of, quick_fabric, verify

import spimpi.trace
from spimpi.errors import CorruptionError
from spimpi.inference import head, model
from spimpi.trace.analysis.diff import diff
from spimpi.verification import run
from spimpi.verification.answer import Answer
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import verify_distributed_inference
from spimpi.verification.tracing import Tracer

pytestmark = pytest.mark.mpi

N_TOKENS = 4
TOPOLOGIES = {1: ["tp=1"], 2: ["tp=2", "pp=2", "dp=2", "sp=2"], 3: ["tp=3", "exo"],
              4: ["tp=2,pp=2", "sp=2,dp=2"]}  # fmt: skip


def topologies():
    return [(n, topology) for n, several in TOPOLOGIES.items() for topology in several]


@pytest.fixture
def wishes(model, monkeypatch):
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    return dict(model=str(model("grouped", **GROUPED)), prompt_ids=IDS, tokens=N_TOKENS)


def on_rank(rank, change):
    """A result, changed on one rank."""

    def struck(array, ctx):
        if array is None or ctx.rank != rank:
            return array
        array = np.array(array)
        change(array)
        return array

    return struck


def flip(tokens):
    tokens.reshape(-1)[-1] ^= 1


def after(monkeypatch, owner, name, change):
    """What a method gives, changed; ``change(result, context)``."""
    original = getattr(owner, name)

    def struck(self, *args, **more):
        return change(original(self, *args, **more), self.ctx)

    monkeypatch.setattr(owner, name, struck)


def corrupted(comm, tensor, rank, topology, **wishes):
    outcome = verify(comm, topology=topology, **wishes)
    where = outcome.verdict.where
    assert outcome.exit_status == 1, str(outcome.verdict)
    assert (where.tensor, where.rank) == (tensor, rank), str(where)
    return outcome


@pytest.mark.parametrize(("n", "topology"), topologies())
@pytest.mark.parametrize("arith", ["exact", "blas"])
@pytest.mark.parametrize(("owner", "name"), [(model.Stage, "run"), (Answer, "gathered")])
def test_finished_tokens_that_change_on_rank_0(
    comm, monkeypatch, wishes, owner, name, n, topology, arith
):
    if comm.size != n:
        pytest.skip(f"a topology of {n} ranks")
    after(monkeypatch, owner, name, on_rank(0, flip))
    outcome = corrupted(comm, "tokens", 0, topology, arith=arith, **wishes)
    assert outcome.verdict.where.step == N_TOKENS - 1


@pytest.mark.parametrize("topology", ["dp=2", "sp=2"])
def test_finished_tokens_that_change_on_another_rank_name_it(comm, monkeypatch, wishes, topology):
    if comm.size != 2:
        pytest.skip("two ranks that have tokens")
    after(monkeypatch, model.Stage, "run", on_rank(1, flip))
    corrupted(comm, "tokens", 1, topology, **wishes)


@pytest.mark.parametrize(("n", "topology"), topologies())
def test_the_tokens_of_an_earlier_step_that_change_later(comm, monkeypatch, wishes, n, topology):
    if comm.size != n:
        pytest.skip(f"a topology of {n} ranks")
    step = model.Stage.step

    def struck(self, number, tokens):
        chosen = step(self, number, tokens)
        if number == 2 and self.ctx.rank == 0:
            tokens[0] ^= 1  # those of step 1, which have been embedded
        return chosen

    monkeypatch.setattr(model.Stage, "step", struck)
    where = corrupted(comm, "tokens", 0, topology, **wishes).verdict.where
    assert where.step == 1


@pytest.mark.parametrize(("n", "topology"), topologies())
@pytest.mark.parametrize("step", [0, 2])
def test_ids_that_change_before_they_are_embedded(comm, monkeypatch, wishes, n, topology, step):
    """On one rank: the others of a tensor group have the right ones."""
    if comm.size != n:
        pytest.skip(f"a topology of {n} ranks")
    embed = model.embed

    def struck(facts, ids, batch, out):
        if batch.step == step and facts.ctx.rank == 0 and batch.microbatch == 0:
            ids = (ids + 1) % 37
        embed(facts, ids, batch, out)

    monkeypatch.setattr(model, "embed", struck)
    name = "tokens" if step else "prompts"
    corrupted(comm, name, 0, topology, **wishes)


def test_prompts_that_change_before_the_run_is_given_them(comm, monkeypatch, wishes):
    original = model.Stage.run

    def struck(self, prompts, *more):
        return original(self, [np.roll(p, 1) for p in prompts], *more)

    monkeypatch.setattr(model.Stage, "run", struck)
    outcome = verify(comm, topology=f"tp={comm.size}", **wishes)
    assert outcome.exit_status == 1 and outcome.verdict.where.tensor == "prompts"


@pytest.mark.parametrize(("n", "topology"), topologies())
@pytest.mark.parametrize("arith", ["exact", "blas"])
def test_a_choice_that_is_wrong_alike_on_all_ranks(
    comm, monkeypatch, wishes, n, topology, arith
):
    if comm.size != n:
        pytest.skip(f"a topology of {n} ranks")
    argmax = head.argmax
    monkeypatch.setattr(head, "argmax", lambda pieces: (argmax(pieces) + 1) % 37)
    outcome = verify(comm, topology=topology, arith=arith, **wishes)
    where = outcome.verdict.where
    assert (outcome.exit_status, where.tensor, where.step) == (1, "tokens", 0), str(outcome.verdict)


def test_rows_that_are_exchanged_before_the_head_uses_them(comm, monkeypatch, wishes):
    sample = head.Head.sample

    def struck(self, *args):
        self.rows[[0, 1]] = self.rows[[1, 0]]
        return sample(self, *args)

    monkeypatch.setattr(head.Head, "sample", struck)
    outcome = verify(comm, topology=f"tp={comm.size}", **wishes)
    assert outcome.exit_status == 1 and outcome.verdict.where.tensor == "last_rows"


def test_tokens_that_change_after_the_verdict_are_not_printed(comm, wishes):
    outcome = verify(comm, topology=f"tp={comm.size}", **wishes)
    assert outcome.exit_status == 0 and outcome.answer() == outcome.tokens.tolist()
    flip(outcome.tokens)
    assert outcome.exit_status == 1
    with pytest.raises(CorruptionError, match="tokens.*changed in memory"):
        outcome.answer()


def test_tokens_that_change_as_the_verdict_is_made(comm, monkeypatch, wishes):
    conclude = run._Run._conclude

    def struck(self, tokens, *more):
        if self.ctx.rank == 0:
            flip(tokens)
        return conclude(self, tokens, *more)

    monkeypatch.setattr(run._Run, "_conclude", struck)
    outcome = corrupted(comm, "tokens", 0, f"tp={comm.size}", **wishes)
    assert not outcome.verdict


def test_the_golden_runs_own_tokens_are_compared(comm, wishes):
    golden = golden_of(comm, **wishes)
    other = replace(golden, tokens=golden.tokens ^ (np.arange(N_TOKENS) == 2))
    assert verify(comm, golden, topology=f"tp={comm.size}", **wishes).exit_status == 0
    outcome = verify(comm, other, topology=f"tp={comm.size}", **wishes)
    where = outcome.verdict.where
    assert (outcome.exit_status, where.tensor, where.step) == (1, "tokens", 2)
    assert "differ from the golden run's own" in where.detail


@pytest.mark.parametrize("spot", [None, "run", "gathered"])
def test_a_trace_of_other_tokens_is_not_the_same(comm, monkeypatch, wishes, shared_folder, spot):
    paths = [shared_folder / f"tokens-{spot}-{i}.h5" for i in range(2)]
    job = prepare(Request(topology=f"tp={comm.size}", **wishes), comm.size)
    for path, struck in zip(paths, (False, True)):
        if struck and spot:
            owner = model.Stage if spot == "run" else Answer
            after(monkeypatch, owner, spot, on_rank(0, flip))
        tracer = Tracer(comm.rank, path, "gather", True, "", path.stem)
        verify_distributed_inference(comm, job, tracer=tracer)
    found = None
    if comm.rank == 0:
        with spimpi.trace.open(paths[0]) as a, spimpi.trace.open(paths[1]) as b:
            compared = diff(a, b)
        row = compared.table[compared.first]
        found = compared.exit_status, compared.n_differ, compared.names[row["tensor"]]
    found = comm.bcast(found)
    assert found[:2] == (0, 0) if spot is None else found == (1, 1, "tokens")
