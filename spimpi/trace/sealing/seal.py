"""Sealing: the journals of all ranks become one HDF5 trace. Three drivers behind one interface.

``mpio``    one shared file, written collectively; h5py must be built with MPI.
``parts``   a serial file a rank in ``PATH.parts/``, and ``PATH`` that shows them as one.
``gather``  one file; the ranks send their rows to rank 0, which writes it.

Everything is written under temporary names of its own and read back before it gets its own; the
journals go only after that. Whatever goes wrong on one rank is agreed on, and raised on all of them.
"""

import os
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from spimpi.errors import IncompleteError, UsageError
from spimpi.trace.checksum import rows_fingerprint
from spimpi.trace.journals.growing import merged, renumbered
from spimpi.trace.journals.journal import OWN_HEADER, Journal, read_journal
from spimpi.trace.journals.journal_files import (
    NODES, OURS, RANKS_OWN, REPLACE, in_use, journal_folder, lock, make_folder, remove_journal,
)  # fmt: skip
from spimpi.trace.journals.node_file import Stream
from spimpi.trace.journals.synced import sync
from spimpi.trace.reading import sketches
from spimpi.trace.schema import EVENT, SKETCH_SHARE, RankInfo
from spimpi.trace.sealing import layout
from spimpi.trace.sealing.agreed import agreed
from spimpi.trace.sealing.drivers import Plan, sync_written, write_gather, write_mpio, write_parts
from spimpi.trace.sealing.leftovers import (
    LONGEST_ENDING, PART, Sealing, killed_sealings, new_token, parts_folder, remove_parts, strangers,
)  # fmt: skip
from spimpi.whole_file import no_ordinary_file, publish

DRIVERS = ("auto", "mpio", "parts", "gather")
WRITERS = {"mpio": write_mpio, "parts": write_parts, "gather": write_gather}


def choose_driver(driver: str = "auto") -> str:
    """The driver to seal with. UsageError for mpio where h5py is built without MPI."""
    if driver not in DRIVERS:
        msg = f"unknown trace driver {driver!r}; there are {', '.join(DRIVERS)}"
        raise UsageError(msg)
    if driver in ("parts", "gather"):
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
        "--trace-driver parts or gather"
    )
    raise UsageError(msg)


def check_can_write(path, overwrite: bool = False, local=None) -> None:
    """Raise UsageError where a trace can't be written to ``path``. For one rank; writes nothing."""
    check_place(Path(path))
    link, folder = journal_folder(path), journal_folder(path, local)
    if not overwrite:
        _check_free(Path(path), link, folder, parts_folder(path))
    _check_ours(parts_folder(path))
    if not (link.is_symlink() and link.readlink().name == link.name):  # of a run with --journal
        _check_ours(link, OURS)
    if local is not None:
        _check_local(Path(local), Path(path))
        _check_ours(folder, OURS)


def prepare(path, overwrite: bool = False, local=None) -> Path:
    """On one rank before any journal is opened: check, clear old journals, make their folder.

    ``local``: where the journals are to be, a folder on each node; beside the trace then stands a
    link to it, by which they are found.
    """
    check_can_write(path, overwrite, local)
    link, folder = journal_folder(path), journal_folder(path, local)
    try:
        for place in (link, folder):  # a link may lead to a running job's, in another folder
            if any(map(in_use, (*place.glob(RANKS_OWN), *place.glob(NODES)))):
                msg = f"the trace {path} is being written by a running job; choose another name"
                raise UsageError(msg)
        for sealing in killed_sealings(path, link):
            sealing.undo()
        if link.is_symlink():
            link.unlink()
        if folder.exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        make_folder(folder)
        if local is not None:
            link.symlink_to(folder.absolute())
    except OSError as error:
        msg = f"cannot write the trace {path}: {folder}: {error.strerror}"
        raise UsageError(msg) from None
    return folder


def seal(comm, journal, path, attributes=None, driver="auto", overwrite=False) -> None:
    """Make the trace ``path`` from the ranks' closed journals, and remove them. Collective.

    ``journal`` is this rank's Journal (or its file's path): what was journalled is what is
    sealed. The attributes of the trace are rank 0's journal header and rank 0's ``attributes``
    (what is known only at the end: text, numbers, or anything that JSON can hold). Where the
    journal is a Journal with ``sync``, the disk has the trace before the journals go. On an error
    every rank raises the same SpimpiError, ``path`` is as it was and the journals are kept.
    """
    path = Path(path)
    synced = isinstance(journal, Journal) and journal.sync
    journal = journal.path if isinstance(journal, Journal) else Path(journal)
    with ExitStack() as held:
        with agreed(comm, path):
            driver = choose_driver(driver)
            held.enter_context(_locked(journal))
            contents = read_journal(journal)
            if not contents.complete:
                msg = "; ".join(contents.problems) or f"{journal.name} was not closed"
                raise IncompleteError(msg)
            if contents.sketches is not None and contents.sketches.problems:
                raise IncompleteError("; ".join(contents.sketches.problems))
            if comm.rank == 0:
                check_place(path)
                if not overwrite:
                    _check_free(path, *([parts_folder(path)] if driver == "parts" else []))
                _check_ours(parts_folder(path))
        sealing = Sealing(path, journal.parent, comm.bcast(new_token()))
        plan = _plan(comm, contents, sealing, attributes or {})
        with ExitStack() as undo:
            with agreed(comm, path):
                if comm.rank == 0:
                    sealing.begin()
                    undo.callback(sealing.note.unlink, missing_ok=True)
            WRITERS[driver](comm, plan, contents.events, undo)
            with agreed(comm, path):
                if synced:
                    sync_written(plan, driver)
                _read_back(plan)
            with agreed(comm, path):
                if comm.rank == 0:
                    publish(plan.temporary, path, overwrite)
                    if synced:
                        sync(path.parent)
            undo.pop_all()
        with agreed(comm, path):
            remove_journal(journal)
    if comm.rank == 0:
        clear(sealing, overwrite and driver != "parts")
    with suppress(OSError):
        journal.parent.rmdir()  # the last one on its node


def clear(sealing: Sealing, replaces_parts: bool) -> None:
    """After sealing: its own names, the journals' folder if it is empty, and what it
    ``replaces``: the parts of the trace that was there before."""
    sealing.clear()
    if replaces_parts:
        remove_parts(parts_folder(sealing.path))
    clear_folder(sealing.path, sealing.note.parent)


def clear_folder(path: Path, folder: Path) -> None:
    """The journals' folder, if it is empty, and the link to it."""
    with suppress(OSError):
        folder.resolve().rmdir()
    link = journal_folder(path)
    if link.is_symlink() and not link.exists() and link.readlink().name == link.name:
        link.unlink(missing_ok=True)


def _locked(journal: Path | Stream):
    shared = isinstance(journal, Stream)
    held = lock(journal.file if shared else journal, shared)
    if held is None:
        msg = f"another process holds the journal {journal}: spimpi trace recover?"
        raise IncompleteError(msg)
    return held


def _plan(comm, contents, sealing: Sealing, attributes) -> Plan:
    """Agree on where each rank's rows go and how they are stored. Collective."""
    header, path = contents.header, sealing.path
    run_id = header.get("run_id", "")
    grows, theirs = comm.bcast((contents.grows, (run_id, contents.tensors)))
    with agreed(comm, path):
        if theirs != (run_id, theirs[1] if grows else contents.tensors):
            msg = f"its journal is of another run than rank 0's, or of other tensors ({run_id})"
            raise UsageError(msg)
    if grows:
        contents.tensors, numbers = merged(comm.allgather(contents.tensors))
        contents.events = renumbered(contents.events, numbers[comm.rank])
        contents.fingerprint = rows_fingerprint(contents.events)
    events = contents.events
    least, most = layout.column_range(events)
    low, high = np.empty_like(least), np.empty_like(most)
    from mpi4py import MPI

    comm.Allreduce(least, low, op=MPI.MIN)
    comm.Allreduce(most, high, op=MPI.MAX)
    attributes = {k: v for k, v in header.items() if k not in OWN_HEADER} | attributes
    taken = _all_sketches(comm, contents, path)
    if taken is not None:
        attributes[sketches.ATTRIBUTE] = sketches.facts_of(taken)
    own = RankInfo(
        rank=comm.rank,
        host=header["host"],
        pid=header["pid"],
        device=header["device"],
        started=float(header["started"]),
        offset=comm.exscan(len(events)) or 0,
        count=len(events),
        fingerprint=contents.fingerprint,
    )
    return Plan(
        path=path,
        own=own,
        total=comm.allreduce(len(events)),
        types=layout.column_types(low, high),
        run_id=run_id,
        ranks=comm.gather(own),
        attributes=attributes,
        tensors=contents.tensors,
        temporary=sealing.file,
        sketches=taken,
        sealing=sealing,
    )


def _all_sketches(comm, contents, path) -> np.ndarray | None:
    """All ranks' sketches on rank 0; None elsewhere, and where none were taken. Collective."""
    own = contents.sketches is not None
    theirs = comm.bcast(own)
    with agreed(comm, path):
        if own != theirs:
            msg = f"its journal {'has' if own else 'lacks'} sketches, unlike rank 0's"
            raise UsageError(msg)
    if not own:
        return None
    total, rows = comm.reduce(len(contents.sketches.rows)), None
    with agreed(comm, path):
        if comm.rank == 0:
            rows = np.empty(total, SKETCH_SHARE)
    sketches.gathered(comm, contents.sketches.rows, rows)
    return rows


def _read_back(plan: Plan) -> None:
    """Check that this rank's rows are in the file, with their fingerprint."""
    import h5py

    own, found = plan.own, 0
    with h5py.File(plan.temporary, "r", locking=False) as file:
        # Opened once: a virtual dataset opens its sources anew each time.
        columns = {name: file[f"events/{name}"] for name in EVENT.names}
        total = len(columns["step"])
        for start in range(0, own.count, layout.ROWS_AT_ONCE):
            n = min(layout.ROWS_AT_ONCE, own.count - start)
            found ^= rows_fingerprint(layout.read_rows(columns, own.offset + start, n), start)
        if plan.sketches is not None and sketches.read_group(file).tobytes() != plan.sketches.tobytes():
            msg = f"read back, {plan.temporary.name} does not hold the sketches that were written"
            raise IncompleteError(msg)
    if (total, found) != (plan.total, own.fingerprint):
        msg = (
            f"read back, {plan.temporary.name} does not hold what was written: expected "
            f"{plan.total} events, fingerprint {own.fingerprint:016x}, found {total}, {found:016x}"
        )
        raise IncompleteError(msg)


def check_place(path: Path) -> None:
    """UsageError where no file can be made at ``path``, or something that is none stands there."""
    if not path.name:
        msg = f"a trace needs a name, found {str(path)!r}, a directory"
        raise UsageError(msg)
    if not path.parent.is_dir():
        msg = f"cannot write the trace {path}: there is no directory {path.parent}"
        raise UsageError(msg)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        msg = f"cannot write the trace {path}: the directory {path.parent} is not writable"
        raise UsageError(msg)
    if other := no_ordinary_file(path):
        msg = f"cannot write the trace {path}: it is {other}; choose another name"
        raise UsageError(msg)
    n_bytes, most = len(os.fsencode(path.name)), os.pathconf(path.parent, "PC_NAME_MAX")
    if n_bytes > most - LONGEST_ENDING:
        msg = (
            f"the trace's name has {n_bytes} bytes, at most {most - LONGEST_ENDING} leave room for "
            f"its drafts here: {path}"
        )
        raise UsageError(msg)


def _check_local(local: Path, path: Path) -> None:
    """UsageError where journals cannot be put into the folder ``local``, made if it is not there."""
    if local.is_dir():
        if local.samefile(path.parent):
            msg = f"the journals are beside the trace {path} anyway: name another folder, or none"
            raise UsageError(msg)
        return
    if os.path.lexists(local):
        msg = f"cannot write the journals into {local}: it is no directory"
        raise UsageError(msg)
    if not local.parent.is_dir():
        msg = f"cannot write the journals into {local}: there is no directory {local.parent}"
        raise UsageError(msg)


def _check_ours(folder: Path, known=PART) -> None:
    """UsageError where something in a folder that is to go was not made by spimpi."""
    try:
        others = strangers(folder, known)
    except OSError as error:
        msg = f"cannot read {folder}: {error.strerror}"
        raise UsageError(msg) from None
    if others:
        msg = (
            f"{folder} holds what is of no trace ({', '.join(others[:3])}), and is not removed: "
            "choose another name, or move it away"
        )
        raise UsageError(msg)


def _check_free(path: Path, *folders: Path) -> None:
    if os.path.lexists(path):
        msg = f"the trace {path} exists; choose another name or remove it ({REPLACE})"
        raise UsageError(msg)
    for folder in folders:
        if os.path.lexists(folder):
            msg = (
                f"{folder} exists: it belongs to a run that has not ended, that was killed, or "
                f"to a trace that was renamed; choose another name or remove it ({REPLACE})"
            )
            raise UsageError(msg)
