"""Point-to-point messages of a checked communicator: a record travels beside each.

The receiver checks, and raises alone: the sender has gone on. Where both ends must know, there is
``verify_pipeline_handoff``. Nothing of the wrapper's own fails on one end before its message is
sent, for the other end would wait: what has no fingerprint travels as its packed bytes.
"""

import numpy as np
from mpi4py import MPI

from spimpi.checks.buffers import elements_of
from spimpi.checks.check import Check, Rule
from spimpi.checks.pending import enforce
from spimpi.checks.requests import CheckedRequest, look, under_way, wait
from spimpi.checks.verdict import Verdict, Where
from spimpi.errors import UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.arrays import dtype_of
from spimpi.fingerprint.tag import DEFAULT_SEED, Tag
from spimpi.trace.schema import Established

MESSAGE = np.dtype([("sequence", "<i8"), ("n", "<i8"), ("dtype", "S24"), ("word", "<u8")])
PACKED = b"packed"  # in the place of a dtype


class CheckedMessages:
    """The point-to-point part of a CheckedComm, which has the communicators."""

    def __init__(self, session):
        self._sent, self._received = session.sent, session.received
        self._records_sent = session.under_way  # (request, record)

    def Send(self, buf, dest, tag=0):
        self._send("Send", buf, dest, tag)

    def Bsend(self, buf, dest, tag=0):
        self._send("Bsend", buf, dest, tag)

    def Rsend(self, buf, dest, tag=0):
        self._send("Rsend", buf, dest, tag)

    def Ssend(self, buf, dest, tag=0):
        self._send("Ssend", buf, dest, tag)

    def Isend(self, buf, dest, tag=0) -> CheckedRequest:
        return self._isend("Isend", buf, dest, tag)

    def Ibsend(self, buf, dest, tag=0) -> CheckedRequest:
        return self._isend("Ibsend", buf, dest, tag)

    def Irsend(self, buf, dest, tag=0) -> CheckedRequest:
        return self._isend("Irsend", buf, dest, tag)

    def Issend(self, buf, dest, tag=0) -> CheckedRequest:
        return self._isend("Issend", buf, dest, tag)

    def Recv(self, buf, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG, status=None):
        status = MPI.Status() if status is None else status
        if under_way():
            wait(self.comm.Irecv(buf, source, tag), status)
        else:
            self.comm.Recv(buf, source, tag, status)
        self._check_received(buf, status)

    def Sendrecv(
        self, sendbuf, dest, sendtag=0, recvbuf=None, source=MPI.ANY_SOURCE,
        recvtag=MPI.ANY_TAG, status=None,
    ):  # fmt: skip
        status = MPI.Status() if status is None else status
        self._send_record(sendbuf, dest, sendtag)
        if under_way():
            self._exchange(sendbuf, dest, sendtag, recvbuf, source, recvtag, status)
        else:
            self.comm.Sendrecv(sendbuf, dest, sendtag, recvbuf, source, recvtag, status)
        self._check_received(recvbuf, status)

    def Sendrecv_replace(
        self, buf, dest, sendtag=0, source=MPI.ANY_SOURCE, recvtag=MPI.ANY_TAG, status=None
    ):
        status = MPI.Status() if status is None else status
        self._send_record(buf, dest, sendtag)
        if under_way():
            sent, packed = elements_of(buf)
            sent = [sent, MPI.PACKED] if packed else sent.copy()
            self._exchange(sent, dest, sendtag, buf, source, recvtag, status)
        else:
            self.comm.Sendrecv_replace(buf, dest, sendtag, source, recvtag, status)
        self._check_received(buf, status)

    def Irecv(self, buf, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG):
        """As mpi4py's; the request's ``Wait`` and ``Test`` check. ``source`` and ``tag`` must be
        given: the record of a message from anywhere could be that of another."""
        if source == MPI.ANY_SOURCE or tag == MPI.ANY_TAG:
            msg = "a checked Irecv needs a source and a tag; Recv takes messages from anywhere"
            raise UsageError(msg)
        if source == MPI.PROC_NULL:
            return CheckedSend(self.comm.Irecv(buf, source, tag))
        record = np.zeros(1, MESSAGE)
        requests = [
            self.comm.Irecv(buf, source, tag),
            self._requests.comm.Irecv([record.view(np.uint8), MPI.BYTE], source, tag),
        ]
        # Messages match receives in the order of posting, whichever is waited for first.
        return CheckedReceive(self, buf, record, requests, self._next_received(source, tag))

    # A rank that waits looks after its collectives meanwhile, by the non-blocking calls.

    def _send(self, name, buf, dest, tag) -> None:
        if under_way():
            self._isend(f"I{name.lower()}", buf, dest, tag).Wait()
            return
        self._send_record(buf, dest, tag)
        getattr(self.comm, name)(buf, dest, tag)

    def _isend(self, name, buf, dest, tag) -> CheckedRequest:
        self._send_record(buf, dest, tag)
        return CheckedSend(getattr(self.comm, name)(buf, dest, tag))

    def _exchange(self, sendbuf, dest, sendtag, recvbuf, source, recvtag, status) -> None:
        receive = self.comm.Irecv(recvbuf, source, recvtag)
        send = self.comm.Isend(sendbuf, dest, sendtag)
        wait(receive, status)
        wait(send)

    def _send_record(self, buf, dest, tag) -> None:
        """Start sending the record; small, so that it does not wait for the receiver."""
        self._records_sent[:] = [kept for kept in self._records_sent if not kept[0].Test()]
        if dest == MPI.PROC_NULL:
            return
        data, packed = elements_of(buf)
        sequence = self._sent.get((dest, tag), 0) + 1
        record = np.zeros(1, MESSAGE)
        word = fingerprint(data, self._message_tag(sequence), None, self.threads)
        record[0] = (sequence, data.size, PACKED if packed else _name(data), word)
        request = self._requests.comm.Isend([record.view(np.uint8), MPI.BYTE], dest, tag)
        self._sent[dest, tag] = sequence
        self._records_sent.append((request, record))

    def _check_received(self, buf, status) -> None:
        source, tag = status.Get_source(), status.Get_tag()
        if source == MPI.PROC_NULL:
            return
        record = np.zeros(1, MESSAGE)
        self._requests.comm.Recv([record.view(np.uint8), MPI.BYTE], source, tag)
        self.verdict = self._judge(buf, record[0], status, self._next_received(source, tag))
        enforce(self.verdict, self.check)

    def _next_received(self, source, tag) -> int:
        sequence = self._received[source, tag] = self._received.get((source, tag), 0) + 1
        return sequence

    def _message_tag(self, sequence) -> Tag:
        return Tag(DEFAULT_SEED, "Send", -1, sequence)

    def _judge(self, buf, record, status, sequence) -> Verdict:
        """Whether a message is what its record says. UsageError, on this rank, where it is of
        another dtype than what the sender sent."""
        source, tag = status.Get_source(), status.Get_tag()
        c = Check("Send", self._message_tag(sequence), Rule.LOCAL, Established.MOVED)
        data, packed = elements_of(buf)
        sent, n_sent = record["dtype"], int(record["n"])
        if not packed and sent not in (PACKED, _name(data)):
            msg = (
                f"a message from rank {source} (tag {tag}): it sent dtype {sent.decode()}, "
                f"rank {self.comm.rank} receives {data.dtype}"
            )
            raise UsageError(msg)
        dtype = np.dtype(np.uint8) if sent == PACKED else dtype_of(sent.decode())
        n_bytes = status.Get_count(MPI.BYTE)
        n = n_bytes // dtype.itemsize
        got = data.view(np.uint8)[: n * dtype.itemsize].view(dtype)
        word = fingerprint(got, self._message_tag(sequence), None, self.threads)
        problem = ""
        if record["sequence"] != sequence:
            problem = f"message {record['sequence']} where {sequence} was waited for"
        elif n_bytes != n_sent * dtype.itemsize:
            problem = f"{n} elements of {n_sent} arrived"
        elif record["word"] != word:
            problem = "its contents changed on the way"
        words = {"check": "Send", "expected": int(record["word"]), "actual": word}
        verdict = Verdict(True, Established.MOVED, **words)
        if problem:
            verdict = self._changed(problem, words, source, tag, sequence)
        if self.ctx is not None and self.ctx.tracer is not None:
            c.n_bytes = n_bytes
            self.ctx.tracer.record(c, verdict, self.comm, source)
        return verdict

    def _changed(self, problem, words, source, tag, sequence) -> Verdict:
        where = Where(
            "Send", "Send", sequence, -1, -1, self.comm.rank, MPI.Get_processor_name(),
            self.comm.rank, f"{words['expected']:016x}", f"{words['actual']:016x}",
            f"received from rank {source} with tag {tag}: {problem}",
        )  # fmt: skip
        return Verdict(False, Established(0), where, **words)


def _name(data) -> bytes:
    return data.dtype.name.encode()[:24]


class CheckedSend(CheckedRequest):
    """A send under way. It has no verdict: its receiver's has."""

    def __init__(self, request):
        super().__init__()
        self._request = request

    def _complete(self, blocking: bool) -> bool:
        if not blocking:
            look()
            return self._request.Get_status()
        return True  # _take waits

    def _take(self, status) -> None:
        wait(self._request, status)


class CheckedReceive(CheckedRequest):
    """A receive under way, and its record; the check is this rank's own."""

    def __init__(self, comm: CheckedMessages, buf, record, requests, sequence):
        super().__init__()
        self._comm, self._buf, self._record, self._requests = comm, buf, record, requests
        self._sequence = sequence

    def _complete(self, blocking: bool) -> bool:
        if not blocking:
            look()
            return all(request.Get_status() for request in self._requests)
        return True  # _take waits

    def _take(self, status) -> None:
        status = MPI.Status() if status is None else status
        wait(self._requests[0], status)
        wait(self._requests[1])
        comm = self._comm
        self.verdict = comm._judge(self._buf, self._record[0], status, self._sequence)
        enforce(self.verdict, comm.check)
