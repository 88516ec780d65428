"""Nothing is sampled: the number of checks is known beforehand, and a missing one is noticed."""

import pytest
from mpi_helpers import GROUPED, IDS, first_ranks, quick_fabric, topologies, verify

from spimpi.checks.recorder import Recorder
from spimpi.inference.schedule import expected_events
from spimpi.verification import run

pytestmark = pytest.mark.mpi

# Counted by hand for three layers, six heads, two key/value heads, two tokens, eight prompts.
# What one layer checks on one tensor rank: five tensors at rest (input, qkv, attn, resid, ffn)
# and six products (qkv, scores, attn, attn_out, gate_up, ffn_out).
ALONE = 5 + 6
# Over tensor ranks also: two partial sums at rest, the two sums, their inputs' two maxima, and the
# agreement of resid and of hidden.
SHARED = ALONE + 2 + 2 + 2 + 2
GOLDEN = 2 * (1 + 3 * 5 + 1 + 1)  # steps × (embed, five tensors a layer, logits, tokens)
WEIGHTS = 3 * 9 + 3  # nine tensors a layer; embedding, last norm, head


def _one_rank():
    # Each step: the layers, the output at rest, the head's product, logits and tokens at rest.
    return WEIGHTS + 2 * (3 * ALONE + 1 + 1 + 1 + 1) + GOLDEN


def _two_tensor_ranks():
    # Five sizes × (sum, max, bor, allgather; of the world bxor, broadcast) and three × records of
    # both.
    fabric = 5 * (4 + 2) + 3 * (1 + 1)
    copies, maxima = 3 * 2 + 1, 3 * 2  # norms; row maxima of o_proj and down_proj
    # Each step: embedding's reduction, layers, output at rest, the head's product, logits gathered
    # and at rest, tokens agreed and at rest.
    step = 1 + 3 * SHARED + 1 + 1 + 2 + 2
    return 2 * (fabric + WEIGHTS + copies + maxima + 2 * step) + GOLDEN


def _two_stages():
    fabric = 5 * (1 + 2) + 3  # the ring of hand-offs; bxor, broadcast; records
    # Two microbatches a step. First stage, two layers: layers and the output at rest after its
    # send; once, the closing hop. Second stage: hand-off, its layer, the output at rest; once,
    # the head's product, logits and tokens at rest.
    first = 2 * (2 * ALONE + 1) + 1
    second = 2 * (1 + ALONE + 1) + 3
    return 2 * fabric + WEIGHTS + 2 * (first + second) + GOLDEN


def _wishes(model):
    return dict(model=str(model("grouped", **GROUPED)), prompt_ids=IDS, tokens=2)


@pytest.mark.parametrize(
    ("topology", "n", "by_hand"),
    [("tp=1", 1, _one_rank()), ("tp=2", 2, _two_tensor_ranks()), ("pp=2", 2, _two_stages())],
)
def test_the_number_of_checks_is_what_counting_by_hand_gives(comm, model, topology, n, by_hand):
    if comm.size < n:
        pytest.skip(f"needs {n} ranks")
    with first_ranks(comm, n) as part:
        if part:
            outcome = verify(part, topology=topology, **_wishes(model))
            assert outcome.verdict, str(outcome.verdict)
            assert outcome.n_events == by_hand


def test_every_rank_records_what_the_closed_form_says(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    recorded = []
    conclude = run._Run._conclude

    def also_note(self, tokens, runs):
        due = expected_events(self.ctx, self.job, runs, self.has_golden)
        recorded.append((self.recorder.n_events, due))
        return conclude(self, tokens, runs)

    monkeypatch.setattr(run._Run, "_conclude", also_note)
    for n in range(1, comm.size + 1):
        with first_ranks(comm, n) as part:
            for split in topologies(n, 6, 3, 8) if part else ():
                verify(part, repeat=2, **_wishes(model), **split)
                found, due = recorded.pop()
                assert found == due, (split, part.rank)


def test_a_check_that_was_left_out_makes_the_run_incomplete(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    add, left_out = Recorder.add, []

    def forgetful(self, events, seconds):
        if self.rank == comm.size - 1 and not left_out:
            left_out.append(events[-1])
            events = events[:-1]
        add(self, events, seconds)

    monkeypatch.setattr(Recorder, "add", forgetful)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)  # the golden run has a recorder of its own
    outcome = verify(comm, **_wishes(model))
    assert outcome.n_failed == 0
    assert outcome.exit_status == 3
    due = outcome.n_events + 1
    assert f"{due} checks were due, {outcome.n_events} were recorded" in str(outcome.verdict)
