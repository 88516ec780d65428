"""The ways to write a sealed trace: all ranks one file, a file a rank, one process one file."""

import io
import os
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spimpi.errors import IncompleteError
from spimpi.trace.journals.synced import sync
from spimpi.trace.reading import sketches
from spimpi.trace.schema import EVENT, SCHEMA_VERSION, RankInfo
from spimpi.trace.sealing import layout
from spimpi.trace.sealing.agreed import agreed, kept
from spimpi.trace.sealing.leftovers import Sealing, parts_folder, remove_parts

PIECE = 1 << 24  # rows a transfer: MPI counts bytes in an int


@dataclass(frozen=True)
class Plan:
    """What the drivers write; ``ranks``, ``attributes`` and ``sketches`` are on rank 0 alone.

    ``own`` is this rank's row of them, None where one process writes all ranks'. Sketches are few,
    so that whoever makes the file writes all of them (SKETCH_SHARE); None: none were taken.
    """

    path: Path
    own: RankInfo | None
    total: int
    types: dict
    run_id: str
    ranks: list | None
    attributes: dict
    tensors: list
    temporary: Path
    sketches: np.ndarray | None = None
    sealing: Sealing | None = None

    def made(self, place: Path) -> None:
        """Note what this sealing made, where there is a note."""
        if self.sealing is not None:
            self.sealing.made(place)


def write_mpio(comm, plan: Plan, events, undo: ExitStack) -> None:
    """Rank 0 lays the file out, then all write their rows. Collective."""
    import h5py
    from mpi4py import MPI

    with agreed(comm, plan.path):
        if comm.rank == 0:
            _lay_out(plan, "mpio", undo)
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


def _lay_out(plan: Plan, driver: str, undo: ExitStack) -> None:
    """A file with everything but the rows, whose space is taken.

    HDF5 does not survive a disk that fills under it.
    """
    import h5py

    _check_room(plan)
    with h5py.File(plan.temporary, "x", libver=layout.LIBVER) as file:
        undo.callback(plan.temporary.unlink, missing_ok=True)
        plan.made(plan.temporary)
        layout.write_tables(file, driver, plan.attributes, plan.ranks, plan.tensors)
        layout.create_columns(file, plan.total, plan.types)
        if plan.sketches is not None:
            sketches.write_group(file, plan.sketches)
    with plan.temporary.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, plan.temporary.stat().st_size)


def _check_room(plan: Plan) -> None:
    needed = plan.total * sum(dtype.itemsize for dtype in plan.types.values())
    needed += plan.sketches.nbytes if plan.sketches is not None else 0
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


def write_gather(comm, plan: Plan, events, undo: ExitStack) -> None:
    """Rank 0 writes what the ranks send, one after the other. Collective."""
    with agreed(comm, plan.path):
        if comm.rank == 0:
            _lay_out(plan, "gather", undo)
    with agreed(comm, plan.path):
        if comm.rank == 0:
            _write_blocks(plan, _received(comm, plan.ranks, events))
        else:
            for start in range(0, len(events), layout.ROWS_AT_ONCE):
                comm.Send(_as_bytes(events[start : start + layout.ROWS_AT_ONCE]), 0)


def _received(comm, ranks, own):
    """Yield (first row in the file, rows) of all ranks, in order."""
    for info in ranks:
        for start in range(0, info.count, layout.ROWS_AT_ONCE):
            rows = own[start : start + layout.ROWS_AT_ONCE]
            if info.rank != comm.rank:
                rows = np.empty(min(layout.ROWS_AT_ONCE, info.count - start), EVENT)
                comm.Recv(_as_bytes(rows), info.rank)
            yield info.offset + start, rows


def _as_bytes(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8)


def write_alone(plan: Plan, blocks, undo: ExitStack) -> None:
    """One process writes all ranks' rows; ``blocks`` yields (first row in the file, rows)."""
    _lay_out(plan, "gather", undo)
    _write_blocks(plan, blocks)


def _write_blocks(plan: Plan, blocks) -> None:
    """All blocks are taken, also after an error: who sends them is not to wait."""
    import h5py

    errors = []
    with kept(errors):
        file = h5py.File(plan.temporary, "r+", libver=layout.LIBVER)
    for start, rows in blocks:
        if errors:
            continue
        with kept(errors):
            for name, dtype in plan.types.items():
                file[f"events/{name}"][start : start + len(rows)] = rows[name].astype(dtype)
    with kept(errors):
        file.close()
    if errors:
        raise errors[0]


def write_parts(comm, plan: Plan, events, undo: ExitStack) -> None:
    """Each rank writes a file of its own, then rank 0 the file that shows them. Collective."""
    path, building = plan.path, plan.sealing.building
    with agreed(comm, path):
        if comm.rank == 0:
            building.mkdir()
            undo.callback(remove_parts, building)
            plan.made(building)
    with agreed(comm, path):
        write_part(plan, building, comm.rank, events)
    with agreed(comm, path):
        if comm.rank == 0:
            _swap_in(plan, undo)
            write_shown_parts(plan)
            undo.callback(plan.temporary.unlink, missing_ok=True)
            plan.made(plan.temporary)


def write_part(plan: Plan, folder: Path, rank: int, events) -> None:
    """The file of one rank's rows."""
    with _written_plainly(folder / _part_name(rank)) as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["run_id"] = plan.run_id
        file.attrs["rank"] = rank
        for name, dtype in plan.types.items():
            column = file.create_dataset(f"events/{name}", data=events[name].astype(dtype))
            layout.describe(column, name)


def write_shown_parts(plan: Plan) -> None:
    """The file that shows the parts of all ranks as one."""
    folder = parts_folder(plan.path).name
    parts = [f"{folder}/{_part_name(rank.rank)}" for rank in plan.ranks]
    with _written_plainly(plan.temporary) as file:
        layout.write_tables(file, "parts", plan.attributes, plan.ranks, plan.tensors, parts)
        layout.create_virtual_columns(file, plan.total, plan.types, plan.ranks, parts)
        if plan.sketches is not None:
            sketches.write_group(file, plan.sketches)


def sync_written(plan: Plan, driver: str) -> None:
    """Wait until the disk has what this process wrote of the file and its parts. Local."""
    if driver == "parts":
        sync(parts_folder(plan.path) / _part_name(plan.own.rank))
        sync(parts_folder(plan.path))
    sync(plan.temporary)


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
    with open(path, "xb") as file:
        try:
            file.write(image.getbuffer())
        except BaseException:
            path.unlink()
            raise


def _part_name(rank: int) -> str:
    return f"rank-{rank:05d}.h5"


def _swap_in(plan: Plan, undo: ExitStack) -> None:
    """Give the new parts their name; those of a trace that is overwritten wait until the end."""
    folder, building, old = parts_folder(plan.path), plan.sealing.building, plan.sealing.old
    if os.path.lexists(folder):
        os.rename(folder, old)
        undo.callback(os.rename, old, folder)
    os.rename(building, folder)
    undo.callback(os.rename, folder, building)
