"""The campaign: every fault in every mode that it fits, many trials in one MPI start.

    mpirun -n 4 python -m mpi4py -m spimpi.bench.runtime_faults.campaign ROWS.json

The world is cut into groups of as many ranks as a mode needs; groups share the faults.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

SEED = 1069
RANKS = 4


def measure(output: str | None = None) -> dict:
    """The tables as Markdown; ``output``: a file for all trials. Takes minutes. Local: starts ranks."""
    from spimpi.bench.runtime_faults import table

    told = on_ranks()
    lines = table.lines_of(told["rows"])
    if output:
        table.write(output, lines)
    figures = {title: f"\n\n{text}\n" for title, text in table.tables(lines).items()}
    return {**figures, "clean runs": told["clean"], "false alarms": told["alarms"]}


def on_ranks() -> dict:
    """What ``campaign`` finds on 4 ranks that the mpirun on PATH starts: rows, clean, alarms."""
    from spimpi.bench.runtime_faults.trial import Row
    from spimpi.bench.startup import launcher
    from spimpi.errors import UsageError

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        program = [sys.executable, "-m", "mpi4py", "-m", __name__, str(path)]
        command = [*launcher(RANKS), *program]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        if done.returncode:
            msg = f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-800:]}"
            raise UsageError(msg)
        told = json.loads(path.read_text())
    return told | {"rows": [Row(**row) for row in told["rows"]]}


@contextmanager
def quick_and_repeatable():
    """A preflight with small payloads (it has tests of its own), groups of steps whose size no clock
    decides, and no golden run made on the way."""
    from spimpi.checks.fabric import SIZES, check_fabric
    from spimpi.inference import ledger
    from spimpi.verification import run

    kept = run.check_fabric, run.GOLDEN_BYTES, ledger.SECONDS
    run.check_fabric = partial(check_fabric, sizes=tuple(range(1, 1 + len(SIZES))))
    run.GOLDEN_BYTES, ledger.SECONDS = 0, 1e9
    try:
        yield
    finally:
        run.check_fabric, run.GOLDEN_BYTES, ledger.SECONDS = kept


def campaign(world, modes, faults, trials=2, part=1, tell=None):
    """(rows, clean trials, alarms among them), on every rank. Collective.

    part: each fault is tried in one of so many of the modes that it fits, at least in one; tell: told
    of each trial.
    """
    from mpi4py import MPI

    from spimpi.launch import wait_asleep

    rows, clean, alarms = [], 0, []
    with quick_and_repeatable():
        shares = _shared_out(modes, faults, part)
        for mode in modes:
            n_groups, group = world.size // mode.n_ranks, world.rank // mode.n_ranks
            comm = world.Split(group if group < n_groups else MPI.UNDEFINED, world.rank)
            if comm != MPI.COMM_NULL:
                own = shares[mode][group::n_groups]
                found, n_clean, said = in_mode(comm, mode, own, trials, tell)
                if comm.rank == 0:
                    rows, clean, alarms = rows + found, clean + n_clean, alarms + said
                comm.Free()
            wait_asleep(world.Ibarrier())
    return (
        sum(world.allgather(rows), []), world.allreduce(clean), sum(world.allgather(alarms), [])
    )  # fmt: skip


def _shared_out(modes, faults, part) -> dict:
    """{mode: its faults}: of the modes that a fault fits every ``part``-th, another first for each."""
    shares = {mode: [] for mode in modes}
    for i, fault in enumerate(faults):
        able = [mode for mode in modes if fault.fits(mode)]
        for mode in able[i % max(1, min(part, len(able))) :: part]:
            shares[mode].append(fault)
    return shares


def in_mode(comm, mode, faults, trials=2, tell=None):
    """The trials of faults in a mode, with a golden run and without: (rows, clean trials, alarms).

    Collective over ``comm``.
    """
    from spimpi.bench.runtime_faults.hooks import Now
    from spimpi.bench.runtime_faults.modes import golden_of, job_of
    from spimpi.bench.runtime_faults.trial import Census, run_once, run_trial

    golden = comm.bcast(golden_of(mode) if comm.rank == 0 else None)
    rows, clean, alarms = [], 0, []
    for chosen in (None, golden) if golden else (None,):
        now = Now()
        census = Census(now, faults)
        clean_run = run_once(comm, job_of(mode, chosen), now, census.listeners())
        clean += 1
        if clean_run.status:
            alarms.append(f"{mode.name}, golden run {bool(chosen)}: {clean_run.said}")
        moments = comm.allgather(census.moments)
        for fault in faults:
            for trial in range(trials):
                seed = [SEED, trial, *f"{mode.name} {fault.name}".encode()]
                found = _moment(comm, mode, fault, moments, trial, seed)
                if found is None:
                    continue
                if tell:
                    tell(f"{mode.name}, golden run {bool(chosen)}, {fault.name}, trial {trial}")
                job = job_of(mode, chosen)
                rows.append(run_trial(comm, mode, job, fault, *found, clean_run, seed))
    return rows, clean, alarms


def _moment(comm, mode, fault, moments, trial, seed):
    """(every rank's moment or None, the rank that is struck) of a trial; None: no such moment.

    Trials take turns between the prefill and later steps, where the fault can strike in both.
    """
    rng = np.random.default_rng(seed)
    able = [(r, m) for r, own in enumerate(moments) for m in own[fault.name]]
    if not able:
        return None
    later = bool((trial + len(fault.name) + len(mode.name)) % 2)
    able = [(r, m) for r, m in able if (m[1] > 0) == later] or able
    rank, moment = able[int(rng.integers(len(able)))]
    moment_of = [None] * comm.size
    moment_of[rank] = moment
    if fault.alike:
        place = mode.grid.coordinates(rank)
        for t in range(mode.grid.tp):
            other = mode.grid.rank_of(*place[:3], t)
            if moment in moments[other][fault.name]:
                moment_of[other] = moment
    return moment_of, rank


def main() -> None:
    from mpi4py import MPI

    from spimpi.bench.runtime_faults.faults import FAULTS
    from spimpi.bench.runtime_faults.modes import MODES
    from spimpi.cli.session import session

    with session(120, None, seeded=True, sequence=True) as (world, watchdog):
        rows, clean, alarms = campaign(world, MODES, FAULTS, tell=watchdog.at)
    if MPI.COMM_WORLD.rank == 0:
        told = {"rows": [asdict(row) for row in rows], "clean": clean, "alarms": alarms}
        Path(sys.argv[1]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
