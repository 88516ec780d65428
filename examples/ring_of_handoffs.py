"""Microbatches that go round a pipeline of all ranks; --stale leaves a receive out.

    mpirun -n 3 python -m mpi4py examples/ring_of_handoffs.py
    mpirun -n 3 python -m mpi4py examples/ring_of_handoffs.py --stale

Every rank adds its number to what it received and hands it on; the last hands back to rank 0. With
--stale rank 1 once uses its buffer before the new microbatch has arrived in it.
"""

import sys

import numpy as np
from mpi4py import MPI

import spimpi

ROWS, COLUMNS, MICROBATCHES = 4, 6, 4


def main(comm, stale):
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    received = spimpi.HandoffChain(comm, before, comm.rank, "hidden")
    handed_on = spimpi.HandoffChain(comm, comm.rank, after, "hidden")
    box = np.empty((ROWS, COLUMNS))
    for m in range(MICROBATCHES):
        x = np.full((ROWS, COLUMNS), 1000.0 * m)
        if comm.rank > 0:
            old = box.copy()
            comm.Recv(box, before)
            if stale and comm.rank == 1 and m == 2:
                box[:] = old
            received.verify(box, step=0, microbatch=m)
            x = box + comm.rank
        comm.Send(x, after)
        handed_on.verify(x, step=0, microbatch=m)
        if comm.rank == 0:  # the closing hop
            comm.Recv(box, before)
            received.verify(box, step=0, microbatch=m)
            assert (box == 1000 * m + sum(range(comm.size))).all()
    # The order in which both ends of a chain close it, from rank 0 round to rank 0.
    for chain in (handed_on, received) if comm.rank == 0 else (received, handed_on):
        chain.close()
    if comm.rank == 0:
        print(f"{MICROBATCHES} microbatches verified round {comm.size} ranks")


if __name__ == "__main__":
    if MPI.COMM_WORLD.size < 2:
        sys.exit("a ring of hand-offs needs two ranks or more: start it with mpirun")
    try:
        main(MPI.COMM_WORLD, "--stale" in sys.argv)
    except spimpi.CorruptionError as error:  # raised on both ends of the hand-off
        if MPI.COMM_WORLD.rank == error.verdict.where.recorded_by:
            print(error, flush=True)
        MPI.COMM_WORLD.Abort(error.exit_status)  # the other ranks wait for their next message
