"""Local work of unlike length, whose errors all ranks raise together."""

from spimpi.reduction import together


def patiently(comm, work):
    """What ``work()`` gives on this rank; an error on one rank is raised on all. Collective.

    ``work`` must not communicate.
    """
    with together(comm):
        return work()


def from_rank_0(comm, work):
    """What ``work()`` gives on rank 0, on every rank; its error too. Collective."""
    return comm.bcast(patiently(comm, work if comm.rank == 0 else lambda: None))
