"""A rank's journal: what it appends while the run goes on, and how it is read back.

    spimpi-journal VERSION LENGTH DIGEST\\n      one line of text, padded to 64 bytes
    header                                      LENGTH bytes of JSON, a multiple of 8
    record 0, record 1, …                       88 bytes each (trace/checksum.py)
    end record                                  number 0xFFFFFFFF; count of records, end state

Plain write() of whole records, nothing collective: a rank that is killed leaves a journal that
reads up to its last flush. A power loss may take more, unless every flush waits for the disk.
"""

import json
import os
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spimpi.errors import IncompleteError, UsageError
from spimpi.trace.checksum import BLOCK, RECORD, checksums, pack, text_digest, unpack
from spimpi.trace.journals.appending import Appending
from spimpi.trace.journals.growing import GrowingTable, read_table, table_path
from spimpi.trace.journals.journal_files import already_there, journal_path
from spimpi.trace.journals.node_file import Stream
from spimpi.trace.journals.sketch_file import SketchContents, SketchFile, read_sketches, sketch_path
from spimpi.trace.journals.synced import sync as sync_path
from spimpi.trace.schema import EVENT, SCHEMA_VERSION, TensorInfo

MAGIC = "spimpi-journal"
FIRST_LINE = 64
END = 0xFFFFFFFF
# Of a journal's header, what is one rank's own and not the run's.
OWN_HEADER = ("schema_version", "rank", "host", "pid", "device", "started")
END_RECORD = np.dtype(
    [("number", "<u4"), ("count", "<u8"), ("state", "S66"), ("writer", "<u2"), ("checksum", "<u8")]
)
BUFFERED = 4096  # rows held before they are written without being asked to


def new_run_id() -> str:
    """A name of its own for every run; rank 0's is taken."""
    return f"spimpi-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


class Journal:
    """Writer of one rank's journal, ``folder/rank-00003.journal`` or ``at``. Not collective.

    ``header`` is what the run is (run_id, command, world, topology, model, …): anything that
    JSON can hold. Schema version, rank, host and pid are added, and ``started`` (seconds since
    the epoch, the zero of t_start) and ``device`` where they are missing. All ranks give the same
    ``tensors``, or None: the table then grows (``table.row``, trace/journals/growing.py). A true
    ``sketches`` in the header makes a file of sketches beside it (``sketches.append``,
    trace/journals/sketch_file.py). UsageError where the file exists or the folder can't be made. ``sync``:
    each flush waits until the disk has it.

    ``append`` belongs to one thread; ``flush`` may be called from any thread and from a signal
    handler.
    """

    def __init__(self, folder, rank: int, header: dict, tensors=(), sync: bool = False, at=None):
        self.path = at or journal_path(folder, rank)
        self.rank, self.sync = rank, sync
        self.count = 0  # rows written to the file
        self._waiting = deque()
        self._rows_waiting = 0
        self._lock = threading.RLock()
        self._writing = False
        own = {"schema_version": SCHEMA_VERSION, "rank": rank, "pid": os.getpid()}
        own["host"] = socket.gethostname()
        self.header = {"started": time.time(), "device": "cpu", **header, **own}
        self.tensors = list(tensors or ())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = Appending(self.path, sync)
        except FileExistsError:
            raise UsageError(already_there(self.path)) from None
        except OSError as error:
            msg = f"cannot create the trace's journal {self.path}: {error.strerror}"
            raise UsageError(msg) from None
        self._file.lock()
        self._write(_header_bytes(self.header, tensors))
        self.table = GrowingTable(table_path(self.path), sync) if tensors is None else None
        self.sketches = None
        if header.get("sketches"):
            place = sketch_path(self.path)
            self.sketches = SketchFile(place, rank, header.get("run_id", ""), sync)
        if sync:
            for parent in (self.path.parent, self.path.parent.parent):
                sync_path(parent)

    def append(self, events: np.ndarray) -> None:
        """Add rows (dtype EVENT, shape (n,)). They are copied, and written by the next flush."""
        if events.dtype != EVENT:
            msg = f"a journal takes rows of dtype EVENT, found {events.dtype}"
            raise TypeError(msg)
        self._waiting.append(events.tobytes())
        self._rows_waiting += len(events)
        if self._rows_waiting >= BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write what was appended. IncompleteError where the file system refuses (disk full)."""
        with self._lock:
            # A signal handler may come in here while this thread is writing: the rows then
            # appended are not many, and interleaving two writes would tear the journal.
            if self._writing or not self._waiting:
                return
            self._writing = True
            rows = []
            try:
                while self._waiting:
                    rows.append(self._waiting.popleft())
                self._rows_waiting = 0
                events = np.frombuffer(b"".join(rows), EVENT)
                self._write(pack(events, self.count).data.cast("B"))
                self.count += len(events)
                rows = []
            finally:
                self._waiting.extendleft(reversed(rows))  # not written: for a later flush
                self._writing = False

    def close(self, end_state: str) -> None:
        """Flush, and say how the run ended: "verified", "failed", "incomplete", "error"."""
        if self._file is None:
            return
        if self.sketches is not None:
            self.sketches.close()
        self.flush()
        end = np.zeros(1, END_RECORD)
        end["number"], end["count"], end["state"] = END, self.count, end_state.encode()
        end["checksum"] = checksums(end.view(RECORD))
        self._write(end.data.cast("B"))
        self._file.close()
        self._file = None
        if self.table is not None:
            self.table.close()

    def _write(self, data) -> None:
        try:
            self._file.append(data)
        except OSError as error:
            msg = (
                f"the trace's journal {self.path} could not be written: {error.strerror}; "
                f"{self.count} events are in it. Free some space or choose another place (--trace)"
            )
            raise IncompleteError(msg) from error


@dataclass
class JournalContents:
    """What a journal holds. ``events``: all rows before the first damaged or torn one.

    ``fingerprint`` is that of these rows: the XOR of their records' checksums. ``grows``: whether
    its table of tensors is a growing one, which other ranks need not share. ``missing``: what is
    not there, as after a kill; ``damage``: what was altered. ``sketches`` has its own of both;
    None where the run took none.
    """

    path: Path | Stream
    header: dict = field(default_factory=dict)
    tensors: list[TensorInfo] = field(default_factory=list)
    events: np.ndarray = field(default_factory=lambda: np.zeros(0, EVENT))
    fingerprint: int = 0
    count: int = 0
    complete: bool = False
    end_state: str | None = None
    grows: bool = False
    sketches: SketchContents | None = None
    missing: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return self.missing + self.damage


def _header_bytes(header: dict, tensors) -> bytes:
    table = None  # it grows
    if tensors is not None:
        table = [[t.name, list(t.shape), t.dtype] for t in tensors]
    body = json.dumps({"header": header, "tensors": table}).encode()
    body += b" " * (-len(body) % 8)
    return _first_line(SCHEMA_VERSION, body) + body


def _first_line(version: int, body: bytes) -> bytes:
    start = f"{MAGIC} {version} {len(body)} "
    return (start + text_digest(start.encode() + body)).ljust(FIRST_LINE - 1).encode() + b"\n"


def read_journal(path) -> JournalContents:
    """Read one journal, also one that is cut short, damaged or still being written.

    Never raises because of what the file holds, except UsageError for a newer schema: what is
    wrong is named in ``problems``, and everything before it is kept.
    """
    path = path if isinstance(path, Stream) else Path(path)
    contents = JournalContents(path)
    with path.open("rb") as file:
        if _read_header(file, contents):
            _read_records(file, contents)
    if contents.grows:
        contents.tensors, problem = read_table(table_path(path))
        if problem:
            contents.damage.append(problem)
            contents.complete = False
    if contents.header.get("sketches"):
        header = contents.header
        contents.sketches = read_sketches(
            sketch_path(path), header["rank"], header.get("run_id", ""), contents.complete
        )
    return contents


def _read_header(file, contents: JournalContents) -> bool:
    name, line = contents.path.name, file.read(FIRST_LINE)
    wanted = FIRST_LINE
    try:
        _, version, length, _ = line.split()
        wanted += int(length)
        body = file.read(int(length))
        sound = line == _first_line(int(version), body)
    except (ValueError, OverflowError, MemoryError):
        sound = False
    if not sound and _size(contents.path) < wanted:
        contents.missing.append(f"{name}: its header is cut short, nothing was flushed")
        return False
    if not sound:
        contents.damage.append(f"{name}: its header is damaged, so none of it was read")
        return False
    if int(version) > SCHEMA_VERSION:
        msg = (
            f"{contents.path} has schema {int(version)}, this spimpi reads up to schema "
            f"{SCHEMA_VERSION}: read it with a newer spimpi"
        )
        raise UsageError(msg)
    content = json.loads(body)
    contents.header = content["header"]
    contents.grows = content["tensors"] is None
    contents.tensors = [TensorInfo(*row) for row in content["tensors"] or ()]
    return True


def _size(path) -> int:
    return path.size() if isinstance(path, Stream) else path.stat().st_size


def _read_records(file, contents: JournalContents) -> None:
    name = contents.path.name
    blocks, count = [], 0
    size = RECORD.itemsize
    while data := file.read(size * BLOCK):
        records = np.frombuffer(data[: len(data) // size * size], RECORD)
        numbers = np.arange(count, count + len(records), dtype=np.uint32)
        good = (checksums(records) == records["checksum"]) & (records["number"] == numbers)
        n = len(records) if good.all() else int(np.argmin(good))
        blocks.append(unpack(records[:n]).view(np.uint8))  # numpy joins events field by field
        contents.fingerprint ^= int(np.bitwise_xor.reduce(records["checksum"][:n]))
        count += n
        if n < len(records):
            left = len(data) - n * size + len(file.read())
            _read_end(records[n : n + 1], count, left, contents)
            break
        if len(data) % size:
            contents.missing.append(
                f"{name}: record {count} is torn, {len(data) % size} of its {size} bytes are there"
            )
            break
    if blocks:
        contents.events = np.concatenate(blocks).view(EVENT)


def _read_end(record: np.ndarray, count: int, left: int, contents: JournalContents) -> None:
    """Judge a record that is not the next event: the end record, or damage."""
    name = contents.path.name
    end = record.view(END_RECORD)[0]
    if end["number"] != END or checksums(record)[0] != record["checksum"][0]:
        after = left // RECORD.itemsize - 1
        contents.damage.append(
            f"{name}: record {count} is damaged; it and the {after} records after it are left out"
        )
        return
    contents.end_state = end["state"].decode("utf-8", "replace")
    if end["count"] != count:
        contents.damage.append(
            f"{name}: {count} records are there, {end['count']} were written"
        )
    elif left > RECORD.itemsize:
        contents.damage.append(
            f"{name}: {left - RECORD.itemsize} bytes stand after its end"
        )
    else:
        contents.complete = True
