"""What a check that holds has established: nothing, where nothing was compared.

A check without elements, or on one rank alone, holds: nothing is wrong, and a program with an
empty shard or a single rank goes on. But its verdict establishes no word, and says why.
"""

from math import prod

import numpy as np
from mpi4py import MPI

from spimpi.checks.check import Check, Rule
from spimpi.checks.verdict import NO_ELEMENTS, Verdict
from spimpi.trace.schema import Established

ALONE = "on one rank there is nobody to agree with"
ONE_PLACE = "what was given and what was got are the same memory: nothing was compared"
NOTHING_CAME = "there are no elements in other memory than they were given in: nothing was compared"


class Compared:
    """Of each of several checks, whether any rank compared any elements with others than its own.

    ``n``: how many ranks did, of all the checks together. Only where some checks of a batch, or
    some ranks of it, compared nothing, that is not enough to know: then an MPI_Iallreduce of a byte
    a check starts here, which ``wait`` completes. Collective then.
    """

    def __init__(self, session, checks: list[Check], n: int):
        self._flags = [bool(c.compares) for c in checks]
        self._request = None
        some = [not _is_empty(c) for c in checks]
        if session.size == 1:
            return
        if n == session.size * sum(some):
            self._flags = some
        else:
            self._flags = np.array(self._flags, np.uint8)
            self._request = session.comm.Iallreduce(MPI.IN_PLACE, self._flags, op=MPI.BOR)

    def wait(self) -> list[bool]:
        if self._request is not None:
            self._request.Wait()
        return [bool(flag) for flag in self._flags]


def _is_empty(c: Check) -> bool:
    """Whether all ranks know that there are no elements."""
    known = c.rule not in (Rule.LOCAL, Rule.GATHERED) and not c.n_loose and c.shape is not None
    return known and not prod(c.shape)


def holding(check: Check, n_ranks: int, compares: bool) -> Verdict:
    """The verdict of a check that holds, on so many ranks."""
    word = check.got if check.rule in (Rule.ASSEMBLED, Rule.AGREED) else None
    established, missing = _established(check, n_ranks, compares)
    return Verdict(
        True, established, missing=missing, check=check.name, expected=word, actual=word
    )


def _established(check, n_ranks, compares) -> tuple[Established, tuple[str, ...]]:
    if not compares:
        return Established(0), (_why_nothing(check, n_ranks),)
    if n_ranks == 1 and Established.AGREED in check.established:
        if check.rule is Rule.AGREED or check.contributed is check.held:
            return Established(0), (f"{ALONE}: nothing was compared",)
        return check.established & ~Established.AGREED, (ALONE,)
    return check.established, ()


def _why_nothing(check, n_ranks) -> str:
    """Why nothing was compared: the same words on all ranks, by what all of them know."""
    if check.rule is Rule.LOCAL or _is_empty(check):
        return NO_ELEMENTS
    if n_ranks > 1:
        return NOTHING_CAME
    return ONE_PLACE if check.n_given + check.n_got else NO_ELEMENTS
