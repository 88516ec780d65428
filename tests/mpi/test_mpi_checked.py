"""The wrapper: collectives as mpi4py has them, with the check that follows."""

import numpy as np
import pytest
from mpi4py import MPI
from planted import corruption, data, refused, worlds

import spimpi
from spimpi import Tag
from spimpi.checks.buffers import message_of

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)


class Faulty:
    """A communicator whose collectives spoil one rank's receive buffer."""

    def __init__(self, comm, victim):
        self.comm, self.victim = comm, victim

    def spoil(self, buffer):
        if self.comm.rank == self.victim and buffer is not MPI.IN_PLACE and buffer is not None:
            flat = message_of(buffer).data
            flat[0] += 1

    def __getattr__(self, name):
        call = getattr(self.comm, name)

        def run(*args):
            result = call(*args)
            if name.startswith("I"):
                return Late(result, lambda: self.spoil(args[0 if name == "Ibcast" else 1]))
            self.spoil(args[0 if name == "Bcast" else 1])
            return result

        passes = name in ("Dup", "Get_attr", "Set_attr") or not name[0].isupper()
        return call if passes else run


class Late:
    """A request whose data come out spoilt when it is complete."""

    def __init__(self, request, spoil):
        self.request, self.spoil = request, spoil

    def Wait(self):
        self.request.Wait()
        self.spoil()

    def Test(self):
        done = self.request.Test()
        if done:
            self.spoil()
        return done


def spoilt(checked, victim):
    """The same wrapper over a communicator with a fault."""
    checked.comm = Faulty(checked.comm, victim)
    return checked


def calls(comm):
    """name -> (the call, with its arguments made anew, what its receive buffer must hold)."""
    size, rank = comm.size, comm.rank
    counts = [(2 - r) % 3 for r in range(size)]
    gaps = [sum(counts[:r]) + r for r in range(size)]
    own = np.arange(3.0) + 10 * rank
    everyone = np.concatenate([np.arange(3.0) + 10 * r for r in range(size)])
    uneven = [np.arange(float(n)) + 10 * r for r, n in enumerate(counts)]
    spaced = np.full(sum(counts) + size, -1.0)
    for place, block in zip(gaps, uneven):
        spaced[place : place + block.size] = block
    pieces = np.arange(2.0 * size) + 100 * rank
    exchanged = np.concatenate([np.arange(2 * rank, 2 * rank + 2) + 100.0 * r for r in range(size)])
    send_counts = [(rank + r) % 3 for r in range(size)]
    root = size - 1
    whole = data((3 * size,), np.float64)
    at_root = rank == root

    def empty(n):
        return np.full(n, -1.0)

    def v(buffer, n, places=None):
        places = [sum(n[:r]) for r in range(len(n))] if places is None else places
        return [buffer, n, places, MPI.DOUBLE]

    sent_v = np.concatenate([np.full(n, 10.0 * rank + r) for r, n in enumerate(send_counts)])
    got_v = np.concatenate([np.full((rank + r) % 3, 10.0 * r + rank) for r in range(size)])
    spread = [np.arange(float(n)) + 10 * r for r, n in enumerate(counts)]
    sums = size * np.arange(3.0) + 10 * sum(range(size))
    return {
        "Allgather": ((own, empty(3 * size)), everyone),
        "Iallgather": (([own, MPI.DOUBLE], [empty(3 * size), 3, MPI.DOUBLE]), everyone),
        "Allgatherv": ((uneven[rank], v(empty(spaced.size), counts, gaps)), spaced),
        "Iallgatherv": ((uneven[rank], v(empty(sum(counts)), counts)), np.concatenate(uneven)),
        "Bcast": ((whole.copy() if at_root else empty(whole.size), root), whole),
        "Ibcast": (([whole.copy() if at_root else empty(whole.size), MPI.DOUBLE], root), whole),
        "Gather": ((own, empty(3 * size) if at_root else None, root), everyone),
        "Gatherv": ((uneven[rank], v(empty(spaced.size), counts, gaps) if at_root else None, root),
                    spaced),
        "Scatter": ((whole if at_root else None, empty(3), root), whole[3 * rank :][:3]),
        "Scatterv": ((v(np.concatenate(spread), counts) if at_root else None,
                      empty(counts[rank]), root), spread[rank]),
        "Alltoall": ((pieces, empty(2 * size)), exchanged),
        "Ialltoall": ((pieces, empty(2 * size)), exchanged),
        "Alltoallv": ((v(sent_v, send_counts), v(empty(got_v.size), send_counts)), got_v),
        "Allreduce": ((own, empty(3)), sums),
        "Iallreduce": ((own, empty(3), MPI.SUM), sums),
    }  # fmt: skip


NAMES = ["Allgather", "Iallgather", "Allgatherv", "Iallgatherv", "Bcast", "Ibcast", "Gather",
         "Gatherv", "Scatter", "Scatterv", "Alltoall", "Ialltoall", "Alltoallv", "Allreduce",
         "Iallreduce"]  # fmt: skip


def _target(name, args):
    return args[0] if "cast" in name else args[1]


@pytest.mark.parametrize("name", NAMES)
def test_clean_calls_give_what_mpi_gives_and_hold(comm, name):
    for part in worlds(comm):
        checked = spimpi.checked(part)
        for _ in range(2):
            args, expected = calls(part)[name]
            request = getattr(checked, name)(*args)
            if name.startswith("I"):
                request.Wait()
            verdict = request.verdict if name.startswith("I") else checked.verdict
            assert verdict, str(verdict)
            target = _target(name, args)
            if target is not None:
                np.testing.assert_array_equal(message_of(target).data, expected)


@two
@pytest.mark.parametrize("name", NAMES)
def test_a_spoilt_receive_buffer_is_found_on_the_rank_that_has_it(comm, name):
    for part in worlds(comm, 2):
        victim = part.size - 1 if "ather" in name and "ll" not in name else 0
        checked = spoilt(spimpi.checked(part), victim)
        args, _ = calls(part)[name]
        with pytest.raises(spimpi.CorruptionError) as caught:
            request = getattr(checked, name)(*args)
            request.Wait()
        if "reduce" not in name.lower():
            assert caught.value.verdict.where.rank == victim, str(caught.value)
            assert caught.value.verdict.where.tensor == name
        texts = part.allgather(str(caught.value))
        assert len(set(texts)) == 1


def test_in_place_calls_are_checked_against_what_was_there_before(comm):
    for part in worlds(comm):
        size, rank = part.size, part.rank
        for faulty in (False, True):
            checked = spimpi.checked(part)
            if faulty:
                spoilt(checked, 0)
            whole = data((2 * size,), np.float64)
            calls_in_place = []
            for name in ("Allgather", "Alltoall"):
                buffer = np.zeros(2 * size)
                if name == "Alltoall":
                    buffer[:] = np.arange(2 * size) + 100 * rank
                buffer[2 * rank : 2 * rank + 2] = whole[2 * rank : 2 * rank + 2]
                calls_in_place.append((name, (MPI.IN_PLACE, buffer)))
            gathered = np.zeros(2 * size)
            gathered[:2] = whole[:2]
            own = whole[2 * rank : 2 * rank + 2].copy()
            calls_in_place.append(
                ("Gather", (MPI.IN_PLACE, gathered, 0) if rank == 0 else (own, None, 0))
            )
            for name, args in calls_in_place:
                if not faulty:
                    getattr(checked, name)(*args)
                    assert checked.verdict
                    continue
                with corruption(part, 0, name):
                    getattr(checked, name)(*args)
        checked = spimpi.checked(part)
        received = np.zeros(2)
        if rank == 0:
            checked.Scatter(whole, MPI.IN_PLACE, 0)
        else:
            checked.Scatter(None, received, 0)
            np.testing.assert_array_equal(received, whole[2 * rank :][:2])
        assert checked.verdict
        total = np.arange(4.0) + rank
        checked.Allreduce(MPI.IN_PLACE, total)
        assert checked.verdict
        counts = [1] * size
        for call in (
            lambda c, b: c.Reduce_scatter(MPI.IN_PLACE, b, counts),
            lambda c, b: c.Reduce_scatter_block(MPI.IN_PLACE, b),
        ):
            call(checked, np.arange(float(size)) + rank)
            assert checked.verdict


def test_reduce_scatters_are_checked(comm):
    for part in worlds(comm):
        size, rank = part.size, part.rank
        counts = [r + 1 for r in range(size)]
        for faulty in (False, True):
            checked = spimpi.checked(part, check=False)
            if faulty:
                spoilt(checked, 0)
            own = np.arange(float(sum(counts))) + rank
            out = np.zeros(counts[rank])
            checked.Reduce_scatter(own, out, counts)
            assert bool(checked.verdict) is not faulty
            checked.Reduce_scatter(own, out)
            assert bool(checked.verdict) is not faulty
            out = np.zeros(2)
            checked.Reduce_scatter_block(np.arange(2.0 * size) * rank, out)
            assert bool(checked.verdict) is not faulty


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
def test_calls_name_their_tensors_by_kind_and_number_or_by_tag(comm):
    checked = spimpi.checked(comm, check=False)
    start = checked._session.calls
    victim = comm.size - 1
    spoilt(checked, victim)

    def where():
        checked.Allgather(np.ones(2), np.zeros(2 * comm.size))
        return checked.verdict.where

    found = [where(), where()]
    assert [w.tensor for w in found] == ["Allgather"] * 2
    assert [w.step for w in found] == [start + 1, start + 2]
    with checked.tagged(Tag(name="kv", layer=2, step=7)):
        found = [where(), where()]
    assert [(w.tensor, w.layer, w.step) for w in found] == [("kv", 2, 7), ("kv", 2, 8)]
    checked.Bcast(np.ones(3), tag=Tag(name="mine", step=4))
    assert (checked.verdict.where.tensor, checked.verdict.where.step) == ("mine", 4)
    assert where().tensor == "Allgather"


def test_everything_else_is_the_communicators_own(comm):
    checked = spimpi.checked(comm)
    assert (checked.rank, checked.size, checked.Get_size()) == (comm.rank, comm.size, comm.size)
    assert checked.allreduce(1) == comm.size


def test_derived_datatypes_are_refused_by_name_on_all_ranks(comm):
    pairs = MPI.DOUBLE.Create_contiguous(2).Commit()
    checked, last = spimpi.checked(comm), comm.rank == comm.size - 1
    out = np.zeros(2 * comm.size)
    own = [np.ones(2), 1, pairs] if last else np.ones(2)
    with refused(comm, f"rank {comm.size - 1}: checked collectives take predefined datatypes"):
        checked.Allgather(own, out)
    pairs.Free()
    checked.Allgather(np.ones(2), out)
    assert checked.verdict


@two
def test_messages_are_checked_by_who_receives_them(comm):
    checked, rank, size = spimpi.checked(comm), comm.rank, comm.size
    after, before = (rank + 1) % size, (rank - 1) % size
    for n in (3, 5):
        sent, box = np.arange(float(n)) + rank, np.zeros(8)
        request = checked.Isend(sent, after, 4)
        status = MPI.Status()
        checked.Recv(box, MPI.ANY_SOURCE, MPI.ANY_TAG, status)
        request.Wait()
        assert checked.verdict and status.source == before and status.Get_count(MPI.DOUBLE) == n
        np.testing.assert_array_equal(box[:n], np.arange(n) + before)
    request = checked.Irecv(box, before, 4)
    checked.Send(sent, after, 4)
    request.Wait()
    first, second = checked.Irecv(box, before, 4), checked.Irecv(np.zeros(8), before, 4)
    for n in (1, 2):
        checked.Send(sent[:n], after, 4)
    while not second.Test():
        pass
    first.Wait()
    checked.Sendrecv(sent, after, 1, box, before, 1)
    assert checked.verdict
    checked.Sendrecv(sent, MPI.PROC_NULL, 1, box, MPI.PROC_NULL, 1)
    with pytest.raises(spimpi.UsageError, match="needs a source"):
        checked.Irecv(box)


@two
def test_a_message_that_changed_or_was_dropped_is_found_by_its_receiver(comm):
    checked = spimpi.checked(comm)
    if comm.rank == 0:
        checked.Send(np.arange(4.0), 1, 3)
        lost = np.arange(4.0)
        checked.Send(lost, 1, 5)
        checked.Send(lost + 1, 1, 5)
        checked.Send(lost, 1, 6)
    if comm.rank == 1:
        box = np.zeros(4)
        checked.comm = Touched(comm)
        with pytest.raises(spimpi.CorruptionError, match="contents changed") as caught:
            checked.Recv(box, 0, 3)
        assert caught.value.verdict.where.rank == 1
        checked.comm = comm
        comm.Recv(box, 0, 5)  # somebody else takes the message that was meant for the wrapper
        with pytest.raises(spimpi.CorruptionError, match="contents changed"):
            checked.Recv(box, 0, 5)
        with pytest.raises(spimpi.UsageError, match="sent dtype float64, rank 1 receives float32"):
            checked.Recv(np.zeros(8, np.float32), 0, 6)
        checked._requests.comm.Recv(np.zeros(40, np.uint8), 0, 5)


class Touched:
    def __init__(self, comm):
        self.comm, self.rank = comm, comm.rank

    def Recv(self, buf, *args):
        self.comm.Recv(buf, *args)
        buf[1] += 1


def test_calls_in_a_batch_are_pending(comm):
    with spimpi.DistributedContext(comm) as ctx:
        checked = spimpi.checked(comm, ctx)
        with ctx.batch():
            checked.Allgather(np.ones(2), np.zeros(2 * comm.size))
            first = checked.verdict
            checked.Bcast(np.ones(2))
            with pytest.raises(spimpi.UsageError, match="pending"):
                bool(first)
        assert first and checked.verdict
        spoilt(checked, 0)
        with corruption(comm, 0, "Allgather"):
            with ctx.batch():
                checked.Allgather(np.ones(2), np.zeros(2 * comm.size))
                checked.Bcast(np.ones(2))


@two
def test_a_wrapper_made_anew_for_each_message_counts_on(comm):
    for part in worlds(comm, 2):
        for i in range(3):
            if part.rank == 0:
                spimpi.checked(part).Send(np.full(5, i), 1)
            elif part.rank == 1:
                received = np.empty(5, int)
                checked = spimpi.checked(part)
                checked.Recv(received, 0)
                assert checked.verdict and (received == i).all()
        session = spimpi.checked(part)._session
        assert len(session.under_way) <= 1  # kept until sent, by the communicator


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
