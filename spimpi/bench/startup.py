"""``spimpi verify`` on 64 ranks against 64 Python processes that import the same libraries."""

import shutil
import subprocess
import sys
from time import perf_counter

from spimpi.errors import UsageError

RANKS, ROUNDS = 64, 3
BARE = "from mpi4py import MPI; import numpy, numba, h5py; MPI.COMM_WORLD.Barrier()"


def measure() -> dict:
    """Seconds of both, in turn; the launcher is the mpirun or mpiexec on PATH."""
    start = launcher(RANKS)
    bare = [*start, sys.executable, "-c", BARE]
    verify = [*start, sys.executable, "-m", "spimpi", "verify", "--no-trace"]
    _run(verify)  # compiles the kernels, once
    times = {"bare": [], "verify": []}
    for _ in range(ROUNDS):
        times["bare"].append(_run(bare))
        times["verify"].append(_run(verify))
    ratios = sorted(v / b for v, b in zip(times["verify"], times["bare"]))
    return {
        "ranks": RANKS,
        "verify / bare start-up, median": round(ratios[len(ratios) // 2], 2),
        "bare start-up, s": [round(t, 1) for t in times["bare"]],
        "verify, s": [round(t, 1) for t in times["verify"]],
    }


def launcher(n_ranks: int) -> list[str]:
    """The start of a command line for so many ranks, which may share cores."""
    found = shutil.which("mpirun") or shutil.which("mpiexec")
    if found is None:
        msg = "no mpirun or mpiexec on PATH: activate the environment that has one"
        raise UsageError(msg)
    help_text = subprocess.run([found, "--help"], capture_output=True, text=True).stdout
    start = [found, "-n", str(n_ranks)]
    if "Open MPI" in help_text or "Open RTE" in help_text or "prterun" in help_text:
        start += ["--oversubscribe", "--bind-to", "none"]
    return start


def _run(command) -> float:
    start = perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        msg = f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-500:]}"
        raise UsageError(msg)
    return perf_counter() - start
