"""Runs that are killed at random moments; what their traces then say is compared with what happened.

    python tests/trace/kill_runs.py 200        prints how many were killed where

Each run is this file on three ranks: journals, signal handling and sealing as in ``spimpi verify``,
with events that can be made again. After every flush a rank notes how many rows are written: that
is the oracle. A rank is killed by SIGKILL, or all are, or one kills itself when half of a flush is
written, or all are killed while they seal.
"""

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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from trace_samples import TENSORS, header, same, some_events  # noqa: E402

from spimpi.trace import journal as journals  # noqa: E402
from spimpi.trace import open as open_trace  # noqa: E402
from spimpi.trace.check import check  # noqa: E402
from spimpi.trace.recover import recover  # noqa: E402
from spimpi.trace.seal import choose_driver, prepare, seal  # noqa: E402
from spimpi.trace.signals import flushed_on_signals  # noqa: E402

RANKS, STEPS, ROWS = 3, 24, 400
WAYS = ("one rank", "all ranks", "in a flush", "in sealing")


def rows_of(rank: int) -> np.ndarray:
    return some_events(STEPS * ROWS, rank)


# On the ranks


def run(path: Path, driver: str, die_in_flush: int) -> None:
    """A traced run; rank 1 kills itself in that flush, counted from 1 (0: it does not)."""
    from mpi4py import MPI

    import h5py  # noqa: F401  so that sealing is not mostly this

    world, events = MPI.COMM_WORLD, rows_of(MPI.COMM_WORLD.rank)
    if world.rank == 0:
        prepare(path)
    world.Barrier()
    note(path, world.rank, f"pid {os.getpid()}")
    journal = journals.Journal(journals.journal_folder(path), world.rank, header(RANKS), TENSORS)
    with flushed_on_signals(journal.flush):
        for step in range(STEPS):
            for row in range(step * ROWS, (step + 1) * ROWS, 50):
                journal.append(events[row : row + 50])
                time.sleep(0.0005)
            if step % 2 and world.rank == 1 and (step + 1) // 2 == die_in_flush:
                journals.os = Dying()
            if step % 2:
                journal.flush()
                note(path, world.rank, f"flushed {journal.count}")
            world.allreduce(step)
        journal.close("verified")
        note(path, world.rank, "closed")
        world.Barrier()
        note(path, world.rank, "sealing")
        seal(world, journal, path, {"end_state": "verified"}, driver)
    note(path, world.rank, "sealed")


class Dying:
    """Stands for ``os`` in the journal: half of what is written arrives, then the process dies."""

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd, data):
        os.write(fd, data[: len(data) // 2])
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


def kill_one_run(path: Path, driver: str, way: str, rng: random.Random) -> str:
    """Start a run, kill it, compare; returns what state its trace was in. AssertionError."""
    die = rng.randint(1, STEPS // 2) if way == "in a flush" else 0
    started = subprocess.Popen(
        [*on_ranks(RANKS), "-m", "mpi4py", __file__, "--rank", str(path), driver, str(die)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=dict(os.environ),  # without what this process's own MPI has added to it
    )  # fmt: skip
    try:
        wait_for(started, lambda: all(noted(path, rank, "pid") for rank in range(RANKS)))
        pids = [int(noted(path, rank, "pid")[0]) for rank in range(RANKS)]
        if way == "in sealing":
            wait_for(started, lambda: noted(path, 0, "sealing"))
            time.sleep(rng.uniform(0, 0.06))
        elif not die:
            time.sleep(rng.uniform(0, 0.5))
        victims = {"one rank": [rng.choice(pids)], "in a flush": []}.get(way, pids)
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
    return compare(path)


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


def compare(path: Path) -> str:
    """What the trace says against what the ranks noted, before and after recovery."""
    found = check(path)
    before = rows_there(path, found)
    if found.driver == "journals":
        got = recover(path)
        again = check(path)
        assert again.driver == "gather" and again.missing == got.missing, again
        assert got.missing == found.missing[1:] and not got.kept, (got, found)
        assert rows_there(path, again) == before
    elif journals.journal_folder(path).exists():  # killed between the last two steps of sealing
        recover(path)
        assert check(path).state == "intact"
    assert not journals.journal_folder(path).exists()
    return f"{found.state}, {'journals' if found.driver == 'journals' else 'sealed'}"


def rows_there(path: Path, found) -> dict[int, int]:
    """How many rows of each rank are there; every one is right, and who lacks some is named."""
    assert not found.damage, found.damage
    there = {}
    with open_trace(path) as trace:
        for info in trace.ranks:
            rows = trace.events(info.rank)
            assert same(rows, rows_of(info.rank)[: len(rows)]), f"wrong rows of rank {info.rank}"
            there[info.rank] = len(rows)
    absent = [line for line in found.missing if line.startswith("no journal of")]
    for rank in range(RANKS):
        flushed = int((noted(path, rank, "flushed") or ["0"])[-1])
        assert there.get(rank, 0) >= flushed, f"rank {rank}: {flushed} flushed, {there} there"
        own = [line for line in found.missing if line.startswith(f"rank-{rank:05d}.")]
        named = bool(own) or any(str(rank) in line.split(": ")[1].split(", ") for line in absent)
        assert named or there[rank] == STEPS * ROWS, f"rank {rank} lacks rows and is not named"
        assert not (named and noted(path, rank, "closed")), f"rank {rank} is named, and closed"
        for line in own:
            counted = f"{there.get(rank, 0)} events" in line or f"record {there.get(rank)} " in line
            assert counted or "cut short" in line, line
    return there


def kill_runs(n: int, seed: int = 0) -> Counter:
    """Kill ``n`` runs, drivers and ways in turn; how often each (driver, way, state) came."""
    drivers = ["parts", "gather"] + (["mpio"] if choose_driver("auto") == "mpio" else [])
    counts, rng = Counter(), random.Random(seed)
    for i in range(n):
        way, driver = WAYS[i % len(WAYS)], drivers[i // len(WAYS) % len(drivers)]
        folder = Path(tempfile.mkdtemp(prefix="spimpi-kill-"))
        state = kill_one_run(folder / "run.h5", driver, way, rng)  # kept where it fails
        shutil.rmtree(folder)
        counts[driver, way, state] += 1
    return counts


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        run(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        for (driver, way, state), n in sorted(kill_runs(int(sys.argv[1])).items()):
            print(json.dumps({"driver": driver, "killed": way, "trace": state, "runs": n}))
