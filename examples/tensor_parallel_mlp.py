"""A tensor-parallel MLP whose allgather is checked; --flip plants a bit flip on one rank.

    mpirun -n 3 python -m mpi4py examples/tensor_parallel_mlp.py
    mpirun -n 3 python -m mpi4py examples/tensor_parallel_mlp.py --flip

Each rank has some columns of both layers, so that activations are gathered after each. What
spimpi needs are the lines with ``spimpi`` in them.
"""

import sys

import numpy as np
from mpi4py import MPI

import spimpi

BATCH, HIDDEN, STEPS = 8, 50, 3


def gather_columns(comm, own, part):
    """The blocks of columns of all ranks, side by side."""
    counts = [BATCH * n for n in part.all_sizes]
    places = [BATCH * start for start in part.starts[:-1]]
    flat = np.empty(BATCH * part.global_size, own.dtype)
    comm.Allgatherv(own, [flat, counts, places, MPI.FLOAT])
    blocks = [flat[a : a + n].reshape(BATCH, -1) for a, n in zip(places, counts)]
    return np.concatenate(blocks, axis=1)


def main(comm, flip):
    part = spimpi.TensorPartition(1, comm.size, comm.rank, HIDDEN)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((2, HIDDEN, HIDDEN), np.float32) / 7
    x = rng.standard_normal((BATCH, HIDDEN), np.float32)
    with spimpi.DistributedContext(comm) as ctx:
        for step in range(STEPS):
            with ctx.batch():
                for layer, w in enumerate(weights):
                    own = np.maximum(x @ w[:, part.start : part.stop], 0)
                    x = gather_columns(comm, own, part)
                    if flip and (step, layer, comm.rank) == (1, 1, comm.size - 1):
                        x.view(np.uint32)[3, 17] ^= 1 << 20
                    tag = spimpi.Tag(name="hidden", layer=layer, step=step)
                    spimpi.verify_allgather(comm, own, x, part, tag, ctx=ctx)
    if comm.rank == 0:
        print(f"{STEPS} steps verified on {comm.size} ranks")


if __name__ == "__main__":
    try:
        main(MPI.COMM_WORLD, "--flip" in sys.argv)
    except spimpi.CorruptionError as error:  # the same on every rank
        if MPI.COMM_WORLD.rank == 0:
            print(error)
        sys.exit(error.exit_status)
