"""The headers of safetensors files: which tensors they hold, where, and whether they are whole."""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from spimpi.errors import UsageError
from spimpi.json_file import is_shape, parse_json
from spimpi.printable import one_line
from spimpi.regular_file import open_regular, size_of

_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


class BrokenFile(UsageError):
    """A file that can be read, and whose bytes are not those of a whole safetensors file."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as it is stored: global shape, dtype ("bfloat16", "float16", "float32"), bytes an
    element."""

    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_elements * self.itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor in a header: dtype as it is written there, shape, first byte and end in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """One safetensors file: its tensors' entries, where their bytes start, its length."""

    path: Path
    entries: dict[str, Entry]
    data_start: int
    n_bytes: int

    def record(self, name: str) -> tuple[TensorRecord, int]:
        """A tensor's record and the offset of its bytes in the file's data.

        UsageError for a dtype that is not supported, or bytes that do not fit the shape.
        """
        entry = self.entries[name]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            msg = (
                f"{self.path}: tensor {one_line(name, 100)} has dtype {one_line(entry.dtype, 40)}, "
                f"supported are {', '.join(_DTYPES)}"
            )
            raise UsageError(msg)
        record = TensorRecord(entry.shape, dtype.name, dtype.itemsize)
        self.require_bytes(name, record.n_bytes)
        return record, entry.start

    def require_bytes(self, name: str, needed: int) -> None:
        """BrokenFile unless a tensor has as many bytes as its shape and dtype need."""
        entry = self.entries[name]
        found = entry.stop - entry.start
        if found != needed:
            msg = (
                f"{self.path}: tensor {one_line(name, 100)} of shape {_told(list(entry.shape))} and "
                f"dtype {entry.dtype} needs {needed} bytes, its header entry gives {found}"
            )
            raise BrokenFile(msg)

    def require_no_holes(self) -> None:
        """Every byte after the header must belong to one tensor, as the format demands: what lies
        in a hole would be in no fingerprint."""
        at = 0
        for start, stop in sorted((entry.start, entry.stop) for entry in self.entries.values()):
            if start != at:
                what = "a gap" if start > at else "an overlap"
                msg = (
                    f"{self.path} has a broken safetensors header: {what} between tensors at byte "
                    f"{min(at, start)} of its data"
                )
                raise BrokenFile(msg)
            at = stop


def read_header(path: Path) -> Header:
    """The header of a safetensors file: 8 bytes of length, JSON, then the data.

    Format: https://github.com/huggingface/safetensors#format
    UsageError where the file cannot be read; BrokenFile where it is not whole, or holds an entry
    that is none.
    """
    try:
        with open_regular(path) as file:
            found = size_of(file)
            prefix = file.read(8)
            if prefix == b"version ":
                msg = f"{path} is a Git LFS pointer, not the weights: run git lfs pull"
                raise UsageError(msg)
            if len(prefix) < 8:
                _refuse_cut(path, "at least 8", found)
            length = struct.unpack("<Q", prefix)[0]
            if length > _LONGEST_HEADER:
                msg = (
                    f"{path} is not a safetensors file: expected a header of at most "
                    f"{_LONGEST_HEADER} bytes, found {length} as its length"
                )
                raise BrokenFile(msg)
            if 8 + length > found:
                _refuse_cut(path, f"a header of {length} bytes and data after it", found)
            text = file.read(length)
    except OSError as error:
        msg = f"{one_line(path)} cannot be read: {error.strerror}"
        raise UsageError(msg) from None
    try:
        values = parse_json(text)
        if not isinstance(values, dict):
            msg = f"expected an object, found a {type(values).__name__}"
            raise ValueError(msg)
        values.pop("__metadata__", None)
        entries = {name: _entry(name, value) for name, value in values.items()}
    except ValueError as error:
        msg = f"{path} has a broken safetensors header, {one_line(error, 250)}"
        raise BrokenFile(msg) from None
    expected = 8 + length + max((entry.stop for entry in entries.values()), default=0)
    if found < expected:
        _refuse_cut(path, str(expected), found)
    if found > expected:
        msg = f"{path} is longer than its header says: expected {expected} bytes, found {found}"
        raise BrokenFile(msg)
    return Header(path, entries, 8 + length, found)


def _entry(name: str, value) -> Entry:
    """An entry of the header, strictly read; ValueError where it is none."""
    try:
        name.encode()
    except UnicodeEncodeError:  # JSON can hold half a character
        msg = f"the tensor name {one_line(ascii(name), 80)} is not valid Unicode"
        raise ValueError(msg) from None
    value = value if isinstance(value, dict) else {}
    shape, offsets = value.get("shape"), value.get("data_offsets")
    pair = is_shape(offsets, product=False) and len(offsets) == 2 and offsets[0] <= offsets[1]
    if not pair or not is_shape(shape):
        msg = (
            f"tensor {one_line(name, 80)}: expected a shape and two offsets, found {_told(shape)} "
            f"and {_told(offsets)}"
        )
        raise ValueError(msg)
    return Entry(str(value.get("dtype")), tuple(shape), *offsets)


def _told(value) -> str:
    return one_line(repr(value), 60)


def _refuse_cut(path: Path, expected: str, found: int):
    msg = f"{path} is cut short: expected {expected} bytes, found {found}; copy it again"
    raise BrokenFile(msg)
