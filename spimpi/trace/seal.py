"""Sealing: the journals of all ranks become one HDF5 trace. Two drivers behind one interface.

``mpio``   one shared file, written collectively; h5py must be built with MPI.
``parts``  a serial file a rank in ``PATH.parts/``, and ``PATH`` that shows them as one.

Everything is written under a temporary name and read back before it gets its own; the journals
go only after that. Whatever goes wrong on one rank is agreed on, and raised on all of them.
"""

import io
import os
import shutil
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spimpi.errors import IncompleteError, SpimpiError, UsageError
from spimpi.trace import layout
from spimpi.trace.checksum import rows_fingerprint
from spimpi.trace.journal import Journal, read_journal
from spimpi.trace.schema import EVENT, SCHEMA_VERSION, RankInfo

DRIVERS = ("auto", "mpio", "parts")
PIECE = 1 << 24  # rows a transfer: MPI counts bytes in an int
OWN_HEADER = ("schema_version", "rank", "host", "pid", "device", "started")


def journal_folder(path) -> Path:
    """Where the journals of the trace ``path`` are while the run goes on."""
    return Path(f"{path}.journal")


def parts_folder(path) -> Path:
    return Path(f"{path}.parts")


def choose_driver(driver: str = "auto") -> str:
    """The driver to seal with. UsageError for mpio where h5py is built without MPI."""
    if driver not in DRIVERS:
        msg = f"unknown trace driver {driver!r}; there are {', '.join(DRIVERS)}"
        raise UsageError(msg)
    if driver == "parts":
        return driver
    from mpi4py import MPI  # noqa: F401  before h5py, or two MPI libraries may be loaded

    import h5py

    if h5py.get_config().mpi:
        return "mpio"
    if driver == "auto":
        return "parts"
    msg = (
        f"the trace driver mpio needs an h5py built with MPI, this h5py {h5py.__version__} is "
        "not: build it against parallel HDF5 (README, `cmake --workflow --preset test`), or use "
        "--trace-driver parts"
    )
    raise UsageError(msg)


def check_can_write(path, overwrite: bool = False) -> None:
    """Raise UsageError where a trace can't be written to ``path``. For one rank; writes nothing."""
    _check_place(Path(path))
    if not overwrite:
        _check_free(Path(path), journal_folder(path), parts_folder(path))


def prepare(path, overwrite: bool = False) -> Path:
    """On one rank before any journal is opened: check, clear old journals, make their folder."""
    check_can_write(path, overwrite)
    folder = journal_folder(path)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    except OSError as error:
        msg = f"cannot write the trace {path}: {folder}: {error.strerror}"
        raise UsageError(msg) from None
    return folder


def seal(comm, journal, path, attributes=None, driver="auto", overwrite=False) -> None:
    """Make the trace ``path`` from the ranks' closed journals, and remove them. Collective.

    ``journal`` is this rank's Journal (or its file's path): what was journalled is what is
    sealed. The attributes of the trace are rank 0's journal header and rank 0's ``attributes``
    (what is known only at the end: text, numbers, or anything that JSON can hold). On an error
    every rank raises the same SpimpiError, ``path`` is as it was and the journals are kept.
    """
    path = Path(path)
    journal = Path(journal.path if isinstance(journal, Journal) else journal)
    with _agreed(comm, path):
        driver = choose_driver(driver)
        contents = read_journal(journal)
        if not contents.complete:
            msg = "; ".join(contents.problems) or f"{journal.name} was not closed"
            raise IncompleteError(msg)
        if comm.rank == 0:
            _check_place(path)
            if not overwrite:
                _check_free(path, *([parts_folder(path)] if driver == "parts" else []))
    plan = _plan(comm, contents, path, attributes or {}, driver)
    with ExitStack() as undo:
        write = _write_mpio if driver == "mpio" else _write_parts
        write(comm, plan, contents.events, undo)
        with _agreed(comm, path):
            _read_back(plan)
        with _agreed(comm, path):
            if comm.rank == 0:
                os.replace(plan.temporary, path)
        undo.pop_all()
    with _agreed(comm, path):
        journal.unlink()
    if comm.rank == 0:
        with suppress(OSError):
            journal.parent.rmdir()
        shutil.rmtree(_old_parts(path), ignore_errors=True)
        if driver == "mpio":
            shutil.rmtree(parts_folder(path), ignore_errors=True)


@dataclass(frozen=True)
class _Plan:
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


def _plan(comm, contents, path, attributes, driver) -> _Plan:
    """Agree on where each rank's rows go and how they are stored. Collective."""
    header, events = contents.header, contents.events
    run_id = header.get("run_id", "")
    theirs = comm.bcast((run_id, contents.tensors))
    with _agreed(comm, path):
        if theirs != (run_id, contents.tensors):
            msg = f"its journal is of another run than rank 0's, or of other tensors ({run_id})"
            raise UsageError(msg)
    least, most = layout.column_range(events)
    low, high = np.empty_like(least), np.empty_like(most)
    from mpi4py import MPI

    comm.Allreduce(least, low, op=MPI.MIN)
    comm.Allreduce(most, high, op=MPI.MAX)
    own = RankInfo(
        rank=comm.rank,
        host=header["host"],
        pid=header["pid"],
        device=header["device"],
        started=float(header["started"]),
        offset=comm.exscan(len(events)) or 0,
        count=len(events),
        fingerprint=rows_fingerprint(events),
    )
    return _Plan(
        path=path,
        own=own,
        total=comm.allreduce(len(events)),
        types=layout.column_types(low, high),
        run_id=run_id,
        ranks=comm.gather(own),
        attributes={k: v for k, v in header.items() if k not in OWN_HEADER} | attributes,
        tensors=contents.tensors,
        temporary=Path(f"{path}.sealing"),
    )


def _write_mpio(comm, plan: _Plan, events, undo: ExitStack) -> None:
    """Rank 0 lays the file out, then all write their rows. Collective."""
    import h5py
    from mpi4py import MPI

    with _agreed(comm, plan.path):
        if comm.rank == 0:
            undo.callback(plan.temporary.unlink, missing_ok=True)
            _check_room(plan)
            with h5py.File(plan.temporary, "w", libver=layout.LIBVER) as file:
                layout.write_tables(file, "mpio", plan.attributes, plan.ranks, plan.tensors)
                layout.create_columns(file, plan.total, plan.types)
    pieces = comm.allreduce(-(-len(events) // PIECE), op=MPI.MAX)
    with _agreed(comm, plan.path):
        file = h5py.File(plan.temporary, "r+", driver="mpio", comm=comm, libver=layout.LIBVER)
    with _agreed(comm, plan.path):
        errors = []
        for name in EVENT.names:
            column = events[name].astype(plan.types[name])
            for piece in range(pieces):
                # A rank whose transfer failed still takes part in the ones that follow.
                with _kept(errors):
                    _write_piece(file, name, column, plan, piece * PIECE)
        with _kept(errors):
            file.close()
        if errors:
            raise errors[0]


def _check_room(plan: _Plan) -> None:
    """HDF5 does not survive a disk that fills under it: look before."""
    needed = plan.total * sum(dtype.itemsize for dtype in plan.types.values())
    free = shutil.disk_usage(plan.path.parent).free
    if needed > free:
        msg = f"the disk is full: {needed} bytes needed in {plan.path.parent}, {free} are free"
        raise IncompleteError(msg)


def _write_piece(file, name: str, column: np.ndarray, plan: _Plan, start: int) -> None:
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


def _write_parts(comm, plan: _Plan, events, undo: ExitStack) -> None:
    """Each rank writes a file of its own, then rank 0 the file that shows them. Collective."""
    path = plan.path
    folder, building = parts_folder(path), Path(f"{path}.parts.sealing")
    with _agreed(comm, path):
        if comm.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
            undo.callback(shutil.rmtree, building, ignore_errors=True)
            building.mkdir()
    with _agreed(comm, path), _written_plainly(building / _part_name(comm.rank)) as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["run_id"] = plan.run_id
        file.attrs["rank"] = comm.rank
        for name, dtype in plan.types.items():
            column = file.create_dataset(f"events/{name}", data=events[name].astype(dtype))
            layout.describe(column, name)
    with _agreed(comm, path):
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


def _old_parts(path) -> Path:
    return Path(f"{path}.parts.old")


def _swap_in(path: Path, building: Path, undo: ExitStack) -> None:
    """Give the new parts their name; those of a trace that is overwritten wait until the end."""
    folder, old = parts_folder(path), _old_parts(path)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
        undo.callback(os.rename, old, folder)
    os.rename(building, folder)
    undo.callback(os.rename, folder, building)


def _read_back(plan: _Plan) -> None:
    """Check that this rank's rows are in the file, with their fingerprint."""
    import h5py

    own, found = plan.own, 0
    with h5py.File(plan.temporary, "r", locking=False) as file:
        total = len(file["events/step"])
        for start in range(0, own.count, layout.ROWS_AT_ONCE):
            n = min(layout.ROWS_AT_ONCE, own.count - start)
            found ^= rows_fingerprint(layout.read_rows(file, own.offset + start, n), start)
    if (total, found) != (plan.total, own.fingerprint):
        msg = (
            f"read back, {plan.temporary.name} does not hold what was written: expected "
            f"{plan.total} events, fingerprint {own.fingerprint:016x}, found {total}, {found:016x}"
        )
        raise IncompleteError(msg)


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        msg = f"cannot write the trace {path}: there is no directory {path.parent}"
        raise UsageError(msg)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        msg = f"cannot write the trace {path}: the directory {path.parent} is not writable"
        raise UsageError(msg)
    if path.is_dir():
        msg = f"cannot write the trace {path}: it is a directory"
        raise UsageError(msg)


def _check_free(path: Path, *folders: Path) -> None:
    if path.exists():
        msg = f"the trace {path} exists; choose another name or use --overwrite"
        raise UsageError(msg)
    for folder in folders:
        if folder.exists():
            msg = (
                f"{folder} exists: it belongs to a run that has not ended, that was killed, or "
                "to a trace that was renamed; choose another name or use --overwrite"
            )
            raise UsageError(msg)


@contextmanager
def _kept(errors: list):
    try:
        yield
    except Exception as error:  # noqa: BLE001  told to all ranks by _agreed
        errors.append(error)


@contextmanager
def _agreed(comm, path: Path):
    """Run a block that is not collective, or collective throughout; then all ranks go on, or none.

    Where a rank raised, every rank raises the error of the lowest such rank.
    """
    errors = []
    with _kept(errors):
        yield
    own = errors[0] if errors else None
    reports = comm.allgather(None if own is None else (_kind(own), " ".join(str(own).split())))
    failed = [rank for rank, report in enumerate(reports) if report]
    if not failed:
        return
    kind, message = reports[failed[0]]
    if kind is not UsageError:
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        message = (
            f"the trace {path} could not be sealed (rank {failed[0]}{others}): {message}. "
            f"The journals are kept in {journal_folder(path)}: spimpi trace show {path} reads them"
        )
    raise kind(message) from own


def _kind(error: Exception) -> type:
    if isinstance(error, UsageError):
        return UsageError
    if isinstance(error, (IncompleteError, OSError, RuntimeError)):
        return IncompleteError
    return SpimpiError
