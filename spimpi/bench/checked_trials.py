"""Trials of ``checked()``, as in moved_trials.py: the wrapper's collectives, and what they leave.

The wrapper is the library's own; of the communicator under it, what a call leaves in the receive
buffer is given (``_Delivers``), so that trials can be made in one process too.
"""

import numpy as np
from mpi4py import MPI

import spimpi
from spimpi.bench.computed_trials import addends, rounds_of, wide_integers
from spimpi.bench.scenes import Scene


class _Delivers:
    """A communicator of which any collective leaves ``arrives`` in ``buffer``."""

    def __init__(self, buffer, arrives):
        self._buffer, self._arrives = buffer, arrives

    def __getattr__(self, name):
        return self._run

    def _run(self, *args):
        if self._buffer is not None:
            self._buffer[...] = self._arrives
        return MPI.REQUEST_NULL


def _trial(s: Scene, name, arrives, arguments):
    """``arrives(rank)``: what it gets, None where nothing; ``arguments(rank, buffer)``: the call's."""

    def call(comm, ctx):
        checked = spimpi.checked(comm, ctx, check=False)
        result = arrives(comm.rank)
        buffer = None if result is None else np.zeros_like(result)
        checked.comm = _Delivers(buffer, result)
        request = getattr(checked, name)(*arguments(comm.rank, buffer), tag=s.tag)
        if request is None:
            return checked.verdict
        request.Wait()
        return request.verdict

    return call, None


def allgather(s: Scene, name="Allgather"):
    wrong, who = s.wrong_whole(), s.who()
    return _trial(
        s, name, lambda r: wrong if r in who else s.whole, lambda r, buffer: (s.shard(r), buffer)
    )


def iallgather(s: Scene):
    return allgather(s, "Iallgather")


def broadcast(s: Scene):
    root = int(s.rng.integers(s.n))
    wrong, who = s.wrong_whole(), s.who([r for r in range(s.n) if r != root])
    return _trial(
        s, "Bcast", lambda r: wrong if r in who else s.whole, lambda r, buffer: (buffer, root)
    )


def gather(s: Scene):
    root, wrong = int(s.rng.integers(s.n)), s.wrong_whole()
    return _trial(
        s, "Gather", lambda r: wrong if r == root else None,
        lambda r, buffer: (s.shard(r), buffer, root),
    )  # fmt: skip


def scatter(s: Scene):
    root, wrong = int(s.rng.integers(s.n)), s.wrong_shard()
    return _trial(
        s, "Scatter", lambda r: wrong if r == s.hit else s.shard(r),
        lambda r, buffer: (s.whole if r == root else None, buffer, root),
    )  # fmt: skip


def alltoallv(s: Scene):
    """Rank q sends the q-th part of each rank's shard."""
    wrong = s.wrong_shard()
    cuts = [s.shard(0).size * r // s.n for r in range(s.n + 1)]
    counts = np.diff(cuts).tolist()

    def arguments(rank, buffer):
        own = slice(cuts[rank], cuts[rank + 1])
        sent = np.concatenate([s.shard(r).reshape(-1)[own] for r in range(s.n)])
        places = [counts[rank] * r for r in range(s.n)]
        return [sent, ([counts[rank]] * s.n, places)], [buffer, (counts, cuts[:-1])]

    return _trial(s, "Alltoallv", lambda r: wrong if r == s.hit else s.shard(r), arguments)


def allreduce(s: Scene, made=None):
    """The same wrong result on all ranks: the sum alone tells."""
    parts, wrong = addends(s, made), s.wrong_whole()
    s.rounds = rounds_of(wrong)
    return _trial(s, "Allreduce", lambda r: wrong, lambda r, buffer: (parts[r], buffer))


def allreduce_integers(s: Scene):
    return allreduce(s, wide_integers)


class _Bytes:
    """A communicator that sends any dtype, and leaves ``arrives`` in the receive buffer."""

    def __init__(self, comm, arrives):
        self._comm, self._arrives, self.rank = comm, arrives, comm.rank

    def Isend(self, buf, dest, tag):
        return self._comm.Isend([buf.view(np.uint8), MPI.BYTE], dest, tag)

    def Recv(self, buf, source, tag, status):
        self._comm.Recv([buf.view(np.uint8), MPI.BYTE], source, tag, status)
        buf[...] = self._arrives


def messages(s: Scene):
    """The receiver alone has a verdict."""
    source, dest = (int(r) for r in s.rng.choice(s.n, 2, replace=False))
    wrong = s.wrong_shard()

    def call(comm, ctx):
        checked = spimpi.checked(comm, ctx, check=False)
        checked.comm = _Bytes(comm, wrong)
        if comm.rank == source:
            checked.Send(s.shard(s.hit), dest)
        if comm.rank != dest:
            return None
        checked.Recv(np.zeros_like(wrong), source, 0)
        return checked.verdict

    return call, None
