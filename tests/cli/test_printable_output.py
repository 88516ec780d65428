"""Nothing of a file, an option or a name steers the terminal, whichever command prints it."""

import io
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from spimpi.bench.synthetic_trace import synthetic_trace, write_ranks
from spimpi.cli import main, status_of
from spimpi.cli.printable_errors import PrintableStream, printable_errors
from spimpi.trace.schema import Op, Stage, Status, TensorInfo, blank_events

EVIL = "\x1b[31m\x9b2J\x07\u202eevil"
STEERS = set("\x1b\x9b\x07\u202e\r\x08")


def said(capfd, *args) -> tuple[int, str]:
    capfd.readouterr()
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as left:  # argparse's way
        status = left.code
    out, err = capfd.readouterr()
    return status, out + err


@pytest.fixture
def evil_trace(tmp_path):
    """Names of tensors, the command, the model and the file itself hold control characters."""
    events = blank_events(4)
    events["stage"], events["op"], events["tensor"] = Stage.PROGRAM, Op.GATHER, np.arange(4) % 2
    events["fingerprint"] = events["expected"] = np.arange(4) + 1
    events["verdict"][3] = Status.FAILED
    tensors = [TensorInfo(EVIL + str(i), (4,), EVIL) for i in range(2)]
    path = tmp_path / f"t{EVIL}.h5"
    facts = {"command": EVIL, "topology": EVIL, "run_id": EVIL, "world": 1, "injected": [EVIL]}
    write_ranks(path, 1, [events].__getitem__, tensors, facts, "gather")
    return path


@pytest.mark.parametrize("command", [
    ("show",), ("show", "--by", "tensor"), ("check",), ("locate",), ("diff",), ("recover",),
    ("report", "--overwrite"), ("export", "-o", f"x{EVIL}.csv"),
])  # fmt: skip
def test_a_trace_steers_no_terminal(command, evil_trace, tmp_path, capfd, monkeypatch):
    if command[0] == "report":
        pytest.importorskip("jinja2", reason="reports need jinja2: pip install 'spimpi[report]'")
    monkeypatch.chdir(tmp_path)
    files = [evil_trace] * (2 if command[0] == "diff" else 1)
    status, text = said(capfd, "trace", *command, *files)
    assert status != 4 and "evil" in text and not STEERS & set(text), text
    absent = [path.with_name(f"no{EVIL}.h5") for path in files]
    status, text = said(capfd, "trace", *command, *absent)
    assert status == 2 and "evil" in text and not STEERS & set(text)


@pytest.mark.parametrize("args", [
    ("trace", EVIL), ("trace", "show"), (EVIL,), ("trace", "show", "x", "--by", EVIL),
    ("trace", "show", "x", "--failures", EVIL), ("trace", "export", "x", "-o", EVIL),
    ("trace", "export", "x", "-o", "y", "--format", EVIL), ("manifest", "check", EVIL),
    ("verify", "--no-trace", "--inject", f"{EVIL}:y=1"),
])  # fmt: skip
def test_an_option_steers_no_terminal(args, capfd):
    status, text = said(capfd, *args)
    assert status == 2 and not STEERS & set(text), text


def test_no_error_and_no_traceback_steers_a_terminal(capfd):
    def broken():
        raise KeyError(EVIL) from ValueError(EVIL)

    with printable_errors():
        assert status_of(broken) == 4
        print(EVIL, file=sys.stderr)
    text = capfd.readouterr().err
    assert "Traceback" in text and text.count("\n") > 3 and not STEERS & set(text)


def test_the_stream_keeps_lines_and_what_else_is_printable():
    held = io.StringIO()
    stream = PrintableStream(held)
    stream.writelines(["a\tb\n", "é\x1b\n"])
    assert held.getvalue() == "a\tb\né\\x1b\n" and stream.getvalue() == held.getvalue()


def test_on_a_terminal_an_export_is_made_printable(evil_trace, capfdbinary, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["trace", "export", str(evil_trace), "-o", "-", "--format", "csv"]) == 0
    text = capfdbinary.readouterr().out.decode()
    assert text.count("\n") == 5 and not STEERS & set(text)


def test_a_golden_file_steers_no_terminal(tmp_path, capfd):
    with h5py.File(tmp_path / f"g{EVIL}.h5", "w") as file:
        file.attrs["schema"] = EVIL
    status, text = said(capfd, "verify", "--no-trace", "--golden", tmp_path / f"g{EVIL}.h5")
    assert status == 2 and not STEERS & set(text)


def test_a_character_that_the_output_lacks_is_written_out(tmp_path):
    synthetic_trace(tmp_path / "é→.h5", 1, 3)
    command = [sys.executable, "-m", "spimpi", "trace", "check", "é→.h5"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.startswith("\\xe9\\u2192.h5: INTACT")
