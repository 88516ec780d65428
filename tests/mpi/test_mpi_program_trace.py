"""Checks of a traced context: each leaves an event, and a planted failure is found in the trace."""

import numpy as np
import pytest
from planted import cut, data, refused, worlds

import spimpi
import spimpi.trace
from spimpi import DistributedContext, Tag, TensorPartition, UsageError
from spimpi.cli import main
from spimpi.trace.analysis.summary import summarise
from spimpi.trace.journals import node_file
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.schema import Established, Op, Stage, Status

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]


def _tag(name, **more):
    return Tag(name=name, **more)


def _checks(ctx, comm, step, wrong=False, **more):
    """An allgather's check, a sum's and a chain's, of one step."""
    x = data((6, 10), np.float32, seed=step)
    rows = TensorPartition(0, comm.size, comm.rank, 6)
    seen = x.copy()
    if wrong and comm.rank == comm.size - 1:
        seen[4, 7] = -1
    more |= {"ctx": ctx}
    tag = _tag("hidden", layer=3, step=step)
    spimpi.verify_allgather(comm, cut(x, rows), seen, rows, tag, **more)
    spimpi.verify_allreduce(comm, x, comm.size * x, _tag("gradient", step=step), **more)
    if 0 < comm.size - 1 and comm.rank in (0, comm.size - 1):
        spimpi.verify_pipeline_handoff(
            comm, x, 0, comm.size - 1, _tag("act", step=step), microbatch=2, **more
        )


def _path(shared_folder, part, name):
    return shared_folder / f"{name}-{part.size}.h5"


def test_every_check_leaves_an_event_on_each_rank_that_makes_it(comm, shared_folder):
    for part in worlds(comm):
        path = _path(shared_folder, part, "clean")
        with spimpi.DistributedContext(part, trace=path) as ctx:
            _checks(ctx, part, 0)
            with ctx.batch():
                _checks(ctx, part, 1)
            spimpi.at_rest(np.ones(9), _tag("cache", step=2)).verify(ctx=ctx)
            spimpi.exact_allreduce(part, np.ones(9), tag=_tag("exact", step=3), ctx=ctx)
        with spimpi.trace.open(path) as trace:
            assert trace.complete and not trace.problems and len(trace.ranks) == part.size
            assert "clipped" not in trace.attributes
            names = [t.name for t in trace.tensors]
            assert names == ["hidden", "gradient", *["act"] * (part.size > 1), "cache", "exact"]
            assert trace.tensors[0].shape == (6, 10) and trace.tensors[0].dtype == "float32"
            for rank in range(part.size):
                events = trace.events(rank)
                ends = part.size > 1 and rank in (0, part.size - 1)
                step = [(0, "hidden", Op.ALLGATHER), (0, "gradient", Op.ALLREDUCE_SUM)]
                step += [(0, "act", Op.HANDOFF)] * ends
                # A batch's hand-offs are finished before its reduction.
                expected = [*step, *((1, *what) for _, *what in step), (2, "cache", Op.AT_REST)]
                expected.append((3, "exact", Op.ALLREDUCE_SUM))
                found = [(int(e["step"]), names[e["tensor"]], int(e["op"])) for e in events]
                assert sorted(found) == sorted(expected)
                assert (events["stage"] == Stage.PROGRAM).all()
                alone = part.size == 1  # a sum over one rank compares nothing
                empty = alone & np.isin(events["op"], [Op.ALLREDUCE_SUM])
                assert (events["verdict"][~empty] == Status.VERIFIED).all()
                assert (events["verdict"][empty] == Status.NOT_ESTABLISHED).all()
                first = events[0]
                kinds = Established.MOVED | Established.AGREED
                assert first["established"] == (Established.MOVED if alone else kinds)
                assert first["layer"] == 3 and first["bytes"] > 240
                assert first["expected"] == first["fingerprint"] == spimpi.fingerprint(
                    data((6, 10), np.float32), _tag("hidden", layer=3)
                )
                assert (events["t_end"] >= events["t_start"]).all()
                handed = events[events["op"] == Op.HANDOFF]
                assert (handed["microbatch"] == 2).all()
                assert (handed["peer"] == part.size - 1 - rank).all()
                assert handed["sequence"].tolist() == [0, 1][: len(handed)]
            assert summarise(trace).exit_status == 0


def test_ranks_of_a_node_that_share_a_file_leave_the_same_trace(comm, shared_folder, monkeypatch):
    monkeypatch.setattr(node_file, "SEPARATE", 0)
    for part in worlds(comm):
        path = _path(shared_folder, part, "shared")
        with spimpi.DistributedContext(part, trace=path) as ctx:
            _checks(ctx, part, 0)
            if part.rank == part.size - 1:
                spimpi.at_rest(np.ones(9), _tag("cache", step=2)).verify(ctx=ctx)
            part.Barrier()
            names = [file.name for file in journal_folder(path).iterdir()]
            assert names == ["node-00000.journal"]
            part.Barrier()
        with spimpi.trace.open(path) as trace:
            assert trace.complete and not trace.problems
            counts = [2 + (rank in (0, part.size - 1) and part.size > 1) for rank in range(part.size)]
            counts[-1] += 1
            assert [info.count for info in trace.ranks] == counts
        assert not journal_folder(path).exists()
        part.Barrier()


def test_a_planted_failure_is_found_in_the_sealed_trace(comm, shared_folder, capfd):
    for part in worlds(comm, 2):
        path = _path(shared_folder, part, "wrong")
        with spimpi.DistributedContext(part, trace=path) as ctx:
            _checks(ctx, part, 0)
            _checks(ctx, part, 1, wrong=True, check=False)
            _checks(ctx, part, 2)
        with spimpi.trace.open(path) as trace:
            summary = summarise(trace)
            assert (summary.verdict, summary.exit_status, summary.n_failed) == (
                "corrupted", 1, part.size,
            )  # fmt: skip
            first = summary.failures[0]
            assert (first.tensor, first.step, first.layer) == ("hidden", 1, 3)
            assert (first.op, first.peer, first.element) == ("allgather", part.size - 1, 47)
            assert trace.attributes["end_state"] == "failed"
        if part.rank == 0:
            assert main(["trace", "show", str(path)]) == 1
            text = capfd.readouterr().out
            assert "program" in text and "step 1, layer 3, hidden: allgather" in text


def test_an_exception_communicates_nothing_and_leaves_the_journals(comm, shared_folder, capfd):
    """One rank leaves by an error of its own; the others go on."""
    for part in worlds(comm):
        path = _path(shared_folder, part, "left")
        last = part.rank == part.size - 1
        context = spimpi.DistributedContext(part, trace=path)
        with pytest.raises(KeyError) if last else pytest.raises(SystemExit), context as ctx:
            _checks(ctx, part, 0)
            if last:
                raise KeyError
            raise SystemExit
        part.Barrier()
        assert not path.exists()
        with spimpi.trace.open(path) as trace:
            assert not trace.complete and len(trace.ranks) == part.size
            assert len(trace.events(part.size - 1)) == (3 if part.size > 1 else 2)
            assert "never sealed" in trace.problems[0]
        part.Barrier()
        path = _path(shared_folder, part, "corrupt")
        if part.size > 1:
            with pytest.raises(spimpi.CorruptionError):
                with spimpi.DistributedContext(part, trace=path) as ctx:
                    _checks(ctx, part, 0)
                    _checks(ctx, part, 1, wrong=True)
            part.Barrier()
            if part.rank == 0:
                assert main(["trace", "show", str(path)]) == 1
                text = capfd.readouterr().out
                assert "INCOMPLETE" in text and "step 1, layer 3, hidden: allgather" in text
            part.Barrier()


@pytest.mark.mpi(min_size=2)
def test_ranks_with_other_checks_and_other_tensors_share_one_table(comm, shared_folder):
    path = _path(shared_folder, comm, "groups")
    with spimpi.DistributedContext(comm, trace=path) as ctx:
        group = comm.Split(comm.rank % 2, -comm.rank)
        for step in range(2):  # the shape differs from step to step
            own = np.full(3 + step, float(comm.rank % 2))
            if step and comm.rank == 0 and group.size > 1:
                own[2] = 7
            tag = _tag(f"g{comm.rank % 2}", step=step)
            spimpi.verify_replicas(group, own, tag, ctx=ctx, check=False)
        spimpi.verify_replicas(comm, np.ones(2), _tag("all"), ctx=ctx)
        group.Free()
    with spimpi.trace.open(path) as trace:
        names = [t.name for t in trace.tensors]
        assert names == ["g0", "all", "g1"]
        assert trace.tensors[0].shape == (-1,)
        for rank in range(comm.size):
            events = trace.events(rank)
            assert [names[i] for i in events["tensor"]] == [f"g{rank % 2}"] * 2 + ["all"]
            if comm.size > 2 and rank % 2 == 0:
                assert events["verdict"].tolist() == [0, 1, 0]
        if comm.size > 4:  # of two replicas that differ none is named
            assert trace.events(0)["peer"][1] == 0
    comm.Barrier()  # before rank 0 may take the folder away


def test_a_trace_that_is_there_or_has_no_place_is_refused_on_every_rank(comm, shared_folder):
    path = _path(shared_folder, comm, "twice")
    with spimpi.DistributedContext(comm, trace=path):
        pass
    with spimpi.trace.open(path) as trace:
        assert trace.complete and len(trace) == 0
    with refused(comm, "twice.* exists"):
        spimpi.DistributedContext(comm, trace=path)
    with refused(comm, "there is no directory"):
        spimpi.DistributedContext(comm, trace=shared_folder / "nowhere" / "run.h5")
    with refused(comm, "expected a path"):
        spimpi.DistributedContext(comm, trace=7)


def test_a_second_run_replaces_its_trace_where_it_may(comm, shared_folder):
    """Also after one that died, and left its journals."""
    path = _path(shared_folder, comm, "again")
    for step in range(3):
        if step == 1:
            with pytest.raises(KeyError):
                with spimpi.DistributedContext(comm, trace=path, overwrite=True) as ctx:
                    spimpi.verify_replicas(comm, np.ones(2), _tag("x", step=9), ctx=ctx)
                    raise KeyError
            comm.Barrier()
            with refused(comm, "again.* exists"):
                spimpi.DistributedContext(comm, trace=path)
            continue
        with spimpi.DistributedContext(comm, trace=path, overwrite=True) as ctx:
            spimpi.verify_replicas(comm, np.ones(2), _tag("x", step=step), ctx=ctx)
        with spimpi.trace.open(path) as trace:
            assert trace.complete and trace.events(comm.rank)["step"].tolist() == [step]
        comm.Barrier()


@pytest.mark.parametrize("seed", ["x", 1.5, -1, 2**64, None])
def test_a_seed_that_is_no_seed_is_refused_on_every_rank(comm, seed):
    with refused(comm, "seed"):
        spimpi.DistributedContext(comm, seed=seed if comm.rank == comm.size - 1 else 3)


@pytest.mark.parametrize("options", [{"journal": "."}, {"sync": True}, {"overwrite": True}])
@pytest.mark.parametrize("of_all", [True, False])
def test_how_a_trace_is_kept_is_refused_without_one(comm, options, of_all):
    given = options if of_all or comm.rank == comm.size - 1 else {}
    with refused(comm, "give trace= too"):
        spimpi.DistributedContext(comm, **given)


def test_the_checked_communicator_traces_too(comm, shared_folder):
    path = _path(shared_folder, comm, "checked")
    with spimpi.DistributedContext(comm, trace=path) as ctx:
        checked = spimpi.checked(comm, ctx)
        checked.Allgather(np.ones(3), np.empty(3 * comm.size))
        checked.Allreduce(np.ones(3), np.empty(3))
        request = checked.Iallgather(np.ones(3), np.empty(3 * comm.size))
        request.Wait()
    with spimpi.trace.open(path) as trace:
        for rank in range(comm.size):
            ops = trace.events(rank)["op"].tolist()
            assert ops == [Op.ALLGATHER, Op.ALLREDUCE_SUM, Op.ALLGATHER]
    comm.Barrier()


@pytest.mark.parametrize("names", ["some", "each its own"])
def test_ranks_that_name_different_traces_all_learn_it(comm, mpi_tmp_path, names):
    if comm.size < 2:
        pytest.skip("needs two ranks")
    own = mpi_tmp_path / f"{comm.rank if names == 'each its own' else 0}.h5"
    trace = None if names == "some" and comm.rank else own
    with pytest.raises(UsageError, match="rank 1: "):
        DistributedContext(comm, trace=trace)
    assert not list(mpi_tmp_path.iterdir())


@pytest.mark.mpi(min_size=2)
def test_ranks_that_give_different_seeds_all_learn_it(comm):
    with refused(comm, "the same seed=; found rank 0: seed 0; rank 1: seed 1"):
        DistributedContext(comm, seed=comm.rank)


def test_a_number_that_no_column_holds_is_clipped_and_the_trace_says_so(comm, shared_folder, capfd):
    path = _path(shared_folder, comm, "clipped")
    with spimpi.DistributedContext(comm, trace=path) as ctx:
        if comm.rank == comm.size - 1:
            watch = spimpi.at_rest(np.ones(3), _tag("cache", step=2**31, layer=40_000))
            watch.verify(ctx=ctx)
    with spimpi.trace.open(path) as trace:
        (event,) = trace.events(comm.size - 1)
        assert (event["step"], event["layer"]) == (2**31 - 1, 2**15 - 1)
        assert list(trace.attributes["clipped"]) == ["layer", "step"]
    if comm.rank == 0:
        assert main(["trace", "show", str(path)]) == 0
        words = capfd.readouterr().out.split()
        assert words[words.index("clipped") + 1] == '["layer",'
    comm.Barrier()
