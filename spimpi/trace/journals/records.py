"""Records of a journal or of its sketches, up to the first that is damaged or torn."""

from dataclasses import dataclass

import numpy as np

from spimpi.trace.checksum import BLOCK, checksums, unpack


@dataclass(frozen=True)
class Records:
    """``rows`` of the sound records, each in its place, and the XOR of their checksums.

    ``next``: the record that follows them and is not the next row, with a ``sound`` checksum or
    not; None where none follows whole. ``left``: bytes from there to the end of the file.
    """

    rows: np.ndarray
    fingerprint: int
    next: np.ndarray | None
    sound: bool
    left: int

    def __len__(self) -> int:
        return len(self.rows)


def read_records(file, left: int, record: np.dtype) -> Records:
    """Read records (RECORD, SKETCH_RECORD) of a file that has ``left`` bytes from here on.

    Nothing is read, and no memory is taken, for what stands after the first that is not sound.
    """
    blocks, count, fingerprint, following, is_sound = [], 0, 0, None, False
    while data := file.read(record.itemsize * BLOCK):
        left = max(left, len(data))  # who writes it goes on
        records = np.frombuffer(data[: len(data) // record.itemsize * record.itemsize], record)
        numbers = np.arange(count, count + len(records), dtype=np.uint32)
        sound = checksums(records) == records["checksum"]
        good = sound & (records["number"] == numbers)
        n = len(records) if good.all() else int(np.argmin(good))
        blocks.append(unpack(records[:n]).view(np.uint8))  # numpy joins rows field by field
        fingerprint ^= int(np.bitwise_xor.reduce(records["checksum"][:n]))
        count += n
        left -= n * record.itemsize
        if n < len(records):
            following, is_sound = records[n : n + 1], bool(sound[n])
            break
        if len(data) % record.itemsize:
            break
    rows = np.concatenate(blocks) if blocks else np.zeros(0, np.uint8)
    return Records(rows.view(record[1]), fingerprint, following, is_sound, left)
