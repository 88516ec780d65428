"""Local work of unlike length, whose errors all ranks raise together."""

from spimpi.errors import SpimpiError, UsageError
from spimpi.launch import wait_asleep
from spimpi.reduction import together


def patiently(comm, work):
    """What ``work()`` gives on this rank; an error on one rank is raised on all. Collective.

    As reduction.together, but a rank with an error waits for the others however long they work:
    they may have minutes of reading before them. ``work`` must not communicate.
    """
    made, error = None, None
    try:
        made = work()
    except SpimpiError as caught:
        error = caught
    except OSError as caught:
        error = UsageError(str(caught))
    wait_asleep(comm.Ibarrier())
    with together(comm):
        if error is not None:
            raise error
    return made


def from_rank_0(comm, work):
    """What ``work()`` gives on rank 0, on every rank; its error too. Collective."""
    return comm.bcast(patiently(comm, work if comm.rank == 0 else lambda: None))
