"""Fingerprints over a communicator: XOR, sums mod 2^64, agreement, and whole check records.

All functions are collective over the communicator they take. A caller's communicator is never
used for point-to-point messages here, and never kept.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from itertools import accumulate
from threading import Lock

import numpy as np
from mpi4py import MPI

from spimpi.errors import SpimpiError, UsageError
from spimpi.launch import naps, wait_asleep
from spimpi.one_traceback import mark

ALL_ONES = np.uint64(0xFFFFFFFFFFFFFFFF)

PATIENCE = 5.0  # seconds for the other ranks of a run to come where one has an error

# One check's share of a reduction. xor, total: combined over the contributions; every, none:
# AND of a result and of its complement (they agree exactly where every == ~none); count: failures
# found locally; place: the lowest code of a failing place.
RECORD = np.dtype(
    [
        ("xor", "<u8"),
        ("total", "<u8"),
        ("every", "<u8"),
        ("none", "<u8"),
        ("count", "<u8"),
        ("place", "<u8"),
    ]
)


class PendingWords:
    """A reduction of words under way; ``wait()`` returns the result."""

    def __init__(self, request, words, result, finish: Callable):
        # mpi4py's request does not keep the buffers alive: ``words`` is still being sent.
        self._request, self._words, self._result, self._finish = request, words, result, finish

    def wait(self):
        self._request.Wait()
        return self._finish(self._result)


def _as_words(fingerprints) -> tuple[np.ndarray, Callable]:
    """A uint64 buffer of one or many fingerprints, and how to give the result back."""
    single = isinstance(fingerprints, (int, np.integer))
    values = [fingerprints] if single else fingerprints
    words = np.array([int(v) for v in values], dtype=np.uint64)
    return words, (lambda out: int(out[0])) if single else (lambda out: [int(v) for v in out])


def reduce_fingerprints(comm, fingerprints: int | Sequence[int]) -> int | list[int]:
    """MPI_BXOR of one fingerprint or of a sequence of them (one call). Collective."""
    words, finish = _as_words(fingerprints)
    comm.Allreduce(MPI.IN_PLACE, words, op=MPI.BXOR)
    return finish(words)


def ireduce_fingerprints(comm, fingerprints: int | Sequence[int]) -> PendingWords:
    """As ``reduce_fingerprints``, without waiting. Collective."""
    words, finish = _as_words(fingerprints)
    result = np.empty_like(words)
    return PendingWords(comm.Iallreduce(words, result, op=MPI.BXOR), words, result, finish)


def sum_words(comm, words: int | Sequence[int]) -> int | list[int]:
    """Sums mod 2^64 of linear fingerprints or counts. Collective."""
    buffer, finish = _as_words(words)
    comm.Allreduce(MPI.IN_PLACE, buffer, op=MPI.SUM)
    return finish(buffer)


def isum_words(comm, words: int | Sequence[int]) -> PendingWords:
    """As ``sum_words``, without waiting. Collective."""
    buffer, finish = _as_words(words)
    result = np.empty_like(buffer)
    return PendingWords(comm.Iallreduce(buffer, result, op=MPI.SUM), buffer, result, finish)


def agree(comm, fingerprints: int | Sequence[int]) -> bool | list[bool]:
    """Whether all ranks hold the same word(s): one MPI_BAND of (f, ~f). Collective."""
    words, finish = _as_words(fingerprints)
    both = np.concatenate([words, ~words])
    comm.Allreduce(MPI.IN_PLACE, both, op=MPI.BAND)
    same = finish(both[: words.size] == ~both[words.size :])
    return bool(same) if isinstance(same, int) else [bool(one) for one in same]


def dissenters(comm, fingerprint: int) -> list[int]:
    """Ranks of ``comm`` that differ from the majority; without a majority, all. Collective."""
    everyone = np.empty(comm.size, np.uint64)
    comm.Allgather(np.array([fingerprint], np.uint64), everyone)
    return minority(everyone)


def minority(words: np.ndarray) -> list[int]:
    """Positions that differ from the value that more than half hold; all where none does."""
    values, counts = np.unique(words, return_counts=True)
    if values.size <= 1:
        return []
    best = int(np.argmax(counts))
    if 2 * counts[best] <= words.size:
        return list(range(words.size))
    return [int(i) for i in np.flatnonzero(words != values[best])]


def _merge(incoming, inout, datatype):
    """Merge two buffers of RECORDs; MPI calls it, in any order and any number of records."""
    a = np.frombuffer(incoming, np.uint64).reshape(-1, 6)
    b = np.frombuffer(inout, np.uint64).reshape(-1, 6)
    b[:, 0] ^= a[:, 0]
    b[:, 1] += a[:, 1]
    b[:, 2:4] &= a[:, 2:4]
    b[:, 4] += a[:, 4]
    np.minimum(b[:, 5], a[:, 5], out=b[:, 5])


def merged_here(records: np.ndarray) -> list[int]:
    """What merging RECORDs of all ranks, uint64[P, 6], gives, where they were gathered."""
    xor, total, every, none, count, place = records.T
    return [
        int(np.bitwise_xor.reduce(xor)), int(total.sum()), int(np.bitwise_and.reduce(every)),
        int(np.bitwise_and.reduce(none)), int(count.sum()), int(place.min()),
    ]  # fmt: skip


class RecordReduction:
    """The custom MPI_Op that merges RECORDs, with its datatype.

    All of a process share one, since mpi4py has room for few: the first makes it, ``free`` of the
    last frees it. Local.
    """

    _shared: tuple = ()
    users = 0
    _counting = Lock()  # of threads

    def __init__(self):
        kind = RecordReduction
        with kind._counting:
            if not kind.users:
                datatype = MPI.UINT64_T.Create_contiguous(6).Commit()
                kind._shared = MPI.Op.Create(_merge, commute=True), datatype
            kind.users += 1
            self.op, self.datatype = kind._shared

    def free(self):
        """Once: what is shared would go from under the others' feet."""
        if self.op is None:
            return
        kind, op, datatype = RecordReduction, self.op, self.datatype
        self.op = self.datatype = None
        with kind._counting:
            kind.users -= 1
            if not kind.users:
                op.Free()
                datatype.Free()

    def start(self, comm, records: np.ndarray, merged: np.ndarray):
        """Start merging into ``merged``; returns the request. Collective."""
        n = records.size
        return comm.Iallreduce(
            [records, n, self.datatype], [merged, n, self.datatype], op=self.op
        )

    def merge(self, comm, records: np.ndarray) -> np.ndarray:
        """The merged records, on every rank. Collective."""
        merged = np.empty_like(records)
        self.start(comm, records, merged).Wait()
        return merged


def empty_records(*shape) -> np.ndarray:
    """RECORDs that change nothing when merged."""
    records = np.zeros(shape, RECORD)
    records["every"] = records["none"] = records["place"] = ALL_ONES
    return records


def blocks(buffer: np.ndarray, counts) -> list:
    """A receive buffer of one block a rank, as mpi4py's v-collectives take it.

    Displacements are spelled out: mpi4py reads a list of two counts as (count, displacement).
    """
    displacements = [0, *accumulate(counts)][: len(counts)]
    return [buffer, (list(counts), displacements)]


@contextmanager
def together(comm, patience: float | None = None):
    """Run a local block on every rank; an error on one becomes the same error on all. Collective.

    The block must not communicate, except over groups that agree on their own errors. Only
    SpimpiError and OSError are agreed on: anything else is a bug, and ends the job by its
    traceback. A rank waits for the others as long as they work, asleep.

    With ``patience``, a rank with an error whose peers do not come within so many seconds raises
    alone. For blocks whose peers may wait for it elsewhere: whoever started the job must end it.
    """
    error = None
    try:
        yield
    except SpimpiError as caught:
        error = caught
    except OSError as caught:
        error = UsageError(str(caught))
    first = np.array([comm.rank if error is not None else comm.size], np.int64)
    agreement = comm.Iallreduce(MPI.IN_PLACE, first, op=MPI.MIN)
    if error is None or patience is None:
        wait_asleep(agreement)
    elif not within(agreement, patience):
        raise error  # the others wait for this rank elsewhere: the caller must end the job
    if first[0] == comm.size:
        return
    told = type(error), str(error), getattr(error, "verdict", None)
    kind, text, verdict = comm.bcast(told if comm.rank == first[0] else None, int(first[0]))
    if verdict is not None:
        raise mark(kind(verdict), comm.rank)
    if first[0] != 0 and comm.size > 1:
        text += f" (found by rank {first[0]})"
    raise mark(same_kind(kind, text), comm.rank)


def within(request, seconds) -> bool:
    """Whether a request completes in so many seconds, asleep between looks."""
    start, pause = time.monotonic(), naps()
    while not request.Test():
        if time.monotonic() - start > seconds:
            return False
        next(pause)
    return True


def same_kind(kind, text):
    """An error of one rank's kind, with other words; SpimpiError where that kind takes no text."""
    try:
        return kind(text)
    except TypeError:
        return SpimpiError(text)
