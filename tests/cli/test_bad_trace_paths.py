"""Paths at which no trace can be: told as such, never as damage."""

import pytest

from spimpi.bench.synthetic_trace import synthetic_trace
from spimpi.cli import main

COMMANDS = (
    ("show",), ("check",), ("locate",), ("recover",), ("report",), ("diff",),
    ("export", "-o", "x.csv"),
)  # fmt: skip


def refused(capfd, command, path) -> str:
    """What is said of it, in one line."""
    paths = [path] * (2 if command[0] == "diff" else 1)
    assert main(["trace", *command, *paths]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) <= 501
    return err


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", ["/", ".", "", ".."])
def test_a_report_of_a_directory_says_that_it_is_one(capfd, path):
    pytest.importorskip("jinja2", reason="reports need jinja2: pip install 'spimpi[report]'")
    assert "it is a directory" in refused(capfd, ("report",), path)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("path", ["a" * 5000, "a/" * 2500, "a" * 250])
def test_a_path_that_is_too_long_is_no_trace(capfd, command, path):
    if command[0] == "report":
        pytest.importorskip("jinja2", reason="reports need jinja2: pip install 'spimpi[report]'")
    refused(capfd, command, path)


def test_a_name_too_long_for_journals_beside_it_is_read(tmp_path, capfd):
    path = tmp_path / f"{'a' * 247}.h5"
    synthetic_trace(tmp_path / "t.h5", 1, 3)
    (tmp_path / "t.h5").rename(path)
    assert main(["trace", "check", str(path)]) == 0
