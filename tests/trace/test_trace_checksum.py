"""The checksum of a record and the fingerprint of a rank's rows."""

import numpy as np
import pytest
from trace_samples import same, some_events

from spimpi.fingerprint.tag import GOLDEN, MASK, VERSION, mix
from spimpi.trace.checksum import (
    BLOCK, RECORD, checksums, compiled_checksums, pack, rank_fingerprints, rows_fingerprint, unpack,
)  # fmt: skip
from spimpi.trace.schema import EVENT


def plain_element8(key, index, value):
    own = (key + (index + 1) * GOLDEN) & MASK
    return mix(mix(own ^ value) ^ own)


def plain_checksum(record: bytes, number: int) -> int:
    """The definition of docs/trace.md in plain integers."""
    key, acc = mix(VERSION + 74), 0
    for i in range(10):
        acc ^= plain_element8(key, i, int.from_bytes(record[8 * i : 8 * i + 8], "little"))
    return plain_element8(key, number, acc)


def test_an_event_has_74_bytes_and_a_record_is_eleven_words():
    assert EVENT.itemsize == 74
    assert RECORD.itemsize == 88


@pytest.mark.parametrize("n", [1, 2, 50])
def test_the_checksum_is_the_one_defined_in_plain_integers(n):
    records = pack(some_events(n), first=7)
    for i, record in enumerate(records):
        assert int(record["checksum"]) == plain_checksum(record.tobytes(), 7 + i)


@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_packing_keeps_the_events_and_checksumming_changes_nothing(n):
    events = some_events(n)
    records = pack(events, 0)
    before = records.tobytes()
    checksums(records)
    assert records.tobytes() == before
    assert same(unpack(records), events)


def test_rows_combine_by_xor_in_any_blocks():
    events = some_events(5000)
    whole = rows_fingerprint(events)
    assert whole == rows_fingerprint(events[:3]) ^ rows_fingerprint(events[3:], first=3)


def test_a_swapped_pair_of_rows_changes_the_fingerprint():
    events = some_events(100)
    swapped = events.copy()
    swapped[[3, 40]] = swapped[[40, 3]]
    assert rows_fingerprint(swapped) != rows_fingerprint(events)


def test_the_same_flip_in_two_equal_rows_does_not_cancel():
    events = np.repeat(some_events(1), 2)
    flipped = events.copy()
    flipped["fingerprint"] ^= np.uint64(1 << 63)
    assert rows_fingerprint(flipped) != rows_fingerprint(events)


def test_every_single_flipped_bit_of_a_record_is_seen():
    record = pack(some_events(1), 3)
    for bit in range(8 * 80):
        damaged = record.copy()
        damaged.view(np.uint8)[bit // 8] ^= np.uint8(1 << bit % 8)
        assert checksums(damaged)[0] != record["checksum"][0]


@pytest.mark.parametrize("compiled", [False, True])
def test_fingerprints_of_ranks_side_by_side_are_those_of_each_alone(compiled):
    judge = compiled_checksums() if compiled else checksums
    ranks = [some_events(n, n) for n in (3, 0, BLOCK + 5, 1, 2 * BLOCK)]
    columns = np.concatenate(ranks)
    narrow = {name: columns[name] for name in EVENT.names}
    narrow["layer"], narrow["bytes"] = columns["layer"].astype("i1"), columns["bytes"].astype("u4")
    found = rank_fingerprints(narrow, list(map(len, ranks)), 0, judge)
    assert found == [rows_fingerprint(events) for events in ranks]
    later = {name: column[7:40] for name, column in narrow.items()}
    assert rank_fingerprints(later, [33], 9, judge) == [rows_fingerprint(columns[7:40], first=9)]
