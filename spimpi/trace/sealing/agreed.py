"""All ranks go on, or all of them raise the same error."""

from contextlib import contextmanager
from pathlib import Path

from spimpi.errors import IncompleteError, SpimpiError, UsageError
from spimpi.trace.journals.journal_files import journal_folder


@contextmanager
def kept(errors: list):
    try:
        yield
    except Exception as error:  # noqa: BLE001  told to all ranks by _agreed
        errors.append(error)


@contextmanager
def agreed(comm, path: Path):
    """Run a block that is not collective, or collective throughout; then all ranks go on, or none.

    Where a rank raised, every rank raises the error of the lowest such rank.
    """
    errors = []
    with kept(errors):
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
