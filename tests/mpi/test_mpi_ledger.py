"""Groups of steps: how many steps travel together is agreed, and nothing else depends on it."""

import pytest
from mpi_helpers import verify

from spimpi.inference import ledger

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.wheels]


def run(comm, **wishes):
    return verify(comm, topology=f"tp={comm.size}", tokens=20, **wishes)


@pytest.mark.parametrize("seconds", [lambda rank: 0, lambda rank: 1e9 * rank, lambda rank: 1e9])
def test_ranks_that_are_not_equally_fast_agree_on_the_group(comm, monkeypatch, seconds):
    monkeypatch.setattr(ledger, "SECONDS", seconds(comm.rank))
    outcome = run(comm)
    assert outcome.verdict, str(outcome.verdict)


@pytest.mark.parametrize("step", [1, 9, 17, 19])
def test_a_fault_in_any_step_of_a_group_is_told_with_its_step(comm, monkeypatch, step):
    monkeypatch.setattr(ledger, "SECONDS", 1e9)
    rank = comm.size - 1
    fault = f"bitflip:rank={rank},layer=1,tensor=attn,bit=3,step={step}"
    where = run(comm, faults=(fault,)).verdict.where
    assert (where.step, where.layer, where.tensor, where.rank) == (step, 1, "attn", rank)
