"""Data-parallel training whose replicas are compared after each step; --wrong spoils one.

    mpirun -n 3 python -m mpi4py examples/data_parallel_replica.py
    mpirun -n 3 python -m mpi4py examples/data_parallel_replica.py --wrong

A linear model, fitted by gradient descent: every rank has its own examples, gradients are summed
by an allreduce, and all ranks must have the same parameters, to the last bit, afterwards.
"""

import sys

import numpy as np
from mpi4py import MPI

import spimpi

FEATURES, EXAMPLES, STEPS = 12, 64, 20


def main(comm, wrong):
    truth = np.random.default_rng(0).standard_normal(FEATURES)
    rng = np.random.default_rng(1 + comm.rank)
    x = rng.standard_normal((EXAMPLES, FEATURES))
    y = x @ truth
    parameters = np.zeros(FEATURES)
    with spimpi.DistributedContext(comm) as ctx:
        for step in range(STEPS):
            gradient = x.T @ (x @ parameters - y)
            comm.Allreduce(MPI.IN_PLACE, gradient)
            parameters -= 0.5 / (EXAMPLES * comm.size) * gradient
            if wrong and (step, comm.rank) == (STEPS // 2, comm.size - 1):
                parameters[5] *= 1 + 1e-15
            tag = spimpi.Tag(name="parameters", step=step)
            spimpi.verify_replicas(comm, parameters, tag, ctx=ctx)
    if comm.rank == 0:
        error = np.abs(parameters - truth).max()
        print(f"{STEPS} steps verified on {comm.size} ranks; largest error {error:.2g}")


if __name__ == "__main__":
    try:
        main(MPI.COMM_WORLD, "--wrong" in sys.argv)
    except spimpi.CorruptionError as error:  # the same on every rank
        if MPI.COMM_WORLD.rank == 0:
            print(error)
        sys.exit(error.exit_status)
