"""``spimpi bench --output``: an ordinary file, whole or not at all, asked for before the work."""

import os

import pytest

from spimpi.bench import matrix
from spimpi.bench.runtime_faults import table
from spimpi.cli import main
from spimpi.errors import UsageError

KINDS = ["link", "fifo", "folder", "no folder", "empty"]


def _place(folder, kind):
    path = folder / "out.csv"
    if kind == "link":
        (folder / "precious").write_text("kept")
        path.symlink_to(folder / "precious")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "no folder":
        path = folder / "none" / "out.csv"
    return "" if kind == "empty" else path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [matrix.write, table.write])
def test_only_an_ordinary_file_is_replaced(tmp_path, write, kind):
    with pytest.raises(UsageError, match="cannot write"):
        write(_place(tmp_path, kind), [])
    if kind == "link":
        assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["confusion", "runtime-faults"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys, name, kind):
    assert main(["bench", name, "--output", str(_place(tmp_path, kind))]) == 2
    assert "cannot write" in capsys.readouterr().err
