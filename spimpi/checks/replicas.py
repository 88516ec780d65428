"""Replicas: ranks that should hold the same bits."""

from spimpi.checks.check import Check, Rule
from spimpi.checks.pending import settle
from spimpi.checks.verdict import Verdict
from spimpi.trace.schema import Established


def verify_replicas(comm, array, tag, *, check=True, ctx=None, threads=1) -> Verdict:
    """Check that all ranks hold the same ``array``, bit for bit.

    A failure names the rank that differs from the majority; of two that differ, both. Establishes
    agreed. Collective; raises as all checks do (docs/checks.md).
    """
    c = Check("replicas", tag, Rule.AGREED, Established.AGREED, threads)
    return settle(comm, c, lambda c: c.gets(array, None), check, ctx)
