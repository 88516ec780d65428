"""Sequence parallelism: prompts split over ranks, keys and values gathered, the same bits."""

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import (
    GROUPED, IDS, both_families, first_ranks, golden_of, named, quick_fabric, verify,
)  # fmt: skip

from spimpi.checks.fabric import SIZES, check_fabric, probes, tensor_names
from spimpi.checks.recorder import Recorder
from spimpi.context import DistributedContext
from spimpi.errors import UsageError
from spimpi.inference import ledger, sequence
from spimpi.inference.checkpoint import open_checkpoint
from spimpi.inference.config import load_config
from spimpi.inference.golden import EMBEDDED_GOLDEN
from spimpi.inference.model import Stage
from spimpi.inference.schedule import expected_events
from spimpi.inference.weights import Loader
from spimpi.topology.grid import choose, parse
from spimpi.trace.schema import Established, Op
from spimpi.trace.schema import Stage as Phase
from spimpi.verification import run
from spimpi.verification.job import Request, prepare

pytestmark = pytest.mark.mpi(min_size=2)

GRIDS = {
    2: ["sp=2"],
    3: ["sp=3"],
    4: ["sp=4", "tp=2,sp=2", "sp=2,pp=2", "sp=2,dp=2"],
    5: ["sp=5"],
    6: ["tp=3,sp=2", "sp=3,pp=2", "tp=2,sp=3", "sp=3,dp=2"],
    7: ["sp=7"],
    8: ["tp=2,sp=2,pp=2", "sp=2,pp=2,dp=2"],
}
MOVED, AGREED, COMPUTED, EXPECTED = Established


def grids(comm, heads=8, layers=8):
    """(ranks, topology) of all grids with several sequence ranks that fit in the test's world."""
    for n, topologies in GRIDS.items():
        for text in topologies if n <= comm.size else ():
            axes = dict(part.split("=") for part in text.split(","))
            size = np.prod([int(x) for x in axes.values()])
            if int(axes.get("tp", 1)) <= heads and int(axes.get("pp", 1)) <= layers:
                yield int(size), text


# The same bits


@pytest.mark.wheels
def test_every_grid_reproduces_the_embedded_model_s_golden_file(comm, monkeypatch):
    quick_fabric(monkeypatch)
    for n, topology in grids(comm):
        with first_ranks(comm, n) as part:
            if part is None:
                continue
            outcome = verify(part, topology=topology, tokens=5)
            assert outcome.verdict, (topology, str(outcome.verdict))
            assert outcome.expected_from == str(EMBEDDED_GOLDEN)
            assert outcome.totals[Phase.GOLDEN].checks == 5 * (5 * 8 + 3)
            assert outcome.totals[Phase.SEQUENCE].checks > 0
            assert outcome.verdict.established == MOVED | AGREED | COMPUTED | EXPECTED


@pytest.mark.wheels
@both_families
def test_prompts_of_any_length_give_the_same_bits_on_every_grid(comm, model, monkeypatch, facts):
    """IDS has prompts of 1 to 11 tokens: most are shorter than some grid's sequence group, and six
    heads with two key/value heads are cut unevenly by tp=3."""
    quick_fabric(monkeypatch)
    wishes = dict(model=named(model, facts), prompt_ids=IDS, tokens=4)
    golden = golden_of(comm, **wishes)
    for n, topology in grids(comm, 6, 3):
        with first_ranks(comm, n) as part:
            if part is None:
                continue
            outcome = verify(part, golden, topology=topology, repeat=2, **wishes)
            assert outcome.verdict, (topology, str(outcome.verdict))
            assert outcome.completed_runs == 2
            if part.rank == 0:
                assert np.array_equal(outcome.tokens, golden.tokens), topology


def test_fewer_prompts_than_sequence_ranks_leave_pieces_empty(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    for prompts in (("3,1,4,1,5,9,2,6",), ("6", "3,1,4,1,5,9,2,6,5", "7,8")):
        wishes = dict(model=str(model("grouped", **GROUPED)), prompt_ids=prompts, tokens=3)
        golden = golden_of(comm, **wishes)
        topologies = [f"sp={comm.size}"] + ["sp=2,pp=2"] * (comm.size == 4)
        for topology in topologies:
            outcome = verify(comm, golden, topology=topology, **wishes)
            assert outcome.verdict, (topology, str(outcome.verdict))
            if comm.rank == 0:
                assert np.array_equal(outcome.tokens, golden.tokens)


def test_float32_blas_runs_over_sequence_ranks_too(comm, monkeypatch):
    quick_fabric(monkeypatch)
    plain = golden_of(comm, tokens=4)
    outcome = verify(comm, topology=f"sp={comm.size}", tokens=4, arith="blas")
    assert outcome.verdict, str(outcome.verdict)
    assert outcome.totals[Phase.SEQUENCE].checks > 0
    if comm.rank == 0:
        assert np.array_equal(outcome.tokens, plain.tokens)
    fault = f"bitflip:rank={comm.size - 1},tensor=kv,layer=1,bit=20"
    where = verify(
        comm, topology=f"sp={comm.size}", tokens=2, arith="blas", faults=(fault,)
    ).verdict.where
    assert (where.tensor, where.layer, where.rank) == ("kv", 1, comm.size - 1)


SEQUENCES = [
    np.array(ids, np.int64)
    for ids in ([3, 1, 4, 1, 5, 9, 2, 6], [35, 8, 9, 7, 9], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4])
]


def _logits(comm, grid, directory, prefilled, rest):
    """(first prompt, first column, own logits) after the prefill and each token fed later."""
    config, found = load_config(directory), []
    with DistributedContext(comm, grid) as ctx:
        part = Loader(ctx, config, open_checkpoint(directory, config), True).load()
        n_steps = 1 + len(rest[0])
        stage = Stage(ctx, config, part, [len(p) for p in prefilled], n_steps, True, None)
        rows = stage.splits[1].rows
        tokens = stage.own_tokens(prefilled[rows.start : rows.stop])
        first = stage.facts.first_prompt
        own = range(first, first + stage.facts.n_prompts)
        for step in range(n_steps):
            stage.step(step, tokens)
            if ctx.is_last_stage:
                found.append((first, part.shard.vocabulary().start, stage.head.logits.copy()))
            if step < n_steps - 1:
                tokens = np.array([rest[i][step] for i in own], np.int64)
    return found


@pytest.mark.wheels
@both_families
def test_prefill_and_decoding_give_the_bits_of_one_rank_alone(comm, model, facts):
    directory, one = named(model, facts), choose(1, 6, 3)
    truth = [
        [_logits(MPI.COMM_SELF, one, directory, [s[: n + 1]], [[]])[0][2][0] for n in range(len(s))]
        for s in SEQUENCES
    ]
    for n, topology in grids(comm, 6, 3):
        if "dp" in topology or "sp=7" in topology:
            continue
        with first_ranks(comm, n) as part:
            if part is None:
                continue
            for n_later in (0, 1, 4):
                prefilled = [s[: len(s) - n_later] for s in SEQUENCES]
                rest = [s[len(s) - n_later :] for s in SEQUENCES]
                grid = parse(topology, n, 6, 3)
                steps = _logits(part, grid, directory, prefilled, rest)
                compared = 0
                for step, (first, column, logits) in enumerate(steps):
                    for i, row in enumerate(logits):
                        whole = truth[first + i][len(SEQUENCES[first + i]) - n_later + step - 1]
                        own = whole[column : column + row.size]
                        assert row.tobytes() == own.tobytes(), (topology, n_later, step, i)
                        compared += 1
                total = part.allreduce(compared)
                assert total == grid.tp * len(SEQUENCES) * (1 + n_later)


# The number of checks


# Counted by hand for three layers, six heads, two tokens, eight prompts.
GOLDEN = 2 * (1 + 3 * 5 + 1 + 1)
WEIGHTS = 3 * 9 + 3
LAYER = 5 + 6 + 1  # tensors at rest, products, keys and values gathered
# After the last step: two norms and four matrices' exponents a layer; embedding; last norm and the
# head's exponents; rotary tables. Prompts' ids, and the first step's tokens, as embedded; each
# step's tokens as rank 0 hands them out.
STANDING = 3 * (2 + 4) + 1 + 2 + 1
EMBEDDED, HANDED_OUT = 2, 2


def _two_sequence_ranks():
    fabric = 5 * (1 + 2) + 3 * (1 + 1)  # allgather; bxor, broadcast; records of group and world
    # Prefill: eight microbatches, one a prompt, of three layers and the output at rest; the later
    # step: one. Each step: the head's rows at rest, its product, logits and tokens at rest. Once:
    # the last rows and the tokens, gathered.
    one = (8 + 1) * (3 * LAYER + 1) + 2 * 4 + 1 + 1 + STANDING + EMBEDDED
    return 2 * (fabric + WEIGHTS + one) + HANDED_OUT + GOLDEN


def _two_tensor_by_two_sequence_ranks():
    # Over tensor ranks sum, max, bor, allgather; bxor of a replica, which is not the world here.
    fabric = 5 * (4 + 1 + 1 + 2) + 3 * (1 + 1 + 1)
    copies, maxima = 3 * 2 + 1, 3 * 2
    shared = LAYER + 2 + 2 + 2 + 2  # partial sums at rest, sums, maxima, agreement of two
    # A microbatch also puts its embedding together; a step gathers logits and agrees on tokens.
    one = (8 + 1) * (3 * shared + 1 + 1) + 2 * (4 + 2) + 1 + 1 + STANDING + EMBEDDED
    return 4 * (fabric + WEIGHTS + copies + maxima + one) + HANDED_OUT + GOLDEN


def _two_stages_of_two_sequence_ranks():
    fabric = 5 * (1 + 1 + 1 + 2) + 3 * (1 + 1)  # also the ring of hand-offs, bxor of a replica
    # The later step has two microbatches. First stage, two layers: the output at rest after its
    # send; the closing hop of each step; the tokens, gathered. Second stage: hand-offs; the head.
    first = (8 + 2) * (2 * LAYER + 1) + 2 + 1
    second = (8 + 2) * (1 + LAYER + 1) + 2 * 4 + 1
    both = first + second + STANDING + 1 + EMBEDDED  # both have rotary tables
    return 4 * fabric + 2 * WEIGHTS + 2 * both + HANDED_OUT + GOLDEN


@pytest.mark.parametrize(
    ("n", "topology", "by_hand"),
    [(2, "sp=2", _two_sequence_ranks()), (4, "tp=2,sp=2", _two_tensor_by_two_sequence_ranks()),
     (4, "sp=2,pp=2", _two_stages_of_two_sequence_ranks())],
)  # fmt: skip
def test_the_number_of_checks_is_what_counting_by_hand_gives(comm, model, n, topology, by_hand):
    if comm.size < n:
        pytest.skip(f"needs {n} ranks")
    with first_ranks(comm, n) as part:
        if part:
            outcome = verify(
                part, model=str(model("grouped", **GROUPED)), prompt_ids=IDS, tokens=2,
                topology=topology,
            )  # fmt: skip
            assert outcome.verdict, str(outcome.verdict)
            assert outcome.n_events == by_hand


@both_families
def test_every_rank_records_what_the_closed_form_says(comm, model, monkeypatch, facts):
    quick_fabric(monkeypatch)
    recorded, conclude = [], run._Run._conclude

    def also_note(self, tokens, words, runs):
        due = expected_events(self.ctx, self.job, runs, self.has_golden)
        recorded.append((self.recorder.n_events, due))
        return conclude(self, tokens, words, runs)

    monkeypatch.setattr(run._Run, "_conclude", also_note)
    for exact in ("exact", "blas"):
        for n, topology in grids(comm, 6, 3):
            with first_ranks(comm, n) as part:
                if part:
                    verify(
                        part, model=named(model, facts), prompt_ids=IDS, tokens=3,
                        topology=topology, repeat=2, arith=exact,
                    )  # fmt: skip
                    found, due = recorded.pop()
                    assert found == due, (topology, part.rank)


def test_a_gather_that_is_not_checked_makes_the_run_incomplete(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    events = sequence.SequenceGroup.events
    left_out = []

    def forgetful(self, ledger):
        made = events(self, ledger)
        if self.rank == 1 and not left_out:
            left_out.append(made[0])
            made = made[1:]
        return made

    monkeypatch.setattr(sequence.SequenceGroup, "events", forgetful)
    outcome = verify(comm, topology=f"sp={comm.size}", tokens=2)
    assert outcome.n_failed == 0 and outcome.exit_status == 3
    due = outcome.n_events + 1
    assert f"{due} checks were due, {outcome.n_events} were recorded" in str(outcome.verdict)


# Groups of steps, the fabric, bad input


def test_ranks_that_are_not_equally_fast_agree_on_the_group(comm, monkeypatch):
    quick_fabric(monkeypatch)
    for seconds in (0, 1e9 * comm.rank, 1e9):
        monkeypatch.setattr(ledger, "SECONDS", seconds)
        for n, topology in grids(comm):
            if topology in ("sp=2", "tp=2,sp=2"):
                with first_ranks(comm, n) as part:
                    if part:
                        outcome = verify(part, topology=topology, tokens=20)
                        assert outcome.verdict, str(outcome.verdict)


@pytest.mark.parametrize("method", ["Allgatherv", "Iallreduce"])
def test_the_preflight_probes_the_sequence_group(comm, method):
    from test_mpi_fabric import BAD_STEP, Corrupted

    with DistributedContext(comm, parse(f"sp={comm.size}", comm.size, 8, 8)) as ctx:
        names = [probe.name for probe in probes(ctx)]
        assert {"fabric.sequence.allgather", "fabric.sequence.records"} <= set(names)
        real = ctx.sequence
        ctx.sequence = Corrupted(real, method, None, comm.size - 1, SIZES[BAD_STEP])
        recorder = Recorder({name: i for i, name in enumerate(tensor_names())}, comm.rank)
        failures = check_fabric(ctx, recorder, sizes=SIZES[: BAD_STEP + 2])
        ctx.sequence = real
        assert failures == (method == "Iallreduce" or comm.rank == comm.size - 1)
        for event in recorder.all_failures():
            kind = "records" if method == "Iallreduce" else "allgather"
            assert tensor_names()[event["tensor"]] == f"fabric.sequence.{kind}"


def test_events_of_a_gather_say_what_was_gathered(comm, monkeypatch):
    quick_fabric(monkeypatch)
    kept, add = [], Recorder.add

    def keep(self, events, seconds):
        kept.append((self, events))
        add(self, events, seconds)

    monkeypatch.setattr(Recorder, "add", keep)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    verify(comm, topology=f"sp={comm.size}", tokens=2)
    recorder, prefill = kept[0]
    kv = prefill[prefill["tensor"] == recorder.tensor_index["kv"]]
    assert (kv["op"] == Op.ALLGATHER).all() and (kv["stage"] == Phase.SEQUENCE).all()
    lengths = [13, 9, 11, 16, 7, 21, 10, 24]
    assert kv["bytes"].tolist() == [n * 2 * 4 * 16 * 4 for n in lengths for _ in range(8)]
    assert kv["layer"].tolist() == 8 * [*range(8)]
    words = comm.allgather(kv["fingerprint"].tobytes())
    assert len(set(words)) == 1 and np.unique(kv["fingerprint"]).size == kv.size


def test_sequence_ranks_without_tokens_are_refused_on_every_rank(comm):
    with pytest.raises(UsageError, match="longest prompt has 1 token: ranks would be idle"):
        prepare(Request(topology=f"sp={comm.size}", prompts=("a", "b")), comm.size, comm.rank)
