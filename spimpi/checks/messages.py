"""Point-to-point messages of a checked communicator: a record travels beside each.

The receiver checks, and raises alone: the sender has gone on. Where both ends must know, there is
``verify_pipeline_handoff``.
"""

import numpy as np
from mpi4py import MPI

from spimpi.checks.buffers import message_of
from spimpi.checks.verdict import Verdict, Where
from spimpi.errors import CorruptionError, UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import Tag
from spimpi.trace.schema import Established

MESSAGE = np.dtype([("sequence", "<i8"), ("n", "<i8"), ("dtype", "S16"), ("word", "<u8")])


class CheckedMessages:
    """The point-to-point part of a CheckedComm, which has the communicators."""

    def __init__(self, session):
        self._sent, self._received = session.sent, session.received
        self._under_way = session.under_way  # (request, record) of sends

    def Send(self, buf, dest, tag=0):
        self._send_record(buf, dest, tag)
        self.comm.Send(buf, dest, tag)

    def Isend(self, buf, dest, tag=0):
        self._send_record(buf, dest, tag)
        return self.comm.Isend(buf, dest, tag)

    def Recv(self, buf, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG, status=None):
        status = MPI.Status() if status is None else status
        self.comm.Recv(buf, source, tag, status)
        self._check_received(buf, status)

    def Sendrecv(
        self, sendbuf, dest, sendtag=0, recvbuf=None, source=MPI.ANY_SOURCE,
        recvtag=MPI.ANY_TAG, status=None,
    ):  # fmt: skip
        status = MPI.Status() if status is None else status
        self._send_record(sendbuf, dest, sendtag)
        self.comm.Sendrecv(sendbuf, dest, sendtag, recvbuf, source, recvtag, status)
        self._check_received(recvbuf, status)

    def Irecv(self, buf, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG):
        """As mpi4py's; the request's ``Wait`` and ``Test`` check. ``source`` and ``tag`` must be
        given: the record of a message from anywhere could be that of another."""
        if source == MPI.ANY_SOURCE or tag == MPI.ANY_TAG:
            msg = "a checked Irecv needs a source and a tag; Recv takes messages from anywhere"
            raise UsageError(msg)
        if source == MPI.PROC_NULL:
            return self.comm.Irecv(buf, source, tag)
        record = np.zeros(1, MESSAGE)
        requests = [
            self.comm.Irecv(buf, source, tag),
            self._requests.comm.Irecv([record.view(np.uint8), MPI.BYTE], source, tag),
        ]
        # Messages match receives in the order of posting, whichever is waited for first.
        return CheckedReceive(self, buf, record, requests, self._next_received(source, tag))

    def _send_record(self, buf, dest, tag) -> None:
        """Start sending the record; small, so that it does not wait for the receiver."""
        self._under_way[:] = [kept for kept in self._under_way if not kept[0].Test()]
        if dest == MPI.PROC_NULL:
            return
        data = message_of(buf).whole()
        sequence = self._sent[dest, tag] = self._sent.get((dest, tag), 0) + 1
        record = np.zeros(1, MESSAGE)
        word = fingerprint(data, self._message_tag(sequence), None, self.threads)
        record[0] = (sequence, data.size, data.dtype.name.encode()[:16], word)
        request = self._requests.comm.Isend([record.view(np.uint8), MPI.BYTE], dest, tag)
        self._under_way.append((request, record))

    def _check_received(self, buf, status) -> None:
        source, tag = status.Get_source(), status.Get_tag()
        if source == MPI.PROC_NULL:
            return
        record = np.zeros(1, MESSAGE)
        self._requests.comm.Recv([record.view(np.uint8), MPI.BYTE], source, tag)
        self._judge(buf, record[0], status, self._next_received(source, tag))

    def _next_received(self, source, tag) -> int:
        sequence = self._received[source, tag] = self._received.get((source, tag), 0) + 1
        return sequence

    def _message_tag(self, sequence) -> Tag:
        return Tag(self._seed, "Send", -1, sequence)

    def _judge(self, buf, record, status, sequence) -> None:
        """CorruptionError, on this rank, where the message is not what its record says."""
        source, tag = status.Get_source(), status.Get_tag()
        data = message_of(buf).whole()
        n = status.Get_count(MPI.BYTE) // data.itemsize
        if record["dtype"] != data.dtype.name.encode()[:16]:
            msg = (
                f"a message from rank {source} (tag {tag}): it sent dtype "
                f"{record['dtype'].decode()}, rank {self.comm.rank} receives {data.dtype}"
            )
            raise UsageError(msg)
        word = fingerprint(data[:n], self._message_tag(sequence), None, self.threads)
        problem = ""
        if record["sequence"] != sequence:
            problem = f"message {record['sequence']} where {sequence} was waited for"
        elif record["n"] != n:
            problem = f"{n} elements of {record['n']} arrived"
        elif record["word"] != word:
            problem = "its contents changed on the way"
        expected = int(record["word"])
        self.verdict = Verdict(
            True, Established.MOVED, check="Send", expected=expected, actual=word
        )
        if not problem:
            return
        where = Where(
            "Send", "Send", sequence, -1, -1, self.comm.rank, MPI.Get_processor_name(),
            self.comm.rank, f"{expected:016x}", f"{word:016x}",
            f"received from rank {source} with tag {tag}: {problem}",
        )  # fmt: skip
        self.verdict = Verdict(
            False, Established(0), where, check="Send", expected=expected, actual=word
        )
        if self.check:
            raise CorruptionError(self.verdict)


class CheckedReceive:
    """A checked Irecv under way: ``Wait`` and ``Test`` as mpi4py's, with the check."""

    def __init__(self, comm: CheckedMessages, buf, record, requests, sequence):
        self._comm, self._buf, self._record, self._requests = comm, buf, record, requests
        self._sequence = sequence

    def Wait(self, status=None) -> bool:
        """Wait for the message and its record, and check."""
        status = MPI.Status() if status is None else status
        self._requests[0].Wait(status)
        self._requests[1].Wait()
        return self._checked(status)

    def Test(self, status=None) -> bool:
        """Whether the message has arrived; it is then checked."""
        if self._record is None:
            return True
        status = MPI.Status() if status is None else status
        if not self._requests[1].Test() or not self._requests[0].Test(status):
            return False
        return self._checked(status)

    def _checked(self, status) -> bool:
        if self._record is not None:
            record, self._record = self._record[0], None
            self._comm._judge(self._buf, record, status, self._sequence)
        return True
