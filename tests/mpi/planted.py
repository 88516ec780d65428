"""Faults for the checks' tests: what can happen to a block that was moved. All work in place."""

from contextlib import contextmanager

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import first_ranks

from spimpi import CorruptionError
from spimpi.checks.buffers import block_of
from spimpi.partition import TensorPartition


def flip(block, previous):
    block.view(f"u{block.itemsize}").reshape(-1)[block.size // 2] ^= 1 << 5


def swap(block, previous):
    flat = block.reshape(-1)
    flat[[0, -1]] = flat[[-1, 0]]


def shift(block, previous):
    block[:] = np.roll(block.reshape(-1), 1).reshape(block.shape)


def stale(block, previous):
    block[:] = previous


def zeros(block, previous):
    block[:] = 0


def truncate(block, previous):
    """The last third was never written: it is what the buffer held before."""
    flat, old = block.reshape(-1), previous.reshape(-1)
    flat[-max(1, flat.size // 3) :] = old[-max(1, flat.size // 3) :]


def two_bits(block, previous):
    """The same bit of two elements: equal masks, which sums and plain XORs of words do not see."""
    words = block.view(f"u{block.itemsize}").reshape(-1)
    words[0] ^= 1 << 3
    words[-1] ^= 1 << 3


FAULTS = {f.__name__: f for f in (flip, swap, shift, stale, zeros, truncate, two_bits)}


def data(shape, dtype=np.float32, seed=0) -> np.ndarray:
    """Values without repetition, so that every fault changes bits."""
    n = int(np.prod(shape))
    values = np.random.default_rng(seed).permutation(n) + 1
    return (values + 1000 * seed).astype(dtype).reshape(shape)


def cut(whole, part: TensorPartition) -> np.ndarray:
    """A contiguous copy of a partition's shard."""
    index = (slice(None),) * part.dim + (slice(part.start, part.stop),)
    return whole[index].copy()


def worlds(comm, smallest=1):
    """Communicators of the first 1, 2, … ranks, freed after use."""
    for n in range(smallest, comm.size + 1):
        with first_ranks(comm, n) as part:
            if part:
                yield part


@contextmanager
def corruption(comm, rank, check):
    """Expects CorruptionError of ``check`` on every rank, with one message, naming ``rank``; a set
    of two: both as suspects, nothing tells which."""
    with pytest.raises(CorruptionError) as caught:
        yield caught
    verdict = caught.value.verdict
    if isinstance(rank, set) and len(rank) == 1:
        (rank,) = rank
    assert verdict.where.rank == (None if isinstance(rank, set) else rank), str(verdict)
    if isinstance(rank, set):
        assert "nothing tells which" in str(verdict), str(verdict)
        assert all(f"rank {one}" in verdict.where.detail for one in rank), str(verdict)
    assert verdict.check == verdict.where.check == check
    assert not verdict and verdict.established == 0
    same_on_all(comm, str(caught.value))


@contextmanager
def refused(comm, match, kind=None):
    """Expects the same UsageError on every rank."""
    from spimpi import UsageError

    with pytest.raises(kind or UsageError, match=match) as caught:
        yield caught
    same_on_all(comm, str(caught.value))


def same_on_all(comm, text):
    texts = comm.allgather(text)
    assert len(set(texts)) == 1, texts


def memory_of(buffer):
    """All elements of the array of a buffer as mpi4py takes it, flat."""
    return block_of(buffer[0] if isinstance(buffer, (list, tuple)) else buffer)


class Faulty:
    """A communicator whose collectives spoil one rank's receive buffer."""

    def __init__(self, comm, victim):
        self.comm, self.victim = comm, victim

    def spoil(self, buffer):
        if self.comm.rank == self.victim and buffer is not MPI.IN_PLACE and buffer is not None:
            memory_of(buffer)[0] += 1

    def __getattr__(self, name):
        call = getattr(self.comm, name)

        def run(*args):
            result = call(*args)
            if name.startswith("I"):
                return Late(result, lambda: self.spoil(args[0 if name == "Ibcast" else 1]))
            self.spoil(args[0 if name == "Bcast" else 1])
            return result

        passes = name in ("Dup", "Get_attr", "Set_attr") or not name[0].isupper()
        return call if passes else run


class Late:
    """A request whose data come out spoilt when it is complete."""

    def __init__(self, request, spoil):
        self.request, self.spoil = request, spoil

    def Wait(self):
        self.request.Wait()
        self.spoil()

    def Test(self):
        done = self.request.Test()
        if done:
            self.spoil()
        return done


def spoilt(checked, victim):
    """The same wrapper over a communicator with a fault."""
    checked.comm = Faulty(checked.comm, victim)
    return checked
