"""The checksum of journal records and the fingerprint of a rank's rows.

A record is ten 8-byte words (a sketch's: sixteen) and a checksum. Both follow docs/fingerprint.md
(8-byte items): ``acc`` is the XOR fingerprint of the record's words, the checksum of record n is
element n of value ``acc``, and the fingerprint of a rank's rows is the XOR of its records'
checksums. So a record binds its words to their places and its place in the journal, and rows
combine in any order and in any blocks. Plain numpy: a journal is read on machines that have nothing else.
"""

import hashlib

import numpy as np

from spimpi.fingerprint.tag import GOLDEN, VERSION, mix
from spimpi.trace.schema import EVENT, SKETCH_SHARE

RECORD = np.dtype(
    [("number", "<u4"), ("event", EVENT), ("writer", "<u2"), ("checksum", "<u8")]
)
SKETCH_RECORD = np.dtype(
    [("number", "<u4"), ("share", SKETCH_SHARE), ("unused", "V6"), ("checksum", "<u8")]
)
RECORDS = {EVENT: RECORD, SKETCH_SHARE: SKETCH_RECORD}  # the record of each kind of row
BLOCK = 4096  # records; the working set stays within a core's cache

_GOLDEN = np.uint64(GOLDEN)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def _keys_of(row: np.dtype, record: np.dtype):
    """The key of this kind of record, and those of its words, in a column."""
    key = np.uint64(mix(VERSION + row.itemsize))
    places = np.arange(1, record.itemsize // 8, dtype=np.uint64)
    return key, (key + places * _GOLDEN)[:, None]


_KEYS = {record: _keys_of(row, record) for row, record in RECORDS.items()}


def _element8(keys, words) -> np.ndarray:
    """element() of 8-byte items, in place on ``words``."""
    for _ in range(2):
        words ^= keys
        words ^= words >> _S30
        words *= _M1
        words ^= words >> _S27
        words *= _M2
        words ^= words >> _S31
    return words


def checksums(records: np.ndarray) -> np.ndarray:
    """Checksum of each record, uint64; ``records`` of dtype RECORD or SKETCH_RECORD, contiguous."""
    key, word_keys = _KEYS[records.dtype]
    words = records.view("<u8").reshape(len(records), len(word_keys) + 1)
    result = np.empty(len(records), np.uint64)
    for start in range(0, len(records), BLOCK):
        block = slice(start, start + BLOCK)
        each = np.array(words[block, :-1].T, np.uint64, order="C")  # always a copy
        acc = np.bitwise_xor.reduce(_element8(word_keys, each), axis=0)
        place = records["number"][block].astype(np.uint64) + np.uint64(1)
        result[block] = _element8(key + place * _GOLDEN, acc)
    return result


def pack(rows: np.ndarray, first: int) -> np.ndarray:
    """Records of ``rows`` (EVENT or SKETCH_SHARE), numbered from ``first``, with checksums."""
    records = np.zeros(len(rows), RECORDS[rows.dtype])
    # Rows are copied as bytes: numpy copies structured arrays field by field, 20 times slower.
    there = _row_bytes(records)
    there[:] = np.ascontiguousarray(rows).view(np.uint8).reshape(there.shape)
    records["number"] = np.arange(first, first + len(rows), dtype=np.uint32)
    records["checksum"] = checksums(records)
    return records


def unpack(records: np.ndarray) -> np.ndarray:
    """The rows of records, as a contiguous array of dtype EVENT or SKETCH_SHARE."""
    rows = np.ascontiguousarray(_row_bytes(records))
    return rows.view(records.dtype[1]).reshape(len(records))


def _row_bytes(records: np.ndarray) -> np.ndarray:
    """The rows of records as bytes, in place: uint8 [records, size of a row]."""
    size = records.dtype.itemsize
    return records.view(np.uint8).reshape(len(records), size)[:, 4 : 4 + records.dtype[1].itemsize]


def rows_fingerprint(events: np.ndarray, first: int = 0) -> int:
    """Fingerprint of a rank's rows ``first``, ``first + 1`` …; blocks combine by XOR."""
    result = np.uint64(0)
    for start in range(0, len(events), BLOCK):
        records = pack(events[start : start + BLOCK], first + start)
        result ^= np.bitwise_xor.reduce(records["checksum"])
    return int(result)


def compiled_checksums():
    """``checksums`` compiled by numba, about five times as fast; None where that cannot be had."""
    try:
        from spimpi.trace.checksum_kernel import checksums_of
    except Exception:  # noqa: BLE001  no numba, no compiler or no folder for it to cache in: no loss
        return None

    def compiled(records: np.ndarray) -> np.ndarray:
        key, word_keys = _KEYS[records.dtype]
        result = np.empty(len(records), np.uint64)
        words = records.view("<u8").reshape(len(records), len(word_keys) + 1)
        checksums_of(words, word_keys[:, 0].copy(), key, _GOLDEN, result)
        return result

    return compiled


def column_checksums(columns, numbers: np.ndarray, checksums=checksums) -> np.ndarray:
    """Checksum of each row, uint64, of rows whose columns lie apart.

    ``columns`` by name, of any integer types that hold their values; ``numbers`` uint32, each
    row's place among its rank's. Records are only ever made of one block, which stays in cache.
    """
    result = np.empty(len(numbers), np.uint64)
    records = np.zeros(min(BLOCK, len(numbers)), RECORD)
    for start in range(0, len(numbers), BLOCK):
        block = slice(start, start + BLOCK)
        records = records[: len(numbers[block])]
        records["number"] = numbers[block]
        for name in EVENT.names:
            records["event"][name] = columns[name][block]
        result[block] = checksums(records)
    return result


def rank_fingerprints(columns, counts, first: int = 0, checksums=checksums) -> list[int]:
    """Fingerprint of the rows of each of several ranks, whose columns lie one after the other.

    ``counts``: rows of each rank; ``first``: place of the first rank's first row here.
    """
    counts = np.asarray(counts, np.int64)
    starts = np.cumsum(counts) - counts
    numbers = np.arange(counts.sum()) - np.repeat(starts, counts)
    numbers[: counts[0] if len(counts) else 0] += first
    each = column_checksums(columns, numbers.astype(np.uint32), checksums)
    found = np.zeros(len(counts), np.uint64)
    if len(each):
        # Ranks without rows are left out: reduceat gives them the next rank's first row.
        found[counts > 0] = np.bitwise_xor.reduceat(each, starts[counts > 0])
    return found.tolist()


def text_digest(text: bytes) -> str:
    """Digest of a header or of a file's small tables, 16 hex digits (BLAKE2b)."""
    return hashlib.blake2b(text, digest_size=8).hexdigest()
