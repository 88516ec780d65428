"""A short fuzz campaign, and that its judges see what they are for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = 300

# Runs a function of this text in a child, as the campaign runs a command, and prints the verdict.
JUDGE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from running import Outside, judge, run
root = Path({root!r})
(root / "cases" / "x").mkdir(parents=True)
(root / "outside").mkdir()
(root / "outside" / "file").write_text("before")
outside = Outside(root, but="cases")
def command():
{body}
wrong = judge(run((), root / "cases" / "x", seconds=2, memory=300 << 20, main=command), {may}, memory=300 << 20)
print(wrong + outside.touched())
"""
PLANTED = {
    "nothing is wrong": ("print('fine')", []),
    "a note": ("print('spimpi: a note', file=sys.stderr)", []),
    "a refusal": ("print('spimpi: no', file=sys.stderr); sys.exit(2)", []),
    "an exception": ("raise KeyError('x')", ["exit status 1 without corruption", "traceback"]),
    "an internal error": ("print('spimpi: x', file=sys.stderr); os._exit(4)", ["exit status 4"]),
    "corruption without any": ("print('x', flush=True); os._exit(1)", ["exit status 1 without corruption"]),
    "a crash": ("os.kill(os.getpid(), 11)", ["ended by signal 11"]),
    "a hang": ("time.sleep(60)", ["hang: still running after 2 s"]),
    "too much memory": ("x = bytearray(400 << 20)", ["memory: "]),
    "a long line": ("print('spimpi: ' + 'x' * 600, file=sys.stderr)", ["long line on standard error: 608 characters"]),
    "two lines": ("print('spimpi: a\\\\nspimpi: b', file=sys.stderr); sys.exit(2)", ["lines on standard error: 2"]),
    "words of others": ("print('RuntimeWarning: x', file=sys.stderr)", ["not spimpi's own words on standard error: 'RuntimeWarning: x'"]),
    "an escape": ("print('\\\\x1b[2J')", ["raw control characters: ['\\\\x1b']"]),
    "silence": ("sys.exit(2)", ["says nothing"]),
    "a file elsewhere": ("open('../../outside/file', 'w').write('after')", ["outside/file"]),
    "a new file elsewhere": ("open('../../outside/new', 'w')", ["outside/new"]),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_seen(tmp_path, what):
    body, expected = PLANTED[what]
    body = body.replace("\\\\", "\\")
    program = JUDGE.format(here=str(HERE), root=str(tmp_path), body=f"    {body}", may=False)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = done.stdout.strip()
    assert all(one.replace("\\\\", "\\") in found.replace("\\\\", "\\") for one in expected), found
    assert (found == "[]") == (not expected), found


def test_three_hundred_hostile_inputs_end_as_they_should(tmp_path):
    """As `python tests/fuzz/campaign.py`; each failure is printed with what replays it."""
    command = [sys.executable, HERE / "campaign.py", "--n", str(CASES), "--folder", tmp_path / "fuzz"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    print(f"{time.monotonic() - start:.0f} s")


def test_a_case_is_the_same_whenever_it_is_asked_for():
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from campaign import *; load(); root = prepared()\n"
        "for n in range(200):\n"
        "    a, b = draw(7, n, root / 'sound'), draw(7, n, root / 'sound')\n"
        "    assert (a.kind, a.changes) == (b.kind, b.changes) or 'nan' in repr(a.changes), n\n"
        "    assert repr(_command(a, a.changes)) == repr(_command(b, b.changes)), n\n"
        "print('alike')\n"
    )
    code = code.replace("import *;", "import _command, draw, load, prepared;")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip().endswith("alike"), done.stderr[-3000:]
