"""What is recorded is written down when a run is told to end, fails, or hangs."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from kill_runs import on_ranks
from trace_samples import TENSORS, header, same, some_events

from spimpi.checks.recorder import Recorder
from spimpi.trace.check import check
from spimpi.trace.journal import Journal, journal_folder, read_journal
from spimpi.trace.recover import recover
from spimpi.trace.schema import Established, Op, Stage
from spimpi.trace.signals import flushed_on_signals

HANGING = """
import os, sys
sys.path.insert(0, sys.argv[2])
from mpi4py import MPI
from trace_samples import TENSORS, header, some_events
from spimpi.trace.journal import Journal
from spimpi.trace.signals import flushed_on_signals

journal = Journal(sys.argv[1], 0, header(1), TENSORS)
with flushed_on_signals(journal.flush):
    journal.append(some_events(20))
    print(os.getpid(), flush=True)
    MPI.COMM_SELF.Recv(bytearray(1), 0)  # nobody sends
"""


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_rank_that_hangs_in_mpi_writes_down_what_it_has_when_told(tmp_path):
    tests = os.path.dirname(__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, tmp_path, tests], stdout=subprocess.PIPE, text=True,
        env=dict(os.environ),
    )  # fmt: skip
    try:
        process.stdout.readline()
        journal = tmp_path / "rank-00000.journal"
        time.sleep(0.1)  # so that it is in MPI, where no Python handler would run
        assert len(read_journal(journal).events) == 0
        process.send_signal(signal.SIGUSR1)
        until(lambda: len(read_journal(journal).events) == 20)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert same(read_journal(journal).events, some_events(20))


def test_afterwards_signals_do_what_they_did_before():
    with flushed_on_signals(lambda: None):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        threads = threading.active_count()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert threading.active_count() == threads - 1


def test_a_handler_of_the_program_is_left_as_it_is():
    def mine(*_):
        pass

    signal.signal(signal.SIGUSR1, mine)
    try:
        with flushed_on_signals(lambda: None):
            assert signal.getsignal(signal.SIGUSR1) is mine
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_writing_down_from_another_thread_loses_and_doubles_nothing(tmp_path):
    journal = Journal(tmp_path, 0, header(1), TENSORS)
    recorder = Recorder({"hidden": 0}, 0, journal)
    n, stop = 20_000, threading.Event()

    def write_down():
        while not stop.is_set():
            recorder.write_down()

    thread = threading.Thread(target=write_down)
    thread.start()
    for i in range(n):
        recorder.one(
            "hidden", Op.MATMUL, Stage.COMPUTE, Established.COMPUTED, i, i, False, t_start=0.0
        )
    stop.set()
    thread.join()
    recorder.write_down()
    found = read_journal(journal.path)
    assert np.array_equal(found.events["fingerprint"], np.arange(n, dtype=np.uint64))
    assert recorder.totals[Stage.COMPUTE].checks == n and not found.problems


def test_a_run_that_fails_writes_down_what_it_has(tmp_path, one):
    from spimpi.verification.job import Request, prepare
    from spimpi.verification.run import verify_distributed_inference
    from spimpi.verification.tracing import Tracer

    class Failing:
        def progress(self, place):
            if place == "inference":
                raise KeyError(place)

    path = tmp_path / "run.h5"
    tracer = Tracer(0, path, "auto", False, "test", "run-1")
    with pytest.raises(KeyError):
        verify_distributed_inference(one, prepare(Request(), 1), Failing(), tracer=tracer)
    (journal,) = journal_folder(path).iterdir()
    found = read_journal(journal)
    assert found.end_state == "error" and len(found.events)
    assert set(found.events["stage"]) == {Stage.WEIGHTS}


def test_a_hang_is_written_down_before_the_job_is_ended(monkeypatch):
    from spimpi import watchdog

    monkeypatch.setattr(watchdog, "GRACE", 0.0)
    said, ended = [], threading.Event()

    def abort(status):
        said.append("abort")
        ended.set()

    with watchdog.Watchdog(0.05, 0, "host", abort) as watched:
        watched.before_abort = lambda: said.append("write down")
        assert ended.wait(60)
    assert said == ["write down", "abort"]


@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_a_job_that_is_told_to_end_leaves_its_journals_and_they_are_recovered(tmp_path, place):
    path, local = tmp_path / "run.h5", tmp_path / "local"
    command = [*on_ranks(2), "-m", "spimpi", "verify", "--repeat", "100000", "--trace", str(path)]
    command += ["--journal", str(local)] if place == "elsewhere" else []
    folder = local / "run.h5.journal" if place == "elsewhere" else journal_folder(path)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ))
    try:
        files = [folder / f"rank-0000{rank}.journal" for rank in range(2)]
        until(lambda: all(file.exists() and file.stat().st_size > 200_000 for file in files))
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert journal_folder(path).is_symlink() == (place == "elsewhere")
    found = check(path)
    assert (found.state, found.ranks) == ("incomplete", 2) and found.events > 1000
    assert recover(path).events == found.events
    left = sorted(p.name for p in tmp_path.rglob("*"))
    assert left == (["local", "run.h5"] if place == "elsewhere" else ["run.h5"])
    assert check(path).state == "incomplete"
