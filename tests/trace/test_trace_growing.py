"""Tables of tensors that grow: what is read back, torn lines, many ranks' tables made one."""

import numpy as np

from spimpi.trace.journals import growing
from spimpi.trace.journals.growing import OTHERS, UNKNOWN, GrowingTable, merged, read_table, renumbered
from spimpi.trace.schema import TensorInfo, blank_events

A = TensorInfo("a", (4, 3), "float32")
B = TensorInfo("b", (2,), "int8")


def test_rows_are_read_back_as_they_were_last_told(tmp_path):
    table = GrowingTable(tmp_path / "rank-00000.tensors")
    assert [table.row(t) for t in (A, B, A)] == [0, 1, 0]
    assert table.row(TensorInfo("a", (5, 3), "float32")) == 0
    assert table.row(TensorInfo("b", (2, 1), "int16")) == 1
    rows, problem = read_table(table.path)
    assert not problem and rows == table.tensors
    assert rows == [TensorInfo("a", (-1, 3), "float32"), TensorInfo("b", (-1,), "mixed")]


def test_a_torn_or_altered_line_is_told_and_the_rows_before_it_are_kept(tmp_path):
    table = GrowingTable(tmp_path / "rank-00000.tensors")
    table.row(A)
    table.row(B)
    text = table.path.read_bytes()
    for damaged in (text[:-4], text.replace(b'"b"', b'"c"')):
        table.path.write_bytes(damaged)
        rows, problem = read_table(table.path)
        assert rows == [A] and "line 2" in problem


def test_tables_of_many_ranks_are_made_one(monkeypatch):
    tables = [[A, B], [], [TensorInfo("c", (), "float64"), TensorInfo("a", (9, 3), "float32")]]
    union, numbers = merged(tables)
    assert [t.name for t in union] == ["a", "b", "c"] and union[0].shape == (-1, 3)
    assert [n.tolist() for n in numbers] == [[0, 1], [], [2, 0]]
    events = blank_events(3)
    events["tensor"] = [1, 0, 5]
    assert renumbered(events, numbers[2])["tensor"].tolist() == [0, 2, UNKNOWN]
    assert events["tensor"].tolist() == [1, 0, 5]


def test_a_table_that_is_full_has_a_row_for_all_others(tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "MOST", 3)
    table = GrowingTable(tmp_path / "rank-00000.tensors")
    rows = [table.row(TensorInfo(name, (1,), "int8")) for name in "abcdab"]
    assert rows == [0, 1, 2, 2, 0, 1]
    assert read_table(table.path)[0][2] == OTHERS
    union, numbers = merged([table.tensors, [TensorInfo(n, (1,), "int8") for n in "xyb"]])
    assert len(union) == 3 and numbers[1].tolist() == [2, 2, 1]
    assert np.uint16 == numbers[0].dtype
