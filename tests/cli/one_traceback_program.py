"""Programs whose check fails, for tests/cli/test_one_traceback.py: ``python -m mpi4py FILE WAY``."""

import sys

import numpy as np
from mpi4py import MPI

import spimpi



class Lost(MPI.Intracomm):
    """Its broadcasts bring nothing."""

    def Bcast(self, *_):
        pass


comm = MPI.COMM_WORLD
way = sys.argv[1]
if way == "one rank":
    if comm.rank == 1:
        raise RuntimeError("of this rank alone")
    comm.Barrier()
whole = np.arange(4.0)
if comm.rank == comm.size - 1:
    whole[2] = -1
tag = spimpi.Tag(name="whole")
if way == "check":
    spimpi.verify_replicas(comm, whole, tag)
elif way == "group without rank 0":
    group = comm.Split(0 if comm.rank == 0 else 1)
    if comm.rank:
        spimpi.verify_replicas(group, whole, tag)
    comm.Barrier()
elif way == "batch":
    with spimpi.DistributedContext(comm) as ctx, ctx.batch():
        spimpi.verify_replicas(comm, whole, tag, ctx=ctx)
elif way == "checked":
    spimpi.checked(Lost(comm)).Bcast(whole)
elif way == "usage":
    spimpi.verify_replicas(comm, whole[: 2 + comm.rank], tag)
elif way == "kept":
    try:
        spimpi.verify_replicas(comm, whole, tag)
    except spimpi.CorruptionError:
        if comm.rank:
            raise
    comm.Barrier()
