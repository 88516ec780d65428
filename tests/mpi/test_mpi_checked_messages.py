"""The wrapper's messages between two ranks, which their receiver checks."""

import numpy as np
import pytest
from mpi4py import MPI
from planted import worlds

import spimpi

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.wheels]


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
        where = caught.value.verdict.where
        assert where.rank is None and where.recorded_by == 1  # the sender's buffer, or ours
        assert "rank 0's send buffer" in where.detail and "rank 1 received" in where.detail
        checked.comm = comm
        comm.Recv(box, 0, 5)  # somebody else takes the message that was meant for the wrapper
        with pytest.raises(spimpi.CorruptionError, match="contents changed"):
            checked.Recv(box, 0, 5)
        with pytest.raises(spimpi.UsageError, match="sent dtype float64, rank 1 receives float32"):
            checked.Recv(np.zeros(8, np.float32), 0, 6)
        checked._requests.comm.Recv(np.zeros(48, np.uint8), 0, 5)


class Touched:
    def __init__(self, comm):
        self.comm, self.rank = comm, comm.rank

    def Recv(self, buf, *args):
        self.comm.Recv(buf, *args)
        flat = buf[0].reshape(-1) if isinstance(buf, list) else buf
        flat[0] += 1


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


def test_every_kind_of_send_has_its_record(comm):
    checked, rank = spimpi.checked(comm), comm.rank
    sent, box = np.arange(4.0), np.zeros(4)
    MPI.Attach_buffer(bytearray(4096))
    names = ["Send", "Ssend", "Bsend", "Isend", "Issend", "Ibsend"]
    for name in names:
        if rank == 0:
            request = getattr(checked, name)(sent, 1, 2)
            assert request is None or request.Wait()
        elif rank == 1:
            box[:] = 0
            checked.Recv(box, 0, 2)
            assert checked.verdict and (box == sent).all()
    if rank < 2:
        request = checked.Irecv(box, 1 - rank, 3)
        comm.sendrecv(None, 1 - rank, source=1 - rank)  # both receives are there
        if rank:
            checked.Rsend(sent + 1, 0, 3)
        else:
            checked.Irsend(sent + 1, 1, 3).Wait()
        request.Wait()
        assert request.verdict and (box == sent + 1).all()
    MPI.Detach_buffer()


def test_replacing_exchanges_are_checked_also_with_requests_under_way(comm):
    checked, size = spimpi.checked(comm), comm.size
    after, before = (comm.rank + 1) % size, (comm.rank - 1) % size
    columns = MPI.DOUBLE.Create_vector(3, 1, 4).Commit()
    for waiting in (False, True):
        request = checked.Iallgather(np.ones(1), np.zeros(size)) if waiting else None
        block = np.full((3, 4), float(comm.rank))
        checked.Sendrecv_replace(block, after, 1, before, 1)
        assert checked.verdict and (block == before).all()
        checked.Sendrecv_replace([block, 1, columns], after, 1, before, 1)
        assert checked.verdict and (block[:, 0] == (comm.rank - 2) % size).all()
        assert (block[:, 1:] == before).all()
        if waiting:
            request.Wait()
    columns.Free()


@pytest.mark.parametrize("faulty", [False, True])
def test_derived_datatypes_are_checked_as_their_bytes(comm, faulty):
    """Sent as a column, received as a column, as a row, and the other way round."""
    checked = spimpi.checked(comm)
    column = MPI.DOUBLE.Create_vector(3, 1, 4).Commit()
    block, row = np.arange(12.0).reshape(3, 4), np.array([0.0, 4, 8])
    if comm.rank == 0:
        for message in ([block, 1, column], [block, 1, column], row):
            checked.Send(message, 1)
        checked.Send([np.ones(3, np.longdouble), MPI.LONG_DOUBLE], 1)
    if comm.rank == 1:
        if faulty:
            checked.comm = Touched(comm)
        received, flat = np.zeros((3, 4)), np.zeros(5)
        for message in ([received, 1, column], flat, [received, 1, column]):
            received[:] = 0
            if faulty:
                with pytest.raises(spimpi.CorruptionError, match="contents changed"):
                    checked.Recv(message, 0)
                continue
            checked.Recv(message, 0)
            assert checked.verdict
            assert (received[:, 0] == row).all() or (flat[:3] == row).all()
        long = np.zeros(3, np.longdouble)
        checked.comm = comm
        checked.Recv([long, MPI.LONG_DOUBLE], 0)
        assert checked.verdict and (long == 1).all()
    column.Free()
