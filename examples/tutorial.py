"""A small quantised network: each rank computes some columns of a layer, then all gather them.

With --flip one bit goes wrong in rank 2's memory. docs/tutorial.md goes through it.
"""

import sys

import numpy as np
from mpi4py import MPI

ROWS, HIDDEN, LAYERS = 8, 1024, 6

comm = MPI.COMM_WORLD
columns = np.array_split(np.arange(HIDDEN), comm.size)[comm.rank]
counts = comm.allgather(ROWS * len(columns))

hidden = np.random.default_rng(0).integers(-8, 9, (ROWS, HIDDEN)).astype(np.float32)
for layer in range(LAYERS):
    weights = np.random.default_rng(1 + layer).integers(-3, 4, (HIDDEN, HIDDEN)).astype(np.float32)
    mine = np.clip(np.rint(hidden @ weights[:, columns] / 64), -127, 127)

    flat = np.empty(ROWS * HIDDEN, np.float32)
    comm.Allgatherv(mine, [flat, counts])
    blocks = np.split(flat, np.cumsum(counts)[:-1])
    hidden = np.hstack([block.reshape(ROWS, -1) for block in blocks])

    if "--flip" in sys.argv and layer == 3 and comm.rank == 2:
        hidden.view(np.uint32)[5, 702] ^= 1 << 25

answer = hidden.argmax(axis=1)
if comm.rank == 0:
    print("answer:", *answer)
