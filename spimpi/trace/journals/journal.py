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
from spimpi.trace.checksum import RECORD, checksums, pack, text_digest
from spimpi.trace.facts import END_STATES, is_rank, sound_facts, tensor_of
from spimpi.trace.journals.appending import Appending
from spimpi.trace.journals.growing import GrowingTable, read_table, table_path
from spimpi.trace.journals.journal_files import already_there, journal_path, make_folder
from spimpi.trace.journals.node_file import Stream, opened
from spimpi.trace.journals.records import Records, read_records
from spimpi.trace.journals.sketch_file import SketchContents, SketchFile, read_sketches, sketch_path
from spimpi.trace.journals.synced import sync as sync_path
from spimpi.trace.schema import EVENT, SCHEMA_VERSION, RankInfo, TensorInfo

MAGIC = "spimpi-journal"
FIRST_LINE = 64
LONGEST = 1 << 26  # bytes of a header
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
            make_folder(self.path.parent)
            self._file = Appending(self.path, sync)
        except FileExistsError as error:
            raise UsageError(already_there(error.filename or self.path)) from None
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
    wrong is named in ``problems``, and everything before it is kept. OSError where no ordinary file
    stands there; a link is not followed.
    """
    path = path if isinstance(path, Stream) else Path(path)
    contents = JournalContents(path)
    file, size = opened(path)
    with file:
        if header := _read_header(file, size, contents):
            _judge(read_records(file, size - header, RECORD), contents)
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


def _read_header(file, size: int, contents: JournalContents) -> int:
    """Bytes of the header, which is taken; 0 where it cannot be."""
    name, line = contents.path.name, file.read(FIRST_LINE)
    wanted, sound = FIRST_LINE, False
    try:
        _, version, length, _ = line.split()
        version, length = int(version), int(length)
        wanted += length
        if FIRST_LINE <= wanted <= min(size, LONGEST):
            body = file.read(length)
            sound = line == _first_line(version, body)
    except ValueError:
        pass
    if not sound and size < wanted:
        contents.missing.append(f"{name}: its header is cut short, nothing was flushed")
        return 0
    if sound and version > SCHEMA_VERSION:
        msg = (
            f"{contents.path} has schema {version}, this spimpi reads up to schema "
            f"{SCHEMA_VERSION}: read it with a newer spimpi"
        )
        raise UsageError(msg)
    if not (sound and _take_header(body, contents)):
        contents.damage.append(f"{name}: its header is damaged, so none of it was read")
        return 0
    return wanted


def _take_header(body: bytes, contents: JournalContents) -> bool:
    """What a header says, where it is of the kinds that a journal writes."""
    try:
        content = json.loads(body)
        header, tensors = content["header"], content["tensors"]
        own = [header[name] for name in OWN_HEADER[1:]]
        table = [tensor_of(row) for row in tensors or ()]
        header["started"] = float(header["started"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False
    if not is_rank(RankInfo(*own, offset=0, count=0, fingerprint=0)):
        return False
    contents.header, others = sound_facts(header)
    contents.damage += [
        f"{contents.path.name}: the field {name} of its header is not what spimpi writes"
        for name in others
    ]
    contents.grows, contents.tensors = tensors is None, table
    return True


def _judge(records: Records, contents: JournalContents) -> None:
    """Take the rows, and what follows them: the end record, or damage."""
    name, size, count = contents.path.name, RECORD.itemsize, len(records)
    contents.events, contents.fingerprint = records.rows, records.fingerprint
    if records.next is None:
        if records.left:
            contents.missing.append(
                f"{name}: record {count} is torn, {records.left} of its {size} bytes are there"
            )
        return
    end = records.next.view(END_RECORD)[0]
    state = end["state"].decode("utf-8", "replace")
    if end["number"] != END or not records.sound or state not in END_STATES:
        after = records.left // size - 1
        contents.damage.append(
            f"{name}: record {count} is damaged; it and the {after} records after it are left out"
        )
        return
    contents.end_state = state
    if end["count"] != count:
        contents.damage.append(
            f"{name}: {count} records are there, {end['count']} were written"
        )
    elif records.left > size:
        contents.damage.append(f"{name}: {records.left - size} bytes stand after its end")
    else:
        contents.complete = True
