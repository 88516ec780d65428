"""A long run says where it is, where there is no terminal."""

import threading
import time

from spimpi.cli import main, progress_lines
from spimpi.cli.output import Reporter


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_line_says_the_place_again_and_again_also_while_a_stage_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(progress_lines, "PERIOD", 0.02)
    said = []

    def read():
        captured = capsys.readouterr()
        assert captured.out == ""
        said.extend(captured.err.splitlines())
        return said

    reporter = Reporter(speaks=True, as_json=True)
    try:
        reporter.progress("weights of layer 3")
        until(lambda: sum(line.endswith(": weights of layer 3") for line in read()) >= 2)
        reporter.progress("token 5 of 16")
        until(lambda: any(line.endswith(": token 5 of 16") for line in read()))
    finally:
        reporter.stop()
    assert all(line.startswith("spimpi: ") for line in said)
    time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_other_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress_lines, "PERIOD", 0.01)
    reporter = Reporter(speaks=False, as_json=False)
    reporter.progress("weights")
    time.sleep(0.1)
    reporter.stop()
    assert capsys.readouterr() == ("", "")


def test_a_run_that_is_refused_leaves_nobody_speaking(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "--config", "nosuch", "--no-trace"]) == 2
    assert "nosuch" in capsys.readouterr().err
    assert "spimpi-progress" not in [thread.name for thread in threading.enumerate()]


def test_the_period_is_ten_seconds():
    assert progress_lines.PERIOD == 10.0
