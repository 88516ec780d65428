"""An error that all ranks of a communicator raise alike shows its traceback on one of them.

Whoever raises such an error marks it here. If it then escapes from the program, rank 0 of that
communicator prints the traceback as Python does, and the others a line. They wait a moment first: under
``python -m mpi4py`` the first process that ends takes all with it. Exit statuses stay as they are.
"""

import sys
import time
from contextlib import contextmanager

from spimpi.errors import IncompleteError, SpimpiError
from spimpi.launch import HEAD_START, launcher_rank
from spimpi.printable import one_line

_hooks = []  # what sys.excepthook was, once this module's has taken its place


@contextmanager
def told_by_rank_0(rank: int):
    """A block whose SpimpiErrors all ranks raise alike; ``rank``: this one's, of those. Local."""
    try:
        yield
    except SpimpiError as error:
        mark(error, rank)
        raise


def mark(error: SpimpiError, rank: int) -> SpimpiError:
    """Say that all ranks raise this error, this rank among them; returns it."""
    error.raised_by = rank
    if not _hooks:
        _hooks.append(sys.excepthook)
        sys.excepthook = _tell
    return error


def _tell(kind, error, trace) -> None:
    if not getattr(error, "raised_by", 0):
        _hooks[0](kind, error, trace)
        return
    time.sleep(HEAD_START)
    said = f"spimpi: rank {launcher_rank()}: {kind.__name__}, as on "
    if issubclass(kind, IncompleteError):  # of a timeout: some did not come, and it may be rank 0
        said += f"rank 0, if that waited too: {error}"
    else:
        said += "all ranks; its traceback is rank 0's"
    print(one_line(said), file=sys.stderr, flush=True)
