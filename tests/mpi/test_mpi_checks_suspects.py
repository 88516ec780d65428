"""Who is named, and when nobody: changed send buffers, buffers used again, watched sends."""

import numpy as np
import pytest
from mpi4py import MPI
from planted import corruption, cut, data, refused, same_on_all, worlds

import spimpi
from spimpi import HandoffChain, Tag, TensorPartition

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)

TAG = Tag(name="hidden", layer=1, step=2)


def _part(comm, dim, size):
    return TensorPartition(dim, comm.size, comm.rank, size)


# A send buffer that has changed since: the receiver holds what was sent


@two
def test_a_send_buffer_that_changed_never_names_the_receiver(comm):
    for part in worlds(comm, 2):
        culprit, root = part.size - 1, 0
        whole = data((2 * part.size, 4))
        rows, columns = _part(part, 0, len(whole)), _part(part, 1, 4)
        own, at_root = cut(whole, rows), whole.copy() if part.rank == root else None
        right = own.copy()
        if part.rank == culprit:
            own[1, 0] += 1
        with corruption(part, {culprit, root}, "gather"):
            spimpi.verify_gather(part, own, at_root, rows, TAG, root)
        with corruption(part, {culprit, root}, "ring"):
            spimpi.verify_ring(part, own, _row_of(whole, (part.rank - 1) % part.size), TAG)
        # Rank 0 has the first column, its own first row not among the culprit's.
        suspects = {culprit, 0}
        with corruption(part, suspects, "alltoall"):
            spimpi.verify_alltoall(part, own, cut(whole, columns), rows, columns, TAG)
        if part.rank == root:
            at_root[-1, 0] += 1
        with corruption(part, {culprit, root}, "scatter"):
            spimpi.verify_scatter(part, at_root, right, rows, TAG, root)
        if part.size == 2:
            seen = whole.copy()
            if part.rank == root:
                seen[0, 0] += 1
            with corruption(part, {0, 1}, "broadcast"):
                spimpi.verify_broadcast(part, seen, TAG, root)


def _row_of(whole, rank):
    return whole[2 * rank : 2 * rank + 2].copy()


@pytest.mark.mpi(min_size=3)
def test_a_rank_that_alone_explains_all_pairs_is_named(comm):
    whole = data((2 * comm.size, 2 * comm.size))
    rows, columns = _part(comm, 0, len(whole)), _part(comm, 1, len(whole))
    own, got = cut(whole, rows), cut(whole, columns)
    sent = own + (1 if comm.rank == 1 else 0)
    with corruption(comm, 1, "alltoall"):
        spimpi.verify_alltoall(comm, sent, got, rows, columns, TAG)
    if comm.rank == 2:
        got[:] = 0
    with corruption(comm, 2, "alltoall"):
        spimpi.verify_alltoall(comm, own, got, rows, columns, TAG)
    spoilt = whole.copy()
    if comm.rank == 0:
        spoilt[:] = 0
    at_root = spoilt if comm.rank == 0 else None
    with corruption(comm, 0, "gather"):
        spimpi.verify_gather(comm, own, at_root, rows, TAG)
    with corruption(comm, 0, "scatter"):
        spimpi.verify_scatter(comm, at_root, own, rows, TAG)
    # An allgather's block is at all ranks: the sender's own copy is evidence.
    if comm.rank == 1:
        whole[0, 0] += 1
    with corruption(comm, 1, "allgather"):
        spimpi.verify_allgather(comm, own, whole, rows, TAG)


# Buffers that were used again before the batch ended


def _batch(comm, check, reuse):
    """The error that a batch of one check raises, its buffers changed before the end."""
    with spimpi.DistributedContext(comm) as ctx:
        with pytest.raises(spimpi.CorruptionError) as caught:
            with ctx.batch():
                check(ctx)
                reuse()
        same_on_all(comm, str(caught.value))
        return caught.value.verdict.where


@two
def test_buffers_used_again_name_nobody_but_by_the_recorded_words(comm):
    for part in worlds(comm, 2):
        last = part.size - 1
        whole = data((2 * part.size, 3))
        rows = _part(part, 0, len(whole))
        own, gathered = cut(whole, rows), whole.copy()
        if part.rank == last:
            gathered[0, 0] = 99

        def reuse():
            own[:] = part.rank
            gathered[:] = 0 if part.rank == 0 else 7

        where = _batch(
            part,
            lambda ctx: spimpi.verify_allgather(part, own, gathered, rows, TAG, ctx=ctx),
            reuse,
        )
        assert where.rank == last and not where.elements
        assert "have changed since the check was made" in where.detail
        # What is right again is no less changed.
        own, gathered = cut(whole, rows), whole.copy()
        if part.rank == last:
            gathered[0, 0] = 99

        def restore():
            gathered[:] = whole

        where = _batch(
            part,
            lambda ctx: spimpi.verify_allgather(part, own, gathered, rows, TAG, ctx=ctx),
            restore,
        )
        assert where.rank == last and f"buffers of rank {last} have changed" in where.detail
        # Of two blocks the words alone tell only that they differ.
        at_root = whole.copy() if part.rank == 0 else None
        own = cut(whole, rows)
        if part.rank == last:
            own[0, 0] += 1

        def again():
            own[:] = 5

        where = _batch(
            part,
            lambda ctx: spimpi.verify_gather(part, own, at_root, rows, TAG, ctx=ctx),
            again,
        )
        assert where.rank is None and not where.elements and "nor is the rank" in where.detail


@two
def test_buffers_of_replicas_products_and_painted_tensors_used_again(comm):
    last = comm.size - 1
    x = data((4, 3))
    if comm.rank == last:
        x[1, 1] += 1
    where = _batch(
        comm, lambda ctx: spimpi.verify_replicas(comm, x, TAG, ctx=ctx), lambda: x.fill(0)
    )
    assert where.rank == (last if comm.size > 2 else None) and not where.elements
    # What a rank knows alone it keeps at the call.
    a, w = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 4)
    y = a @ w
    if comm.rank == last:
        y[1, 2] += 1
    where = _batch(
        comm, lambda ctx: spimpi.verify_matmul(comm, a, w, y, TAG, ctx=ctx), lambda: y.fill(-1)
    )
    assert (where.rank, [e.index for e in where.elements]) == (last, [(1, 2)])
    part = _part(comm, 0, 2 * comm.size)
    painted = np.random.default_rng(comm.rank).normal(size=(2, 8))
    spimpi.color_hidden_states(painted, TAG, part)
    if comm.rank == last:
        painted.view(np.uint64)[1, 3] ^= 1
    where = _batch(
        comm,
        lambda ctx: spimpi.verify_colors(comm, painted, TAG, part, ctx=ctx),
        lambda: painted.fill(0),
    )
    assert [e.index for e in where.elements] == [(2 * last + 1, 3)]


@two
@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_sums_whose_buffers_were_used_again_invent_no_elements(comm, dtype):
    x = (np.arange(40).reshape(4, 10) + (0.5 if dtype == np.float64 else 0)).astype(dtype)
    total = x * comm.size
    total[2, 3] += 1

    def reuse():
        x.fill(1)
        total.fill(comm.size)
        total[0, 0] = 99

    where = _batch(
        comm, lambda ctx: spimpi.verify_allreduce(comm, x, total, TAG, ctx=ctx), reuse
    )
    assert not where.elements and "have changed since the check was made" in where.detail
    # A maximum is compared at the end of the batch: not any more.
    with spimpi.DistributedContext(comm) as ctx:
        with refused(comm, "buffers of rank.* have changed .*keep its arrays"):
            with ctx.batch():
                x = np.arange(5.0)
                total = x.copy()
                spimpi.verify_allreduce(comm, x, total, TAG, op=MPI.MAX, ctx=ctx)
                total[:] = x[:] = 3
        with ctx.batch():
            x = np.arange(5.0)
            verdict = spimpi.verify_allreduce(comm, x, x.copy(), TAG, op=MPI.MAX, ctx=ctx)
        assert verdict.kinds == ["agreed", "computed"]


# A fingerprint before the send


def _stage(comm, early, before, check):
    """Four microbatches over Isend; the third's buffer is filled anew before its send has ended,
    where ``early``. The verdicts."""
    def payload(k):
        return np.random.default_rng(k).standard_normal(300_000).astype(np.float32)

    buffer, verdicts = payload(0), []
    for k in range(4):
        if comm.rank == 0:
            buffer[:] = payload(k)
            before(buffer, k)
            request = comm.Isend(buffer, 1, 5)
            if early and k == 2:
                buffer[:] = payload(3)
            comm.Barrier()
            request.Wait()
            verdicts.append(check(buffer, k))
        else:
            comm.Barrier()
            received = np.empty_like(buffer)
            comm.Recv(received, 0, 5)
            verdicts.append(check(received, k))
    return verdicts


@two
@pytest.mark.parametrize("early", [False, True])
def test_a_buffer_overwritten_before_its_send_had_ended_names_the_sender(comm, early):
    part = comm.Split(comm.rank < 2, comm.rank)
    if comm.rank < 2:
        watches = {}

        def watch(buffer, k):
            watches[k] = spimpi.at_rest(buffer, TAG)

        def check(buffer, k):
            return spimpi.verify_pipeline_handoff(
                part, buffer, 0, 1, TAG, microbatch=k, before_send=watches.get(k), check=False
            )

        by_function = _stage(part, early, watch, check)
        with HandoffChain(part, 0, 1, "hidden") as chain:
            by_chain = _stage(
                part, early, lambda b, k: chain.before_send(b, step=k),
                lambda b, k: chain.verify(b, step=k, check=False),
            )  # fmt: skip
        for verdicts in (by_function, by_chain):
            assert [bool(v) for v in verdicts] == [True, True, not early, True]
            assert "read before the send" in verdicts[0].strength
            if early:
                where = verdicts[2].where
                assert where.rank == 0 and "overwritten before its send had ended" in where.detail
                assert not where.elements
            same_on_all(part, str(verdicts[2]))
    part.Free()


@two
def test_a_watched_send_buffer_tells_who_is_at_fault(comm):
    if comm.rank > 1:
        return
    sends, tag = comm.rank == 0, Tag(name="watched")
    x = data((3, 4))

    def handoff(**more):
        before = spimpi.at_rest(x, tag) if sends else None
        if sends and more.pop("refilled", False):
            x[:] = 0  # after its send: no fault of the hand-off
        more.pop("refilled", None)
        return spimpi.verify_pipeline_handoff(comm, x, 0, 1, tag, before_send=before, check=False)

    assert handoff()
    assert handoff(refilled=True)
    x = data((3, 4))
    if not sends:
        x[1, 1] += 1
    verdict = handoff()
    assert verdict.where.rank == 1 and "whose send buffer is as it was" in str(verdict)
    assert [e.index for e in verdict.where.elements] == [(1, 1)]
    verdict = handoff(refilled=True)
    assert verdict.where.rank is None and not verdict.where.elements
    assert "nothing tells which" in str(verdict)
    ends = _Ends(comm)
    x = data((3, 4))
    for bad, words in (
        (spimpi.at_rest(x, TAG), "before_send is of another tensor"),
        (spimpi.at_rest(x[:2], tag), "before_send is of another tensor"),
        (5, "before_send is what spimpi.at_rest gave, found int"),
    ):
        with refused(ends, words):
            given = bad if sends else None
            spimpi.verify_pipeline_handoff(comm, x, 0, 1, tag, before_send=given)
    with refused(ends, "before_send is for the sender"):
        watch = spimpi.at_rest(x, tag)
        spimpi.verify_pipeline_handoff(comm, x, 0, 1, tag, before_send=watch)
    with refused(ends, "before_send is of another array"):
        watch = spimpi.at_rest(x.copy(), tag) if sends else None
        spimpi.verify_pipeline_handoff(comm, x, 0, 1, tag, before_send=watch)
    chain = HandoffChain(comm, 0, 1, "c")
    for ends_with in (lambda: chain.verify(x), chain.close):
        if not sends:
            chain.before_send(x)
        with refused(ends, "before_send is for the sender|before_send of no hand-off"):
            ends_with()


@two
def test_a_chains_watch_is_taken_by_the_handoff_of_its_own_array_alone(comm):
    """Several under way, of one tag; only some are watched, and not in the order of the checks."""
    if comm.rank > 1:
        return
    sends = comm.rank == 0
    x = [data((3,), seed=s) for s in range(4)] + [np.empty(0), np.empty(0)]
    chain = HandoffChain(comm, 0, 1, "some")
    if sends:
        for i in (3, 1, 5):
            chain.before_send(x[i])
    strengths = [chain.verify(one).strength for one in x]
    assert ["before the send" in text for text in strengths[:4]] == [False, True, False, True]
    if sends:
        chain.before_send(x[1])
        x[1][0] += 1
    verdict = chain.verify(x[0], check=False)
    assert verdict and "after the send alone" in verdict.strength
    x[1][0] += not sends
    verdict = chain.verify(x[1], check=False)
    assert verdict.where.rank == 0 and "overwritten before its send had ended" in str(verdict)
    if sends:
        chain.before_send(x[2], step=1)
    with refused(_Ends(comm), "before_send is of another tensor"):
        chain.verify(x[2])
    if sends:
        chain.before_send(x[2])
    assert "after the send alone" in chain.verify(x[2].copy()).strength
    with refused(_Ends(comm), "1 before_send of no hand-off: .*give `verify` the same array"):
        chain.close()
    assert chain.close()


class _Ends:
    """Ranks 0 and 1, as ``refused`` sees them."""

    def __init__(self, comm):
        self.comm = comm

    def allgather(self, text):
        return [text, self.comm.sendrecv(text, dest=1 - self.comm.rank, source=1 - self.comm.rank)]


@two
def test_handoffs_of_a_batch_whose_buffers_were_used_again(comm):
    x, verdicts = data((3, 4)), []
    if comm.rank == 1:
        x[0, 0] += 1
    with spimpi.DistributedContext(comm) as ctx:
        with ctx.batch():
            if comm.rank < 2:
                verdicts.append(
                    spimpi.verify_pipeline_handoff(comm, x, 0, 1, TAG, ctx=ctx, check=False)
                )
                x[:] = comm.rank
    for verdict in verdicts:
        assert not verdict and not verdict.where.elements
        assert "buffers of ranks 0, 1 have changed" in str(verdict)


# How many are wrong


@two
def test_a_verdict_says_how_many_more_are_wrong_or_at_least(comm):
    x = np.random.default_rng(comm.rank).standard_normal(4096).astype(np.float32)
    verdict = spimpi.verify_allreduce(comm, x, np.zeros_like(x), TAG, check=False)
    assert str(verdict).endswith("; at least 13 more")
    whole = data((8, 8))
    seen = whole.copy()
    if comm.rank == 0:
        seen[:, :2] = -1
    rows = _part(comm, 0, 8)
    verdict = spimpi.verify_allgather(comm, cut(whole, rows), seen, rows, TAG, check=False)
    assert verdict.where.n_wrong == 16 and str(verdict).endswith("; 13 more")
    if comm.rank == 0:
        seen[:] = -1
    verdict = spimpi.verify_allgather(comm, cut(whole, rows), seen, rows, TAG, check=False)
    assert verdict.where.n_wrong is None and "at least 13 more" in str(verdict)
