"""A batch that a rank leaves by an exception: the others learn it, and what was under way hurts nobody."""

import numpy as np
import pytest
from planted import cut, data, worlds

import spimpi
from spimpi import HandoffChain, Tag, TensorPartition
from spimpi.checks.session import Session

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)


def _left(ctx, leaver, body):
    """All make ``body`` in a batch that one rank leaves at its end, which all others are told."""
    kind, words = spimpi.UsageError, f"nothing was checked, rank {leaver} takes no part"
    if ctx.rank == leaver:
        kind, words = KeyError, "mine"
    with pytest.raises(kind, match=words), ctx.batch():
        body()
        if ctx.rank == leaver:
            raise KeyError("mine")


@two
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_handoff_whose_other_end_left_the_batch_is_not_waited_for(comm, begun, own):
    """Whether the leaver had begun it or not; hand-offs after it are as if it had not been."""
    for part in worlds(comm, 2):
        over = part.Dup() if own else part
        with spimpi.DistributedContext(part) as ctx:
            chain = HandoffChain(over, 0, 1, "chain", ctx=ctx) if part.rank < 2 else None

            def handoff(step, leaver=None):
                if chain is None:
                    return []
                x = data((3,), seed=step)
                made = []
                if begun or part.rank != leaver:
                    made = [chain.verify(x, step=step) for _ in range(2)]
                    made.append(spimpi.verify_pipeline_handoff(
                        over, x, 0, 1, Tag(name="lone", step=step), ctx=ctx))
                return made

            assert all(handoff(0))
            for leaver in (0, 1):
                _left(ctx, leaver, lambda: handoff(1 + leaver, leaver))  # noqa: B023
            assert all(handoff(3))
            with ctx.batch():
                if part.rank < 2:
                    verdicts = [chain.verify(data((2,)), step=4), chain.close()]
            assert part.rank > 1 or all(verdicts)
        if own:
            over.Free()


@two
def test_checks_over_other_communicators_go_on_after_a_batch_that_a_rank_left(comm):
    """Nothing of theirs is begun before all are known to stay: nothing is left half done."""
    for part in worlds(comm, 2):
        group = part.Split(part.rank % 2, part.rank)
        other = part.Dup()
        with spimpi.DistributedContext(part) as ctx:

            def checks(step, given):
                made = []
                for comm_ in (other, group):
                    p = TensorPartition(0, comm_.size, comm_.rank, 8)
                    x, name = data((8,), seed=step), f"of {comm_ is other}"
                    tag, of_sum = Tag(name=name, step=step), Tag(name=f"sum {name}", step=step)
                    made.append(spimpi.verify_allgather(comm_, cut(x, p), x, p, tag, ctx=given))
                    total = np.full(3, float(comm_.size))
                    made.append(spimpi.verify_allreduce(comm_, np.ones(3), total, of_sum, ctx=given))
                return made

            assert all(checks(0, None))
            for leaver in range(part.size):
                _left(ctx, leaver, lambda: checks(1 + leaver, ctx))  # noqa: B023
                assert all(checks(10 + leaver, None))
            with ctx.batch():
                verdicts = checks(20, ctx)
            assert all(verdicts)
        other.Free()
        group.Free()


@two
def test_a_batch_with_handoffs_takes_two_reductions_one_without_one(comm, monkeypatch):
    started, start = [], Session.start

    def counted(self, words):
        started.append(self)
        return start(self, words)

    with spimpi.DistributedContext(comm) as ctx:
        monkeypatch.setattr(Session, "start", counted)
        for handing, n in ((False, 1), (True, 2)):
            started.clear()
            with ctx.batch():
                spimpi.verify_replicas(comm, data((3,)), Tag(name="x"), ctx=ctx)
                if handing and comm.rank < 2:
                    spimpi.verify_pipeline_handoff(comm, data((3,)), 0, 1, Tag(name="h"), ctx=ctx)
            assert started == [ctx.session] * n
