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
from spimpi.trace.checksum import SKETCH_RECORD, checksums, pack, text_digest, unpack
from spimpi.trace.journals.appending import Appending
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
        data = path.read_bytes()
    except FileNotFoundError:
        found.missing.append(f"{name}: is not there, though this run took sketches")
        return found
    if len(data) < FIRST_LINE:
        found.missing.append(f"{name}: its first line is cut short, no sketch is there")
        return found
    if data[:FIRST_LINE] != _first_line(rank, run_id):
        msg = f"{name}: its first line is damaged or of another run, so none of it was read"
        found.damage.append(msg)
        return found
    size = SKETCH_RECORD.itemsize
    whole, torn = divmod(len(data) - FIRST_LINE, size)
    records = np.frombuffer(data, SKETCH_RECORD, whole, FIRST_LINE)
    sound = checksums(records) == records["checksum"]
    good = sound & (records["number"] == np.arange(whole, dtype=np.uint32))
    n = whole if good.all() else int(np.argmin(good))
    found.rows = unpack(records[:n])
    if n < whole and sound[n] and records["number"][n] == END:
        _judge_end(found, name, n, int(records["share"]["size"][n]), (whole - n - 1) * size + torn)
    elif n < whole:
        msg = f"{name}: record {n} is damaged; it and the {whole - n - 1} records after it are left out"
        found.damage.append(msg)
    elif torn:
        found.missing.append(f"{name}: record {n} is torn, {torn} of its {size} bytes are there")
    elif ended:
        found.missing.append(f"{name}: its end is missing, {n} sketches are there")
    return found


def _judge_end(found: SketchContents, name: str, n: int, expected: int, left: int) -> None:
    if expected != n:
        found.damage.append(f"{name}: {n} records are there, {expected} were written")
    elif left:
        found.damage.append(f"{name}: {left} bytes stand after its end")
