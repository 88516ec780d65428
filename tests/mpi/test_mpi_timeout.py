"""Contexts with a timeout: a check that not all ranks come to is given up, and says who is missing."""

import time
import warnings

import numpy as np
import pytest
from mpi4py import MPI
from planted import data, refused, same_on_all

import spimpi
from spimpi import Tag

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.wheels,
    pytest.mark.skipif(MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="MPI without threads"),
]
two = pytest.mark.mpi(min_size=2)
three = pytest.mark.mpi(min_size=3)
TIMEOUT = 2.0  # also the time that a rank has to come to its check, on a busy machine


def _given_up(comm, missing, call, *words):
    """All ranks but ``missing`` are in ``call``, which gives up on each of them."""
    comm.Barrier()
    if comm.rank in missing:
        somewhere_else(comm)
    else:
        with pytest.raises(spimpi.IncompleteError) as caught:
            call()
        text = str(caught.value)
        for word in words:
            assert word in text, text
        _reached(comm, missing)


def somewhere_else(comm):
    """Not in any check, until the others have given up."""
    while not comm.Iprobe(tag=77):
        time.sleep(0.01)
    comm.recv(tag=77)


def _reached(comm, missing):
    if comm.rank == min(set(range(comm.size)) - set(missing)):
        for rank in missing:
            comm.send(None, rank, 77)


def _left(comm, context):
    """Leave it as an exception does: the ranks of a broken context free nothing together."""
    context.__exit__(spimpi.IncompleteError, spimpi.IncompleteError(), None)
    context.attendance.stop()
    comm.Barrier()


@two
@pytest.mark.parametrize("kind", ["lone", "batch", "request"])
def test_a_rank_that_never_comes_is_named_with_its_place(comm, kind):
    ctx = spimpi.DistributedContext(comm, timeout=TIMEOUT)
    tag, last = Tag(name="hidden", step=3, layer=5), comm.size - 1
    if kind == "request":
        checked = spimpi.checked(comm, ctx)
        request = checked.Iallgather(np.ones(1), np.zeros(comm.size), tag=tag)

    def call():
        if kind == "lone":
            spimpi.verify_replicas(comm, np.ones(3), tag, ctx=ctx)
        elif kind == "batch":
            with ctx.batch():
                spimpi.verify_replicas(comm, np.ones(3), tag, ctx=ctx)
                spimpi.verify_broadcast(comm, np.ones(3), tag, ctx=ctx)
        else:
            request.Wait()

    others = "ranks" + ",".join(f" {r}" for r in range(last)) + " wait" if last > 1 else "rank 0 waits"
    _given_up(
        comm, (last,), call, "of 'hidden', step 3, layer 5", f"{others} in it",
        f"not in it: rank {last} in somewhere_else (test_mpi_timeout.py:", "waits in no check",
    )  # fmt: skip
    # The rank that comes late learns it too, and nothing hangs.
    while ctx.attendance.error is None:
        time.sleep(0.01)
    with pytest.raises(spimpi.IncompleteError, match="given up after"):
        spimpi.verify_replicas(comm, np.ones(3), tag, ctx=ctx)
    _left(comm, ctx)


@three
@pytest.mark.parametrize("first", [False, True])
def test_ranks_in_another_check_are_named_with_it(comm, first):
    """Rank 0 compares over a group, the others over the world."""
    ctx = spimpi.DistributedContext(comm, timeout=TIMEOUT)
    group = comm.Split(0 if comm.rank < 3 else 1, comm.rank)
    if not first:
        spimpi.verify_replicas(group, np.ones(3), Tag(name="norm"), ctx=ctx)
    comm.Barrier()
    with pytest.raises(spimpi.IncompleteError) as caught:
        if comm.rank == 0:
            spimpi.verify_replicas(group, np.ones(3), Tag(name="norm", step=1), ctx=ctx)
        else:
            spimpi.verify_replicas(comm, np.ones(3), Tag(name="cache", step=2), ctx=ctx)
    text = str(caught.value)
    over_group = "the first check over" if first else "replicas of 'norm', step 1"
    assert over_group in text and "replicas of 'cache', step 2" in text
    _left(comm, ctx)


@two
def test_a_hand_off_whose_other_end_never_comes_is_given_up(comm):
    ctx = spimpi.DistributedContext(comm, timeout=TIMEOUT)
    text = ""
    if comm.rank == 0:
        with pytest.raises(spimpi.IncompleteError, match="not in it: rank 1") as caught:
            spimpi.verify_pipeline_handoff(comm, np.ones(3), 0, 1, Tag(name="act"), ctx=ctx)
        text = str(caught.value)
        _reached(comm, range(1, comm.size))
    else:
        somewhere_else(comm)
    text = comm.bcast(text)
    assert "pipeline hand-off of 'act'" in text
    _left(comm, ctx)


def test_checks_in_time_are_as_without_a_timeout(comm):
    """Also where ranks come late, but not too late; and failures are failures."""
    with spimpi.DistributedContext(comm, timeout=20 * TIMEOUT) as ctx:
        checked = spimpi.checked(comm, ctx)
        for step in range(3):
            if comm.rank == step % comm.size:
                time.sleep(0.2)
            checked.Allgather(np.ones(2), np.zeros(2 * comm.size))
            request = checked.Iallreduce(np.ones(2), np.zeros(2))
            with ctx.batch():
                verdict = spimpi.verify_replicas(comm, np.ones(3), Tag(name="x", step=step), ctx=ctx)
            request.Wait()
            assert verdict and checked.verdict and request.verdict
        if comm.size > 1:
            with pytest.raises(spimpi.CorruptionError) as caught:
                wrong = data((4,)) + (comm.rank == 0)
                spimpi.verify_replicas(comm, wrong, Tag(name="y"), ctx=ctx)
            same_on_all(comm, str(caught.value))
    spimpi.verify_replicas(comm, np.ones(3), Tag(name="after"))


def test_a_timeout_is_a_number_of_seconds_that_all_give(comm):
    for wrong in (0, -1, True, "10", float("nan")):
        with refused(comm, "timeout= is a number of seconds above 0"):
            spimpi.DistributedContext(comm, timeout=wrong)
    if comm.size > 1:
        with refused(comm, "the same timeout=; found rank 0: timeout 1; rank 1: timeout None"):
            spimpi.DistributedContext(comm, timeout=1 if comm.rank == 0 else None)
        with refused(comm, "the same timeout=; found rank 0: timeout 1; rank 1: timeout True"):
            spimpi.DistributedContext(comm, timeout=True if comm.rank == 1 else 1)
        with spimpi.DistributedContext(comm, timeout=(60, 60.0, np.float32(60))[comm.rank % 3]):
            pass


@two
def test_a_rank_that_left_by_an_error_is_named_so(comm):
    ctx = spimpi.DistributedContext(comm, timeout=TIMEOUT)
    comm.Barrier()
    if comm.rank == 1:
        with pytest.raises(KeyError), ctx:
            raise KeyError
        somewhere_else(comm)
    else:
        with pytest.raises(spimpi.IncompleteError, match="rank 1 has left the context by KeyError"):
            with warnings.catch_warnings(), ctx:
                spimpi.verify_replicas(comm, np.ones(3), Tag(name="x"), ctx=ctx)
        _reached(comm, (1,))
    ctx.attendance.stop()
    comm.Barrier()


class _Ending:
    """A communicator by which no job is ended: it keeps the status instead."""

    def __init__(self, comm):
        self.comm, self.status = comm, None

    def Abort(self, status):
        self.status = status

    def __getattr__(self, name):
        return getattr(self.comm, name)


@two
def test_a_rank_inside_mpi_is_ended_where_another_one_gave_up_before_it(comm, capfd):
    ctx = spimpi.DistributedContext(comm, timeout=TIMEOUT)
    attendance = ctx.attendance
    ending = attendance._comm = _Ending(attendance._comm)
    comm.Barrier()
    if comm.rank == 0:
        with pytest.raises(spimpi.IncompleteError, match="waits in Allgather of 'x'"):
            spimpi.verify_replicas(comm, np.ones(3), Tag(name="a"), ctx=ctx)
    else:
        with attendance.waiting("Allgather of 'x'", comm, breakable=False):
            end = time.monotonic() + 15 * TIMEOUT
            while ending.status is None and time.monotonic() < end:
                time.sleep(0.01)
        assert ending.status == 3
        assert "spimpi: replicas of 'a', step 0: given up after" in capfd.readouterr().err
    _left(comm, ctx)


@three
def test_a_handoff_that_is_given_up_is_its_two_ends_affair(comm):
    ctx = spimpi.DistributedContext(comm, timeout=TIMEOUT)
    if comm.rank == 0:
        with pytest.raises(spimpi.IncompleteError, match="not in it: rank 1 in [^;]*$"):
            spimpi.verify_pipeline_handoff(comm, np.ones(3), 0, 1, Tag(name="act"), ctx=ctx)
        _reached(comm, range(1, comm.size))
    else:
        somewhere_else(comm)
        while comm.rank == 1 and ctx.attendance.error is None:  # its thread looks now and then
            time.sleep(0.01)
        assert comm.rank == 1 or ctx.attendance.error is None
    _left(comm, ctx)


@two
def test_a_rank_that_asks_for_the_block_lengths_of_a_reduce_scatter_is_not_left_alone(comm):
    ctx = spimpi.DistributedContext(comm, timeout=TIMEOUT)
    checked = spimpi.checked(comm, ctx)
    x = np.arange(2.0 * comm.size)
    checked.Reduce_scatter(x, np.empty(2))
    assert checked.verdict
    _given_up(
        comm, (1,), lambda: checked.Reduce_scatter(x, np.empty(2)),
        "the block lengths of a reduce-scatter: given up", "not in it: rank 1 in somewhere_else",
    )  # fmt: skip
    _left(comm, ctx)


@two
def test_a_rank_that_left_the_context_normally_is_named_so_and_learns_it(comm):
    ctx = spimpi.DistributedContext(comm, timeout=TIMEOUT)
    comm.Barrier()
    with pytest.raises(spimpi.IncompleteError, match="rank 0 has left the context"):
        with warnings.catch_warnings(), ctx:
            if comm.rank:
                spimpi.verify_replicas(comm, np.ones(3), Tag(name="x"), ctx=ctx)
    ctx.attendance.stop()
    comm.Barrier()
