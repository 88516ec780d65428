"""The tutorial's commands print what the page shows, its five lines are five; the examples' page."""

import difflib
import re
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
COMMAND = re.compile(r"^```console\n\$ mpirun -n (\d+) python ([^\n]*)\n(.*?)^```$", re.M | re.S)
RUNS = [match.groups() for match in COMMAND.finditer(PAGE)]


def one_line(text):
    """Line breaks are the page's; the host's name is this machine's."""
    host = re.escape(socket.gethostname())
    return " ".join(re.sub(rf"\({host}\)", "(node17)", text).split())


def test_the_page_shows_four_runs_two_of_them_with_a_flip():
    assert [command for _, command, _ in RUNS] == [
        "examples/tutorial.py",
        "examples/tutorial.py --flip",
        "examples/tutorial_checked.py",
        "examples/tutorial_checked.py --flip",
    ]


@pytest.mark.parametrize(("ranks", "command", "shown"), RUNS, ids=[run[1] for run in RUNS])
def test_a_command_prints_what_the_page_shows(run_ranks, ranks, command, shown):
    program, *options = command.split()
    done = run_ranks(int(ranks), sys.executable, ROOT / program, *options)
    if "Error" in shown:
        assert done.returncode == 1
        assert one_line(shown) in one_line(done.stderr)
        assert done.stdout == ""
    else:
        assert (done.returncode, one_line(done.stdout)) == (0, one_line(shown)), done.stderr


def test_the_answers_of_the_runs_differ_in_one_row_where_nothing_checks():
    right, flipped, checked = (shown.split()[1:] for _, _, shown in RUNS[:3])
    assert right == checked
    assert [i for i, (a, b) in enumerate(zip(right, flipped)) if a != b] == [5]


def test_five_lines_are_added_and_none_is_changed():
    before, after = (
        (ROOT / "examples" / name).read_text().splitlines()
        for name in ("tutorial.py", "tutorial_checked.py")
    )
    _, _, *lines = difflib.unified_diff(before, after, n=1, lineterm="")
    lines = ["" if line.startswith("@@") else line.rstrip() for line in lines]
    assert PAGE.split("```diff\n")[1].split("\n```")[0] == "\n".join(lines).strip("\n")
    assert [line[0] for line in lines if line and line[0] != " "] == ["+"] * 5


def test_every_example_is_on_the_examples_page():
    page = (ROOT / "docs" / "examples.md").read_text()
    for file in (ROOT / "examples").glob("*.py"):
        assert f"{{literalinclude}} ../examples/{file.name}\n" in page, file.name
