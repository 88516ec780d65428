"""Reading a trace: a sealed file of any driver, or the journals of a run that never sealed.

Needs no MPI and no numba. What is missing or altered is named in ``problems``; rows that cannot
be vouched for are refused (IncompleteError), never replaced by fill values.
"""

import os.path
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.reading.base import Trace
from spimpi.trace.reading.sealed import SealedTrace, sealed_run_id
from spimpi.trace.reading.unsealed import JournalTrace


def open(path) -> Trace:
    """Open the trace ``path``; where its run was never sealed, the journals beside it.

    UsageError where there is no trace, or one of a newer schema; IncompleteError (DamageError)
    where a trace is so damaged that nothing of it can be read.
    """
    path, folder = places(path)
    # os.path: a name that is too long is of no file, where pathlib raises.
    if os.path.isfile(path) and not _superseded(path, folder):
        return SealedTrace(path)
    if os.path.isdir(folder):
        return JournalTrace(path, folder)
    msg = f"there is no trace {path}"
    if os.path.isdir(path):
        msg += ", it is a directory"
    elif os.path.exists(path):
        msg += ", it is no ordinary file"
    elif os.path.islink(folder):
        msg += f", and its journals are not here: {folder} points to {folder.readlink()}"
    raise UsageError(msg)


def places(path) -> tuple[Path, Path]:
    """The trace and its journals, of either's path."""
    path = Path(path)
    if path.name.endswith(".journal") and os.path.isdir(path):
        return path.with_name(path.name.removesuffix(".journal")), path
    return path, journal_folder(path)


def _superseded(path: Path, folder: Path) -> bool:
    """Whether the file is of an earlier run than the journals: what was asked for is the latter."""
    if not os.path.isdir(folder):
        return False
    try:
        run_id = JournalTrace(path, folder).attributes.get("run_id")
    except UsageError:
        if any(folder.glob("*.journal")):
            raise
        return False  # another rank has just sealed them, and takes the folder away
    return run_id is not None and sealed_run_id(path) != run_id
