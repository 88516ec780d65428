"""Tables of tensors that grow while a program runs, and may differ from rank to rank.

A journal's header has the table of a run whose tensors are known before it starts. A program's
checks name theirs as they come: such a journal has a file beside it, ``rank-00003.tensors``, of
one line for each row, which is appended before the first event that refers to it. Its shape or
dtype may change later: a line for the same row then replaces the earlier one. Sealing makes one
table of all ranks'.
"""

import json
from itertools import count

import numpy as np

from spimpi.errors import IncompleteError
from spimpi.trace.checksum import text_digest
from spimpi.trace.facts import tensor_of
from spimpi.trace.journals.appending import Appending
from spimpi.trace.journals.node_file import opened
from spimpi.trace.schema import TensorInfo

UNKNOWN = 0xFFFF  # the row of a tensor that no table names
MOST = 65535  # rows; the last one stands for all tensors that have none of their own
LONGEST = 1 << 20  # bytes of a line
OTHERS = TensorInfo("(other tensors)", (-1,), "mixed")


def table_path(journal):
    """Where the growing table of a journal (a Path or a Stream) is."""
    return journal.with_suffix(".tensors")


class GrowingTable:
    """Rows by the tensor's name; written as they come, in a new file. Local."""

    def __init__(self, path, sync: bool = False):
        self.path, self._file = path, Appending(path, sync)
        self.rows: dict[str, int] = {}
        self.tensors: list[TensorInfo] = []

    def row(self, tensor: TensorInfo) -> int:
        """The row of a tensor, which is made where there is none."""
        if tensor.name not in self.rows and len(self.tensors) >= MOST - 1:
            tensor = OTHERS
        row = self.rows.setdefault(tensor.name, len(self.tensors))
        known = self.tensors[row] if row < len(self.tensors) else None
        now = tensor if known is None else alike(known, tensor)
        if now == known:
            return row
        self.tensors[row : row + 1] = [now]
        body = json.dumps([row, now.name, list(now.shape), now.dtype])
        self._write(f"{text_digest(body.encode())} {body}\n")
        return row

    def _write(self, text: str) -> None:
        try:
            self._file.append(text.encode())
        except OSError as error:
            msg = f"the trace's table {self.path} could not be written: {error.strerror}"
            raise IncompleteError(msg) from error

    def close(self) -> None:
        self._file.close()


def alike(one: TensorInfo, other: TensorInfo) -> TensorInfo:
    """One row for both: -1 for axes that differ, and (-1,) where their numbers of axes do."""
    shape = (-1,)
    if len(one.shape) == len(other.shape):
        shape = tuple(a if a == b else -1 for a, b in zip(one.shape, other.shape))
    return TensorInfo(one.name, shape, one.dtype if one.dtype == other.dtype else "mixed")


def read_table(path) -> tuple[list[TensorInfo], str]:
    """The rows before the first line that is damaged or torn, and what is wrong with that."""
    tensors: list[TensorInfo] = []
    try:
        file, _ = opened(path)
    except FileNotFoundError:
        return tensors, f"{path.name} is missing"
    except OSError as error:
        return tensors, f"{path.name} cannot be read: {error.strerror}"
    with file:
        for number in count(1):
            line = file.readline(LONGEST).strip(b"\n\0")  # a stream ends at a whole word
            if not line:
                return tensors, ""
            try:
                _take(line, tensors)
            except (ValueError, TypeError, RecursionError):
                return tensors, f"{path.name}: line {number} is damaged or torn"


def _take(line: bytes, tensors: list[TensorInfo]) -> None:
    """Put a line's row into the table. ValueError where it is none."""
    digest, _, body = line.partition(b" ")
    if digest.decode() != text_digest(body):
        raise ValueError
    row, *tensor = json.loads(body)
    if type(row) is not int or not 0 <= row <= min(len(tensors), MOST - 1):
        raise ValueError
    tensors[row : row + 1] = [tensor_of(tensor)]


def merged(tables) -> tuple[list[TensorInfo], list[np.ndarray]]:
    """One table of many, and for each of these the new number of its rows (uint16)."""
    rows: dict[str, int] = {}
    union: list[TensorInfo] = []
    numbers = []
    for table in tables:
        own = np.zeros(len(table), np.uint16)
        for i, tensor in enumerate(table):
            if tensor.name not in rows and len(union) >= MOST - 1:
                tensor = OTHERS
            row = own[i] = rows.setdefault(tensor.name, len(union))
            union[row : row + 1] = [tensor if row == len(union) else alike(union[row], tensor)]
        numbers.append(own)
    return union, numbers


def renumbered(events: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Events whose tensors have these new rows. What a torn table lacks gets a number that no
    table has: its own would be another tensor's in the merged one."""
    events = events.copy()
    old = events["tensor"].copy()
    known = old < numbers.size
    events["tensor"] = UNKNOWN
    events["tensor"][known] = numbers[old[known]]
    return events
