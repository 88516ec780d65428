"""Checks of collectives that move data: allgather, broadcast, gather, scatter, all-to-all.

All are collective over ``comm``, return a Verdict that is equal on every rank, and raise on every
rank: CorruptionError where the check fails (unless ``check=False``), UsageError where what the
ranks gave does not fit together. docs/checks.md has what they promise and what they do not.
"""

import numpy as np

from spimpi.checks.check import Check, Rule, cut_of
from spimpi.checks.pending import settle
from spimpi.checks.verdict import Verdict
from spimpi.errors import UsageError
from spimpi.trace.schema import Established

MOVED, AGREED = Established.MOVED, Established.AGREED


def verify_allgather(
    comm, local, gathered, partition, tag, *, check=True, ctx=None, threads=1
) -> Verdict:
    """Check an allgather(v) after it ran: everybody's ``gathered`` is all ``local`` blocks.

    local: this rank's block; gathered: the whole tensor, in its global shape, of the same dtype;
    partition: a TensorPartition along any axis (blocks may be uneven or empty) or this rank's
    Slab. Establishes moved and agreed. UsageError where ``local`` lies in ``gathered``: pass a copy
    made before an allgather in place. Collective.
    """

    def build(c):
        c.layout = cut_of(partition)
        c.gives(local, partition)
        c.gets(gathered, None)
        if comm.size > 1:
            c.require_apart("local", "gathered")

    c = Check("allgather", tag, Rule.ASSEMBLED, MOVED | AGREED, threads)
    return settle(comm, c, build, check, ctx)


def verify_broadcast(comm, array, tag, root=0, *, check=True, ctx=None, threads=1) -> Verdict:
    """Check a broadcast after it ran: everybody's ``array`` is the root's.

    Establishes moved and agreed. Collective.
    """

    def build(c):
        c.gets(array, None)
        if _is_root(c, comm, root):
            c.given, c.n_given, c.contributed = c.got, c.n_got, c.held

    c = Check("broadcast", tag, Rule.ASSEMBLED, MOVED | AGREED, threads)
    return settle(comm, c, build, check, ctx)


def verify_gather(
    comm, local, gathered, partition, tag, root=0, *, check=True, ctx=None, threads=1
) -> Verdict:
    """Check a gather(v) after it ran: the root's ``gathered`` is all ``local`` blocks.

    As verify_allgather, but ``gathered`` counts on the root alone (None elsewhere). The root's own
    block is no movement where it lies in ``gathered`` already. Establishes moved. Collective.
    """

    def build(c):
        c.layout = cut_of(partition)
        c.gives(local, partition)
        if _is_root(c, comm, root):
            c.gets(gathered, None)

    return settle(comm, Check("gather", tag, Rule.MOVED, MOVED, threads), build, check, ctx)


def verify_scatter(
    comm, whole, part, partition, tag, root=0, *, check=True, ctx=None, threads=1
) -> Verdict:
    """Check a scatter(v) after it ran: everybody's ``part`` is its block of the root's ``whole``.

    whole: the tensor, in its global shape, counts on the root alone (None elsewhere); part: this
    rank's block of ``partition`` (a TensorPartition or a Slab). The root's own part is no movement
    where it lies in ``whole``. Establishes moved. Collective.
    """

    def build(c):
        c.layout = cut_of(partition)
        c.gets(part, partition)
        if _is_root(c, comm, root):
            c.gives(whole, None)

    return settle(comm, Check("scatter", tag, Rule.MOVED, MOVED, threads), build, check, ctx)


def verify_alltoall(
    comm, sent, received, before, after, tag, *, check=True, ctx=None, threads=1
) -> Verdict:
    """Check a re-partitioning (all-to-all(v)) after it ran: two cuts of one tensor are equal.

    sent: this rank's block of ``before``; received: its block of ``after``; both TensorPartitions
    or Slabs. Each element is owned once in both. Establishes moved. UsageError where ``sent`` and
    ``received`` share memory. Collective.
    """

    def build(c):
        c.layout = cut_of(before), cut_of(after)
        c.gives(sent, before)
        c.gets(received, after)
        if comm.size > 1:
            c.require_apart("sent", "received")

    return settle(comm, Check("alltoall", tag, Rule.MOVED, MOVED, threads), build, check, ctx)


def _is_root(c: Check, comm, root) -> bool:
    """Whether this rank is the root; UsageError for a root outside the communicator."""
    if isinstance(root, bool) or not isinstance(root, (int, np.integer)) or not 0 <= root < comm.size:
        msg = f"a root is a rank of the communicator, 0..{comm.size - 1}, found {root!r}"
        raise UsageError(msg)
    c.root = root
    return comm.rank == root
