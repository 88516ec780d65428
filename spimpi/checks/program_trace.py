"""The trace of a program's checks: a journal a rank while it runs, one HDF5 file at its end.

Every check that is given a traced DistributedContext leaves one event on each rank that makes it,
when its verdict is known. Recording is local; only opening and sealing are collective.
"""

import sys
from collections import Counter
from contextlib import suppress
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from time import perf_counter

import numpy as np
from mpi4py import MPI

from spimpi import __version__
from spimpi.checks.recorder import Recorder
from spimpi.errors import CorruptionError, SpimpiError, UsageError
from spimpi.fingerprint.tag import MASK
from spimpi.reduction import together
from spimpi.trace.journals.journal import Journal, new_run_id
from spimpi.trace.journals.journal_files import journal_folder, own_journal
from spimpi.trace.journals.signals import SignalFlush
from spimpi.trace.schema import (
    EVENT, HELD_BY_ONE, Established, Op, Stage, Status, TensorInfo,
)  # fmt: skip
from spimpi.trace.sealing.seal import choose_driver, prepare, seal

OPS = {
    "allgather": Op.ALLGATHER, "broadcast": Op.BROADCAST, "bcast": Op.BROADCAST,
    "gather": Op.GATHER, "scatter": Op.SCATTER, "alltoall": Op.ALLTOALL, "ring": Op.RING,
    "reduce_scatter": Op.REDUCE_SCATTER, "pipeline hand-off": Op.HANDOFF, "send": Op.MESSAGE,
    "replicas": Op.AGREEMENT, "matmul": Op.MATMUL, "at rest": Op.AT_REST, "colors": Op.COLOURS,
    "weights": Op.CONTENT, "exact_allreduce": Op.ALLREDUCE_SUM,
}  # fmt: skip
SUMS = {
    "op MPI.SUM": Op.ALLREDUCE_SUM, "op MPI.MAX": Op.ALLREDUCE_MAX, "op MPI.MIN": Op.ALLREDUCE_MIN,
    "op MPI.BXOR": Op.ALLREDUCE_BXOR,
}  # fmt: skip
STATES = {
    Status.VERIFIED: "verified", Status.NOT_ESTABLISHED: "incomplete", Status.FAILED: "failed",
}  # fmt: skip
WORST_LAST = list(STATES)
LIMITS = {
    name: (int(np.iinfo(EVENT[name]).min), int(np.iinfo(EVENT[name]).max))
    for name in ("step", "microbatch", "layer", "sequence", "element")
}  # fmt: skip


class ProgramTracer:
    """Where the checks of a context are written down. Made by ``DistributedContext(trace=…)``.

    Collective over ``comm``; UsageError on every rank where the trace can't be written.
    """

    def __init__(
        self, comm, path, topology: str, seed: int, journal=None, sync: bool = False,
        overwrite: bool = False,
    ):  # fmt: skip
        self.comm, self.overwrite = comm, overwrite
        with together(comm):
            if not isinstance(path, (str, PathLike)):
                msg = f"expected a path for the trace, found {type(path).__name__}"
                raise UsageError(msg)
            self.path = Path(path)
            if journal is not None and not isinstance(journal, (str, PathLike)):
                msg = f"expected a folder for the journals, found {type(journal).__name__}"
                raise UsageError(msg)
            self.driver = choose_driver()
            if comm.rank == 0:
                prepare(self.path, overwrite, local=journal)
        header = {
            "run_id": comm.bcast(new_run_id()),
            "spimpi": __version__,
            "command": " ".join(sys.argv),
            "world": comm.size,
            "topology": topology,
            "seed": seed,
        }
        folder = journal_folder(self.path, journal)
        own = own_journal(comm, partial(together, comm), folder)
        with together(comm):
            self.journal = Journal(folder, comm.rank, header, None, sync, own)
        self._recorder = Recorder({}, comm.rank, self.journal)
        self._worst, self._error = Status.VERIFIED, None
        self._established, self._n_empty = Established(0), 0  # of checks that compared nothing
        self._clipped: set[str] = set()  # columns that could not hold a number
        self.unchecked: Counter = Counter()  # calls of the wrapper that no check looked at
        self._seen: dict[str, tuple] = {}  # by tensor: what its last check said of it, its row
        self._signals = SignalFlush(self._recorder.write_down)

    def record(
        self, check, verdict, comm, peer=None, *, microbatch=-1, sequence=0
    ) -> None:
        """Take the verdict of a check over ``comm``. Local.

        ``peer``: rank of ``comm`` at the other end, where there is one. A journal that can't be
        written is told by ``seal``: here one rank would raise alone.
        """
        now = perf_counter()
        tag, where, op = check.tag, verdict.where, op_of(check.name, check.settings)
        status, element = Status.VERIFIED, -1
        if not verdict:
            nothing_wrong = where is None and verdict.missing
            status = Status.NOT_ESTABLISHED if nothing_wrong else Status.FAILED
            self._worst = max(self._worst, status, key=WORST_LAST.index)
        elif not verdict.established:  # nothing was compared: one rank alone, or no elements
            status = Status.NOT_ESTABLISHED
        self._established |= verdict.established
        self._n_empty += status == Status.NOT_ESTABLISHED
        if where is not None:
            peer = where.rank if peer is None else peer
            microbatch = where.microbatch if microbatch < 0 else microbatch
            element = _linear(check, where)
        try:
            # In the order of EVENT's fields.
            self._recorder.row((
                self._fitting("step", tag.step), self._fitting("microbatch", microbatch), 0,
                self._fitting("layer", tag.layer), Stage.PROGRAM, op, status, verdict.established,
                self._row(check), 0,
                -1 if peer is None else self._world_rank(comm, peer),
                self._fitting("sequence", sequence or self._group(comm, op)),
                self._fitting("element", element), *_words(check, verdict), check.n_bytes,
                check.started, now,
            ), now - check.started)  # fmt: skip
            self._recorder.flush()
        except SpimpiError as error:
            self._error = self._error or error

    def _row(self, check) -> int:
        """The check's row in the table of tensors; looked up again where its tensor has changed."""
        seen = (check.shape, check.dtype, check.n_loose)
        last, row = self._seen.get(check.tag.name, (None, 0))
        if last != seen:
            row = self.journal.table.row(_tensor(check))
            self._seen[check.tag.name] = seen, row
        return row

    def _fitting(self, name: str, value) -> int:
        """The nearest number that an event's column can hold; that it is another is kept."""
        least, most = LIMITS[name]
        if least <= value <= most:
            return value
        self._clipped.add(name)
        return least if value < least else most

    def seal(self) -> None:
        """Make the trace of all ranks' journals. Collective.

        SpimpiError on every rank where that fails; the journals are then kept.
        """
        try:
            self._seal()
        finally:
            self._signals.close()

    def _seal(self) -> None:
        worst = WORST_LAST[self.comm.allreduce(WORST_LAST.index(self._worst), op=MPI.MAX)]
        told = self.comm.allgather((self._clipped, bool(self._established), self._n_empty))
        unchecked = sum(self.comm.allgather(self.unchecked), Counter())
        clipped = set().union(*(names for names, _, _ in told))
        if worst == Status.VERIFIED and any(n for *_, n in told) and not any(e for _, e, _ in told):
            worst = Status.NOT_ESTABLISHED  # no check of the run compared anything
        with together(self.comm):
            if self._error is not None:
                raise self._error
            self._finish(STATES[worst])
        attributes = {"end_state": STATES[worst]}
        if clipped:
            attributes["clipped"] = sorted(clipped)
        if unchecked:
            attributes["unchecked"] = dict(sorted(unchecked.items()))
        seal(self.comm, self.journal, self.path, attributes, self.driver, self.overwrite)

    def give_up(self, error) -> None:
        """The program ended by an exception: the journal stays, to be read as it is. Local."""
        self._signals.close()
        with suppress(OSError, SpimpiError):
            self._finish("failed" if isinstance(error, CorruptionError) else "error")

    def _finish(self, state: str) -> None:
        self._recorder.totals  # noqa: B018  settles what waits
        self.journal.close(state)

    def _world_rank(self, comm, rank: int) -> int:
        if rank < 0 or comm == self.comm:
            return rank
        return self._world_ranks(comm, [rank])[0]

    def _group(self, comm, op) -> int:
        """Of a collective of some of the ranks 1 + the lowest of them: which group made it."""
        if op in HELD_BY_ONE or comm.size == self.comm.size:
            return 0
        return 1 + min(self._world_ranks(comm, range(comm.size)))

    def _world_ranks(self, comm, ranks) -> list[int]:
        """The world's ranks of those of ``comm``; -1: not among them."""
        ours, theirs = self.comm.Get_group(), comm.Get_group()
        found = theirs.Translate_ranks(ranks, ours)
        ours.Free()
        theirs.Free()
        return [-1 if rank == MPI.UNDEFINED else rank for rank in found]


@lru_cache(maxsize=4096)
def op_of(name: str, settings: str = "") -> Op:
    """What a check looked at; the wrapper's checks are named after their call (Iallgatherv)."""
    name = name.lower()
    for known in (name, name.removesuffix("v"), name.removeprefix("i").removesuffix("v")):
        if known == "allreduce":
            return SUMS[settings]
        if known in OPS:
            return OPS[known]
    return Op.CONTENT


def _words(check, verdict) -> tuple[int, int]:
    """The fingerprints found and expected. Where the verdict compares none and nothing is wrong,
    twice that of what this rank holds, by which two runs can be compared (docs/trace-diff.md)."""
    if verdict.actual is None and verdict.expected is None and verdict.where is None:
        return check.got & MASK, check.got & MASK
    return (verdict.actual or 0) & MASK, (verdict.expected or 0) & MASK


def _tensor(check) -> TensorInfo:
    shape = (-1,) if check.shape is None or check.n_loose else check.shape
    return TensorInfo(check.tag.name, shape, check.dtype.name if check.dtype else "")


def _linear(check, where) -> int:
    """The global linear index of the first wrong element; -1 where there is none."""
    index = where.elements[0].index if where.elements else ()
    if not index or check.shape is None or check.n_loose or len(index) != len(check.shape):
        return -1
    linear = 0
    for place, length in zip(index, check.shape):
        linear = linear * length + place
    return linear
