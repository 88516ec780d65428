"""Nothing is sampled: the number of checks is known beforehand, and a missing one is noticed."""

import pytest
from mpi_helpers import (
    GROUPED, IDS, OLMO, first_ranks, on_rank_0, quick_fabric, topologies, verify,
)  # fmt: skip

from spimpi.checks.recorder import Recorder
from spimpi.inference.schedule import expected_events
from spimpi.manifest import make_manifest, write_manifest
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
# After the last step: two norms and four matrices' exponents a layer; embedding; last norm and the
# head's exponents; rotary tables. Prompts' ids, and the first step's tokens, as embedded; each
# step's tokens as rank 0 hands them out.
STANDING = 3 * (2 + 4) + 1 + 2 + 1
EMBEDDED, HANDED_OUT = 2, 2


def _one_rank():
    # Each step: the layers, the output and the head's rows at rest, the head's product, logits and
    # tokens at rest.
    run = 2 * (3 * ALONE + 1 + 1 + 1 + 1 + 1) + STANDING + EMBEDDED + HANDED_OUT
    return WEIGHTS + run + GOLDEN


def _two_tensor_ranks():
    # Five sizes × (sum, max, bor, allgather; of the world bxor, broadcast) and three × records of
    # both.
    fabric = 5 * (4 + 2) + 3 * (1 + 1)
    copies, maxima = 3 * 2 + 1, 3 * 2  # norms; row maxima of o_proj and down_proj
    # Each step: embedding's reduction, layers, output and head's rows at rest, the head's product,
    # logits gathered and at rest, tokens agreed and at rest.
    step = 1 + 3 * SHARED + 2 + 1 + 2 + 2
    rank = fabric + WEIGHTS + copies + maxima + 2 * step + STANDING + EMBEDDED
    return 2 * rank + HANDED_OUT + GOLDEN


def _two_stages():
    fabric = 5 * (1 + 2) + 3  # the ring of hand-offs; bxor, broadcast; records
    # Two microbatches a step. First stage, two layers: layers and the output at rest after its
    # send; once, the closing hop. Second stage: hand-off, its layer, the output at rest; once,
    # the head's product, its rows, logits and tokens at rest.
    first = 2 * (2 * ALONE + 1) + 1
    second = 2 * (1 + ALONE + 1) + 4
    standing = STANDING + 1  # both have rotary tables
    return 2 * fabric + WEIGHTS + 2 * (first + second) + standing + EMBEDDED + HANDED_OUT + GOLDEN


def _olmo_alone():
    # A norm of queries and one of keys more a layer to load, which stand as one array; and what
    # it made, at rest.
    return _one_rank() + 3 * 2 + 3 + 2 * 3 * 1


def _olmo_over_two_tensor_ranks():
    # Each rank: two more tensors a layer to load, one array more that stands; what the norm made, at
    # rest; its sum at rest and summed; its maximum. No head is shared by two of two ranks.
    return _two_tensor_ranks() + 2 * (3 * 2 + 3 + 2 * 3 * (1 + 2 + 1))


def _olmo_over_three_tensor_ranks():
    # Three query heads, three and two; rank 1 holds both key/value heads: head 0 is shared by ranks
    # 0 and 1, head 1 by ranks 1 and 2.
    held = 1 + 2 + 1
    fabric = 5 * (4 + 2) + 3 * (1 + 1)
    copies, maxima = 3 * 2 + 1, 3 * 2
    step = 1 + 3 * (SHARED + 1 + 2 + 1) + 2 + 1 + 2 + 2
    standing = STANDING + 3 + EMBEDDED
    ranks = 3 * (fabric + WEIGHTS + 3 * 2 + copies + maxima + 2 * step + standing)
    # A shared head, for each that holds it: k_proj, v_proj and k_norm; in each step its qkv.
    return ranks + held * (3 * 3 + 2 * 3) + HANDED_OUT + GOLDEN


def _wishes(model, facts=GROUPED):
    name = facts.get("model_type", "grouped")
    return dict(model=str(model(name, **facts)), prompt_ids=IDS, tokens=2)


@pytest.mark.parametrize(
    ("topology", "n", "by_hand", "facts"),
    [("tp=1", 1, _one_rank(), GROUPED), ("tp=2", 2, _two_tensor_ranks(), GROUPED),
     ("pp=2", 2, _two_stages(), GROUPED), ("tp=1", 1, _olmo_alone(), OLMO),
     ("tp=2", 2, _olmo_over_two_tensor_ranks(), OLMO),
     ("tp=3", 3, _olmo_over_three_tensor_ranks(), OLMO)],
)  # fmt: skip
def test_the_number_of_checks_is_what_counting_by_hand_gives(
    comm, model, topology, n, by_hand, facts
):
    if comm.size < n:
        pytest.skip(f"needs {n} ranks")
    wishes = _wishes(model, facts)  # on all ranks: the model is written by one for all
    with first_ranks(comm, n) as part:
        if part:
            outcome = verify(part, topology=topology, **wishes)
            assert outcome.verdict, str(outcome.verdict)
            assert outcome.n_events == by_hand


@pytest.mark.parametrize(
    ("n", "by_hand"),
    # After loading and after the last step, on each rank: integers and exponents of seven matrices a
    # layer and of the head; over tensor ranks o_proj's and down_proj's exponents, which all have,
    # and integers and exponents of the keys and values of a shared head.
    [(1, 2 * 2 * (3 * 7 + 1)),
     (2, 2 * 2 * (2 * (3 * 7 + 1) + 3 * 2)),
     (3, 2 * (3 * (2 * (3 * 7 + 1) + 3 * 2) + (1 + 2 + 1) * 3 * 4))],
)  # fmt: skip
def test_a_manifest_with_derived_tensors_adds_what_counting_by_hand_gives(
    comm, model, shared_folder, n, by_hand
):
    if comm.size < n:
        pytest.skip(f"needs {n} ranks")
    wishes, file = _wishes(model), shared_folder / "counted.spi.json"
    made = on_rank_0(comm, lambda: make_manifest(wishes["model"], derived=True))
    on_rank_0(comm, lambda: write_manifest(file, made, overwrite=True))
    with first_ranks(comm, n) as part:
        if part:
            counts = [
                verify(part, topology=f"tp={n}", manifest=given, **wishes).n_events
                for given in (None, str(file))
            ]
            assert counts[1] - counts[0] == by_hand


@pytest.mark.parametrize("facts", [GROUPED, OLMO], ids=["llama", "olmo"])
@pytest.mark.parametrize("arith", ["exact", "blas"])
def test_every_rank_records_what_the_closed_form_says(comm, model, monkeypatch, facts, arith):
    quick_fabric(monkeypatch)
    recorded = []
    conclude = run._Run._conclude

    def also_note(self, tokens, words, runs):
        due = expected_events(self.ctx, self.job, runs, self.has_golden)
        recorded.append((self.recorder.n_events, due))
        return conclude(self, tokens, words, runs)

    monkeypatch.setattr(run._Run, "_conclude", also_note)
    wishes = _wishes(model, facts)
    for n in range(1, comm.size + 1):
        with first_ranks(comm, n) as part:
            for split in topologies(n, 6, 3, 8) if part else ():
                verify(part, repeat=2, arith=arith, **wishes, **split)
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
