"""A trace as a DataFrame: names for numbers, and no row but those that were asked for."""

import sys

import numpy as np
import pytest
from trace_samples import (
    TENSORS, failing, some_events, write_alone_trace, write_journal, write_trace,
)  # fmt: skip

from spimpi.errors import MissingDependency, UsageError
from spimpi.trace import open as open_trace
from spimpi.trace.reading import pieces
from spimpi.trace.schema import EVENT, Op, Stage, Status

pandas = pytest.importorskip("pandas", reason="needs the extra spimpi[trace]")

RANKS = [failing(some_events(60, seed), 5 * seed, op=Op.MATMUL) for seed in range(3)]
ROWS = np.concatenate(RANKS)


@pytest.fixture
def trace(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "ROWS", 70)  # a rank a block
    write_alone_trace(tmp_path / "run.h5", RANKS)
    with open_trace(tmp_path / "run.h5") as opened:
        yield opened


def test_a_frame_holds_every_column_with_names_for_numbers(trace):
    frame = trace.to_pandas()
    assert list(frame.columns) == ["rank", "host", *EVENT.names] and len(frame) == len(ROWS)
    names = {
        "stage": [Stage(n).name for n in ROWS["stage"]],
        "op": [Op(n).name for n in ROWS["op"]],
        "verdict": [Status(n).name for n in ROWS["verdict"]],
        "tensor": [TENSORS[n].name for n in ROWS["tensor"]],
        "host": np.repeat(["node0000"], len(ROWS)),
        "rank": np.repeat([0, 1, 2], 60),
    }
    for name in frame:
        assert list(frame[name]) == list(names[name] if name in names else ROWS[name])
    for name in ("host", "stage", "op", "verdict", "tensor"):
        assert isinstance(frame[name].dtype, pandas.CategoricalDtype)
    assert frame["bytes"].dtype == np.uint64 and frame["layer"].dtype == np.int16


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("verdict == 'FAILED'", ROWS["verdict"] == Status.FAILED),
        ("verdict == 'FAILED' and rank > 0", (ROWS["verdict"] == 1) & (np.arange(180) >= 60)),
        ("op in ['MATMUL', 'RING'] & layer >= 3", np.isin(ROWS["op"], [8, 15]) & (ROWS["layer"] >= 3)),
        ("tensor.str.startswith('h') and t_start < .5", (ROWS["tensor"] == 1) & (ROWS["t_start"] < 0.5)),
        ("step == 1000", np.zeros(180, bool)),
    ],
)  # fmt: skip
def test_a_condition_chooses_the_rows_for_which_it_holds(trace, where, chosen):
    frame = trace.to_pandas(where=where)
    assert np.array_equal(frame["fingerprint"], ROWS["fingerprint"][chosen])
    assert list(frame["op"]) == [Op(n).name for n in ROWS["op"][chosen]]
    few = trace.to_pandas(["t_end"], where)
    assert list(few.columns) == ["t_end"] and np.array_equal(few["t_end"], ROWS["t_end"][chosen])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("verdict == 'failed'", "no verdict 'failed'; there are VERIFIED, FAILED, NOT_EST"),
        ("1 == verdict", "no verdict 1; there are"),
        ("tensor in ('hidden', 'hiden')", "no tensor 'hiden'; there are embed, hidden, logits"),
        ("host == 'node9'", "no host 'node9'"),
        ("colour == 3", "no column 'colour'; there are rank, host, step"),
        ("layer ==", "not a condition: 'layer =='"),
        ("layer + 1", "is no condition: it gives int16"),
        ("layer.missing > 1", "cannot evaluate the condition"),
    ],
)
def test_a_condition_that_can_choose_nothing_or_is_none_is_refused(trace, where, message):
    with pytest.raises(UsageError, match=message):
        trace.to_pandas(where=where)


def test_only_the_ranks_that_were_asked_for_are_read(tmp_path):
    import h5py

    write_alone_trace(tmp_path / "run.h5", RANKS)
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        file["events/step"][70] += 1
    with open_trace(tmp_path / "run.h5") as trace:
        assert set(trace.to_pandas(["rank"], ranks=[2, 0])["rank"]) == {0, 2} and trace.complete
        assert set(trace.to_pandas(["rank"])["rank"]) == {0, 2} and "rank 1" in trace.damage[0]


def test_numbers_of_a_later_version_are_named_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "ROWS", 70)
    ranks = [events.copy() for events in RANKS]
    ranks[1]["op"][7], ranks[1]["tensor"][8] = 22, 4
    write_alone_trace(tmp_path / "run.h5", ranks)
    with open_trace(tmp_path / "run.h5") as trace:
        frame = trace.to_pandas()
    assert (frame["op"][67], frame["tensor"][68]) == ("op 22", "tensor 4")
    assert isinstance(frame["op"].dtype, pandas.CategoricalDtype)


def test_a_trace_without_events_has_the_same_columns(tmp_path, trace):
    write_alone_trace(tmp_path / "none.h5", [some_events(0)])
    with open_trace(tmp_path / "none.h5") as none:
        empty = none.to_pandas()
        assert list(empty.dtypes) == list(trace.to_pandas().dtypes) and not len(empty)
        assert not len(none.to_pandas(where="verdict == 'FAILED'", ranks=[]))


def test_journals_give_the_same_frame(tmp_path, one):
    write_journal(one, tmp_path / "killed.h5", RANKS[0])
    write_trace(one, tmp_path / "run.h5", RANKS[0])
    frames = [open_trace(tmp_path / f"{name}.h5").to_pandas() for name in ("killed", "run")]
    pandas.testing.assert_frame_equal(*frames)


def test_without_pandas_the_error_says_what_to_install(trace, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependency, match=r"pip install 'spimpi\[trace\]'"):
        trace.to_pandas()
