"""What `spimpi verify` does, called by a program; --flip plants a fault that the run must find.

    mpirun -n 3 python -m mpi4py examples/whole_run.py
    mpirun -n 3 python -m mpi4py examples/whole_run.py --flip

A job scheduler's health check might do this before it starts the real work on the same ranks.
"""

import sys

from mpi4py import MPI

import spimpi

FLIP = "bitflip:rank=1,layer=3,tensor=hidden,element=17,bit=30"


def main(comm, faults) -> int:
    request = spimpi.Request(topology=f"tp={comm.size}", tokens=4, faults=faults)
    outcome = spimpi.verify_distributed_inference(comm, request)
    if comm.rank == 0:
        print(f"{outcome.n_events} checks on {comm.size} ranks, {outcome.n_failed} failed")
        print(outcome.verdict)
    return outcome.exit_status


if __name__ == "__main__":
    sys.exit(main(MPI.COMM_WORLD, (FLIP,) if "--flip" in sys.argv else ()))
