"""Batches of checks that gather words: sums, painted tensors, weights, beside those that do not."""

import numpy as np
import pytest
from planted import corruption, cut, data, refused, same_on_all, worlds

import spimpi
from spimpi import Tag, TensorPartition
from spimpi.checks.session import Session
from spimpi.manifest import Manifest, TensorFacts, write_manifest

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)

PAINT = Tag(name="painted")


def _tag(i):
    return Tag(name=f"t{i}")


def _addends(comm, dtype, seed=0):
    x = np.random.default_rng(seed).standard_normal((comm.size, 6, 20))
    return list((100 * x).astype(dtype))


def _model():
    return {"w": data((6, 4), seed=3), "b": data((5,), seed=4)}


def _manifest() -> Manifest:
    return Manifest({
        name: TensorFacts("F32", x.shape, spimpi.fingerprint(x, Tag(name=name)))
        for name, x in _model().items()
    })  # fmt: skip


def _held(comm, model):
    part = TensorPartition(0, comm.size, comm.rank, 6)
    return {"w": (cut(model["w"], part), part), "b": (model["b"], None)}


def _painted():
    x = np.random.default_rng(7).standard_normal((9, 5)).astype(np.float32)
    return spimpi.color_hidden_states(x, PAINT)


def _all_kinds(ctx, comm, wrong=(), manifest=None, **more):
    """Seven checks, of which those whose numbers are in ``wrong`` fail. Their verdicts."""
    last = comm.rank == comm.size - 1
    more |= {"ctx": ctx}
    verdicts = []
    for i, dtype in enumerate((np.float64, np.int32, np.float32)):
        xs = _addends(comm, dtype, i)
        total = np.sum(xs, axis=0, dtype=dtype)
        total[2, 3] += 500 if i in wrong else 0
        verdicts.append(
            spimpi.verify_allreduce(comm, xs[comm.rank], total, _tag(i), **more)
        )
    x = data((4, 4))
    seen = x + (3 in wrong and last)
    verdicts.append(spimpi.verify_broadcast(comm, seen, _tag(3), 0, **more))
    painted, rows = _painted(), TensorPartition(0, comm.size, comm.rank, 9)
    slab = cut(painted, rows)
    if 4 in wrong and last:
        slab.view(np.uint32)[0, 0] ^= 1
    verdicts.append(spimpi.verify_colors(comm, slab, PAINT, rows, **more))
    model = _model()
    held = _held(comm, model)
    if 5 in wrong and last:
        held["w"][0][0, 0] += 1
    manifest = _manifest() if manifest is None else manifest
    verdicts.append(spimpi.verify_weights(comm, held, manifest, **more))
    xs = _addends(comm, np.float64, 9)
    columns = TensorPartition(1, comm.size, comm.rank, 20)
    shard = cut(np.sum(xs, axis=0), columns)
    shard[1, 0] += 500 if 6 in wrong and last else 0
    verdicts.append(
        spimpi.verify_reduce_scatter(comm, xs[comm.rank], shard, columns, _tag(6), **more)
    )
    return verdicts


class Counting:
    """A communicator that notes what is called of it."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def __getattr__(self, name):
        if name[0].isupper() or name in ("allgather", "bcast", "allreduce"):
            self.calls.append(name)
        return getattr(self.inner, name)


def test_sums_and_colours_share_one_allgather_after_the_record(comm, monkeypatch):
    for part in worlds(comm):
        with spimpi.DistributedContext(part) as ctx:
            started, start = [], Session.start

            def counted(self, words):
                started.append(len(words))
                return start(self, words)

            monkeypatch.setattr(Session, "start", counted)
            counting = ctx.session.comm = Counting(ctx.session.comm)
            with ctx.batch():
                verdicts = []
                for i in range(5):
                    xs = _addends(part, np.float64, i)
                    verdicts.append(spimpi.verify_allreduce(
                        part, xs[part.rank], np.sum(xs, axis=0), _tag(i), ctx=ctx))
                rows = TensorPartition(0, part.size, part.rank, 9)
                verdicts.append(
                    spimpi.verify_colors(part, cut(_painted(), rows), PAINT, rows, ctx=ctx)
                )
                verdicts.append(spimpi.verify_replicas(part, np.ones(3), _tag(7), ctx=ctx))
                assert not counting.calls and not started
                with pytest.raises(spimpi.UsageError, match="verdict of this allreduce is pending"):
                    bool(verdicts[0])
            assert started == [6]
            assert [name for name in counting.calls if name != "Iallreduce"] == ["Iallgather"]
            assert all(verdicts)
            assert verdicts[0].strength.startswith("bound" if part.size > 1 else "exact")
            shape = {"n_tokens": 9, "hidden_dim": 5, "name": "painted"}
            assert verdicts[5].expected == spimpi.expected_fingerprint(1069, **shape)
            ctx.session.comm = counting.inner
        monkeypatch.undo()


def test_the_first_failure_in_the_order_of_the_calls_is_raised_whatever_its_kind(comm):
    names = {
        0: "allreduce", 1: "allreduce", 2: "allreduce", 3: "broadcast", 4: "colors", 5: "weights",
        6: "reduce_scatter",
    }  # fmt: skip
    for part in worlds(comm, 2):
        with spimpi.DistributedContext(part) as ctx:
            with ctx.batch():
                assert len(verdicts := _all_kinds(ctx, part)) == 7
            assert all(verdicts)
            for first in range(7):
                wrong = [i for i in range(7) if i >= first and (i - first) % 2 == 0]
                verdicts = []
                rank = None if first in (0, 1, 2, 5) else part.size - 1
                if names[first] == "broadcast" and part.size == 2:
                    rank = {0, 1}
                with corruption(part, rank, names[first]):
                    with ctx.batch():
                        verdicts += _all_kinds(ctx, part, wrong)
                assert [bool(v) for v in verdicts] == [i not in wrong for i in range(7)]
                same_on_all(part, repr([str(v) for v in verdicts]))
            with ctx.batch():
                verdicts = _all_kinds(ctx, part, (1, 5), check=False)
            assert [i for i, v in enumerate(verdicts) if not v] == [1, 5]
            assert verdicts[1].where.elements[0].index == (2, 3)


def test_weights_of_a_file_and_weights_that_are_nowhere(comm, shared_folder):
    path = shared_folder / "batch.spi.json"
    if comm.rank == 0:
        write_manifest(path, _manifest(), overwrite=True)
    comm.Barrier()
    with spimpi.DistributedContext(comm) as ctx:
        with ctx.batch():
            verdicts = _all_kinds(ctx, comm, manifest=path)
        assert all(verdicts)
        with refused(comm, "incomplete: tensor w is on no rank", spimpi.IncompleteError):
            with ctx.batch():
                held = {"b": (_model()["b"], None)}
                v = spimpi.verify_weights(comm, held, path, ctx=ctx)
        assert not v and v.missing and v.where is None
        with refused(comm, "nosuch.json cannot be read"):
            with ctx.batch():
                spimpi.verify_weights(comm, {}, shared_folder / "nosuch.json", ctx=ctx)


@two
def test_ranks_that_made_other_checks_of_these_kinds_are_told(comm):
    first = comm.rank == 0
    x = np.ones((3, 4))

    def summed(i, ctx, own=x, **more):
        spimpi.verify_allreduce(comm, own, own * comm.size, _tag(i), ctx=ctx, **more)

    with spimpi.DistributedContext(comm) as ctx:
        with refused(comm, "rank 0 made 2 checks; .* made 1 check"):
            with ctx.batch():
                for i in range(2 if first else 1):
                    summed(i, ctx)
        with refused(comm, "ranks differ in check: rank 0 called allreduce; .* called replicas"):
            with ctx.batch():
                if first:
                    summed(0, ctx)
                else:
                    spimpi.verify_replicas(comm, x, _tag(0), ctx=ctx)
        with refused(comm, "ranks differ in shape"):
            with ctx.batch():
                summed(0, ctx)
                summed(1, ctx, x[: 2 if first else 3])
        with refused(comm, "allreduce of 't1': rank 0: no check of MPI.PROD"):
            from mpi4py import MPI

            with ctx.batch():
                summed(0, ctx)
                summed(1, ctx, op=MPI.PROD if first else MPI.SUM)
        with refused(comm, "two allreduce checks of other data"):
            with ctx.batch():
                summed(0, ctx)
                summed(0, ctx, x + 1)
        with ctx.batch():
            summed(0, ctx)


@two
def test_a_sum_over_a_group_that_fails_is_told_to_every_rank_of_the_context(comm):
    """Also where one of two groups makes one sum, and the other something else."""
    with spimpi.DistributedContext(comm) as ctx:
        group = comm.Split(comm.rank % 2, comm.rank)
        for wrong in (0, 500):
            xs = _addends(group, np.float64, comm.rank % 2)
            total = np.sum(xs, axis=0)
            total[1, 1] += wrong * (comm.rank % 2)

            def batch():
                with ctx.batch():
                    return spimpi.verify_allreduce(group, xs[group.rank], total, _tag(0), ctx=ctx)

            if not wrong:
                assert batch()
                continue
            with pytest.raises(spimpi.CorruptionError, match="allreduce") as caught:
                batch()
            same_on_all(comm, str(caught.value))
        if comm.size > 2:
            with refused(comm, "all ranks must make the same checks"):
                with ctx.batch():
                    for i in range(1 + (group.rank == 0)):
                        spimpi.verify_allreduce(group, xs[group.rank], xs[0], _tag(i), ctx=ctx)
        group.Free()


@two
def test_a_sum_that_is_not_blocking_is_tested_without_waiting(comm):
    """What a request does: a Group of one sum travels alone, and ``test`` never waits for it."""
    from spimpi.checks.pending import Group, built
    from spimpi.checks.session import request_session_of
    from spimpi.checks.sums.verify import sum_check

    xs = _addends(comm, np.float64)
    session = request_session_of(comm)
    for wrong in (0, 500):
        total = np.sum(xs, axis=0) + wrong
        group = Group(
            session, [built(*sum_check(comm, "allreduce", xs[comm.rank], total, None, _tag(0)))]
        )
        if comm.rank > 0:
            group.start()
            assert not group.test()  # rank 0 has not come yet
        comm.Barrier()
        if comm.rank == 0:
            group.start()
        while not group.test():
            pass
        (verdict,) = group.finish()
        assert bool(verdict) == (not wrong)
        same_on_all(comm, str(verdict))
