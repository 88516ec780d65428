"""The confusion matrix's trials on real ranks: ``mpirun -n 8 python -m mpi4py -m … FILE``.

The world is cut into as many groups of 2, 3, 4 and 8 ranks as fit. Trials of checks that can share a
batch do; every verdict is carried to its end, and must be the same on all ranks.
"""

import json
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from spimpi.bench.cases import ON_RANKS, SHARDS
from spimpi.bench.confusion import generator
from spimpi.bench.matrix import ON_MPI
from spimpi.bench.scenes import CLEAN, Scene
from spimpi.context import DistributedContext
from spimpi.launch import wait_asleep

BATCHED, SINGLE = 4, 1  # trials of each fault, dtype and number of ranks


def measure(world, sizes=SHARDS, cases=ON_RANKS) -> list:
    """Rows (route, check, fault, dtype, ranks, missed, tried), on every rank. Collective."""
    rows = []
    for n in sizes:
        group = world.rank // n
        n_groups = world.size // n
        comm = world.Split(group if group < n_groups else MPI.UNDEFINED, world.rank)
        if comm != MPI.COMM_NULL:
            with DistributedContext(comm) as ctx:
                for case in cases[group::n_groups]:
                    rows += case_rows(comm, ctx, case)
            comm.Free()
        wait_asleep(world.Ibarrier())
    mine = {tuple(row[1:5]): row for row in rows}
    gathered = {key: row for part in world.allgather(mine) for key, row in part.items()}
    return list(gathered.values())


def case_rows(comm, ctx, case) -> list:
    """A check's trials on the ranks of ``comm``. Collective."""
    n_trials = BATCHED if case.batched else SINGLE
    rng, scenes = generator("ranks", case.name, comm.size), []
    for dtype in case.dtypes:
        for fault in case.faults:
            first = len(scenes)
            scenes += [Scene(dtype, comm.size, fault, rng, first + i) for i in range(n_trials)]
        first, n_clean = len(scenes), n_trials * len(case.faults)
        scenes += [Scene(dtype, comm.size, CLEAN, rng, first + i) for i in range(n_clean)]
    calls = [case.trial(s) for s in scenes]
    mine = [(i, call) for i, (call, callers) in enumerate(calls)
            if callers is None or comm.rank in callers]  # fmt: skip
    if case.batched:
        with ctx.batch():
            verdicts = [(i, call(comm, ctx)) for i, call in mine]
    else:
        verdicts = [(i, call(comm, ctx)) for i, call in mine]
    said = np.zeros((len(scenes), 2), np.int64)  # by how many ranks that it holds, that it does not
    for i, verdict in verdicts:
        if verdict is not None:  # the sender of a message has none
            said[i, int(not verdict)] = 1
    comm.Allreduce(MPI.IN_PLACE, said)
    if said.all(axis=1).any():
        msg = f"{case.name}: ranks have different verdicts"
        raise RuntimeError(msg)
    counts: dict = {}
    for s, (held, _) in zip(scenes, said):
        if s.changed:
            count = counts.setdefault((s.fault, s.dtype), [0, 0])
            count[0] += bool(held) != (s.fault == CLEAN)
            count[1] += 1
    return [(ON_MPI, case.name, *key, comm.size, *count) for key, count in counts.items()]


def main() -> None:
    world = MPI.COMM_WORLD
    rows = measure(world)
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
