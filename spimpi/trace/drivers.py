"""The two ways to write a sealed trace: one shared file, or a file a rank. Both are collective."""

import io
import os
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spimpi.errors import IncompleteError
from spimpi.trace import layout
from spimpi.trace.agreed import agreed, kept
from spimpi.trace.schema import EVENT, SCHEMA_VERSION, RankInfo

PIECE = 1 << 24  # rows a transfer: MPI counts bytes in an int


@dataclass(frozen=True)
class Plan:
    """What the drivers write; ``ranks`` and ``attributes`` are on rank 0 alone."""

    path: Path
    own: RankInfo
    total: int
    types: dict
    run_id: str
    ranks: list | None
    attributes: dict
    tensors: list
    temporary: Path


def parts_folder(path) -> Path:
    return Path(f"{path}.parts")


def write_mpio(comm, plan: Plan, events, undo: ExitStack) -> None:
    """Rank 0 lays the file out, then all write their rows. Collective."""
    import h5py
    from mpi4py import MPI

    with agreed(comm, plan.path):
        if comm.rank == 0:
            undo.callback(plan.temporary.unlink, missing_ok=True)
            _check_room(plan)
            with h5py.File(plan.temporary, "w", libver=layout.LIBVER) as file:
                layout.write_tables(file, "mpio", plan.attributes, plan.ranks, plan.tensors)
                layout.create_columns(file, plan.total, plan.types)
    pieces = comm.allreduce(-(-len(events) // PIECE), op=MPI.MAX)
    with agreed(comm, plan.path):
        file = h5py.File(plan.temporary, "r+", driver="mpio", comm=comm, libver=layout.LIBVER)
    with agreed(comm, plan.path):
        errors = []
        for name in EVENT.names:
            column = events[name].astype(plan.types[name])
            for piece in range(pieces):
                # A rank whose transfer failed still takes part in the ones that follow.
                with kept(errors):
                    _write_piece(file, name, column, plan, piece * PIECE)
        with kept(errors):
            file.close()
        if errors:
            raise errors[0]


def _check_room(plan: Plan) -> None:
    """HDF5 does not survive a disk that fills under it: look before."""
    needed = plan.total * sum(dtype.itemsize for dtype in plan.types.values())
    free = shutil.disk_usage(plan.path.parent).free
    if needed > free:
        msg = f"the disk is full: {needed} bytes needed in {plan.path.parent}, {free} are free"
        raise IncompleteError(msg)


def _write_piece(file, name: str, column: np.ndarray, plan: Plan, start: int) -> None:
    """One collective transfer; a rank with no rows left selects nothing."""
    import h5py

    rows = np.ascontiguousarray(column[start : start + PIECE])
    collective = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    collective.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    dataset = h5py.h5d.open(file.id, f"events/{name}".encode())
    there = dataset.get_space()
    # A selection of nothing needs an extent all the same: HDF5 refuses memory of no elements.
    here = h5py.h5s.create_simple((max(len(rows), 1),))
    if len(rows):
        there.select_hyperslab((plan.own.offset + start,), (len(rows),))
    else:
        there.select_none()
        here.select_none()
        rows = np.zeros(1, column.dtype)
    dataset.write(here, there, rows, dxpl=collective)


def write_parts(comm, plan: Plan, events, undo: ExitStack) -> None:
    """Each rank writes a file of its own, then rank 0 the file that shows them. Collective."""
    path = plan.path
    folder, building = parts_folder(path), Path(f"{path}.parts.sealing")
    with agreed(comm, path):
        if comm.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
            undo.callback(shutil.rmtree, building, ignore_errors=True)
            building.mkdir()
    with agreed(comm, path), _written_plainly(building / _part_name(comm.rank)) as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["run_id"] = plan.run_id
        file.attrs["rank"] = comm.rank
        for name, dtype in plan.types.items():
            column = file.create_dataset(f"events/{name}", data=events[name].astype(dtype))
            layout.describe(column, name)
    with agreed(comm, path):
        if comm.rank == 0:
            _swap_in(path, building, undo)
            parts = [f"{folder.name}/{_part_name(rank.rank)}" for rank in plan.ranks]
            undo.callback(plan.temporary.unlink, missing_ok=True)
            with _written_plainly(plan.temporary) as file:
                layout.write_tables(
                    file, "parts", plan.attributes, plan.ranks, plan.tensors, parts
                )
                layout.create_virtual_columns(file, plan.total, plan.types, plan.ranks, parts)


@contextmanager
def _written_plainly(path: Path):
    """A new HDF5 file that is built in memory and then written with plain write().

    On a disk that fills, HDF5 can neither write nor close its file, and the process crashes at
    its end; a plain write raises, and that is all.
    """
    import h5py

    image = io.BytesIO()
    with h5py.File(image, "w", libver=layout.LIBVER) as file:
        yield file
    path.write_bytes(image.getbuffer())


def _part_name(rank: int) -> str:
    return f"rank-{rank:05d}.h5"


def old_parts(path) -> Path:
    return Path(f"{path}.parts.old")


def _swap_in(path: Path, building: Path, undo: ExitStack) -> None:
    """Give the new parts their name; those of a trace that is overwritten wait until the end."""
    folder, old = parts_folder(path), old_parts(path)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
        undo.callback(os.rename, old, folder)
    os.rename(building, folder)
    undo.callback(os.rename, folder, building)
