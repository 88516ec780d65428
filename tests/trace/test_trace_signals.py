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
from spimpi.trace.journals.journal import Journal, read_journal
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.journals.signals import flushed_on_signals
from spimpi.trace.reading.check import check
from spimpi.trace.schema import Established, Op, Stage
from spimpi.trace.sealing.recover import recover

HANGING = """
import os, sys
sys.path.insert(0, sys.argv[2])
from mpi4py import MPI
from trace_samples import TENSORS, header, some_events
from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.signals import flushed_on_signals

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


@pytest.mark.parametrize("made", ["before", "within"])
def test_a_handler_of_the_program_stays_and_comes_after_the_flush(made):
    said, flushed = [], threading.Event()

    def mine(*_):
        said.append("mine")

    def install():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, mine)

    try:
        if made == "before":
            install()
        with flushed_on_signals(flushed.set):
            if made == "within":
                install()
            for number in (signal.SIGTERM, signal.SIGUSR1):
                flushed.clear()
                os.kill(os.getpid(), number)
                assert flushed.wait(60)
        assert said == ["mine", "mine"]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)


def test_two_traces_are_both_flushed():
    first, second = threading.Event(), threading.Event()
    with flushed_on_signals(first.set), flushed_on_signals(second.set):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert first.wait(60) and second.wait(60)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_forked_worker_that_is_told_to_end_ends_alone():
    flushed = threading.Event()
    with flushed_on_signals(flushed.set):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not flushed.wait(0.1)


PROGRAM = """
import os, sys
import numpy as np
from mpi4py import MPI
import spimpi

comm = MPI.COMM_WORLD
with spimpi.DistributedContext(comm, trace=sys.argv[1], journal=sys.argv[2], sync=True) as ctx:
    for step in range(3):
        own = np.full(4, float(comm.rank))
        everyone = np.empty((comm.size, 4))
        comm.Allgather(own, everyone)
        place = spimpi.TensorPartition(0, comm.size, comm.rank, comm.size)
        tag = spimpi.Tag(name="hidden", step=step)
        spimpi.verify_allgather(comm, own[None], everyone, place, tag, ctx=ctx)
    open(f"{sys.argv[1]}.pid-{comm.rank}", "w").write(str(os.getpid()))
    comm.Recv(bytearray(1), comm.rank, tag=1)  # nobody sends
"""


def test_a_program_that_is_told_to_end_leaves_all_its_checks(tmp_path):
    path, local = tmp_path / "run.h5", tmp_path / "local"
    process = subprocess.Popen(
        [*on_ranks(3), "-c", PROGRAM, str(path), str(local)],
        stdout=subprocess.DEVNULL, env=dict(os.environ),
    )  # fmt: skip
    noted = [tmp_path / f"run.h5.pid-{rank}" for rank in range(3)]
    try:
        until(lambda: all(n.exists() and n.read_text() for n in noted))
        os.kill(int(noted[1].read_text()), signal.SIGTERM)  # mpirun then tells the others
        process.wait(60)
        for pid in (note.read_text() for note in noted):
            until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
    finally:
        process.kill()
        process.wait()
    assert journal_folder(path).resolve() == local / "run.h5.journal"
    found = check(path)
    assert (found.state, found.ranks) == ("incomplete", 3)
    told = read_journal(local / "run.h5.journal" / "rank-00001.journal")
    assert told.events["step"].tolist() == [0, 1, 2]


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
