"""Distributed tensors with planted errors, and a brute-force oracle that sees all of them at once.

A layout is made from a seed, alike on every rank: a random cut of a random tensor into owners'
blocks, random blocks that ranks hold, arrays with random strides.
"""

import pickle
import threading
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from mpi4py import MPI

from spimpi.partition import Slab

DTYPES = [
    np.dtype(name)
    for name in ("?", "i1", "u2", "f2", "i4", "f4", "u8", "f8", "c8", "c16")
] + [np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)]


@dataclass
class Layout:
    """A tensor and who has which part: per rank, lists of (array, start)."""

    truth: np.ndarray
    contributed: list
    held: list

    def arguments(self, rank, rng=None):
        """``contributed`` and ``held`` of a rank as localise takes them, with odd strides."""
        rng = rng or np.random.default_rng(rank)
        return [
            [(strided(rng, x), Slab(self.truth.shape, start)) for x, start in blocks[rank]]
            for blocks in (self.contributed, self.held)
        ]


def random_values(rng, shape, dtype):
    """Random bits; of bool, 0 and 1."""
    if dtype == bool:
        return np.asarray(rng.random(shape) < 0.5)
    n = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(n), dtype).reshape(shape).copy()


def strided(rng, values):
    """An equal array, laid out in memory in any order: transposed, reversed, with gaps."""
    axes = rng.permutation(values.ndim)
    steps = rng.integers(1, 3, values.ndim)
    base = np.zeros([values.shape[a] * s for a, s in zip(axes, steps)], values.dtype)
    signs = rng.choice([-1, 1], values.ndim)
    view = base[(..., *(slice(None, None, int(s)) for s in steps))]
    view = view[(..., *(slice(None, None, int(s)) for s in signs))]
    view = view.transpose(np.argsort(axes)) if values.ndim else view
    view[...] = values
    view.flags.writeable = bool(rng.integers(2))
    return view


def random_cut(rng, start, shape, n):
    """About ``n`` disjoint blocks, (start, shape), that cover one; some may be empty."""
    if n <= 1 or not shape:
        return [(start, shape)]
    axis = int(rng.integers(len(shape)))
    at = int(rng.integers(shape[axis] + 1))
    left, right = list(shape), list(shape)
    left[axis], right[axis] = at, shape[axis] - at
    later = list(start)
    later[axis] += at
    first = int(rng.integers(1, n))
    return random_cut(rng, start, tuple(left), first) + random_cut(
        rng, tuple(later), tuple(right), n - first
    )


def random_layout(seed, n_ranks, shape, dtype) -> Layout:
    """Owners of random blocks; ranks that hold the whole, random blocks, or nothing."""
    rng = np.random.default_rng(seed)
    truth = np.asarray(random_values(rng, shape, dtype))
    contributed = [[] for _ in range(n_ranks)]
    n_owned = int(rng.integers(1, rng.choice([2, 12, 90])))
    for start, block in random_cut(rng, (0,) * len(shape), shape, n_owned):
        contributed[rng.integers(n_ranks)].append((_block(truth, start, block), start))
    replicated = rng.random() < 0.5
    held = [[] for _ in range(n_ranks)]
    for blocks in held:
        for start, block in random_cut(rng, (0,) * len(shape), shape, int(rng.integers(1, 4))):
            if replicated:
                blocks[:] = [(truth.copy(), (0,) * len(shape))]
            elif rng.random() < 0.7:
                blocks.append((_block(truth, start, block), start))
    return Layout(truth, contributed, held)


def _block(truth, start, shape):
    return truth[(..., *(slice(a, a + n) for a, n in zip(start, shape)))].copy()


def plant(layout, seed, n) -> None:
    """Change ``n`` elements or fewer: random bits, on one rank or alike on all that hold them."""
    rng = np.random.default_rng((seed, 1))
    itemsize = layout.truth.dtype.itemsize
    for _ in range(n):
        if not layout.truth.size:
            return
        index = tuple(int(rng.integers(n)) for n in layout.truth.shape)
        mask = np.zeros(itemsize, np.uint8)
        mask[rng.integers(itemsize)] = 1 << rng.integers(8)
        if rng.random() < 0.3:
            mask |= rng.integers(0, 256, itemsize, np.uint8)
        everywhere = rng.random() < 0.5
        victim = int(rng.integers(len(layout.held)))
        for rank, blocks in enumerate(layout.held):
            if everywhere or rank == victim:
                for array, start in blocks:
                    flip(array, [i - a for i, a in zip(index, start)], mask)


def flip(array, local, mask) -> None:
    """XOR the bytes of one element, if the array has it."""
    if all(0 <= i < n for i, n in zip(local, array.shape)):
        at = (..., *(slice(i, i + 1) for i in local))
        changed = np.frombuffer(array[at].tobytes(), np.uint8) ^ mask
        array[at] = np.frombuffer(changed.tobytes(), array.dtype).reshape(array[at].shape)


def wrong_elements(array, start, truth):
    """{global index: (expected bytes, found bytes)} of a block, by comparing them all."""
    true = _block(truth, start, array.shape)
    n = array.dtype.itemsize
    a, b = true.tobytes(), array.tobytes()
    return {
        tuple(s + int(i) for s, i in zip(start, index)): (
            a[k * n : (k + 1) * n],
            b[k * n : (k + 1) * n],
        )
        for k, index in enumerate(np.ndindex(array.shape))
        if a[k * n : (k + 1) * n] != b[k * n : (k + 1) * n]
    }


def check_findings(findings, layout, limit) -> None:
    """Compare with what a rank that sees everything finds."""
    groups: dict = {}
    for rank, blocks in enumerate(layout.held):
        for array, start in blocks:
            wrong = wrong_elements(array, start, layout.truth)
            if wrong:
                key = (start, array.shape, array.tobytes())
                groups.setdefault(key, (set(), wrong))[0].add(rank)
    expected = {
        (index, *both, min(ranks))
        for ranks, wrong in groups.values()
        for index, both in wrong.items()
    }
    total = sum(len(wrong) for _, wrong in groups.values())
    named = [(e.index, e.expected, e.found, e.rank) for e in findings.elements]
    assert sorted(findings.alike) == sorted(tuple(sorted(ranks)) for ranks, _ in groups.values())
    assert findings.ranks == tuple(sorted({r for ranks, _ in groups.values() for r in ranks}))
    assert set(named) <= expected
    if total <= limit:
        assert sorted(named) == sorted(
            (index, *both, min(ranks))
            for ranks, wrong in groups.values()
            for index, both in wrong.items()
        )
        assert (findings.n_wrong, findings.blocks) == (total, ())
        return
    assert len(named) == limit and findings.n_wrong in (None, total)
    _check_blocks(findings, expected, whole_slabs=len(groups) > limit)


def _check_blocks(findings, expected, whole_slabs):
    """Nothing is wrong outside the blocks, and each face of a block has a wrong element."""
    for index, _, _, rank in expected:
        assert any(
            r == rank and all(a <= i < a + n for i, a, n in zip(index, slab.offset, shape))
            for r, slab, shape in findings.blocks
        )
    if whole_slabs:
        return
    for rank, slab, shape in findings.blocks:
        inside = [
            index
            for index, _, _, r in expected
            if r == rank and all(a <= i < a + n for i, a, n in zip(index, slab.offset, shape))
        ]
        low, high = np.min(inside, axis=0), np.max(inside, axis=0)
        assert tuple(low) == slab.offset
        assert tuple(high - low + 1) == shape


class Counted:
    """A communicator that keeps (call, bytes) of what is sent, and only has collectives."""

    def __init__(self, comm):
        self._comm, self.rank, self.size, self.calls = comm, comm.rank, comm.size, []

    def Allreduce(self, send, receive, op):
        self.calls.append(("Allreduce", receive.nbytes))
        return self._comm.Allreduce(send, receive, op=op)

    def Iallreduce(self, send, receive, op):
        self.calls.append(("Iallreduce", receive.nbytes))
        return self._comm.Iallreduce(send, receive, op=op)

    def allgather(self, one):
        self.calls.append(("allgather", len(pickle.dumps(one))))
        return self._comm.allgather(one)

    def bcast(self, one, root=0):
        self.calls.append(("bcast", len(pickle.dumps(one))))
        return self._comm.bcast(one, root)


class _Done:
    def Test(self):
        return True


class ThreadComm:
    """One rank of a communicator whose ranks are threads: collectives by a shared table."""

    def __init__(self, rank, table, barrier):
        self.rank, self.size, self._table, self._barrier = rank, len(table), table, barrier

    def allgather(self, one):
        self._table[self.rank] = one
        self._barrier.wait()
        everyone = list(self._table)
        self._barrier.wait()
        return everyone

    def bcast(self, one, root=0):
        return self.allgather(one)[root]

    def Allreduce(self, send, receive, op):
        assert send is MPI.IN_PLACE
        every = np.stack(self.allgather(receive.copy()))
        reductions = (
            (MPI.BXOR, np.bitwise_xor),
            (MPI.BOR, np.bitwise_or),
            (MPI.MIN, np.minimum),
            (MPI.SUM, np.add),
        )
        receive[...] = next(f for o, f in reductions if o == op).reduce(every, axis=0)

    def Iallreduce(self, send, receive, op):
        self.Allreduce(send, receive, op)
        return _Done()


def on_threads(n_ranks, work):
    """``work(comm)`` on each of so many threads; its results, by rank. Raises the first error."""
    table, barrier = [None] * n_ranks, threading.Barrier(n_ranks, timeout=60)
    results, errors = [None] * n_ranks, []

    def run(rank):
        try:
            results[rank] = work(ThreadComm(rank, table, barrier))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return results
