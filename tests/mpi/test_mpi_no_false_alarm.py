"""A thousand clean runs give no alarm; a corrupted one among them is the last."""

import pytest
from mpi_helpers import quick_fabric, verify

pytestmark = pytest.mark.mpi

SMALL = dict(
    vocab_size=29, hidden_size=32, intermediate_size=40, n_layers=2, n_heads=4, n_kv_heads=2,
    head_dim=8,
)  # fmt: skip


@pytest.mark.mpi(min_size=2)
def test_a_thousand_clean_runs_give_no_alarm(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    wishes = dict(model=str(model("small", **SMALL)), prompt_ids=("3,1,4", "1,5"), tokens=2)
    once = verify(comm, **wishes)
    outcome = verify(comm, repeat=1000, **wishes)
    assert outcome.verdict, str(outcome.verdict)
    assert (outcome.completed_runs, outcome.n_failed) == (1000, 0)
    before = 2 * once.n_events - verify(comm, repeat=2, **wishes).n_events  # fabric and weights
    assert outcome.n_events == before + 1000 * (once.n_events - before)


def test_a_corrupted_run_ends_the_repetition(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    wishes = dict(model=str(model("small", **SMALL)), prompt_ids=("3,1,4", "1,5"), tokens=2)
    fault = f"bitflip:rank={comm.size - 1},tensor=logits,step=1"
    if comm.size == 3:
        wishes["topology"] = "tp=3"
    outcome = verify(comm, repeat=1000, faults=(fault,), **wishes)
    assert outcome.exit_status == 1
    assert outcome.completed_runs == 1
    assert outcome.verdict.where.repeat == 0
