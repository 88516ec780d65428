"""Reading a trace: rows checked a second, beside h5py that reads the same columns; commands on it."""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from spimpi.bench.synthetic_trace import synthetic_trace
from spimpi.trace import open as open_trace
from spimpi.trace.reading.pieces import ROWS
from spimpi.trace.schema import EVENT

ROUNDS = 3
COMMANDS = ("show", "show --by layer", "show --by rank")


def measure(n_ranks: int = 10_000, n_events: int = 1000, folder=None) -> dict:
    """Figures of a synthetic trace that is made for it in ``folder`` (about 49 bytes an event)."""
    with tempfile.TemporaryDirectory(prefix="spimpi-bench-", dir=folder) as place:
        path = Path(place) / "run.h5"
        synthetic_trace(path, n_ranks, n_events)
        return _measured(path, n_ranks * n_events)


def _measured(path: Path, n: int) -> dict:
    blocks, plain, frames = [], [], []
    for _ in range(ROUNDS):
        blocks.append(_seconds(_read_blocks, path))
        plain.append(_seconds(_read_plainly, path))
        frames.append(_seconds(_query, path))
    figures = {
        "events": n,
        "bytes an event": round(path.stat().st_size / n, 1),
        "read and checked, 10^6 events/s": round(n / min(blocks) / 1e6, 1),
        "h5py, same columns, 10^6 events/s": round(n / min(plain) / 1e6, 1),
        "time of blocks / of h5py": round(min(blocks) / min(plain), 2),
        "to_pandas of the failures, s": round(min(frames), 2),
    }
    for command in COMMANDS:
        figures[f"{command}, s"] = round(_seconds(_command, path, command), 1)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    figures["most memory of a command, MB"] = round(peak / 1e3)
    return figures


def _seconds(function, *args) -> float:
    began = perf_counter()
    function(*args)
    return perf_counter() - began


def _read_blocks(path: Path) -> None:
    with open_trace(path) as trace:
        for _ in trace.blocks():
            pass
        if trace.problems:
            raise RuntimeError(trace.problems[0])


def _read_plainly(path: Path) -> None:
    import h5py

    with h5py.File(path, locking=False) as file:
        columns = [file[f"events/{name}"] for name in EVENT.names]
        for start in range(0, len(columns[0]), ROWS):
            for column in columns:
                column[start : start + ROWS]


def _query(path: Path) -> None:
    with open_trace(path) as trace:
        if not len(trace.to_pandas(where="verdict == 'FAILED' and op == 'MATMUL'")):
            msg = "the planted failures were not found"
            raise RuntimeError(msg)


def _command(path: Path, command: str) -> None:
    verb, *options = command.split()
    line = [sys.executable, "-m", "spimpi", "trace", verb, path, *options]
    done = subprocess.run(line, stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 1:
        msg = f"spimpi trace {command} of failures gave exit status {done.returncode}, expected 1"
        raise RuntimeError(msg)
