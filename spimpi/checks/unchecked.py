"""What of a communicator the wrapper does not check, by name; docs/checks.md has the same list.

Such a call goes on to the communicator, but not silently: the first of each kind warns. Of sums by
operations that have no check, only the operation is compared.
"""

import warnings

from mpi4py import MPI

from spimpi.errors import UncheckedWarning

_NEIGHBOURS = {
    f"Neighbor_{kind}" for kind in ("allgather", "allgatherv", "alltoall", "alltoallv", "alltoallw")
}  # fmt: skip
_BLOCKING = _NEIGHBOURS | {
    "Alltoallw", "Exscan", "Scan", "allgather", "allreduce", "alltoall", "bcast", "exscan",
    "gather", "neighbor_allgather", "neighbor_alltoall", "reduce", "scan", "scatter",
}  # fmt: skip
_PERSISTENT = _NEIGHBOURS | {
    "Allgather", "Allgatherv", "Allreduce", "Alltoall", "Alltoallv", "Alltoallw", "Bcast", "Bsend",
    "Exscan", "Gather", "Gatherv", "Precv", "Psend", "Recv", "Reduce", "Reduce_scatter",
    "Reduce_scatter_block", "Rsend", "Scan", "Scatter", "Scatterv", "Send", "Ssend",
}  # fmt: skip

# Methods that move data unchecked.
UNCHECKED = _BLOCKING | {f"{name}_init" for name in _PERSISTENT} | {
    "Ialltoallw", "Iexscan", "Iscan", "Isendrecv", "Isendrecv_replace", "Improbe", "Mprobe",
    "bsend", "ibsend", "improbe", "irecv", "isend", "issend", "mprobe", "recv", "send", "sendrecv",
    "ssend", *(f"I{name.lower()}" for name in _NEIGHBOURS),
}  # fmt: skip

# Collectives that may wait for all ranks: requests under way are completed before them.
SYNCHRONISING = _BLOCKING | {
    "Barrier", "barrier", "Clone", "Create", "Create_cart", "Create_dist_graph",
    "Create_dist_graph_adjacent", "Create_graph", "Disconnect", "Dup", "Dup_with_info", "Free",
    "Split", "Split_type", "Sub", "free",
}  # fmt: skip

_OPS = (
    "SUM", "PROD", "MAX", "MIN", "BXOR", "BAND", "BOR", "LAND", "LOR", "LXOR", "MAXLOC", "MINLOC",
)  # fmt: skip


def name_of(op) -> str:
    """An operation in words."""
    known = (f"MPI.{name}" for name in _OPS if op == getattr(MPI, name))
    return next(known, "an operation of the user's")


def note(counts, what: str, depth: int, compared: str = "") -> None:
    """Count an unchecked call; the first one of its kind warns, at the user's line.

    ``compared``: what of it is compared all the same.
    """
    counts[what] += 1
    if counts[what] == 1:
        how = f"only {compared} is compared" if compared else "it goes on to the communicator as it is"
        msg = (
            f"{what} is not checked: {how} (docs/checks.md, "
            '"The wrapper"; where that is meant, call it on checked.comm)'
        )
        warnings.warn(msg, UncheckedWarning, stacklevel=depth)
