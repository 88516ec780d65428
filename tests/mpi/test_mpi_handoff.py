"""A buffer that is reused before its send has finished: caught, with real messages in flight."""

import time

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import first_ranks, quick_fabric, verify

from spimpi.checks.handoff import Receiver, Sender, describe_mismatch, same_place
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import Tag

pytestmark = pytest.mark.mpi

ROWS, COLUMNS = 1024, 1024  # 4 MiB, far above any library's eager limit
N = 5


class Hasty(Sender):
    """A sender that leaves out the wait; what is in flight ends when the test does."""

    def __init__(self, *args):
        super().__init__(*args)
        self.in_flight = []

    def _wait(self, requests):
        self.in_flight += requests


def _word(array, sequence):
    return np.uint64(fingerprint(array, Tag(name="hidden", step=sequence)))


def _record(sequence):
    return {"sequence": sequence, "step": sequence, "microbatch": 0, "n_rows": ROWS}


def _send(comm, kind):
    """Hand on N buffers; returns which of them had changed when their send was complete."""
    changed = []

    def sent(buffer, record):
        if _word(buffer, int(record["sequence"])) != record["fingerprint"]:
            changed.append(int(record["sequence"]))

    sender = kind(comm, 1, ROWS, COLUMNS, np.float32, sent)
    for sequence in range(N):
        buffer = sender.buffer(ROWS)
        buffer[:] = np.arange(COLUMNS) + sequence
        sender.send(**_record(sequence), fingerprint=_word(buffer, sequence))
    sender.drain()
    MPI.Request.Waitall(getattr(sender, "in_flight", []))
    return changed


def _receive(comm):
    """Take N buffers, the first of them late; returns those whose fingerprint differs."""
    receiver = Receiver(comm, 0, ROWS, COLUMNS, np.float32)
    wrong = []
    time.sleep(0.5)
    receiver.post(ROWS)
    receiver.post(ROWS)
    for sequence in range(N):
        buffer, record = receiver.take()
        assert same_place(record, _record(sequence)), describe_mismatch(record, _record(sequence))
        if _word(buffer, sequence) != record["fingerprint"]:
            wrong.append(sequence)
        if sequence + 2 < N:
            receiver.post(ROWS)
    return wrong


@pytest.mark.wheels
@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kind", [Sender, Hasty])
def test_a_buffer_reused_before_its_send_is_complete_is_caught(comm, kind):
    with first_ranks(comm, 2) as part:
        if part:
            found = _send(part, kind) if part.rank == 0 else _receive(part)
            wrong = part.bcast(found, root=1)
            # Three of five buffers are overwritten while the first two still wait to be sent.
            assert bool(wrong) == (kind is Hasty), wrong


@pytest.mark.wheels
@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("waits", [True, False])
def test_a_pipeline_that_leaves_out_one_wait_is_caught(comm, model, monkeypatch, waits):
    """Three stages, three microbatches, two buffers: the third is written into the first."""
    facts = dict(
        vocab_size=16, hidden_size=1024, intermediate_size=64, n_layers=3, n_heads=2, n_kv_heads=1,
        head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    directory = model("wide", **facts)
    quick_fabric(monkeypatch)
    hasty = []
    if not waits:
        monkeypatch.setattr(Sender, "_wait", lambda self, requests: hasty.extend(requests))
    slow = Receiver.post

    def post(self, n_rows):
        if self.posted == 0 and n_rows > 50 and comm.rank == 1:
            time.sleep(1)
        slow(self, n_rows)

    monkeypatch.setattr(Receiver, "post", post)
    ids = ",".join(str(i % 16) for i in range(300))
    with first_ranks(comm, 3) as part:
        if part:
            wishes = dict(model=str(directory), prompt_ids=(ids,), tokens=1, topology="pp=3")
            outcome = verify(part, **wishes)
            MPI.Request.Waitall(hasty)
            assert bool(outcome.verdict) == waits, str(outcome.verdict)
            if not waits:
                where = outcome.verdict.where
                assert outcome.exit_status == 1
                assert (where.check, where.tensor, where.layer) == ("handoff", "hidden", 0)
                assert (where.microbatch, where.recorded_by) == (0, 1)
                assert "received from rank 0" in where.detail
