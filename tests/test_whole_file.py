"""Files that are written whole or not at all."""

import os

import pytest

from spimpi.errors import UsageError
from spimpi.whole_file import whole_csv, whole_file


def test_any_name_that_the_file_system_takes_can_be_written(tmp_path):
    path = tmp_path / (os.pathconf(tmp_path, "PC_NAME_MAX") * "n")
    with whole_file(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole" and os.listdir(tmp_path) == [path.name]


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "t.csv"
    with whole_csv(path) as out:
        out.writerows([["a", "b"], ["ä", 1]])
    with pytest.raises(ZeroDivisionError), whole_csv(path) as out:
        out.writerow([1 / 0])
    assert path.read_text("utf-8") == "a,b\nä,1\n" and os.listdir(tmp_path) == ["t.csv"]
    path.chmod(0o644)
    with pytest.raises(UsageError, match="no file can be made"), whole_csv(tmp_path / "no" / "t.csv"):
        pass
