"""Checkpoints of safetensors files: validated by their headers, read slice by slice.

Every source of weights (files here, a seed in checkpoint_seeded.py) has the same face:
``config``, ``tensors``, ``not_read``, ``read``, ``pieces``, ``bytes_read``, ``total_bytes`` and
``identity``.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from spimpi.errors import UsageError
from spimpi.inference.config import ModelConfig, checkpoint_tensors
from spimpi.inference.safetensors_header import Header, TensorRecord
from spimpi.inference.weight_files import find_weights, not_read
from spimpi.printable import one_line

BLOCK_BYTES = 1 << 22
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie: the file, and the offset of the first byte in it."""

    header: Header
    offset: int


def open_checkpoint(directory, config: ModelConfig) -> "FileCheckpoint":
    """Open model.safetensors, or model.safetensors.index.json and its shards; headers only.

    Raises UsageError, with the file and what was expected and found, where a tensor of
    ``checkpoint_tensors(config)`` is missing or has another shape or dtype, or a file is broken,
    absent, or not as long as its header says. The checkpoint's ``config`` is what holds.
    """
    directory = Path(directory)
    files = find_weights(directory)
    homes = files.homes
    unread = not_read(files.left_out, files.copies, homes)
    _require_layers(directory, config, homes)
    if config.tie_word_embeddings and HEAD in homes:
        # Right where both are equal too; transformers 5 compares them, and does not tie others.
        config = replace(config, tie_word_embeddings=False)
        unread.append(f"tie_word_embeddings: the files have a {HEAD} of their own")
    tensors, places = {}, {}
    wanted = checkpoint_tensors(config)
    missing = [name for name in wanted if name not in homes]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        there = one_line(", ".join(header.path.name for header in files.headers), 150)
        msg = (
            f"the checkpoint in {one_line(directory, 150)} lacks {len(missing)} of the "
            f"{len(wanted)} tensors of {config.name}: {', '.join(missing[:3])}{more}; found "
            f"{len(homes)} tensors in {there}"
        )
        raise UsageError(msg)
    for name, shape in wanted.items():
        header = homes[name]
        record, start = header.record(name)
        if record.shape != shape:
            msg = (
                f"{header.path}: tensor {name} has shape {one_line(list(record.shape), 60)}, "
                f"expected {list(shape)} from config.json"
            )
            raise UsageError(msg)
        tensors[name] = record
        places[name] = _Place(header, header.data_start + start)
    for header in files.headers:
        header.require_no_holes()
    ignored = sorted(set(homes) - set(wanted))
    if ignored:
        more = f" and {len(ignored) - 1} more" if len(ignored) > 1 else ""
        unread.append(f"tensors: {one_line(ignored[0], 100)}{more}, of no use to {config.name}")
    return FileCheckpoint(config, tensors, places, ignored, unread)


def _require_layers(directory: Path, config: ModelConfig, homes) -> None:
    """UsageError where the files cannot hold so many layers; said before these are counted out."""
    if config.n_layers > len(homes):
        msg = (
            f"config.json in {one_line(directory, 150)} says {config.n_layers} layers "
            f"(num_hidden_layers), and the files hold {len(homes)} tensors in all"
        )
        raise UsageError(msg)


class FileCheckpoint:
    """The weights in safetensors files. Make it with ``open_checkpoint``.

    config: the model's, tied to its embedding only where the files have no head of their own;
    tensors: the model's tensors in program order; ignored: what else the files hold; not_read: what
    of the folder is not read, in lines for people; total_bytes: of the model's tensors; bytes_read
    and bytes_reread: what ``read`` and ``pieces`` have fetched so far.
    """

    def __init__(self, config, tensors, places, ignored, not_read):
        self.config: ModelConfig = config
        self.tensors: dict[str, TensorRecord] = tensors
        self.ignored: list[str] = ignored
        self.not_read: list[str] = not_read
        self.total_bytes = sum(record.n_bytes for record in tensors.values())
        self.bytes_read = 0
        self.bytes_reread = 0
        self._places: dict[str, _Place] = places

    def read(self, name: str, rows=None, cols=None) -> np.ndarray:
        """A slice of a tensor, in the stored dtype: half-open ranges of rows and of columns.

        None takes all. A contiguous array of its own; only the slice's bytes are read. Raises
        UsageError where the slice does not lie in the tensor or the file has changed.

        Goes through the safetensors library (get_slice reads BF16 as ml_dtypes.bfloat16 since
        safetensors 0.5). The library maps the file: it is opened for each slice, so that the
        pages do not stay in this process's resident memory, and the length is looked at before,
        because reading a map of a file that was cut short kills the process with SIGBUS.
        """
        ranges = slice_ranges(name, self.tensors[name], rows, cols)
        path = self._unchanged(name)
        if any(start == stop for start, stop in ranges):
            # the library refuses an empty range at a tensor's end
            return np.empty([b - a for a, b in ranges], self.tensors[name].dtype)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                array = file.get_slice(name)[tuple(slice(*pair) for pair in ranges)]
        except (OSError, SafetensorError) as error:
            msg = f"{path}: tensor {name} cannot be read: {error}"
            raise UsageError(msg) from None
        self.bytes_read += array.nbytes
        return array

    def pieces(self, part: int, n_parts: int) -> Iterator[tuple[str, int, np.ndarray]]:
        """The second read: share ``part`` of ``n_parts`` nearly equal byte ranges of all tensors.

        Yields (tensor's name, global index of the first element, flat array of the elements' bits
        as unsigned words) in blocks of at most 4 MiB. Over all parts every element comes exactly
        once. Plain pread at offsets that this module computed: shares neither code nor cut with
        ``read``, because the same read twice would prove nothing.
        """
        for name, start, stop in byte_share(self.tensors, part, n_parts):
            itemsize = self.tensors[name].itemsize
            step = BLOCK_BYTES // itemsize
            for first in range(start, stop, step):
                count = min(step, stop - first)
                data = self._pread(name, first * itemsize, count * itemsize)
                self.bytes_reread += len(data)
                yield name, first, np.frombuffer(data, dtype=f"<u{itemsize}")

    def identity(self) -> str:
        """16 hex digits that name the model, whatever its directory and number of files.

        Taken from the configuration (without the name), the tensors' names, shapes and dtypes,
        and 16 bytes from the middle of every matrix: models of one shape but with other weights
        differ, and a few corrupted bytes elsewhere do not make it another model.
        """
        digest = config_digest(self.config)
        for name, record in self.tensors.items():
            digest.update(f"{name} {record.shape} {record.dtype}".encode())
            if len(record.shape) == 2:
                middle = record.n_elements // 2 * record.itemsize
                digest.update(self._pread(name, middle, min(16, record.n_bytes - middle)))
        return digest.hexdigest()[:16]

    def _unchanged(self, name: str) -> Path:
        header = self._places[name].header
        try:
            found = os.stat(header.path).st_size
        except OSError as error:
            msg = f"{header.path} can no longer be read: {error.strerror}"
            raise UsageError(msg) from None
        if found != header.n_bytes:
            msg = (
                f"{header.path} has changed since it was opened: expected {header.n_bytes} bytes, "
                f"found {found}"
            )
            raise UsageError(msg)
        return header.path

    def _pread(self, name: str, start: int, count: int) -> bytearray:
        """``count`` bytes of a tensor from its byte ``start`` on."""
        place = self._places[name]
        path = self._unchanged(name)
        data = bytearray(count)
        view = memoryview(data)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                done = 0
                while done < count:
                    n = os.preadv(descriptor, [view[done:]], place.offset + start + done)
                    if n == 0:
                        msg = (
                            f"{path} ended in tensor {name}: expected {count} bytes at offset "
                            f"{place.offset + start}, found {done}"
                        )
                        raise UsageError(msg)
                    done += n
            finally:
                os.close(descriptor)
        except OSError as error:
            msg = f"{path}: tensor {name} cannot be read: {error.strerror}"
            raise UsageError(msg) from None
        return data


def slice_ranges(name: str, record: TensorRecord, rows, cols) -> list[tuple[int, int]]:
    """The half-open range of each axis; UsageError unless they lie in the tensor."""
    ranges = [rows] if len(record.shape) == 1 and cols is None else [rows, cols]
    ranges = [(0, n) if r is None else (int(r[0]), int(r[1])) for r, n in zip(ranges, record.shape)]
    inside = all(0 <= a <= b <= n for (a, b), n in zip(ranges, record.shape))
    if not inside or (cols is not None and len(record.shape) == 1):
        msg = (
            f"rows {rows}, columns {cols} do not lie in tensor {name} of shape {list(record.shape)}"
        )
        raise UsageError(msg)
    return ranges


def byte_share(tensors: dict[str, TensorRecord], part: int, n_parts: int):
    """The element ranges (name, start, stop) of one of n_parts byte ranges of all tensors.

    The tensors are laid end to end in their order and cut at total * part // n_parts; an element
    belongs to the part in which its first byte lies.
    """
    if not 0 <= part < n_parts:
        msg = f"part must lie in 0..{n_parts - 1}, found {part}"
        raise UsageError(msg)
    total = sum(record.n_bytes for record in tensors.values())
    low, high = total * part // n_parts, total * (part + 1) // n_parts
    at = 0
    for name, record in tensors.items():
        start, stop = (
            min(max(-(-(cut - at) // record.itemsize), 0), record.n_elements) for cut in (low, high)
        )
        at += record.n_bytes
        if start < stop:
            yield name, start, stop


def float32(array: np.ndarray) -> np.ndarray:
    """A float32 copy of bfloat16, float16 or float32 data; -0.0 becomes +0.0.

    The sign of a zero would depend on how sums are split, so no negative zero gets in.
    """
    if array.dtype == ml_dtypes.bfloat16:
        wide = array.view(np.uint16).astype(np.uint32)  # several times as fast as ml_dtypes' cast
        wide <<= 16
        wide = wide.view(np.float32)
    else:
        wide = array.astype(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN is refused later, by name
        wide += np.float32(0)  # round to nearest: -0.0 + 0.0 is +0.0
    return wide


def config_digest(config: ModelConfig):
    """A SHA-256 object that has taken in the facts of a configuration."""
    facts = asdict(config)
    del facts["name"]  # a copy of the directory under another name is the same model
    if config.model_type == "llama":  # what no Llama has names none: golden files stay valid
        for field in ("model_type", "layer_types", "sliding_window"):
            del facts[field]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
