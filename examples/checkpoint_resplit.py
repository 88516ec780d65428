"""A checkpoint checked in memory, under another split than the one it was saved with.

    mpirun -n 4 python examples/checkpoint_resplit.py

Whoever published it saved whole tensors in two files, and a manifest: 8 bytes a tensor. The ranks
that load it, however many, each read a block of rows. No rank ever holds a whole matrix, and yet
together they know that every bit is the one of which the manifest was made. Then one bit flips in
the memory of one rank, and is found.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from mpi4py import MPI
from safetensors import safe_open
from safetensors.numpy import save_file

import spimpi
from spimpi.manifest import make_manifest, write_manifest

SHAPES = {
    "embed.weight": (64, 48),
    "layers.0.attn.weight": (48, 48),
    "layers.0.mlp.weight": (130, 48),
    "layers.0.norm.weight": (48,),
    "temperature": (),
}


def save(folder: Path) -> None:
    """The publisher: the tensors in two files, and the manifest beside them."""
    rng = np.random.default_rng(1069)
    tensors = {
        name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()
    }
    names = list(tensors)
    save_file({n: tensors[n] for n in names[:2]}, folder / "part-1.safetensors")
    save_file({n: tensors[n] for n in names[2:]}, folder / "part-2.safetensors")
    write_manifest(folder / "model.spi.json", make_manifest(folder))


def read_rows(comm, folder: Path) -> dict:
    """This rank's block of rows of every tensor: name -> (array, which part of it that is)."""
    held = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():
                stored = file.get_slice(name)
                shape = stored.get_shape()
                if not shape:  # a single number, on every rank: replicas, which must agree
                    held[name] = (file.get_tensor(name), None)
                    continue
                rows = spimpi.TensorPartition(0, comm.size, comm.rank, shape[0])
                block = slice(rows.start, rows.stop)
                # the library refuses an empty range at a tensor's end
                held[name] = (stored[block] if rows.size else stored[:1][:0], rows)
    return held


def main() -> int:
    comm = MPI.COMM_WORLD
    folder = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
    if comm.rank == 0:
        save(folder)
    comm.Barrier()
    held = read_rows(comm, folder)

    verdict = spimpi.verify_weights(comm, held, folder / "model.spi.json")
    if comm.rank == 0:
        print(f"{comm.size} ranks, by rows: {verdict}")

    if comm.rank == comm.size - 1:  # a cosmic ray
        array, _ = held["layers.0.mlp.weight"]
        array.reshape(-1).view(np.uint32)[7] ^= 1 << 30
    verdict = spimpi.verify_weights(comm, held, folder / "model.spi.json", check=False)
    if comm.rank == 0:
        print(f"after a flipped bit: {verdict}")
        shutil.rmtree(folder)
    return 0 if not verdict and verdict.where.tensor == "layers.0.mlp.weight" else 1


if __name__ == "__main__":
    sys.exit(main())
