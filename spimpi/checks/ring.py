"""A ring: each rank hands its block to the next, and the last one to rank 0."""

from spimpi.checks.check import Check, Rule
from spimpi.checks.pending import settle
from spimpi.checks.verdict import Verdict
from spimpi.fingerprint.protocols import as_array
from spimpi.partition import Slab
from spimpi.trace.schema import Established

# Blocks may differ in length along their first axis, so that no rank knows their common shape:
# the tensor of which they are blocks has room for this many rows of each rank.
LONGEST = 1 << 31


def verify_ring(comm, sent, received, tag, *, check=True, ctx=None, threads=1) -> Verdict:
    """Check one turn of a ring: ``received`` is what the rank before this one ``sent``.

    Rank 0's comes from the last rank, so that all ranks call it. Blocks may differ in length along
    their first axis, not in their other axes or dtype. A failure tells sender and receiver, and
    elements by (rank that sent it, index…). Establishes moved. UsageError where ``sent`` and
    ``received`` share memory. Collective.
    """

    def build(c):
        c.gives(*_block(sent, comm.rank, comm.size))
        c.gets(*_block(received, (comm.rank - 1) % comm.size, comm.size))
        if comm.size > 1:
            c.require_apart("sent", "received")

    c = Check("ring", tag, Rule.MOVED, Established.MOVED, threads, n_loose=1)
    return settle(comm, c, build, check, ctx)


def _block(array, sender: int, size: int):
    """One rank's block as a slab of all blocks: (array with a leading axis, Slab)."""
    array = as_array(array)
    shape = (size, LONGEST, *array.shape[1:]) if array.ndim else (size,)
    offset = (sender, *[0] * (len(shape) - 1))
    return array[None] if array.ndim else array.reshape(1), Slab(shape, offset)
