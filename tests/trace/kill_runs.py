"""Runs that are killed at random moments; what their traces then say is compared with what happened.

    python tests/trace/kill_runs.py 800        prints how many were killed where

Each run is this file on three ranks: journals, signal handling and sealing as in ``spimpi verify``,
with events that can be made again. After every flush a rank notes how many rows are written: that
is the oracle. A rank is killed by SIGKILL, or all are, or one kills itself when half of a flush is
written, or one or all are killed when a rank has come to a given place in sealing; and where
journals are left, their recovery is killed as well before it may end. A quarter of the runs have
one file for all ranks' journals.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from trace_samples import TENSORS, header, same, some_events, some_sketches  # noqa: E402

from spimpi.trace import open as open_trace  # noqa: E402
from spimpi.trace.journals import appending  # noqa: E402
from spimpi.trace.journals import node_file  # noqa: E402
from spimpi.trace.journals.journal import Journal  # noqa: E402
from spimpi.trace.journals.journal_files import journal_folder, own_journal  # noqa: E402
from spimpi.trace.journals.signals import flushed_on_signals  # noqa: E402
from spimpi.trace.reading.check import check  # noqa: E402
from spimpi.trace.reading.sketches import combined  # noqa: E402
from spimpi.trace.sealing import drivers  # noqa: E402
from spimpi.trace.sealing import layout  # noqa: E402
from spimpi.trace.sealing import recover as recovery  # noqa: E402
from spimpi.trace.sealing import seal as sealing  # noqa: E402
from spimpi.trace.sealing.recover import recover  # noqa: E402
from spimpi.trace.sealing.seal import choose_driver, prepare, seal  # noqa: E402

RANKS, STEPS, ROWS = 3, 24, 400
WAYS = ("one rank", "all ranks", "in a flush", "in sealing")
# What a rank is about to do when it is killed, by the driver: a function, and the call that counts.
WRITING = {
    "mpio": (drivers, "_write_piece", 7), "gather": (drivers, "_as_bytes", 1),
    "parts": (layout, "describe", 7),
}  # fmt: skip
PHASES = {
    "before writing": (sealing, "_plan", 1), "in writing": None,
    "before reading back": (sealing, "_read_back", 1),
    "in reading back": (layout, "read_rows", 1), "before renaming": (sealing, "publish", 1),
    "before removing": (sealing, "remove_journal", 1), "after removing": (sealing, "clear", 1),
}  # fmt: skip
RECOVERY = {
    "before writing": (recovery, "write_alone", 1),
    "before reading back": (recovery, "_read_back", 1),
    "before renaming": (recovery, "publish", 1), "before removing": (recovery, "remove_file", 1),
    "in removing": (recovery, "remove_file", 2), "after removing": (recovery, "clear", 1),
}  # fmt: skip


def rows_of(rank: int) -> np.ndarray:
    return some_events(STEPS * ROWS, rank)


def sketches_of(rank: int) -> np.ndarray:
    """Those of all steps, in their order."""
    shares = some_sketches(rank, RANKS, STEPS)
    return shares[np.argsort(shares["step"], kind="stable")]


# On the ranks


def run(path: Path, driver: str, shared: bool, die_in_flush: int, phase: str) -> None:
    """A traced run; rank 1 kills itself in that flush, counted from 1 (0: it does not).

    ``shared``: one file for all journals. A rank that comes to ``phase`` notes it and waits.
    """
    from mpi4py import MPI

    import h5py  # noqa: F401  so that sealing is not mostly this

    world, events = MPI.COMM_WORLD, rows_of(MPI.COMM_WORLD.rank)
    sketches = sketches_of(world.rank)
    if world.rank == 0:
        prepare(path)
    world.Barrier()
    note(path, world.rank, f"pid {os.getpid()}")
    node_file.SEPARATE = 0 if shared else RANKS
    own = own_journal(world, nullcontext, journal_folder(path))
    world.Barrier()
    facts = header(RANKS, sketches=True)
    journal = Journal(journal_folder(path), world.rank, facts, TENSORS, at=own)
    with flushed_on_signals(journal.flush):
        for step in range(STEPS):
            for row in range(step * ROWS, (step + 1) * ROWS, 50):
                journal.append(events[row : row + 50])
                time.sleep(0.0005)
            if step % 2 and world.rank == 1 and (step + 1) // 2 == die_in_flush:
                appending.os = node_file.os = Dying()
                if die_in_flush % 2:
                    journal.flush()  # else it is the sketches that are torn
            journal.sketches.append(sketches[sketches["step"] == step])
            note(path, world.rank, f"sketched {step + 1}")
            if step % 2:
                journal.flush()
                note(path, world.rank, f"flushed {journal.count}")
            world.allreduce(step)
        journal.close("verified")
        note(path, world.rank, "closed")
        world.Barrier()
        note(path, world.rank, "sealing")
        if phase:
            place, name, call = PHASES[phase] or WRITING[driver]
            stop_before(place, name, call, lambda: note(path, world.rank, f"at {phase}"))
        seal(world, journal, path, {"end_state": "verified"}, driver)
    note(path, world.rank, "sealed")


def stop_before(place, name: str, call: int, tell) -> None:
    """At this call of a function, tell it and wait for the end."""
    function, calls = getattr(place, name), []

    def stopping(*arguments, **more):
        calls.append(name)
        if len(calls) == call:
            tell()
            time.sleep(60)
        return function(*arguments, **more)

    setattr(place, name, stopping)


class Dying:
    """Stands for ``os`` in a journal: half of what is written arrives, then the process dies."""

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd, data):
        os.write(fd, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def pwrite(self, fd, data, offset):
        os.pwrite(fd, data[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)


def note(path: Path, rank: int, text: str) -> None:
    with notes(path, rank).open("a") as file:
        file.write(text + "\n")


def notes(path: Path, rank: int) -> Path:
    return path.with_suffix(f".notes-{rank}")


# Outside


def noted(path: Path, rank: int, word: str) -> list[str]:
    """What the rank noted under this word, in order."""
    file = notes(path, rank)
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.partition(" ")[2] for line in lines if line.split(" ")[0] == word]


def kill_one_run(
    path: Path, driver: str, shared: bool, way: str, rng: random.Random, phase: str = ""
) -> str:
    """Start a run, kill it, compare; returns what state its trace was in. AssertionError."""
    die = rng.randint(1, STEPS // 2) if way == "in a flush" else 0
    started = subprocess.Popen(
        [*on_ranks(RANKS), "-m", "mpi4py", __file__, "--rank", str(path), driver, str(int(shared)), str(die), phase],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=dict(os.environ),  # without what this process's own MPI has added to it
    )  # fmt: skip
    try:
        wait_for(started, lambda: all(noted(path, rank, "pid") for rank in range(RANKS)))
        pids = [int(noted(path, rank, "pid")[0]) for rank in range(RANKS)]
        if way == "in sealing":
            wait_for(started, lambda: any(noted(path, rank, "at") for rank in range(RANKS)))
            time.sleep(rng.uniform(0, 0.03))  # the others go on, or wait for it
        elif not die:
            time.sleep(rng.uniform(0, 0.5))
        alone = way == "one rank" or (way == "in sealing" and rng.random() < 0.5)
        victims = [] if die else [rng.choice(pids)] if alone else pids
        for pid in victims:
            if started.poll() is None:
                kill(pid)
        started.wait(60)
    finally:
        if started.poll() is None:
            started.kill()
            started.wait()
    for pid in pids:  # whom mpiexec did not end
        wait_for(started, lambda pid=pid: not Path(f"/proc/{pid}").exists(), ended=True)
    return compare(path, rng.choice(list(RECOVERY)))


def on_ranks(n: int) -> list[str]:
    """The start of a command: this Python on ``n`` ranks."""
    launcher = os.environ.get("SPIMPI_MPIEXEC") or shutil.which("mpiexec")
    return [launcher, "-n", str(n), sys.executable]


def wait_for(started, condition, ended: bool = False) -> None:
    deadline = time.monotonic() + 60
    while not condition() and (ended or started.poll() is None):
        assert time.monotonic() < deadline, "the run did not come so far"
        time.sleep(0.001)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def kill_recovery(path: Path, phase: str) -> None:
    """Recover in a process that dies there, if it comes there (some have but one file to remove)."""
    child = os.fork()
    if child == 0:
        stop_before(*RECOVERY[phase], lambda: os.kill(os.getpid(), signal.SIGKILL))
        recover(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    died = os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert died or phase == "in removing", "recovery did not come so far"


def compare(path: Path, recovery_dies: str) -> str:
    """What the trace says against what the ranks noted, before and after recovery."""
    found = check(path)
    unsealed = found.driver == "journals"
    before = rows_there(path, found)
    if unsealed and before:
        kill_recovery(path, recovery_dies)
        again = check(path)
        assert rows_there(path, again) == before
        if again.driver == "journals":
            assert again.missing == found.missing
    if journal_folder(path).exists() and before:
        got = recover(path)
        assert not got.kept, got
    if before:
        again = check(path)
        assert again.missing == (found.missing[1:] if unsealed else found.missing), (again, found)
        assert again.driver == "gather" if unsealed else again.state == "intact", again
        assert rows_there(path, again) == before
        left = [p.name for p in path.parent.iterdir() if p.name.startswith(f"{path.name}.")]
        assert left == [f"{path.name}.parts"] * (again.driver == "parts"), left
    return f"{found.state}, {'journals' if unsealed else 'sealed'}"


def rows_there(path: Path, found) -> dict[int, int]:
    """How many rows of each rank are there; every one is right, and who lacks some is named."""
    assert not found.damage, found.damage
    there = {}
    with open_trace(path) as trace:
        for info in trace.ranks:
            rows = trace.events(info.rank)
            assert same(rows, rows_of(info.rank)[: len(rows)]), f"wrong rows of rank {info.rank}"
            there[info.rank] = len(rows)
        judge_sketches(path, trace.sketches())
    absent = [line for line in found.missing if line.startswith("no journal of")]
    nothing = "no journal whose header can be read" in found.missing
    for rank in range(RANKS):
        flushed = int((noted(path, rank, "flushed") or ["0"])[-1])
        assert there.get(rank, 0) >= flushed, f"rank {rank}: {flushed} flushed, {there} there"
        own = [line for line in found.missing if line.startswith(f"rank-{rank:05d}.journal")]
        named = bool(own) or nothing or any(str(rank) in line.split(": ")[1].split(", ") for line in absent)
        assert named or there[rank] == STEPS * ROWS, f"rank {rank} lacks rows and is not named"
        assert not (named and noted(path, rank, "closed")), f"rank {rank} is named, and closed"
        for line in own:
            counted = f"{there.get(rank, 0)} events" in line or f"record {there.get(rank)} " in line
            assert counted or "cut short" in line, line
    return there


def judge_sketches(path: Path, found: np.ndarray) -> None:
    """Every sketch is right, and those of the steps that all ranks have written are there."""
    expected, _ = combined(np.concatenate([sketches_of(rank) for rank in range(RANKS)]))
    steps = min(int((noted(path, rank, "sketched") or ["0"])[-1]) for rank in range(RANKS))
    assert (found["step"] < steps).sum() == (expected["step"] < steps).sum(), "lost sketches"
    right = {row.tobytes() for row in expected}
    assert len({row.tobytes() for row in found} & right) == len(found), "wrong sketches"


def kill_runs(n: int, seed: int = 0) -> Counter:
    """Kill ``n`` runs: ways, phases of sealing, drivers, and one journal file or one a rank in
    turn. How often each (driver, journals, how, where in sealing, state of the trace) came."""
    drivers = ["parts", "gather"] + (["mpio"] if choose_driver("auto") == "mpio" else [])
    kinds = [(driver, False) for driver in drivers] + [("any", True)]
    counts, rng, phases = Counter(), random.Random(seed), itertools.cycle(PHASES)
    for i in range(n):
        way, (driver, shared) = WAYS[i % len(WAYS)], kinds[i // len(WAYS) % len(kinds)]
        if driver == "any":
            driver = rng.choice(drivers)
        phase = next(phases) if way == "in sealing" else ""
        folder = Path(tempfile.mkdtemp(prefix="spimpi-kill-"))
        state = kill_one_run(folder / "run.h5", driver, shared, way, rng, phase)
        shutil.rmtree(folder)  # kept where it fails
        counts[driver, "shared" if shared else "own", way, phase, state] += 1
    return counts


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        path, driver, shared, die, phase = sys.argv[2:]
        run(Path(path), driver, shared == "1", int(die), phase)
    else:
        names = ("driver", "journals", "killed", "where", "trace")
        for found, n in sorted(kill_runs(int(sys.argv[1]), *map(int, sys.argv[2:])).items()):
            print(json.dumps({**dict(zip(names, found)), "runs": n}))
