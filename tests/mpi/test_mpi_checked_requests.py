"""The wrapper's requests: complete in any order on any rank, as MPI's are, and checked."""

import numpy as np
import pytest
from mpi4py import MPI
from planted import Faulty, corruption, spoilt, worlds

import spimpi

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)


def test_requests_may_be_waited_for_in_any_order_on_any_rank(comm):
    """Blocking calls come in between; the checks run in the order of the calls all the same."""
    for part in worlds(comm):
        checked = spimpi.checked(part)
        n = 4
        out = [np.zeros(3 * part.size) for _ in range(n)]
        requests = [checked.Iallgather(np.full(3, 1.0 * i + part.rank), out[i]) for i in range(n)]
        order = np.random.default_rng(part.rank).permutation(n)
        requests[order[0]].Test()
        checked.Bcast(np.ones(2), 0)
        for i in order:
            requests[i].Wait()
            assert requests[i].verdict
            assert requests[i].Test()
        last = checked.Ibcast(np.ones(3), 0)
        while not last.Test():
            pass
        assert last.verdict


@two
def test_a_failed_request_raises_when_it_is_waited_for_and_not_before(comm):
    checked = spimpi.checked(comm)
    inner, checked.comm = checked.comm, Faulty(checked.comm, 1)
    first = checked.Iallgather(np.ones(2), np.zeros(2 * comm.size))
    checked.comm = inner
    second = checked.Iallgather(np.ones(2), np.zeros(2 * comm.size))
    second.Wait()
    assert second.verdict and not first.verdict
    with corruption(comm, 1, "Iallgather"):
        first.Wait()


@two
def test_two_wrappers_of_a_communicator_share_the_order_of_their_requests(comm):
    for part in worlds(comm, 2):
        first, second = (np.empty(part.size) for _ in range(2))
        own = np.full(1, float(part.rank))
        a = spimpi.checked(part).Iallgather(own, first)
        b = spimpi.checked(part).Iallgather(own, second)
        for request in (a, b) if part.rank % 2 else (b, a):
            request.Wait()
        assert a.verdict and b.verdict


@two
def test_ranks_wait_in_opposite_orders_on_two_communicators(comm):
    second = comm.Dup()
    worlds_, n = (spimpi.checked(comm), spimpi.checked(second)), comm.size
    for call in ("Iallgather", "Iallreduce"):
        size = 2 * n if call == "Iallgather" else 2
        out = [np.zeros(size), np.zeros(size)]
        requests = [getattr(w, call)(np.ones(2), o) for w, o in zip(worlds_, out)]
        for i in (0, 1) if comm.rank % 2 else (1, 0):
            requests[i].Wait()
            assert requests[i].verdict
    second.Free()


@two
@pytest.mark.parametrize("call", ["Iallgather", "Iallreduce"])
def test_a_rank_waits_for_a_message_of_one_that_waits_for_its_request(comm, call):
    """Legal in MPI: rank 0 waits, then sends; the others receive, then wait."""
    checked, box = spimpi.checked(comm), np.zeros(1)
    large = np.zeros(1 << 18)
    request = getattr(checked, call)(np.ones(1), np.zeros(comm.size if "gather" in call else 1))
    if comm.rank == 0:
        request.Wait()
        for other in range(1, comm.size):
            checked.Send(np.ones(1), other)
            checked.Recv(large, other)
    else:
        checked.Recv(box, 0)
        checked.Ssend(large, 0)
        request.Wait()
    assert request.verdict


@two
@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("call", ["Iallgather", "Iallreduce"])
def test_some_ranks_wait_before_a_blocking_collective_and_some_after(comm, call, faulty):
    checked = spimpi.checked(comm, check=False)
    inner = checked.comm
    if faulty:
        spoilt(checked, 1)
    request = getattr(checked, call)(np.ones(2), np.zeros(2 * comm.size if "gather" in call else 2))
    checked.comm = inner
    later = checked.Ibcast(np.ones(2), 0)
    if comm.rank == 0:
        request.Wait()
    checked.Bcast(np.ones(2), 0)
    checked.Barrier()
    later.Wait()
    request.Wait()
    assert checked.verdict and later.verdict and bool(request.verdict) is not faulty


@two
@pytest.mark.parametrize("call", ["Iallgather", "Iallreduce"])
def test_test_does_not_wait_for_ranks_that_are_elsewhere(comm, call):
    """The others are in a call that the wrapper does not see until rank 0 has tested in vain."""
    checked, box = spimpi.checked(comm), np.zeros(1)
    request = getattr(checked, call)(np.ones(1), np.zeros(comm.size if "gather" in call else 1))
    if comm.rank == 0:
        for _ in range(300):
            assert not request.Test()
        for other in range(1, comm.size):
            comm.Send(box, other)
    else:
        comm.Recv(box, 0)
    while not request.Test():
        pass
    assert request.verdict and request.Test() and not request


@two
def test_lists_of_requests_complete_as_mpis_do(comm):
    checked, size = spimpi.checked(comm), comm.size
    after, before = (comm.rank + 1) % size, (comm.rank - 1) % size
    R = spimpi.CheckedRequest

    def start():
        box, out, total, own = np.zeros(2), np.zeros(size), np.zeros(1), np.full(1, 1.0 + comm.rank)
        requests = [
            checked.Irecv(box, before, 1), checked.Iallgather(own, out), comm.Ibarrier(),
            checked.Isend(np.arange(2.0) + comm.rank, after, 1), checked.Iallreduce(own, total),
        ]  # fmt: skip
        return requests, lambda: (box[0], out[before], total[0]) == (
            before, before + 1, size * (size + 1) / 2,
        )

    requests, arrived = start()
    statuses = []
    assert R.Waitall(requests, statuses) and arrived()
    assert statuses[0].source == before and statuses[0].Get_count(MPI.DOUBLE) == 2
    assert R.Waitany(requests) == MPI.UNDEFINED and R.Waitsome(requests) is None
    assert R.Testany(requests) == (MPI.UNDEFINED, True) and R.Testall(requests)
    requests, arrived = start()
    while not requests[1].Testall(requests):
        pass
    assert arrived() and not any(requests)
    requests, arrived = start()
    assert sorted(R.Waitany(requests) for _ in requests) == [0, 1, 2, 3, 4] and arrived()
    requests, arrived = start()
    found = []
    while (done := R.Waitsome(requests)) is not None:
        found += done
    assert sorted(found) == [0, 1, 2, 3, 4] and arrived()
    requests, _ = start()
    with pytest.raises(TypeError, match="CheckedReceive"):
        MPI.Request.Waitall(requests)
    while (done := R.Testsome(requests)) is not None:
        pass
    assert all(r.verdict for r in requests if isinstance(r, R) and hasattr(r, "_check"))


@two
def test_of_a_list_all_complete_and_the_first_failure_is_raised(comm):
    checked = spimpi.checked(comm)
    inner = checked.comm
    spoilt(checked, 1)
    first = checked.Iallgather(np.ones(2), np.zeros(2 * comm.size))
    checked.comm = inner
    second = checked.Ibcast(np.ones(2), 0)
    with corruption(comm, 1, "Iallgather"):
        second.Waitall([first, second])
    assert second.verdict and not first and not second


@pytest.mark.parametrize("timeout", [None, 60])
def test_requests_may_be_waited_for_after_their_context(comm, timeout):
    for faulty in (False, comm.size > 1):
        with spimpi.DistributedContext(comm, timeout=timeout) as ctx:
            checked = spimpi.checked(comm, ctx)
            if faulty:
                checked.comm = Faulty(checked.comm, 1)
            request = checked.Iallgather(np.ones(2), np.zeros(2 * comm.size))
        if faulty:
            with corruption(comm, 1, "Iallgather"):
                request.Wait()
        else:
            request.Wait()


def test_requests_that_nobody_waits_for_go_with_their_communicator(comm):
    other = comm.Dup()
    request = spimpi.checked(other).Iallgather(np.ones(1), np.zeros(comm.size))
    other.Barrier()
    other.Free()
    with pytest.raises(spimpi.UsageError, match="was freed"):
        request.Wait()
    mine = spimpi.checked(comm).Ibcast(np.ones(1), 0)
    mine.Wait()
    assert mine.verdict


@two
@pytest.mark.parametrize("case", ["faulty", "maximum", "NaN"])
def test_a_rank_waits_for_a_message_of_one_whose_check_exchanges_more(comm, case):
    """Rank 0 waits, then sends; the others receive (Recv, Irecv and Waitany), then wait."""
    for part in worlds(comm, 2):
        checked, box = spimpi.checked(part, check=False), np.zeros(1)
        own, op = np.full(2, 1.0 + part.rank), MPI.MAX if case == "maximum" else MPI.SUM
        own[1] = np.nan if case == "NaN" else own[1]
        inner = checked.comm
        if case == "faulty":
            spoilt(checked, 1)
        request = checked.Iallreduce(own, np.zeros(2), op)
        checked.comm = inner
        if part.rank == 0:
            request.Wait()
            for other in range(1, part.size):
                checked.Send(np.ones(1), other)
        elif part.rank == 1:
            checked.Recv(box, 0)
        else:
            assert spimpi.CheckedRequest.Waitany([checked.Irecv(box, 0, 0)]) == 0
        request.Wait()
        assert bool(request.verdict) is (case != "faulty")


@two
def test_a_handoff_and_an_exact_sum_come_between_a_failing_request_and_its_wait(comm):
    """Rank 0 waits first, the others last."""
    checked, tag = spimpi.checked(comm, check=False), spimpi.Tag(name="between")
    inner = checked.comm
    if comm.rank < 2:  # a pair's first hand-off makes a communicator, and MPI waits for that
        spimpi.verify_pipeline_handoff(comm, np.ones(3), 0, 1, tag)
    requests = []
    for _ in range(2):
        spoilt(checked, 1)
        requests.append(checked.Iallgather(np.ones(2), np.zeros(2 * comm.size)))
        checked.comm = inner
        if comm.rank == 0:
            requests[-1].Wait()
        if len(requests) == 1 and comm.rank < 2:
            assert spimpi.verify_pipeline_handoff(comm, np.ones(3), 0, 1, tag)
        if len(requests) == 2:
            assert spimpi.exact_allreduce(comm, np.ones(2))[1] == comm.size
        requests[-1].Wait()
        assert not requests[-1].verdict and requests[-1].verdict.where.rank == 1


def exchanging(checked, case):
    """A request whose check exchanges more than one record: several times where it is faulty."""
    own, size = np.full(2, 1.0 + checked.comm.rank), checked.comm.size
    own[1] = np.nan if case == "NaN" else own[1]
    inner = checked.comm
    if case == "faulty":
        spoilt(checked, 1)
        request = checked.Iallgather(own, np.zeros(2 * size))
        checked.comm = inner
        return request
    return checked.Iallreduce(own, np.zeros(2), MPI.MAX if case == "maximum" else MPI.SUM)


@two
@pytest.mark.parametrize("case", ["faulty", "maximum", "NaN"])
def test_ranks_wait_in_opposite_orders_on_communicators_whose_checks_exchange_more(comm, case):
    """Two requests on each of two communicators; even ranks wait for one first, odd for the other."""
    second = comm.Dup()
    both = [spimpi.checked(one, check=False) for one in (comm, second)]
    for _ in range(3):
        requests = [exchanging(checked, case) for checked in both for _ in range(2)]
        for request in requests if comm.rank % 2 else reversed(requests):
            request.Wait()
            assert bool(request.verdict) is (case != "faulty")
    second.Free()


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("case", ["faulty", "maximum", "NaN"])
def test_a_ring_of_pairs_whose_checks_exchange_more(comm, case):
    """Each rank waits for its exchange with the next first, then for that with the one before."""
    checked = {}
    for low in range(comm.size):  # making and freeing a communicator waits for its ranks
        ends = low, (low + 1) % comm.size
        pair = comm.Split(0 if comm.rank in ends else MPI.UNDEFINED, comm.rank != low)
        if pair != MPI.COMM_NULL:
            checked[low] = spimpi.checked(pair, check=False)
    requests = {low: exchanging(one, case) for low, one in checked.items()}
    for low in (comm.rank, (comm.rank - 1) % comm.size):
        requests[low].Wait()
        assert bool(requests[low].verdict) is (case != "faulty")
    for low in sorted(checked):
        checked[low].comm.Free()
