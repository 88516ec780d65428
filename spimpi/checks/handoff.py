"""Pipeline hand-offs: a buffer sent with a record of what it is, checked at both ends.

The record travels as a message of its own: sequence number, step, microbatch, layer range, rows,
columns, item size, fingerprint. The receiver compares it with what it is waiting for, so a
stale, repeated, lost or reordered buffer is named as such, and the buffer with the fingerprint.
The sender fingerprints its buffer again when the send has completed, before it is reused.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spimpi.launch import wait_asleep

IN_FLIGHT = 2
PAYLOAD, RECORD_TAG = 1, 2

HANDOFF = np.dtype(
    [
        ("sequence", "<i8"),
        ("step", "<i8"),
        ("microbatch", "<i8"),
        ("first_layer", "<i8"),
        ("last_layer", "<i8"),
        ("first_row", "<i8"),
        ("n_rows", "<i8"),
        ("n_cols", "<i8"),
        ("itemsize", "<i8"),
        ("fingerprint", "<u8"),
    ]
)


def wait(request, polite: bool) -> None:
    """Wait for a request; ``polite``: asleep between looks, where ranks share their cores."""
    if polite:
        wait_asleep(request)
    else:
        request.Wait()


@dataclass
class _Slot:
    buffer: np.ndarray
    record: np.ndarray
    requests: list
    rows: int = 0


class Sender:
    """The sending end of a link: ``IN_FLIGHT`` buffers in turn, each reused after its send.

    ``sent(buffer, record)`` is called once for every hand-off when its send has completed.
    """

    def __init__(
        self, comm, to_rank: int, max_rows: int, n_cols: int, dtype, sent: Callable, polite=False
    ):
        self.comm, self.to_rank, self.sent, self.polite = comm, to_rank, sent, polite
        self.slots = [
            _Slot(np.empty((max_rows, n_cols), dtype), np.zeros(1, HANDOFF), [])
            for _ in range(IN_FLIGHT)
        ]
        self.turn = 0

    def buffer(self, n_rows: int) -> np.ndarray:
        """The next buffer to fill, [n_rows, columns]; waits until its last send has completed."""
        slot = self.slots[self.turn]
        self._complete(slot)
        slot.rows = n_rows
        return slot.buffer[:n_rows]

    def send(self, **record) -> None:
        """Start sending the buffer that ``buffer`` gave last, with its record."""
        slot = self.slots[self.turn]
        for name, value in record.items():
            slot.record[name] = value
        payload = slot.buffer[: slot.rows]
        slot.requests = [
            self.comm.Isend(payload, self.to_rank, PAYLOAD),
            self.comm.Isend(slot.record.view(np.int64), self.to_rank, RECORD_TAG),
        ]
        self.turn = (self.turn + 1) % IN_FLIGHT

    def drain(self) -> None:
        """Wait for all sends."""
        for i in range(IN_FLIGHT):
            self._complete(self.slots[(self.turn + i) % IN_FLIGHT])

    def _complete(self, slot: _Slot) -> None:
        if not slot.requests:
            return
        self._wait(slot.requests)
        slot.requests = []
        self.sent(slot.buffer[: slot.rows], slot.record[0])

    def _wait(self, requests) -> None:
        for request in requests:
            wait(request, self.polite)


class Receiver:
    """The receiving end: receives are posted ahead, ``IN_FLIGHT`` at a time."""

    def __init__(self, comm, from_rank: int, max_rows: int, n_cols: int, dtype, polite=False):
        self.comm, self.from_rank, self.polite = comm, from_rank, polite
        self.slots = [
            _Slot(np.empty((max_rows, n_cols), dtype), np.zeros(1, HANDOFF), [])
            for _ in range(IN_FLIGHT)
        ]
        self.posted = self.taken = 0

    def post(self, n_rows: int) -> None:
        """Start receiving the next buffer; at most ``IN_FLIGHT`` may be posted and not released."""
        slot = self.slots[self.posted % IN_FLIGHT]
        slot.rows = n_rows
        slot.requests = [
            self.comm.Irecv(slot.buffer[:n_rows], self.from_rank, PAYLOAD),
            self.comm.Irecv(slot.record.view(np.int64), self.from_rank, RECORD_TAG),
        ]
        self.posted += 1

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """(buffer, record) of the oldest posted receive, when it has arrived."""
        slot = self.slots[self.taken % IN_FLIGHT]
        for request in slot.requests:
            wait(request, self.polite)
        slot.requests = []
        self.taken += 1
        return slot.buffer[: slot.rows], slot.record[0]


def same_place(record, expected: dict) -> bool:
    """Whether a record says of its buffer what the receiver is waiting for."""
    return all(int(record[name]) == value for name, value in expected.items())


def describe_mismatch(record, expected: dict) -> str:
    """What a wrong record says, in words."""
    names = [n for n, value in expected.items() if int(record[n]) != value]
    late = int(record["sequence"]) - expected["sequence"]
    kind = "a stale or repeated buffer" if late < 0 else "a buffer out of order"
    kind = kind if late else "a buffer of another place"
    found = ", ".join(f"{n} {int(record[n])} (expected {expected[n]})" for n in names)
    return f"{kind}: {found}"
