"""The headers of safetensors files: which tensors they hold, where, and whether they are whole."""

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from spimpi.errors import UsageError
from spimpi.json_file import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


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
class Header:
    """One safetensors file: its tensors' raw entries, where their bytes start, its length."""

    path: Path
    entries: dict
    data_start: int
    n_bytes: int

    def record(self, name: str) -> tuple[TensorRecord, int]:
        """A tensor's record and the offset of its bytes in the file's data.

        UsageError for a dtype that is not supported, or bytes that do not fit the shape.
        """
        entry = self.entries[name]
        dtype = _DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            msg = (
                f"{self.path}: tensor {name} has dtype {entry.get('dtype')}, supported are "
                f"{', '.join(_DTYPES)}"
            )
            raise UsageError(msg)
        try:
            start, stop = (int(n) for n in entry["data_offsets"])
            record = TensorRecord(tuple(int(n) for n in entry["shape"]), dtype.name, dtype.itemsize)
        except (ValueError, TypeError, LookupError) as error:
            msg = f"{self.path} has a broken safetensors header, tensor {name}: {error!r}"
            raise UsageError(msg) from None
        if start < 0 or stop - start != record.n_bytes:
            msg = (
                f"{self.path}: tensor {name} of shape {list(record.shape)} and dtype "
                f"{entry['dtype']} needs {record.n_bytes} bytes, its header entry gives "
                f"{stop - start}"
            )
            raise UsageError(msg)
        return record, start


def read_headers(directory: Path) -> list[Header]:
    """The headers of model.safetensors, or of all the files that the index names.

    Raises UsageError, with the file and what was expected and found, where a file is broken,
    absent, or not as long as its header says, or the index misplaces a tensor.
    """
    if (directory / SINGLE_FILE).exists():  # as transformers: a single file wins over an index
        return [read_header(directory / SINGLE_FILE)]
    index = directory / INDEX_FILE
    there = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    values = read_json_object(
        index,
        f"no weights in {directory}: expected {SINGLE_FILE} or {INDEX_FILE}, "
        f"found {', '.join(there) or 'nothing'}",
    )
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        msg = f"{index} must hold a weight_map from tensors to files, found {sorted(values)}"
        raise UsageError(msg)
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard or not (directory / shard).is_file():
            msg = f"{index} names the file {shard!r}, which is not in {directory}"
            raise UsageError(msg)
    headers = [read_header(directory / shard) for shard in shards]
    for header in headers:
        for name in [n for n, s in weight_map.items() if s == header.path.name]:
            if name not in header.entries:
                msg = f"{index} places tensor {name} in {header.path.name}, which does not hold it"
                raise UsageError(msg)
    return headers


def read_header(path: Path) -> Header:
    """The header of a safetensors file: 8 bytes of length, JSON, then the data.

    Format: https://github.com/huggingface/safetensors#format
    """
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
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
                raise UsageError(msg)
            if 8 + length > found:
                _refuse_cut(path, f"a header of {length} bytes and data after it", found)
            text = file.read(length)
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise UsageError(msg) from None
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        msg = f"{path} has a broken safetensors header: {error!r}"
        raise UsageError(msg) from None
    expected = 8 + length + max(ends, default=0)
    if found < expected:
        _refuse_cut(path, str(expected), found)
    if found > expected:
        msg = f"{path} is longer than its header says: expected {expected} bytes, found {found}"
        raise UsageError(msg)
    return Header(path, entries, 8 + length, found)


def _refuse_cut(path: Path, expected: str, found: int):
    msg = f"{path} is cut short: expected {expected} bytes, found {found}; copy it again"
    raise UsageError(msg)
