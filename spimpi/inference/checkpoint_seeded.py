"""Weights made from a seed: any slab of any tensor alone, in place of a checkpoint's files."""

import math
from collections.abc import Iterator

import numpy as np

from spimpi.fingerprint import words
from spimpi.fingerprint.tag import COLOUR, DEFAULT_SEED, GOLDEN, Tag
from spimpi.inference.checkpoint import (
    BLOCK_BYTES,
    TensorRecord,
    byte_share,
    config_digest,
    slice_ranges,
)
from spimpi.inference.config import ModelConfig, checkpoint_tensors
from spimpi.jit import kernel

_HALF = np.int32(1 << 23)


class SeededCheckpoint:
    """Seeded weights behind the interface of a checkpoint (spimpi.inference.checkpoint).

    Element i of a matrix is (2 * (colour(i) >> 40) / 2**24 - 1) * sqrt(3 / fan_in) in float32:
    uniform, of variance 1 / fan_in. fan_in is the row length; colour is the field of
    docs/fingerprint.md for the tag (seed, Hugging Face's tensor name, layer -1, step 0), the
    tensor's global shape and item size 4. Norm weights are 1.
    """

    def __init__(self, config: ModelConfig, seed: int = DEFAULT_SEED):
        self.config = config
        self.seed = seed
        self.tensors: dict[str, TensorRecord] = {
            name: TensorRecord(shape, "float32", 4)
            for name, shape in checkpoint_tensors(config).items()
        }
        self.ignored: list[str] = []
        self.not_read: list[str] = []
        self.total_bytes = sum(record.n_bytes for record in self.tensors.values())
        self.bytes_read = 0
        self.bytes_reread = 0

    def read(self, name: str, rows=None, cols=None) -> np.ndarray:
        """A slice of a tensor, float32: half-open ranges of rows and of columns, None for all."""
        record = self.tensors[name]
        ranges = slice_ranges(name, record, rows, cols)
        array = np.ones([stop - start for start, stop in ranges], dtype=np.float32)
        if len(record.shape) == 2:
            key, scale = self._stream(name)
            _fill(array, key, ranges[0][0], ranges[1][0], record.shape[1], scale)
        self.bytes_read += array.nbytes
        return array

    def pieces(self, part: int, n_parts: int) -> Iterator[tuple[str, int, np.ndarray]]:
        """The second making: share ``part`` of ``n_parts``, as FileCheckpoint.pieces cuts it.

        In numpy and over flat ranges: shares neither code nor cut with ``read``'s kernel.
        """
        step = BLOCK_BYTES // 4
        for name, start, stop in byte_share(self.tensors, part, n_parts):
            is_norm = len(self.tensors[name].shape) == 1
            for first in range(start, stop, step):
                count = min(step, stop - first)
                values = np.ones(count, np.float32) if is_norm else self._flat(name, first, count)
                self.bytes_reread += values.nbytes
                yield name, first, values.view(np.uint32)

    def identity(self) -> str:
        """16 hex digits that name the model: its configuration (without the name) and the seed."""
        digest = config_digest(self.config)
        digest.update(f"seed {self.seed}".encode())
        return digest.hexdigest()[:16]

    def _stream(self, name: str) -> tuple[np.uint64, np.float32]:
        """The colour field's key, and 2**-23 * sqrt(3 / fan_in), by which c - 2**23 is multiplied.

        The power of two changes no bit: only the root is rounded to float32.
        """
        shape = self.tensors[name].shape
        key = np.uint64(Tag(self.seed, name, -1, 0).key(COLOUR, shape, 4))
        return key, np.float32(math.sqrt(3 / shape[-1])) * np.float32(2**-23)

    def _flat(self, name: str, first: int, count: int) -> np.ndarray:
        key, scale = self._stream(name)
        values = np.empty(count, np.float32)
        step = 1 << 14  # the intermediate words stay in cache
        for low in range(0, count, step):
            high = min(low + step, count)
            z = np.arange(first + low + 1, first + high + 1, dtype=np.uint64)
            z *= np.uint64(GOLDEN)
            z += key
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                z ^= z >> np.uint64(shift)
                z *= np.uint64(factor)
            z ^= z >> np.uint64(31)
            z >>= np.uint64(40)
            values[low:high] = z.astype(np.int32) - _HALF
            values[low:high] *= scale
        return values


@kernel("void(float32[:, ::1], uint64, int64, int64, int64, float32)")
def _fill(out, key, first_row, first_col, row_length, scale):
    """Fill a slab of a seeded matrix whose rows have ``row_length`` elements."""
    for r in range(out.shape[0]):
        start = np.uint64((first_row + r) * row_length + first_col)
        for c in range(out.shape[1]):
            word = words.mix(words.element_key(key, start + np.uint64(c)))
            out[r, c] = np.float32(np.int32(word >> np.uint64(40)) - _HALF) * scale
