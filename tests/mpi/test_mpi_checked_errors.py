"""Calls that raise an error on some ranks, or differ from rank to rank: nobody waits for ever."""

import threading
import warnings

import numpy as np
import pytest
from mpi4py import MPI
from planted import data, refused

import spimpi
from spimpi import Tag
from spimpi.checks import session as sessions

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.wheels]
ERROR = MPI.Exception(MPI.ERR_TRUNCATE)


class Raises:
    """A communicator whose calls raise an error on some ranks, after they ran."""

    def __init__(self, comm, ranks):
        self.comm, self.raises = comm, comm.rank in ranks

    def __getattr__(self, name):
        def run(*args):
            made = getattr(self.comm, name)(*args)
            if not self.raises:
                return made
            if made is not None:
                made.Wait()
            raise ERROR

        return run


def _calls(size):
    return {
        "Allgather": (np.ones(2), np.zeros(2 * size)),
        "Bcast": (np.ones(2), 0),
        "Allreduce": (np.ones(2), np.zeros(2)),
        "Reduce_scatter_block": (np.ones(2 * size), np.zeros(2)),
    }


def _expected(checked, failing, call):
    """Whether the call raised what it should: its own error, or one that names the failing rank."""
    if checked.comm.rank in failing:
        with pytest.raises(MPI.Exception) as caught:
            call()
        assert caught.value is ERROR
        return
    with pytest.raises(spimpi.UsageError, match=f"rank {failing[0]} takes no part") as caught:
        call()
    assert "nothing was checked" in str(caught.value)


@pytest.mark.parametrize("name", _calls(1))
@pytest.mark.parametrize("failing", [(0,), (1,), "all"], ids=str)
def test_an_error_of_some_ranks_is_told_to_the_others(comm, name, failing):
    failing = range(comm.size) if failing == "all" else failing
    checked = spimpi.checked(comm)
    for _ in range(2):
        checked.comm = Raises(comm, failing)
        checked.comm.rank = comm.rank
        _expected(checked, failing, lambda: getattr(checked, name)(*_calls(comm.size)[name]))
        checked.comm = comm
        getattr(checked, name)(*_calls(comm.size)[name])
        assert checked.verdict


@pytest.mark.parametrize("name", ["Iallgather", "Iallreduce", "Ibcast"])
def test_an_error_of_a_request_is_told_to_the_others(comm, name):
    """Between two others, which are checked all the same."""
    checked, args = spimpi.checked(comm), _calls(comm.size)[name[1:].capitalize()]
    before = checked.Iallgather(np.ones(1), np.zeros(comm.size))
    checked.comm = Raises(comm, (1,))
    checked.comm.rank = comm.rank

    def call():
        getattr(checked, name)(*args).Wait()

    if comm.rank == 1:
        _expected(checked, (1,), call)
    if comm.rank != 1:
        _expected(checked, (1,), call)
    checked.comm = comm
    after = checked.Iallgather(np.ones(1), np.zeros(comm.size))
    after.Wait()
    before.Wait()
    assert before.verdict and after.verdict


class Late:
    """A request that completes with an error."""

    def __init__(self, request):
        self.request = request

    def Test(self):
        if self.request.Test():
            raise ERROR
        return False

    def Wait(self):
        self.request.Wait()
        raise ERROR


@pytest.mark.parametrize("waits", ["Wait", "Test"])
def test_an_error_that_a_request_ends_with_is_told_to_the_others(comm, waits):
    checked = spimpi.checked(comm)
    request = checked.Iallgather(np.ones(1), np.zeros(comm.size))
    if comm.rank == 0:
        request._request = Late(request._request)

    def call():
        while not getattr(request, waits)():
            pass

    _expected(checked, (0,), call)
    checked.Bcast(np.ones(1), 0)
    assert checked.verdict


@pytest.mark.parametrize("name", ["Allreduce", "Iallreduce", "Reduce", "Ireduce_scatter_block"])
def test_an_operation_of_one_rank_alone_is_named(comm, name):
    """One that is checked beside one that is not: either way round."""
    checked, size = spimpi.checked(comm), comm.size
    for one, others in ((MPI.PROD, MPI.SUM), (MPI.SUM, MPI.BAND)):
        kind = int if MPI.BAND in (one, others) else float
        args = np.ones(2 * size, kind), np.zeros(2 if "block" in name else 2 * size, kind)

        def call(op=one if comm.rank == 0 else others, args=args):
            request = getattr(checked, name)(*args, op)
            if request is not None:
                request.Wait()

        names = [f"MPI.{'PROD' if op == MPI.PROD else 'SUM' if op == MPI.SUM else 'BAND'}"
                 for op in (one, others)]  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with refused(comm, f"rank 0 gave op {names[0]}; ranks? 1.* gave op {names[1]}"):
                call()
            total = np.zeros(2)
            checked.Allreduce(np.full(2, 2.0), total, MPI.PROD)
        assert (total == 2.0**size).all() and checked.verdict is None
    checked.Bcast(np.ones(1), 0)
    assert checked.verdict


def test_datatypes_that_differ_are_named_where_mpi_lets_them_pass(comm):
    checked, size = spimpi.checked(comm), comm.size
    last = comm.rank == size - 1
    with refused(comm, "gather of 'g'.*differ in dtype"):
        kind = MPI.INT64_T if last else MPI.DOUBLE
        checked.Allgather([np.ones(2), kind], [np.zeros(2 * size), kind], tag=Tag(name="g"))
    checked.Allgather(np.ones(2), np.zeros(2 * size))
    assert checked.verdict


def test_a_rank_that_leaves_a_batch_is_not_waited_for(comm):
    with spimpi.DistributedContext(comm) as ctx:
        checked = spimpi.checked(comm, ctx)
        for _ in range(2):
            checked.comm = Raises(comm, (1,))
            checked.comm.rank = comm.rank

            def batch():
                with ctx.batch():
                    checked.Allgather(np.ones(2), np.zeros(2 * comm.size))

            _expected(checked, (1,), batch)
            checked.comm = comm
            with ctx.batch():
                checked.Allgather(np.ones(2), np.zeros(2 * comm.size))
            assert checked.verdict


def test_a_rank_does_not_stay_for_others_that_never_come(comm, monkeypatch):
    monkeypatch.setattr(sessions, "PATIENCE", 0.05)
    part = comm.Dup()
    checked = spimpi.checked(part)
    if comm.rank == 0:
        checked.comm = Raises(MPI.COMM_SELF, (0,))
        with pytest.raises(MPI.Exception):
            checked.Bcast(np.ones(1), 0)
    else:
        with pytest.raises(spimpi.UsageError, match="rank 0 takes no part"):
            checked.comm = MPI.COMM_SELF
            checked.Bcast(np.ones(1), 0)
    comm.Barrier()
    part.Free()


def test_a_message_that_does_not_fit_takes_its_record_with_it(comm):
    checked, box = spimpi.checked(comm), np.zeros(4)
    for blocking in (True, False):
        if comm.rank == 0:
            checked.Send(np.arange(4.0), 1, 3)
            checked.Send(np.arange(4.0), 1, 3)
        elif comm.rank == 1:
            with pytest.raises(MPI.Exception) as caught:
                if blocking:
                    checked.Recv(box[:2], 0, 3)
                else:
                    checked.Irecv(box[:2], 0, 3).Wait()
            assert caught.value.Get_error_class() == MPI.ERR_TRUNCATE
            checked.Recv(box, 0, 3)
            assert checked.verdict and (box == np.arange(4)).all()


def _in_threads(n, work):
    """Run work(i) in n threads; their errors."""
    errors = []

    def run(i):
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


needs_threads = pytest.mark.skipif(
    MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="MPI without threads"
)


@needs_threads
@pytest.mark.parametrize("faulty", [False, True])
def test_threads_with_a_communicator_each_are_checked_each(comm, faulty):
    """Requests in any order, blocking calls, messages; a fault is of its thread alone."""
    n, size, rank = 3, comm.size, comm.rank
    worlds = [comm.Dup() for _ in range(n)]
    checked = [spimpi.checked(world, check=False) for world in worlds]
    seen = [[] for _ in range(n)]

    def work(i):
        c = checked[i]
        for step in range(12):
            x = data((500,), np.float32, 100 * i + step + rank)
            whole, total = np.empty((size, 500), np.float32), np.empty_like(x)
            if faulty and i == 1 and step == 5 and rank == 0:
                requests = [c.Iallgather(x, whole), c.Iallreduce(x, total)]
                x[7] += 1  # too early
            else:
                requests = [c.Iallgather(x, whole), c.Iallreduce(x, total)]
            for request in requests[:: 1 if (rank + i) % 2 else -1]:
                request.Wait()
            seen[i].append(bool(requests[0].verdict))
            c.Bcast(x, step % size)
            box = np.empty_like(x)
            c.Sendrecv(x, (rank + 1) % size, i, box, (rank - 1) % size, i)
            assert c.verdict, str(c.verdict)

    assert _in_threads(n, work) == []
    for i in range(n):
        expected = [not (faulty and i == 1 and step == 5) for step in range(12)]
        assert seen[i] == expected
    comm.Barrier()
    for world in worlds:
        world.Free()


@needs_threads
def test_threads_send_messages_of_other_tags_on_one_communicator(comm):
    checked, size, rank = spimpi.checked(comm), comm.size, comm.rank

    def work(i):
        for step in range(20):
            box = np.empty(50)
            sent = np.full(50, 1.0 * i + step)
            if rank % 2 and rank + 1 < size + rank % 2:
                checked.Recv(box, rank - 1, i)
                assert (box == sent).all()
            elif rank + 1 < size:
                checked.Send(sent, rank + 1, i)

    assert _in_threads(3, work) == []
