"""Point-to-point messages of a checked communicator: a record travels beside each.

The receiver checks, and raises alone: the sender has gone on. Where both ends must know, there is
``verify_pipeline_handoff``. Nothing of the wrapper's own fails on one end before its message is
sent, for the other end would wait: what has no fingerprint travels as its packed bytes.
"""

from contextlib import contextmanager

import numpy as np
from mpi4py import MPI

from spimpi.checks.buffers import elements_of
from spimpi.checks.check import Check, Rule
from spimpi.checks.pending import enforce
from spimpi.checks.requests import CheckedRequest, lock, look, under_way, wait
from spimpi.checks.verdict import NO_ELEMENTS, Verdict, Where
from spimpi.errors import UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.arrays import dtype_of
from spimpi.fingerprint.tag import DEFAULT_SEED, Tag
from spimpi.trace.schema import Established

MESSAGE = np.dtype([("sequence", "<i8"), ("n", "<i8"), ("dtype", "S24"), ("word", "<u8")])
MOVED = Established.MOVED
PACKED = b"packed"  # in the place of a dtype
NOBODY = "from MPI.PROC_NULL nothing arrives: nothing was compared"
BYTES = b"uint8"  # received as, or sent as, what they are bytes of


class CheckedMessages:
    """The point-to-point part of a CheckedComm, which has the communicators."""

    verdict, _n_calls, _last = None, 0, 0

    def __init__(self, session):
        self._sent, self._received = session.sent, session.received
        self._records_sent = session.under_way  # (request, record)

    def next_call(self) -> int:
        """The number of a call, in their order."""
        self._n_calls += 1
        return self._n_calls

    def completed(self, number: int, verdict) -> None:
        """Keep the verdict of a call, unless a later one is complete already."""
        if number >= self._last:
            self._last, self.verdict = number, verdict

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
        with self._record_taken(status):
            if under_way():
                wait(self.comm.Irecv(buf, source, tag), status)
            else:
                self.comm.Recv(buf, source, tag, status)
        self._check_received(buf, status)

    def Sendrecv(
        self, sendbuf, dest, sendtag=0, recvbuf=None, source=MPI.ANY_SOURCE,
        recvtag=MPI.ANY_TAG, status=None,
    ):  # fmt: skip
        self._exchange(sendbuf, dest, sendtag, recvbuf, source, recvtag, status)

    def Sendrecv_replace(
        self, buf, dest, sendtag=0, source=MPI.ANY_SOURCE, recvtag=MPI.ANY_TAG, status=None
    ):
        sent = None
        if dest != MPI.PROC_NULL:
            elements, packed = elements_of(buf)
            sent = [elements, MPI.PACKED] if packed else elements.copy()
        self._exchange(sent, dest, sendtag, buf, source, recvtag, status)

    def Irecv(self, buf, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG):
        """As mpi4py's; the request's ``Wait`` and ``Test`` check. ``source`` and ``tag`` must be
        given: the record of a message from anywhere could be that of another."""
        if source == MPI.PROC_NULL:
            return CheckedSend(self.comm.Irecv(buf, source, tag))
        if source == MPI.ANY_SOURCE or tag == MPI.ANY_TAG:
            msg = "a checked Irecv needs a source and a tag; Recv takes messages from anywhere"
            raise UsageError(msg)
        record = np.zeros(1, MESSAGE)
        # Messages match receives in the order of posting, whichever is waited for first.
        with lock:
            requests = [
                self.comm.Irecv(buf, source, tag),
                self._requests.comm.Irecv([record.view(np.uint8), MPI.BYTE], source, tag),
            ]
            return CheckedReceive(self, buf, record, requests, self._next_received(source, tag))

    # A message is begun before its record: of a call that mpi4py refuses nothing is sent. Both are
    # under way before this rank waits, and looks after its collectives meanwhile.

    def _send(self, name, buf, dest, tag) -> None:
        self._isend(f"I{name.lower()}", buf, dest, tag).Wait()

    def _isend(self, name, buf, dest, tag) -> CheckedRequest:
        return CheckedSend(self._begin(name, buf, dest, tag))

    def _begin(self, name, buf, dest, tag):
        """The request of a message; its record is under way too, and small: it does not wait."""
        if dest == MPI.PROC_NULL:
            return getattr(self.comm, name)(buf, dest, tag)
        with lock:
            self._records_sent[:] = [kept for kept in self._records_sent if not kept[0].Test()]
            data, packed = elements_of(buf)
            sequence = self._sent.get((dest, tag), 0) + 1
            record = np.zeros(1, MESSAGE)
            word = fingerprint(data, self._message_tag(sequence), None, self.threads)
            record[0] = (sequence, data.size, PACKED if packed else _name(data), word)
            message = getattr(self.comm, name)(buf, dest, tag)
            request = self._requests.comm.Isend([record.view(np.uint8), MPI.BYTE], dest, tag)
            self._sent[dest, tag] = sequence
            self._records_sent.append((request, record))
        return message

    def _exchange(self, sendbuf, dest, sendtag, recvbuf, source, recvtag, status) -> None:
        status = MPI.Status() if status is None else status
        receive = self.comm.Irecv(recvbuf, source, recvtag)
        try:
            send = self._begin("Isend", sendbuf, dest, sendtag)
        except Exception:
            receive.Cancel()
            receive.Wait()
            raise
        with self._record_taken(status):
            wait(receive, status)
        wait(send)
        self._check_received(recvbuf, status)

    @contextmanager
    def _record_taken(self, status):
        """A message that does not fit is gone as in MPI, and its record with it."""
        try:
            yield
        except MPI.Exception as error:
            if error.Get_error_class() == MPI.ERR_TRUNCATE and status.Get_source() >= 0:
                self._take_record(status)
            raise

    def _take_record(self, status) -> tuple:
        """The record of a message that has been received, and the number that it should have."""
        source, tag = status.Get_source(), status.Get_tag()
        record = np.zeros(1, MESSAGE)
        self._requests.comm.Recv([record.view(np.uint8), MPI.BYTE], source, tag)
        return record[0], self._next_received(source, tag)

    def _check_received(self, buf, status) -> None:
        if status.Get_source() == MPI.PROC_NULL:
            nothing = Verdict(True, Established(0), check="Send", missing=(NOBODY,))
            self.completed(self.next_call(), nothing)
            return
        record, sequence = self._take_record(status)
        self.completed(self.next_call(), self._judge(buf, record, status, sequence))
        enforce(self.verdict, self.check)

    def _next_received(self, source, tag) -> int:
        with lock:
            sequence = self._received[source, tag] = self._received.get((source, tag), 0) + 1
        return sequence

    def _message_tag(self, sequence) -> Tag:
        return Tag(DEFAULT_SEED, "Send", -1, sequence)

    def _judge(self, buf, record, status, sequence) -> Verdict:
        """Whether a message is what its record says. UsageError, on this rank, where it is of
        another dtype than what the sender sent."""
        source, tag = status.Get_source(), status.Get_tag()
        c = Check("Send", self._message_tag(sequence), Rule.LOCAL, MOVED)
        data, packed = elements_of(buf)
        sent, n_sent = record["dtype"], int(record["n"])
        untyped = _name(data) == BYTES or sent in (PACKED, BYTES)
        if not packed and not untyped and sent != _name(data):
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
        problem, receiver = "", self.comm.rank
        if record["sequence"] != sequence:
            problem = f"message {record['sequence']} where {sequence} was waited for"
        elif n_bytes != n_sent * dtype.itemsize:
            problem = f"{n} elements of {n_sent} arrived"
        elif record["word"] != word:
            # Nothing tells which: the word is of the send buffer as it was when the send began.
            receiver = None
            problem = (
                f"its contents changed, nothing tells which: rank {source}'s send buffer before its "
                f"send had ended, or what rank {self.comm.rank} received"
            )
        words = {"check": "Send", "expected": int(record["word"]), "actual": word}
        established, missing = (MOVED, ()) if n else (Established(0), (NO_ELEMENTS,))
        verdict = Verdict(True, established, missing=missing, **words)
        if problem:
            verdict = self._changed(problem, receiver, words, source, tag, sequence)
        if self.ctx is not None and self.ctx.tracer is not None:
            c.dtype, c.n_bytes = dtype, n_bytes
            self.ctx.tracer.record(c, verdict, self.comm, source)
        return verdict

    def _changed(self, problem, at_fault, words, source, tag, sequence) -> Verdict:
        host = "" if at_fault is None else MPI.Get_processor_name()
        where = Where(
            "Send", "Send", sequence, -1, -1, at_fault, host, self.comm.rank,
            f"{words['expected']:016x}", f"{words['actual']:016x}",
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
        self._sequence, self._number = sequence, comm.next_call()

    def _complete(self, blocking: bool) -> bool:
        if not blocking:
            look()
            return all(request.Get_status() for request in self._requests)
        return True  # _take waits

    def _take(self, status) -> None:
        status = MPI.Status() if status is None else status
        try:
            wait(self._requests[0], status)
        except MPI.Exception as error:  # see _record_taken
            if error.Get_error_class() == MPI.ERR_TRUNCATE:
                wait(self._requests[1])
            raise
        wait(self._requests[1])
        comm = self._comm
        self.verdict = comm._judge(self._buf, self._record[0], status, self._sequence)
        comm.completed(self._number, self.verdict)
        enforce(self.verdict, comm.check)
