"""What goes wrong between sequence ranks is caught, and its rank named."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from mpi_helpers import both_families, golden_of, named, quick_fabric, verify

from spimpi.errors import UsageError
from spimpi.faults import PLACES, Fault, part_of, validate
from spimpi.inference import sequence
from spimpi.verification import answer, run
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import verify_distributed_inference

pytestmark = pytest.mark.mpi(min_size=2)

FAULT_IDS = ("3,14,1,25,9,2,31", "36,5", "35,8,19,7", "12,24,30,3,17")
BITS = (0, 30, 12, 31)


def _faults(job, n_steps):
    """Each kind of fault at each place, in the prefill and later, on ranks, layers and elements in
    turn; the new places on every rank."""
    turn = count()
    for name, place in PLACES.items():
        new = name in ("kv", "last_rows")
        if job.config.qk_norm and not new and not name.startswith("qk"):
            continue  # as in the other family
        for kind in place.kinds:
            for step in (0,) if place.is_weight else (0, n_steps - 1):
                i = next(turn)
                layers = range(job.config.n_layers) if place.in_layer else (-1,)
                able = [
                    fault
                    for rank in range(job.grid.size)
                    for layer in layers
                    for bit in [BITS[i % 4] if kind == "bitflip" else 0]
                    for fault in [Fault(kind, rank, name, layer, step, bit=bit)]
                    if _exists(fault, job, n_steps)
                ]
                for at in range(0, len(able), 2) if new else [5 * i % len(able)] if able else ():
                    fault = able[at]
                    if kind == "bitflip" and i % 2:
                        part = part_of(
                            name, fault.rank, job.grid, job.config, job.lengths, fault.step
                        )
                        column = [block for block in part.columns if block][-1][-1]
                        last = part.rows[-1] * part.width + column
                        fault = replace(fault, element=last)
                    yield fault


def _exists(fault, job, n_steps):
    try:
        validate(fault, job.grid, job.config, job.lengths, n_steps)
    except UsageError:
        return False
    return True


@pytest.mark.wheels
@both_families
@pytest.mark.parametrize("topology", ["sp=2", "sp=3", "sp=2,pp=2", "tp=2,sp=2", "sp=2,dp=2"])
def test_every_fault_is_caught_where_it_was_injected(comm, model, monkeypatch, topology, facts):
    n = int(np.prod([int(axis[3:]) for axis in topology.split(",")]))
    if comm.size != n:
        pytest.skip(f"a topology of {n} ranks")
    quick_fabric(monkeypatch)
    wishes = dict(model=named(model, facts), prompt_ids=FAULT_IDS, tokens=3)
    golden = golden_of(comm, **wishes) if "tp=2" in topology else None
    if golden is None:
        monkeypatch.setattr(run, "GOLDEN_BYTES", 0)  # the checks on the ranks are enough
    job = prepare(Request(**wishes, topology=topology), n)
    missed, places, idle = [], set(), 0
    for fault in _faults(job, 3):
        places.add((fault.tensor, fault.kind))
        outcome = verify_distributed_inference(comm, replace(job, faults=(fault,), golden=golden))
        where = outcome.verdict.where
        if fault.tensor in ("embed", "tokens") and "changed nothing" in str(outcome.verdict):
            idle += 1  # of two equal tokens neither is misplaced or stale
            continue
        found = where and (outcome.exit_status, where.step, where.layer, where.rank)
        assert comm.allgather(found) == [found] * n
        said = where and (PLACES[fault.tensor].is_weight or where.tensor == fault.tensor)
        if not said or found != (1, fault.step, fault.layer, fault.rank):
            missed.append(f"{fault}: {outcome.exit_status} {outcome.verdict}")
    assert not missed, "\n".join(missed)
    assert idle <= 4
    wanted = {(name, kind) for name in ("kv", "last_rows") for kind in PLACES[name].kinds}
    assert wanted <= places


@pytest.mark.parametrize(("what", "place"), [("kv", (0, 2)), ("last_rows", (0, -1))])
def test_a_piece_that_was_sent_wrong_names_its_sender(comm, monkeypatch, what, place):
    """All ranks then hold the same wrong bits, and the sender sees that its own are not its own."""
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    group, culprit = sequence.SequenceGroup, comm.size - 1
    gather = group.gather if what == "kv" else group.gather_last

    class Wrong:
        """A communicator that sends another piece than it was given, once."""

        def __init__(self, real):
            self.real = real

        def Allgatherv(self, sent, received):
            sent = sent.copy()
            sent.reshape(-1)[0] += 1
            self.real.Allgatherv(sent, received)

    done = []

    def wrong(self, *args):
        ctx, real = self.facts.ctx, self.facts.ctx.sequence
        here = what != "kv" or (args[0] == 2 and args[2].step == 0)
        if self.rank == culprit and here and not done:
            done.append(True)
            ctx.sequence = Wrong(real)
        try:
            return gather(self, *args)
        finally:
            ctx.sequence = real

    monkeypatch.setattr(group, gather.__name__, wrong)
    outcome = verify(comm, topology=f"sp={comm.size}", tokens=2)
    where = outcome.verdict.where
    assert outcome.exit_status == 1
    assert (where.tensor, where.step, where.layer, where.rank) == (what, *place, culprit)
    assert where.check == "allgather" and where.found != where.expected


def test_a_gather_in_the_wrong_order_is_caught(comm, monkeypatch):
    """Two ranks' pieces in each other's place: nothing is lost, and every rank has the same."""
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    gather = sequence.SequenceGroup.gather

    def misplaced(self, i, qkv, batch):
        kv = gather(self, i, qkv, batch)
        if i == 1 and batch.step == 0 and batch.microbatch == 0:
            kv[:] = np.roll(kv, 1, axis=0)
        return kv

    monkeypatch.setattr(sequence.SequenceGroup, "gather", misplaced)
    outcome = verify(comm, topology=f"sp={comm.size}", tokens=1)
    where = outcome.verdict.where
    assert (outcome.exit_status, where.tensor, where.layer) == (1, "kv", 1)


def test_a_result_that_all_share_must_be_what_the_pieces_were(comm, monkeypatch):
    """Agreement is not enough, nor that every rank finds its own piece as it was."""
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    fingerprint = sequence.gathered_words

    def as_if_all_had_the_same_wrong_rows(*args):
        fingerprint(*args)
        args[-1][sequence.WHOLE] ^= np.uint64(1)

    monkeypatch.setattr(sequence, "gathered_words", as_if_all_had_the_same_wrong_rows)
    outcome = verify(comm, topology=f"sp={comm.size}", tokens=1)
    where = outcome.verdict.where
    assert (outcome.exit_status, where.tensor, where.rank) == (1, "kv", None)


def test_tokens_that_are_gathered_wrong_are_caught(comm, monkeypatch):
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    real = answer.token_words

    def after(tokens, *more):
        if len(tokens) == 8 and comm.rank == 1:  # the result, not a share
            tokens[3, 1] ^= 1
        return real(tokens, *more)

    monkeypatch.setattr(answer, "token_words", after)
    outcome = verify(comm, topology=f"sp={comm.size}", tokens=2)
    where = outcome.verdict.where
    assert (outcome.exit_status, where.tensor, where.check, where.rank) == (
        1, "tokens", "allgather", 1
    )  # fmt: skip
