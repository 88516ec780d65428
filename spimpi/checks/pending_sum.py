"""The checks of sums as the wrapper makes them: at once, or for requests in two steps that do not
wait.

The steps are those of ``checks/sums/verify.py``, with MPI_Iallgather. Judging a sum that holds
exchanges nothing more, but for elements that are not finite, narrow integers that may have wrapped,
and maxima (docs/sums.md).
"""

import numpy as np

from spimpi.checks.sums.call import CALL, FAILED, n_words, prepare
from spimpi.checks.sums.judge import JUDGES
from spimpi.checks.sums.verify import (
    _digest, _fill, _refuse, verify_allreduce, verify_reduce_scatter,
)  # fmt: skip
from spimpi.errors import SpimpiError, UsageError


def verify_sum(comm, built, tag, op, check, ctx, threads):
    """The blocking check of a sum that checks/calls.py described."""
    kind, own, result, partition = built
    more = {"op": op, "check": check, "ctx": ctx, "threads": threads}
    if kind == "allreduce":
        return verify_allreduce(comm, own, result, tag, **more)
    return verify_reduce_scatter(comm, own, result, partition, tag, **more)


class PendingSum:
    """A sum under way, in the steps of a RecordCheck. ``build()``: see checks/calls.py."""

    def __init__(self, session, build, tag, op, threads):
        self.session, self.build, self.tag, self.op = session, build, tag, op
        self.threads = threads

    def begin(self, requests) -> None:
        """Start exchanging words, on the requests' communicator."""
        comm = requests.comm
        self.local, self.error, self.call = None, None, "nothing that could be checked"
        self.words = np.zeros(n_words(comm.size), np.uint64)
        try:
            self.local, self.call = prepare(comm, *self.build(), self.tag, self.op)
            _fill(self.local, self.words, self.threads, comm)
        except (SpimpiError, OSError) as caught:
            self.error = caught
        except (TypeError, ValueError, OverflowError, MemoryError) as caught:
            self.error = UsageError(f"{type(caught).__name__}: {caught}")
        self.words[FAILED] = self.error is not None
        self.words[CALL] = _digest(self.call)
        self.everyone = np.empty((comm.size, self.words.size), np.uint64)
        self.exchange = comm.Iallgather(self.words, self.everyone)

    def test(self) -> bool:
        return self.exchange.Test()

    def judge(self):
        self.exchange.Wait()
        comm, everyone = self.session.comm, self.everyone
        if everyone[:, FAILED].any() or np.ptp(everyone[:, CALL]):
            _refuse(comm, self.error, self.call)
        return JUDGES[self.local.kind](comm, self.local, everyone)
