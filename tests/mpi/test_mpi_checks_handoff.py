"""Hand-offs, chains of them, and rings: stale, reordered, repeated and lost buffers by name."""

import numpy as np
import pytest
from planted import FAULTS, corruption, data, refused, worlds

import spimpi
from spimpi import HandoffChain, Slab, Tag, TensorPartition
from spimpi.trace.schema import Established

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)

TAG = Tag(name="hidden", layer=7)


def _pairs(comm):
    """Every ordered pair of ranks, with what this rank has to do in it: None where nothing."""
    for sender in range(comm.size):
        for receiver in range(comm.size):
            if sender != receiver:
                yield sender, receiver, comm.rank in (sender, receiver)


class Ends:
    """The two ends of a link, as ``corruption`` and ``refused`` see them: they compare notes."""

    def __init__(self, comm, sender, receiver):
        self.comm, self.peer = comm, receiver if comm.rank == sender else sender

    def allgather(self, text):
        return [text, self.comm.sendrecv(text, dest=self.peer, source=self.peer)]


@two
def test_clean_handoffs_hold_between_any_two_ranks_while_the_others_do_other_things(comm):
    x = data((4, 5))
    for sender, receiver, takes_part in _pairs(comm):
        if takes_part:
            verdict = spimpi.verify_pipeline_handoff(comm, x, sender, receiver, TAG, microbatch=3)
            assert verdict and verdict.established == Established.MOVED
            assert verdict.expected == verdict.actual == spimpi.fingerprint(x, TAG)


@two
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_received_buffer_is_told_to_both_ends(comm, name):
    """After the fact nothing tells whether the send buffer has changed, or the other one."""
    for sender, receiver, takes_part in _pairs(comm):
        if not takes_part:
            continue
        x, previous = data((4, 5)), data((4, 5), seed=2)
        if comm.rank == receiver:
            FAULTS[name](x, previous)
        ends = Ends(comm, sender, receiver)
        with corruption(ends, {sender, receiver}, "pipeline hand-off") as caught:
            spimpi.verify_pipeline_handoff(comm, x, sender, receiver, TAG, microbatch=2)
        assert caught.value.verdict.where.microbatch == 2
        assert f"received from rank {sender}" in str(caught.value)


@two
def test_a_stale_buffer_is_named_with_its_sequence(comm):
    """The receiver did not wait: it holds what came two hand-offs ago."""
    if comm.rank > 1:
        return
    sent = [data((3, 4), seed=s) for s in range(5)]
    for step in range(5):
        received = sent[2] if comm.rank == 1 and step == 4 else sent[step]
        tag = Tag(name="stale", step=step)
        verdict = spimpi.verify_pipeline_handoff(comm, received, 0, 1, tag, check=False)
        assert bool(verdict) == (step != 4)
    assert "a stale buffer: that of sequence 2 (step 2)" in str(verdict)
    assert verdict.where.rank == 1


@two
@pytest.mark.parametrize(
    ("sender", "receiver", "words"),
    [
        (dict(sequence=3), dict(sequence=4), "stale or repeated.*sequence 3 .expected 4"),
        (dict(sequence=6), dict(sequence=4), "lost or reordered.*sequence 6 .expected 4"),
        (dict(microbatch=1), dict(microbatch=0), "another place: microbatch 1 .expected 0"),
        (dict(layers=(0, 3)), dict(layers=(4, 7)), "first_layer 0 .expected 4.*last_layer 3"),
        (dict(microbatch=1), dict(), "microbatch 1 .expected not given"),
        (dict(step=1), dict(step=2), "another place: step 1 .expected 2"),
    ],
)
def test_a_buffer_that_is_not_the_one_waited_for_is_named_as_such(comm, sender, receiver, words):
    if comm.rank > 1:
        return
    wishes = dict(sender if comm.rank == 0 else receiver)
    tag = Tag(name=f"place{sender}{receiver}", step=wishes.pop("step", 0))
    # The payload may well be right, and even shapes may differ: the record tells.
    x = np.ones((2 + comm.rank, 3))
    with pytest.raises(spimpi.CorruptionError, match=words):
        spimpi.verify_pipeline_handoff(comm, x, 0, 1, tag, **wishes)
    same = np.ones((2, 3))
    if "sequence" in sender:
        wishes = {}
    assert spimpi.verify_pipeline_handoff(comm, same, 0, 1, Tag(name="after"), sequence=9)


@two
def test_ends_that_give_different_tensors_are_both_told(comm):
    if comm.rank > 1:
        return
    x, first, ends = np.ones((3, 4), np.float32), comm.rank == 0, Ends(comm, 0, 1)

    def handoff(array, tag=TAG, **more):
        spimpi.verify_pipeline_handoff(comm, array, 0, 1, tag, **more)

    with refused(ends, r"differ in shape: rank 0 gave \(2, 4\), rank 1 gave \(3, 4\)"):
        handoff(x[:2] if first else x)
    with refused(ends, "differ in dtype: rank 0 gave float64, rank 1 gave float32"):
        handoff(x.astype(float) if first else x)
    with refused(ends, "differ in name: rank 0 gave 'a', rank 1 gave 'b'"):
        handoff(x, Tag(name="a" if first else "b"))
    with refused(ends, "differ in seed"):
        handoff(x, Tag(seed=1 + comm.rank))
    with refused(ends, "another `where`"):
        handoff(x, where=TensorPartition(0, 2, comm.rank, 6))
    with refused(ends, "rank 1: no fingerprint for dtype object"):
        handoff(x if first else x.astype(object))
    with refused(ends, "rank 0: expected a spimpi.Tag"):
        handoff(x, "hidden" if first else TAG)
    with refused(ends, "rank 1: layers are"):
        handoff(x, layers=None if first else 5)
    with refused(ends, "at most 16 axes"):
        handoff(x.reshape((3, 4) + 15 * (1,)))
    for name in ("sequence", "microbatch"):
        for value in ("a", 1.5, 2**70, -(2**63)):
            with refused(ends, f"rank 1: a {name} is an integer of 64 bits"):
                handoff(x, **{name: 1 if first else value})
    with refused(ends, "rank 0: a layer is an integer of 64 bits"):
        handoff(x, layers=(0, 2**70) if first else (0, 1))
    part = TensorPartition(0, 2, 1, 6)
    assert spimpi.verify_pipeline_handoff(comm, x, 0, 1, TAG, where=part)
    slab = Slab((6, 4), (3, 0))
    assert spimpi.verify_pipeline_handoff(comm, x, 0, 1, Tag(name="slab"), where=slab)


def test_ranks_that_are_not_its_ends_are_refused_at_once(comm):
    x = np.ones(3)
    with pytest.raises(spimpi.UsageError, match="two ends alone"):
        spimpi.verify_pipeline_handoff(comm, x, comm.rank, comm.rank, TAG)
    with pytest.raises(spimpi.UsageError, match="ranks 0.."):
        spimpi.verify_pipeline_handoff(comm, x, 0, comm.size, TAG)
    if comm.rank > 1:
        with pytest.raises(spimpi.UsageError, match=f"called on rank {comm.rank}"):
            spimpi.verify_pipeline_handoff(comm, x, 0, 1, TAG)


@two
def test_a_chain_counts_both_ends_and_passes_along_a_pipeline(comm):
    for part in worlds(comm, 2):
        before = after = None
        if part.rank > 0:
            before = HandoffChain(part, part.rank - 1, part.rank, "hidden")
        if part.rank < part.size - 1:
            after = HandoffChain(part, part.rank, part.rank + 1, "hidden")
        for step in range(3):
            x = data((2, 3), seed=step)
            for chain in (before, after):
                if chain:
                    assert chain.verify(x, step=step, microbatch=step % 2, layers=(0, 1))
        for chain in (before, after):
            if chain:
                assert chain.n_handoffs == 3
                assert chain.close()
                with pytest.raises(spimpi.UsageError, match="closed"):
                    chain.verify(x)


@two
def test_a_chain_whose_receiver_took_one_fewer_does_not_hang(comm):
    if comm.rank > 1:
        return
    x = data((2, 3))
    chain = HandoffChain(comm, 0, 1, "short")
    for step in range(3 if comm.rank == 0 else 2):
        verdict = chain.verify(x, step=step, check=False)
    if comm.rank == 1:
        verdict = chain.close(check=False)
    assert "a buffer was lost: the receiver closed the chain after 2 hand-offs" in str(verdict)
    assert chain.closed
    with pytest.raises(spimpi.CorruptionError, match="received twice"):
        with HandoffChain(comm, 0, 1, "twice") as chain:
            for step in range(1 + comm.rank):
                chain.verify(x, step=step)


@two
def test_chains_that_were_mixed_up_differ_from_then_on(comm):
    """Same names, steps and contents at the second hand-off; the first ones were not the same."""
    if comm.rank > 1:
        return
    chains = [HandoffChain(comm, 0, 1, "mixed") for _ in range(2)]
    x = [data((2, 3), seed=s) for s in range(2)]
    order = (0, 1) if comm.rank == 0 else (1, 0)
    for i in (0, 1):
        assert chains[order[i]].verify(x[i])
    verdict = chains[0].verify(x[0], check=False)
    assert "mixed-up chains" in str(verdict)
    assert verdict.where.rank is None


@two
def test_both_directions_between_two_ranks_are_links_of_their_own(comm):
    ctx = spimpi.DistributedContext(comm)
    there, back = data((2, 2)), data((2, 2), seed=1)
    tags = Tag(name="there"), Tag(name="back")
    # In a batch an end need not wait for the other, so that they may ask in any order.
    calls = [(there, 0, 1, tags[0]), (back, 1, 0, tags[1])][:: 1 if comm.rank else -1]
    with ctx.batch():
        if comm.rank < 2:
            verdicts = [spimpi.verify_pipeline_handoff(comm, *call, ctx=ctx) for call in calls]
    assert comm.rank > 1 or all(verdicts)
    ctx.free()


def before_of(comm, rank):
    return (rank - 1) % comm.size


@pytest.mark.parametrize("name", ["none", *FAULTS])
def test_a_ring_checks_every_hop_the_closing_one_included(comm, name):
    for part in worlds(comm):
        for victim in range(part.size):
            before = (part.rank - 1) % part.size
            sent, received = data((4, 3), seed=part.rank), data((4, 3), seed=before)
            if name != "none" and part.rank == victim:
                FAULTS[name](received, data((4, 3), seed=part.size))
            if name == "none":
                assert spimpi.verify_ring(part, sent, received, TAG)
                continue
            with corruption(part, {victim, before_of(part, victim)}, "ring"):
                spimpi.verify_ring(part, sent, received, TAG)


def test_a_rings_blocks_may_differ_in_length(comm):
    for part in worlds(comm):
        before = (part.rank - 1) % part.size

        def block(rank, **more):
            return data((rank, 3), **more)  # rank 0's is empty

        assert spimpi.verify_ring(part, block(part.rank), block(before), TAG)
        one = np.array(float(part.rank)), np.array(float(before))
        assert spimpi.verify_ring(part, *one, TAG)
        if part.size > 2:
            with refused(part, r"rank 0 receives a block of shape \(1, 3\), and rank . sends"):
                received = block(1) if part.rank == 0 else block(before)
                spimpi.verify_ring(part, block(part.rank), received, TAG)
            with corruption(part, {1, 2}, "ring"):
                received = block(before)
                if part.rank == 2:
                    FAULTS["flip"](received, None)
                spimpi.verify_ring(part, block(part.rank), received, TAG)
