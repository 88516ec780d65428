"""Many checks, one collective; contexts without a grid; what a failure tells every rank."""

import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
from planted import FAULTS, corruption, cut, data, refused, same_on_all, worlds

import spimpi
from spimpi import ElementError, Tag, TensorPartition
from spimpi.checks.check import Check, Rule, fold
from spimpi.checks.session import Session
from spimpi.fingerprint.tag import MASK
from spimpi.topology.grid import Grid
from spimpi.trace.schema import Established

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)


def _tag(i):
    return Tag(name=f"t{i}")


def _many(ctx, comm, n=6, wrong=(), **more):
    """n checks of three kinds; those in ``wrong`` fail on the last rank. Their verdicts."""
    verdicts = []
    for i in range(n):
        x = data((8, 10), seed=i)
        seen = x.copy()
        if i in wrong and comm.rank == comm.size - 1:
            FAULTS["flip"](seen, None)
        part = TensorPartition(i % 2, comm.size, comm.rank, x.shape[i % 2])
        if i % 3 == 0:
            v = spimpi.verify_allgather(comm, cut(x, part), seen, part, _tag(i), ctx=ctx, **more)
        elif i % 3 == 1:
            v = spimpi.verify_broadcast(comm, seen, _tag(i), 0, ctx=ctx, **more)
        else:
            other = TensorPartition(1 - i % 2, comm.size, comm.rank, x.shape[1 - i % 2])
            got = cut(x, other)
            if (seen != x).any():
                FAULTS["flip"](got, None)
            v = spimpi.verify_alltoall(
                comm, cut(x, part), got, part, other, _tag(i), ctx=ctx, **more
            )
        verdicts.append(v)
    return verdicts


def test_a_batch_is_one_reduction_of_48_bytes(comm, monkeypatch):
    started = []
    start = Session.start

    def counted(self, words):
        started.append(len(words))
        return start(self, words)

    for part in worlds(comm):
        with spimpi.DistributedContext(part) as ctx:
            monkeypatch.setattr(Session, "start", counted)
            started.clear()
            with ctx.batch():
                verdicts = _many(ctx, part, 12)
                with pytest.raises(spimpi.UsageError, match="verdict of this allgather is pending"):
                    bool(verdicts[0])
                with pytest.raises(spimpi.UsageError, match="pending"):
                    verdicts[2].established
                assert "pending broadcast" in str(verdicts[1]) == repr(verdicts[1])
            assert started == [6] and str(verdicts[2]).startswith("verified")
            assert all(verdicts) and verdicts[0].expected == spimpi.fingerprint(
                data((8, 10)), _tag(0)
            )
            monkeypatch.undo()
            with ctx.batch():
                pass


def test_the_first_failure_of_a_batch_is_raised_and_all_verdicts_are_known(comm):
    for part in worlds(comm, 2):
        with spimpi.DistributedContext(part) as ctx:
            verdicts = []
            culprit = part.size - 1 if part.size > 2 else {0, 1}
            with corruption(part, culprit, "broadcast") as caught:
                with ctx.batch():
                    verdicts += _many(ctx, part, 12, wrong=(4, 5, 7, 9, 10))
            assert caught.value.verdict.where.tensor == "t4"
            assert [bool(v) for v in verdicts] == [i not in (4, 5, 7, 9, 10) for i in range(12)]
            assert all(v.where.rank == part.size - 1 for v in verdicts if not v and v.where.rank)
            assert "not looked into" in str(verdicts[10])
            assert "not looked into" not in str(verdicts[7])
            same_on_all(part, [str(v) for v in verdicts].__repr__())


def test_a_batch_whose_failures_are_not_to_raise_does_not(comm):
    with spimpi.DistributedContext(comm) as ctx:
        with ctx.batch():
            verdicts = _many(ctx, comm, 4, wrong=(3,), check=False)
        assert [bool(v) for v in verdicts] == [True, True, True, False]


def test_failures_that_would_cancel_in_a_plain_xor_are_found(comm):
    """The same check twice, with the same fault: the words of both errors are equal."""
    x, tag = data((4, 4)), Tag(name="twice")
    part = TensorPartition(0, comm.size, comm.rank, 4)
    wrong = x.copy()
    FAULTS["flip"](wrong, None)
    with spimpi.DistributedContext(comm) as ctx:
        for distance in (1, 64, 65):
            with pytest.raises(spimpi.CorruptionError):
                with ctx.batch():
                    for i in range(distance + 1):
                        seen = wrong if i in (0, distance) else x
                        name = tag if i in (0, distance) else Tag(name="twice", step=i)
                        spimpi.verify_allgather(comm, cut(x, part), seen, part, name, ctx=ctx)


def test_folding_loses_no_single_error(comm):
    """Whatever bit of whichever check differs shows in the folded record."""
    def checks(n, at=None, bit=0):
        made = []
        for i in range(n):
            c = Check("c", _tag(i), Rule.MOVED, Established.MOVED, given=i, got=i)
            c.digest = 7 * i
            c.given ^= (1 << bit) if i == at else 0
            made.append(c)
        return fold(made)[0]

    for n in (1, 2, 70):
        clean = checks(n)
        for at in (0, n // 2, n - 1):
            for bit in range(0, 64, 7):
                other = checks(n, at, bit)
                assert other[0] != clean[0] and other[1:] == clean[1:]
                assert 0 <= other[0] <= MASK


def test_one_tag_for_two_tensors_is_refused(comm):
    last = comm.rank == comm.size - 1
    x = data((4, 3))
    with spimpi.DistributedContext(comm) as ctx:
        with refused(comm, "stands for two tensors in one batch: float32.*and float64"):
            with ctx.batch():
                spimpi.verify_replicas(comm, x, _tag(0), ctx=ctx)
                spimpi.verify_broadcast(comm, x.astype(float), _tag(0), ctx=ctx)
        with refused(comm, "two replicas checks of other data"):
            with ctx.batch():
                spimpi.verify_replicas(comm, x, _tag(0), ctx=ctx)
                spimpi.verify_replicas(comm, x + 1, _tag(0), ctx=ctx)
        # Also where only one rank can tell: the others' shards are empty.
        sizes = (0,) * (comm.size - 1) + (4,)
        part = TensorPartition(0, comm.size, comm.rank, 4, sizes)
        with refused(comm, f"rank {comm.size - 1}: the tag stands for two"):
            with ctx.batch():
                for add in (0, 1):
                    own = cut(x, part) + add
                    spimpi.verify_alltoall(comm, own, own.copy(), part, part, _tag(0), ctx=ctx)
        with ctx.batch():
            a = spimpi.verify_replicas(comm, x, _tag(0), ctx=ctx)
            b = spimpi.verify_broadcast(comm, x, _tag(0), ctx=ctx)
        assert a and b and last in (True, False)


@two
def test_ranks_that_made_other_checks_are_told(comm):
    x, first = data((4, 3)), comm.rank == 0
    with spimpi.DistributedContext(comm) as ctx:
        with refused(comm, "rank 0 made 1 check; .*made 2 checks.*check 2 is: rank 0 nothing"):
            with ctx.batch():
                for i in range(1 if first else 2):
                    spimpi.verify_replicas(comm, x, _tag(i), ctx=ctx)
        with refused(comm, "ranks differ in check: rank 0 called broadcast"):
            with ctx.batch():
                if first:
                    spimpi.verify_broadcast(comm, x, _tag(0), ctx=ctx)
                else:
                    spimpi.verify_replicas(comm, x, _tag(0), ctx=ctx)
        with refused(comm, "rank 0: no fingerprint for dtype object"):
            with ctx.batch():
                for i in range(3):
                    own = x.astype(object) if first and i == 1 else x
                    spimpi.verify_replicas(comm, own, _tag(i), ctx=ctx)
        with ctx.batch():
            fine = spimpi.verify_replicas(comm, x, _tag(0), ctx=ctx)
        assert fine


def test_a_batch_that_has_ended_is_not_begun_again(comm):
    with spimpi.DistributedContext(comm) as ctx:
        batch = ctx.batch()
        with batch:
            spimpi.verify_replicas(comm, np.ones(2), Tag(name="x"), ctx=ctx)
        with pytest.raises(spimpi.UsageError, match="this batch has ended"), batch:
            pass
        with ctx.batch():
            pass


def test_an_exception_in_a_batch_checks_nothing_and_batches_do_not_nest(comm):
    with spimpi.DistributedContext(comm) as ctx:
        with pytest.raises(KeyError):
            with ctx.batch():
                pending = spimpi.verify_replicas(comm, data((2,)), _tag(0), ctx=ctx)
                raise KeyError
        with pytest.raises(spimpi.UsageError, match="pending"):
            bool(pending)
        with ctx.batch():
            with pytest.raises(spimpi.UsageError, match="do not nest"):
                ctx.batch()
        assert spimpi.verify_replicas(comm, data((2,)), _tag(0), ctx=ctx)


@two
def test_checks_over_groups_raise_on_every_rank_of_the_context(comm):
    """Two groups; the fault is in one of them, and the other is told too."""
    with spimpi.DistributedContext(comm) as ctx:
        group = comm.Split(comm.rank % 2, comm.rank)
        x = data((3, 3))
        for wrong in (False, True):
            seen = x + (1 if wrong and comm.rank == 1 else 0)
            tag = Tag(name=f"group{comm.rank % 2}")

            def batch():
                with ctx.batch():
                    own = spimpi.verify_broadcast(group, x, tag, ctx=ctx)
                    part = TensorPartition(0, group.size, group.rank, 3)
                    spimpi.verify_allgather(group, cut(x, part), seen, part, _tag(9), ctx=ctx)
                    spimpi.verify_replicas(comm, x, _tag(1), ctx=ctx)
                return own

            if not wrong:
                assert batch()
                continue
            with pytest.raises(spimpi.CorruptionError, match="allgather") as caught:
                batch()
            same_on_all(comm, str(caught.value))
        group.Free()


@two
@pytest.mark.parametrize("wrong", [False, True])
def test_handoffs_in_a_batch_are_told_to_all_ranks_at_its_end(comm, wrong):
    with spimpi.DistributedContext(comm) as ctx:
        x = data((3, 3))
        verdicts = []

        def batch():
            with ctx.batch():
                if comm.rank < 2:
                    for m in range(3):
                        own = x + (1 if wrong and m == 1 and comm.rank == 1 else 0)
                        verdicts.append(spimpi.verify_pipeline_handoff(
                            comm, own, 0, 1, Tag(name=f"b{wrong}"), microbatch=m, ctx=ctx))
                spimpi.verify_replicas(comm, x, _tag(0), ctx=ctx)

        if wrong:
            with corruption(comm, {0, 1}, "pipeline hand-off") as caught:
                batch()
            assert caught.value.verdict.where.microbatch == 1
        else:
            batch()
        assert [bool(v) for v in verdicts] == [not (wrong and m == 1) for m in range(3)][
            : len(verdicts)
        ]
        with refused(comm, "differ in shape"):
            with ctx.batch():
                if comm.rank < 2:
                    spimpi.verify_pipeline_handoff(comm, x[comm.rank :], 0, 1, _tag(5), ctx=ctx)


@two
@pytest.mark.parametrize("wrong", [False, True])
def test_a_ring_of_handoffs_in_a_batch_does_not_wait_in_a_circle(comm, wrong):
    """Every rank asks for its predecessor's first, and all hops fail at once."""
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    tag = Tag(name=f"circle{wrong}")
    with spimpi.DistributedContext(comm) as ctx:
        verdicts = []
        with ctx.batch():
            for sender, receiver in ((before, comm.rank), (comm.rank, after)):
                x = data((2, 2)) + (1 if wrong and sender == before else 0)
                verdicts.append(spimpi.verify_pipeline_handoff(
                    comm, x, sender, receiver, tag, ctx=ctx, check=False))
        assert [bool(v) for v in verdicts] == [not wrong] * 2
        for v, ends in zip(verdicts, ((before, comm.rank), (comm.rank, after)) if wrong else ()):
            assert v.where.rank is None
            assert all(f"rank {end}" in str(v) for end in ends)


def test_a_context_without_a_grid_is_one_tensor_group(comm):
    with spimpi.DistributedContext(comm) as ctx:
        assert ctx.grid == Grid(comm.size, 1, 1, (1,))
        assert (ctx.world.size, ctx.tensor.size, ctx.pipeline.size) == (comm.size, comm.size, 1)
        assert ctx.is_over(comm) and ctx.is_over(ctx.world) and not ctx.is_over(ctx.data)
        assert spimpi.verify_replicas(ctx.tensor, np.ones(3), _tag(0), ctx=ctx)


def test_a_freed_communicator_takes_its_session_along(comm):
    """Made and freed many times: sessions do not use up the MPI library's communicators."""
    for i in range(200):
        part = comm.Dup()
        assert spimpi.verify_replicas(part, np.ones(3), _tag(i))
        if comm.size > 1 and comm.rank < 2:
            assert spimpi.verify_pipeline_handoff(part, np.ones(3), 0, 1, _tag(i))
        part.Free()


@dataclass(frozen=True)
class Found:
    elements: tuple
    text: str
    n_wrong: int | None = None


def test_localisation_is_asked_once_with_what_was_given_and_got(comm, monkeypatch):
    """Its interface, with a stand-in that gathers everything."""
    asked, histories = [], []

    def localise(comm, contributed, held, tag, *, history=None, limit=16):
        def told(blocks):
            return [(slab, array.copy()) for array, slab in blocks]

        everyone = comm.allgather((told(contributed), told(held)))
        asked.append(tag)
        histories.append(history)
        shape = next(s.global_shape for given, got in everyone for s, _ in (*given, *got))
        truth = None
        for given, _ in everyone:
            for slab, array in given:
                truth = np.zeros(shape, array.dtype) if truth is None else truth
                truth[tuple(slice(a, a + n) for a, n in zip(slab.offset, array.shape))] = array
        elements = []
        for rank, (_, got) in enumerate(everyone):
            for slab, array in got:
                part = truth[tuple(slice(a, a + n) for a, n in zip(slab.offset, array.shape))]
                for index in np.argwhere(part != array):
                    place = tuple(int(i) + a for i, a in zip(index, slab.offset))
                    i = tuple(index)
                    words = part[i].tobytes(), array[i].tobytes()
                    elements.append(ElementError(place, *words, rank))
        return Found(tuple(elements[:limit]), f"{len(elements)} elements")

    stand_in = ModuleType("spimpi.checks.localisation.localise")
    stand_in.localise = localise
    monkeypatch.setitem(sys.modules, "spimpi.checks.localisation.localise", stand_in)
    for part in worlds(comm):
        x = data((6, 5), np.int32)
        p = TensorPartition(1, part.size, part.rank, 5)
        victim = part.size - 1
        seen = x.copy()
        if part.rank == victim:
            seen[2, 3] ^= 1 << 9
        asked.clear()
        assert spimpi.verify_allgather(part, cut(x, p), x, p, _tag(0)) and not asked
        with corruption(part, victim, "allgather") as caught:
            spimpi.verify_allgather(part, cut(x, p), seen, p, _tag(0))
        (element,) = caught.value.verdict.where.elements
        assert (element.index, element.rank, element.bits) == ((2, 3), victim, (9,))
        # What this rank gave to earlier checks comes along, to recognise a stale block by.
        own = spimpi.fingerprint(cut(x, p), _tag(0), p)
        assert histories[-1][_tag(0), p.slab(cut(x, p).shape)] == own
        assert asked == [_tag(0)] and "1 elements" in str(caught.value)
        assert f"element [2, 3] on rank {victim}" in str(caught.value)
        # A ring's blocks are given places of their own; elements come as (sender, index…).
        sent = data((2 + part.rank, 2), np.int32, seed=part.rank)
        before = (part.rank - 1) % part.size
        received = data((2 + before, 2), np.int32, seed=before)
        if part.rank == victim:
            received[1, 1] ^= 4
        with corruption(part, {victim, (victim - 1) % part.size}, "ring") as caught:
            spimpi.verify_ring(part, sent, received, _tag(1))
        (element,) = caught.value.verdict.where.elements
        sender = (victim - 1) % part.size
        assert (element.index, element.rank, element.bits) == ((sender, 1, 1), victim, (2,))
        if part.size > 2:
            own = x.copy()
            if part.rank == 1:
                own[0, 0] ^= 1
            with corruption(part, 1, "replicas") as caught:
                spimpi.verify_replicas(part, own, _tag(2))
            (element,) = caught.value.verdict.where.elements
            assert (element.index, element.rank, element.bits) == ((0, 0), 1, (0,))
        if part.size > 1 and part.rank < 2:
            own = x.copy()
            if part.rank == 0:
                own[5, 4] ^= 2
            with pytest.raises(spimpi.CorruptionError) as caught:
                spimpi.verify_pipeline_handoff(part, own, 1, 0, _tag(3))
            (element,) = caught.value.verdict.where.elements
            assert (element.index, element.rank, element.bits) == ((5, 4), 0, (1,))


def test_a_context_that_was_given_back_says_so(comm):
    with spimpi.DistributedContext(comm) as ctx:
        checked = spimpi.checked(comm, ctx)
    x = np.ones(3)
    for use in (
        lambda: spimpi.verify_replicas(comm, x, Tag(name="x"), ctx=ctx),
        lambda: spimpi.verify_allreduce(comm, x, comm.size * x, Tag(name="x"), ctx=ctx),
        lambda: spimpi.exact_allreduce(comm, x, tag=Tag(name="x"), ctx=ctx),
        lambda: spimpi.at_rest(x, Tag(name="x")).verify(ctx=ctx),
        lambda: checked.Allreduce(x, x.copy()),
        lambda: checked.Allgather(x, np.empty(3 * comm.size)),
        ctx.batch,
        ctx.free,
        lambda: ctx.world.rank,
    ):
        with refused(comm, "this DistributedContext was given back"):
            use()
    assert not hasattr(ctx, "no_such_name")
