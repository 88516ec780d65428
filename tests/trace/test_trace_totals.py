"""Checks added up in groups, against adding them up row by row."""

import json
from collections import defaultdict

import numpy as np
import pytest
from trace_samples import TENSORS, failing, some_events, write_alone_trace

from spimpi.cli import main
from spimpi.trace import open as open_trace
from spimpi.trace.analysis.summary import summarise
from spimpi.trace.reading import pieces
from spimpi.trace.schema import Op, Stage, Status

COUNTS = (90, 0, 40, 130)


def ranks_of(overlapping: bool) -> list[np.ndarray]:
    ranks = [some_events(count, seed) for seed, count in enumerate(COUNTS)]
    for seed, events in enumerate(ranks):
        rng = np.random.default_rng(seed + 10)
        events["verdict"] = rng.choice(3, len(events), p=[0.7, 0.1, 0.2])
        if overlapping:
            rng.shuffle(events["t_start"])
            events["t_end"] = events["t_start"] + rng.exponential(0.1, len(events))
    return ranks


def covered(rows) -> float:
    """Time covered by the intervals of some rows, by walking along them."""
    total, until = 0.0, -np.inf
    for row in sorted(rows, key=lambda row: row["t_start"]):
        total += max(0.0, row["t_end"] - max(row["t_start"], until))
        until = max(until, row["t_end"])
    return total


def added_up(ranks, label) -> dict:
    rows = defaultdict(lambda: defaultdict(list))
    for rank, events in enumerate(ranks):
        for row in events:
            rows[label(rank, row)][rank].append(row)
    totals = {}
    for group, of_rank in rows.items():
        all_ = [row for some in of_rank.values() for row in some]
        held = [row["established"] for row in all_ if row["verdict"] == Status.VERIFIED]
        totals[group] = (
            len(all_),
            sum(row["verdict"] == Status.FAILED for row in all_),
            sum(row["verdict"] == Status.NOT_ESTABLISHED for row in all_),
            sum(int(row["bytes"]) for row in all_),
            pytest.approx(max(map(covered, of_rank.values())), abs=1e-12),
            np.bitwise_or.reduce(held, initial=0),
        )
    return totals


LABELS = {
    "stage": lambda rank, row: Stage(row["stage"]),
    "op": lambda rank, row: Op(row["op"]),
    "layer": lambda rank, row: int(row["layer"]),
    "tensor": lambda rank, row: TENSORS[row["tensor"]].name,
    "rank": lambda rank, row: rank,
    "host": lambda rank, row: f"node{rank // 8:04d}",
}


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("rows", [1000, 30])  # all ranks in one block, each rank in several
@pytest.mark.parametrize("by", LABELS)
def test_groups_hold_what_adding_up_row_by_row_gives(tmp_path, by, rows, overlapping, monkeypatch):
    monkeypatch.setattr(pieces, "ROWS", rows)
    ranks = ranks_of(overlapping and rows == 1000)
    write_alone_trace(tmp_path / "run.h5", ranks)
    with open_trace(tmp_path / "run.h5") as trace:
        summary = summarise(trace, 10, by)
    found = {
        label: (t.events, t.failed, t.not_established, t.bytes, t.seconds, int(t.established))
        for label, t in summary.groups.items()
    }
    assert found == added_up(ranks, LABELS[by])
    assert summary.n_failed == sum((events["verdict"] == Status.FAILED).sum() for events in ranks)
    assert summary.n_events == sum(COUNTS)


def test_numbers_of_a_later_version_are_a_group_of_their_own(tmp_path):
    events = some_events(10)
    events["op"], events["stage"] = [77] * 10, [50] * 10
    events["tensor"] = [0, 1, 2, 3, 5] * 2
    write_alone_trace(tmp_path / "run.h5", [events])
    with open_trace(tmp_path / "run.h5") as trace:
        assert list(summarise(trace, by="op").groups) == [77]
        summary = summarise(trace, by="tensor")
    assert list(summary.stages) == [50]
    assert list(summary.groups) == ["embed", "hidden", "logits", "tensor 3", "tensor 5"]


def show(capfd, *args) -> tuple[int, str]:
    status = main(["trace", "show", *map(str, args)])
    return status, capfd.readouterr().out


@pytest.mark.parametrize("by", LABELS)
def test_show_prints_the_groups_that_were_asked_for(tmp_path, by, capfd):
    ranks = [some_events(40, seed) for seed in range(3)]
    ranks[2] = failing(ranks[2], 11, layer=5, op=Op.RING, stage=Stage.PIPELINE, tensor=1)
    write_alone_trace(tmp_path / "run.h5", ranks)
    status, text = show(capfd, tmp_path / "run.h5", "--by", by, "--json")
    found = json.loads(text)
    assert status == 1 and found["by"] == by and found["failed"] == 1
    (bad,) = [group for group in found["groups"] if group["failed"]]
    at_fault = {"stage": "pipeline", "op": "ring", "layer": 5, "tensor": "hidden", "rank": 2,
                "host": "node0000"}  # fmt: skip
    assert bad[by] == at_fault[by]
    _, text = show(capfd, tmp_path / "run.h5", "--by", by)
    (line,) = [line for line in text.splitlines() if line.startswith(f"{at_fault[by]} ")]
    assert line.split()[1:4] == [str(bad["events"]), "1", "0"]


def test_of_many_groups_those_that_matter_are_printed(tmp_path, capfd):
    ranks = [some_events(4, seed) for seed in range(60)]
    ranks[57] = failing(ranks[57], 2)
    ranks[33]["t_end"][-1] += 5
    write_alone_trace(tmp_path / "run.h5", ranks)
    _, text = show(capfd, tmp_path / "run.h5", "--by", "rank", "--failures", 0)
    table = text[text.index("\nrank  checks") :].splitlines()[2:]
    shown = [int(line.split()[0]) for line in table[:40]]
    assert shown == sorted(shown) and {57, 33} <= set(shown)
    assert table[40].startswith("40 of 60: those with most failures")
    assert len(json.loads(show(capfd, tmp_path / "run.h5", "--by", "rank", "--json")[1])["groups"]) == 60


def test_layers_that_are_none_are_called_so(tmp_path, capfd):
    write_alone_trace(tmp_path / "run.h5", [some_events(40)])
    _, text = show(capfd, tmp_path / "run.h5", "--by", "layer")
    assert "\nnone " in text
