"""Blocks: many ranks in one read, a large rank in several, each rank checked."""

import shutil

import numpy as np
import pytest
from trace_samples import same, some_events, write_alone_trace

from spimpi.errors import UsageError
from spimpi.trace import open as open_trace
from spimpi.trace.reading import pieces
from spimpi.trace.schema import EVENT, blank_events

COUNTS = (40, 0, 7, 3, 100, 0, 25)


def rows_of(blocks) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and rows of all blocks, joined."""
    blocks = list(blocks)
    rows = blank_events(sum(map(len, blocks)))
    for name in EVENT.names:
        rows[name] = np.concatenate([block[name] for block in blocks])
    return np.concatenate([block["rank"] for block in blocks]), rows


@pytest.fixture(params=["gather", "parts"])
def many(request, tmp_path):
    """A trace of ranks with different numbers of events, also none."""
    ranks = [some_events(count, seed) for seed, count in enumerate(COUNTS)]
    write_alone_trace(tmp_path / "run.h5", ranks, request.param)
    return tmp_path / "run.h5", ranks


@pytest.mark.parametrize("rows", [9, 30, 60, 1000])
def test_blocks_hold_all_rows_in_their_order_whatever_their_size(many, rows, monkeypatch):
    monkeypatch.setattr(pieces, "ROWS", rows)
    path, ranks = many
    with open_trace(path) as trace:
        found, events = rows_of(trace.blocks())
        assert trace.complete
    assert same(events, np.concatenate(ranks))
    assert np.array_equal(found, np.repeat(np.arange(len(COUNTS)), COUNTS))


def test_blocks_have_the_columns_and_ranks_that_were_asked_for(many):
    path, ranks = many
    with open_trace(path) as trace:
        (block,) = trace.blocks(["layer", "bytes"], ranks=[3])
        assert set(block.columns) == {"layer", "bytes"} and set(block["rank"]) == {3}
        assert block["layer"].dtype == np.int16 and block["bytes"].dtype == np.uint64
        assert np.array_equal(block["bytes"], ranks[3]["bytes"])
        with pytest.raises(UsageError, match="no column 'colour'"):
            trace.blocks(["colour"])
        with pytest.raises(UsageError, match="no rank 9"):
            trace.blocks(ranks=[9])


@pytest.mark.parametrize("rows", [30, 1000])
@pytest.mark.parametrize("column", ["fingerprint", "verdict"])
def test_ranks_whose_rows_were_altered_are_left_out_and_named(many, rows, column, monkeypatch):
    import h5py

    monkeypatch.setattr(pieces, "ROWS", rows)
    path, _ = many
    at = {"run.h5": COUNTS[0] + COUNTS[2] + 1}
    if (part := path.parent / "run.h5.parts" / "rank-00003.h5").exists():
        at = {part: 1}
    for name, row in at.items():
        with h5py.File(path.parent / name, "r+") as file:
            file[f"events/{column}"][row] ^= 1
    with open_trace(path) as trace:
        found, _ = rows_of(trace.blocks(["step", *EVENT.names[1:]]))
        assert set(found) == {0, 2, 4, 6}
        assert [line[:6] for line in trace.damage] == ["rank 3"]
        assert "events were altered" in trace.damage[0]


def test_a_missing_part_is_left_out_and_named(tmp_path):
    ranks = [some_events(count, seed) for seed, count in enumerate(COUNTS)]
    write_alone_trace(tmp_path / "run.h5", ranks, "parts")
    parts = tmp_path / "run.h5.parts"
    (parts / "rank-00002.h5").unlink()
    shutil.copy(parts / "rank-00000.h5", parts / "rank-00004.h5")
    with open_trace(tmp_path / "run.h5") as trace:
        found, _ = rows_of(trace.blocks())
        assert set(found) == {0, 3, 6}
        assert "rank-00002.h5 is missing" in trace.missing[0]
        assert "not the one that was written" in trace.damage[0]
