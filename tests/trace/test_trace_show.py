"""``spimpi trace show``: what it prints, and its exit status."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from trace_samples import TENSORS, failing, some_events, write_journal, write_trace

from spimpi.cli import main
from spimpi.launch import speaks
from spimpi.trace.analysis.order import program_order
from spimpi.trace.schema import Established, Op, Stage, Status, blank_events


def checks(n: int) -> np.ndarray:
    """Clean matmul checks of layers 0, 1, …, 1000 bytes and 2 ms each."""
    events = blank_events(n)
    events["layer"], events["tensor"] = np.arange(n), 1
    events["stage"], events["op"] = Stage.COMPUTE, Op.MATMUL
    events["established"], events["bytes"] = Established.COMPUTED, 1000
    events["t_start"] = np.arange(n)
    events["t_end"] = events["t_start"] + 0.002
    return events


def show(capfd, *args) -> tuple[int, str]:
    status = main(["trace", "show", *map(str, args)])
    return status, capfd.readouterr().out


def test_a_verified_run_gives_exit_0_and_its_totals(tmp_path, one, driver, capfd):
    path = tmp_path / "run.h5"
    write_trace(one, path, checks(10), driver)
    status, text = show(capfd, path)
    assert status == 0
    assert "VERIFIED: 10 checks held" in text
    assert ["compute", "10", "0", "0", "9.8", "KiB", "0.020", "computed"] in [
        line.split() for line in text.splitlines()
    ]
    for fact in ("run-1", "tiny", '{"tp": 2}', f"({driver})"):
        assert fact in text


def test_a_failure_is_shown_with_its_place_and_gives_exit_1(tmp_path, one, capfd):
    path = tmp_path / "run.h5"
    events = failing(checks(10), 4, step=3, element=17, nonfinite=2, peer=5, repeat=1)
    write_trace(one, path, events, end_state="failed")
    status, text = show(capfd, path)
    assert status == 1 and "CORRUPTED: 1 of 10 checks failed" in text
    (line,) = [line for line in text.splitlines() if "matmul" in line]
    assert line.startswith("  1. step 3 of run 1, layer 4, hidden: matmul on rank 0 (")
    assert line.endswith(
        "expected 0000000000000001, found 0000000000000000, peer 5, element 17, 2 NaN or Inf"
    )


def test_a_failed_sum_of_floats_has_no_fingerprints_to_show(tmp_path, one, capfd):
    path = tmp_path / "run.h5"
    events = failing(checks(10), 4, op=Op.ALLREDUCE_SUM, expected=0, fingerprint=0, element=17)
    write_trace(one, path, events, end_state="failed")
    _, text = show(capfd, path)
    (line,) = [line for line in text.splitlines() if "allreduce" in line]
    assert line.endswith("), element 17") and "expected" not in line and "0000" not in line
    _, text = show(capfd, path, "--json")
    (failure,) = json.loads(text)["failures"]
    assert failure["expected"] == failure["found"] == ""


def test_only_the_first_failures_are_shown(tmp_path, one, capfd):
    events = checks(30)
    events["verdict"] = Status.FAILED
    write_trace(one, tmp_path / "run.h5", events[::-1].copy())
    status, text = show(capfd, tmp_path / "run.h5", "--json", "--failures", 3)
    found = json.loads(text)
    assert status == 1 and found["failed"] == 30
    assert [failure["layer"] for failure in found["failures"]] == [0, 1, 2]


def test_json_holds_what_is_printed(tmp_path, one, driver, capfd):
    path = tmp_path / "run.h5"
    write_trace(one, path, checks(10), driver)
    status, text = show(capfd, path, "--json")
    found = json.loads(text)
    assert (found["verdict"], found["exit_status"], found["complete"]) == ("verified", 0, True)
    (stage,) = found["stages"]
    assert stage.pop("seconds") == pytest.approx(0.02)
    assert stage == {
        "stage": "compute", "events": 10, "failed": 0, "not_established": 0, "bytes": 10_000,
        "established": ["computed"],
    }  # fmt: skip
    assert found["attributes"]["model"] == "tiny" and found["ranks"] == 1


def test_checks_made_together_do_not_count_their_time_twice(tmp_path, one, capfd):
    events = checks(4)
    events["t_start"], events["t_end"] = [0, 0, 1, 5], [2, 2, 3, 6]
    write_trace(one, tmp_path / "run.h5", events)
    _, text = show(capfd, tmp_path / "run.h5", "--json")
    assert json.loads(text)["stages"][0]["seconds"] == pytest.approx(4.0)


def test_a_run_that_ended_incomplete_gives_exit_3(tmp_path, one, capfd):
    write_trace(one, tmp_path / "run.h5", checks(3), end_state="incomplete")
    status, text = show(capfd, tmp_path / "run.h5")
    assert status == 3 and "INCOMPLETE: no check failed among the 3" in text


def test_an_altered_trace_gives_exit_3_and_its_rows_are_not_counted(tmp_path, one, capfd):
    import h5py

    write_trace(one, tmp_path / "run.h5", checks(3))
    with h5py.File(tmp_path / "run.h5.parts" / "rank-00000.h5", "r+") as file:
        file["events/bytes"][1] = 5
    status, text = show(capfd, tmp_path / "run.h5")
    assert status == 3
    assert text.startswith("DAMAGED") and "its events were altered" in text


def test_an_absent_trace_gives_exit_2_and_one_line(tmp_path, capfd):
    assert main(["trace", "show", str(tmp_path / "absent.h5")]) == 2
    assert capfd.readouterr().err.count("\n") == speaks()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_trace_show import checks
from trace_samples import TENSORS, header
from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.sealing.seal import prepare

prepare(sys.argv[1])
journal = Journal(journal_folder(sys.argv[1]), 0, header(1), TENSORS)
for step in range(100):
    events = checks(8)
    events["step"] = step
    journal.append(events)
    if step < 50:
        journal.flush()
    if step == 60:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_shown_as_far_as_it_was_flushed(tmp_path, capfd):
    path = tmp_path / "run.h5"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, path, os.path.dirname(__file__)], check=False
    )
    assert done.returncode == -signal.SIGKILL
    status, text = show(capfd, path)
    assert status == 3
    assert text.startswith("INCOMPLETE: what follows does not cover the whole run")
    assert "not closed, 400 events were flushed" in text
    assert json.loads(show(capfd, path, "--json")[1])["events"] == 400


def test_a_killed_run_with_a_failure_gives_exit_1(tmp_path, one, capfd):
    write_journal(one, tmp_path / "run.h5", failing(checks(5), 2))
    status, text = show(capfd, tmp_path / "run.h5")
    assert status == 1 and text.startswith("INCOMPLETE") and "CORRUPTED" in text


def test_failures_stand_in_program_order():
    names = {tensor.name: i for i, tensor in enumerate(TENSORS)}
    program = [
        {"stage": Stage.FABRIC},
        {"stage": Stage.WEIGHTS, "layer": 9},
        {"stage": Stage.TENSOR, "tensor": names["embed"]},
        {"stage": Stage.COMPUTE, "layer": 0, "tensor": names["hidden"], "op": Op.MATMUL},
        {"stage": Stage.TENSOR, "layer": 0, "tensor": names["hidden"], "op": Op.AGREEMENT},
        {"stage": Stage.TENSOR, "layer": 1, "tensor": names["hidden"], "microbatch": 0},
        {"stage": Stage.TENSOR, "layer": 1, "tensor": names["hidden"], "microbatch": 1},
        {"stage": Stage.TENSOR, "tensor": names["logits"]},
        {"stage": Stage.TENSOR, "step": 1, "tensor": names["embed"]},
        {"stage": Stage.FABRIC, "repeat": 1},
    ]
    events = blank_events(len(program))
    for event, columns in zip(events, program, strict=True):
        for name, value in columns.items():
            event[name] = value
    shuffled = np.random.default_rng(0).permutation(len(program))
    order = program_order(events[shuffled], np.zeros(len(program), int), names["hidden"])
    assert shuffled[order].tolist() == list(range(len(program)))


def test_on_a_terminal_lines_fit_its_width_and_elsewhere_they_are_plain(tmp_path, one, capfd):
    path = tmp_path / "run.h5"
    events = failing(some_events(30), 4)
    write_trace(one, path, events)
    ours, terminal = pty.openpty()
    code = "import sys; from spimpi.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "trace", "show", path],
        stdout=terminal, check=False, env=os.environ | {"COLUMNS": "60", "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    colourful = b""
    with contextlib.suppress(OSError):  # the end of a terminal whose other side is closed
        while block := os.read(ours, 4096):
            colourful += block
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;]*m", "", colourful.decode())
    assert done.returncode == 1 and len(text) < len(colourful)
    assert "verdict" in text and max(map(len, text.splitlines())) <= 60
    assert "\x1b" not in show(capfd, path)[1]


def test_text_of_a_trace_does_not_steer_the_terminal(tmp_path, one, capfd):
    write_journal(one, tmp_path / "run.h5", some_events(1), command="evil\x1b[2J")
    assert "\x1b" not in show(capfd, tmp_path / "run.h5")[1]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_told_in_one_line(tmp_path, one, unbuffered):
    write_trace(one, tmp_path / "run.h5", some_events(5))
    for options in ([], ["--json"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", "spimpi", "trace", "show", *options, tmp_path / "run.h5"],
                stdout=full, stderr=subprocess.PIPE, text=True, check=False,
                env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == "spimpi: cannot write standard output: No space left on device\n"


def test_several_traces_are_shown_one_after_the_other(tmp_path, one, capfd):
    paths = [tmp_path / f"{name}.h5" for name in ("good", "bad", "absent")]
    write_trace(one, paths[0], checks(10))
    write_trace(one, paths[1], failing(checks(10), 3), end_state="failed")
    status, text = show(capfd, *paths[:2])
    assert status == 1
    good, bad = text.split("\n\n" + "trace ")
    assert "VERIFIED: 10 checks held" in good and str(paths[0]) in good
    assert "CORRUPTED: 1 of 10" in bad and str(paths[1]) in bad
    assert show(capfd, paths[0], paths[0])[0] == 0
    # The others are shown all the same.
    status = main(["trace", "show", *map(str, paths[::-1])])
    said = capfd.readouterr()
    assert status == 2 and f"there is no trace {paths[2]}" in said.err
    assert "VERIFIED" in said.out and "CORRUPTED" in said.out
    assert said.out.startswith("trace ") and said.out.count("\n\ntrace ") == 1
    status, text = show(capfd, "--json", *paths[:2])
    assert status == 1 and [run["verdict"] for run in json.loads(text)] == ["verified", "corrupted"]


@pytest.mark.parametrize("started", [1e300, np.nan, -np.inf, 1e18])
def test_a_start_of_no_calendar_is_left_out(started):
    from spimpi.cli.trace_show import _at

    assert _at(started) == "" and _at(0.0).startswith("19")
