"""The sketches of one rank while the run goes on: a file beside its journal.

    spimpi-sketches VERSION RANK RUN DIGEST\\n   one line of text, padded to 64 bytes
    record 0, record 1, …                       136 bytes each (trace/checksum.py)
    end record                                  number 0xFFFFFFFF; size: count of records

As in the journal, whole records are appended by plain write(), nothing is collective, and each
record has its number and its checksum. Every call writes at once: sketches are few.
"""

from dataclasses import dataclass, field

import numpy as np

from spimpi.errors import IncompleteError, UsageError
from spimpi.trace.checksum import SKETCH_RECORD, checksums, pack, text_digest
from spimpi.trace.journals.appending import Appending
from spimpi.trace.journals.node_file import opened
from spimpi.trace.journals.records import read_records
from spimpi.trace.schema import SCHEMA_VERSION, SKETCH_SHARE

MAGIC = "spimpi-sketches"
FIRST_LINE = 64
END = 0xFFFFFFFF


def sketch_path(journal):
    """Where the sketches beside a journal (a Path or a Stream) are."""
    return journal.with_suffix(".sketches")


class SketchFile:
    """Writer of one rank's sketches of the run ``run_id``. Not collective.

    UsageError where the file exists or can't be made. ``append`` and ``close`` belong to one
    thread.
    """

    def __init__(self, path, rank: int, run_id: str, sync: bool = False):
        self.path = path
        self.count = 0
        try:
            self._file = Appending(path, sync)
        except OSError as error:
            msg = f"cannot create the file of sketches {self.path}: {error.strerror}"
            raise UsageError(msg) from None
        self._write(_first_line(rank, run_id))

    def append(self, shares: np.ndarray) -> None:
        """Write rows (dtype SKETCH_SHARE, shape (n,)). IncompleteError where the file system
        refuses (disk full); what was written before is then as it was."""
        self._write(pack(shares, self.count).data.cast("B"))
        self.count += len(shares)

    def close(self) -> None:
        """Say how many there are."""
        end = np.zeros(1, SKETCH_RECORD)
        end["number"], end["share"]["size"] = END, self.count
        end["checksum"] = checksums(end)
        self._write(end.data.cast("B"))
        self._file.close()

    def _write(self, data) -> None:
        try:
            self._file.append(data)
        except OSError as error:
            msg = (
                f"the file of sketches {self.path} could not be written: {error.strerror}; "
                "free some space or choose another place (--trace)"
            )
            raise IncompleteError(msg) from error


@dataclass
class SketchContents:
    """The rows (SKETCH_SHARE) before the first damaged or torn record, and what is wrong."""

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, SKETCH_SHARE))
    missing: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return self.missing + self.damage


def _first_line(rank: int, run_id: str) -> bytes:
    start = f"{MAGIC} {SCHEMA_VERSION} {rank} {text_digest(run_id.encode())} "
    return (start + text_digest(start.encode()).ljust(FIRST_LINE - 1 - len(start))).encode() + b"\n"


def read_sketches(path, rank: int, run_id: str, ended: bool) -> SketchContents:
    """Read a rank's sketches, also where the file is cut short, damaged or still being written.

    ``ended``: whether the rank's journal has its end, which the sketches then have too. Never
    raises because of what the file holds.
    """
    found = SketchContents()
    name = path.name
    try:
        file, length = opened(path)
    except FileNotFoundError:
        found.missing.append(f"{name}: is not there, though this run took sketches")
        return found
    except OSError as error:
        found.damage.append(f"{name}: cannot be read: {error.strerror}")
        return found
    with file:
        first = file.read(FIRST_LINE)
        if len(first) < FIRST_LINE:
            found.missing.append(f"{name}: its first line is cut short, no sketch is there")
            return found
        if first != _first_line(rank, run_id):
            msg = f"{name}: its first line is damaged or of another run, so none of it was read"
            found.damage.append(msg)
            return found
        records = read_records(file, length - FIRST_LINE, SKETCH_RECORD)
    found.rows = records.rows
    n, size = len(records), SKETCH_RECORD.itemsize
    after = records.next
    if after is not None and records.sound and after["number"][0] == END:
        _judge_end(found, name, n, int(after["share"]["size"][0]), records.left - size)
    elif after is not None:
        msg = (
            f"{name}: record {n} is damaged; it and the {records.left // size - 1} records after "
            "it are left out"
        )
        found.damage.append(msg)
    elif records.left:
        found.missing.append(
            f"{name}: record {n} is torn, {records.left} of its {size} bytes are there"
        )
    elif ended:
        found.missing.append(f"{name}: its end is missing, {n} sketches are there")
    return found


def _judge_end(found: SketchContents, name: str, n: int, expected: int, left: int) -> None:
    if expected != n:
        found.damage.append(f"{name}: {n} records are there, {expected} were written")
    elif left:
        found.damage.append(f"{name}: {left} bytes stand after its end")
