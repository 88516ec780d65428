"""Trials of the checks of sums, products and sketches, as in moved_trials.py: results are faulty."""

from copy import copy
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
from mpi4py import MPI

import spimpi
from spimpi.bench.planted import N_TENSORS, REPLICA, SHAPE, tensors
from spimpi.bench.scenes import Scene
from spimpi.checks.matmul import project_weight
from spimpi.exact_sum import quantized, row_exponents, scaled_bits

INNER = 16  # of the products
MANY = 100  # rounds: more than the search for a sum's elements takes


def float_sum(parts, op=np.add):
    """Added one after the other, rounded after each."""
    total = parts[0].copy()
    for part in parts[1:]:
        total = op(total, part).astype(part.dtype)
    return total


def addends(s: Scene, made=None, op=np.add) -> list[np.ndarray]:
    """One contribution a rank; the scene's tensor becomes their sum, in a random order."""
    chosen = s.rng.choice(N_TENSORS, s.n + 1, replace=False)
    pool = tensors(s.dtype) if made is None else made(s.dtype)
    return _summed(s, [pool[i] for i in chosen], op)


def _summed(s: Scene, addends, op=np.add) -> list[np.ndarray]:
    """As ``addends``, of these: one a rank, and one of the step before."""
    *parts, other = addends
    order = s.rng.permutation(s.n)
    s.whole = float_sum([parts[i] for i in order], op)
    s.earlier = float_sum([other, *parts[1:]], op)
    out = int(order[0])
    s.more = {
        "without": lambda: float_sum([p for i, p in enumerate(parts) if i != out], op),
        "doubled": lambda: float_sum([*parts, parts[out]], op),
    }
    return parts


def rounds_of(result) -> int:
    """A result that is not finite is judged after a closer look; any other by its words."""
    is_float = result.dtype.kind not in "iu"
    return MANY if is_float and not np.isfinite(result).all() else 2


def allreduce(s: Scene, parts, agreement=False, op=MPI.SUM):
    # Where all hold the same wrong result only the sum tells; where some do, agreement does too.
    wrong = s.wrong_whole()
    who = s.who(agreement=True) if agreement else frozenset(range(s.n))
    s.rounds = rounds_of(wrong)

    def call(comm, ctx):
        result = wrong if comm.rank in who else s.whole
        return spimpi.verify_allreduce(
            comm, parts[comm.rank], result, s.tag, op=op, check=False, ctx=ctx
        )

    return call, None


def allreduce_floats(s: Scene):
    """The same wrong result on all ranks: the bound alone tells."""
    return allreduce(s, addends(s))


def allreduce_disagreeing(s: Scene):
    """A wrong result on some ranks: agreement tells."""
    return allreduce(s, addends(s), agreement=True)


def allreduce_integers(s: Scene):
    return allreduce(s, addends(s, wide_integers))


def allreduce_wrapping(s: Scene):
    """Integers whose sums wrap."""
    call = allreduce(s, addends(s, widest_integers))
    s.rounds = MANY
    return call


def allreduce_integral(s: Scene):
    """Floats that hold integers whose sums cannot round."""
    return allreduce(s, addends(s, integral_floats))


def allreduce_max(s: Scene):
    call = allreduce(s, addends(s, op=np.maximum), op=MPI.MAX)
    s.rounds = 4
    return call


def allreduce_xor(s: Scene):
    return allreduce(s, addends(s, wide_integers, op=np.bitwise_xor), op=MPI.BXOR)


def reduce_scatter(s: Scene, made=None):
    parts = addends(s, made)
    wrong = s.wrong_shard()
    s.rounds = rounds_of(wrong)

    def call(comm, ctx):
        r = comm.rank
        return spimpi.verify_reduce_scatter(
            comm, parts[r], wrong if r == s.hit else s.shard(r), s.parts[r], s.tag,
            check=False, ctx=ctx,
        )  # fmt: skip

    return call, None


def reduce_scatter_integers(s: Scene):
    return reduce_scatter(s, wide_integers)


@lru_cache
def wide_integers(dtype: str) -> tuple[np.ndarray, ...]:
    """Integers of which eight can be added without wrapping."""
    return _integers(dtype, np.iinfo(dtype).min // 8, np.iinfo(dtype).max // 8)


@lru_cache
def widest_integers(dtype: str) -> tuple[np.ndarray, ...]:
    return _integers(dtype, np.iinfo(dtype).min, np.iinfo(dtype).max)


def _integers(dtype, low, high):
    rng = np.random.default_rng(1)
    return tuple(
        rng.integers(low, high, SHAPE, dtype=dtype, endpoint=True) for _ in range(N_TENSORS)
    )


@lru_cache
def integral_floats(dtype: str) -> tuple[np.ndarray, ...]:
    """Floats that hold 1 to 16, so that sums of eight are exact in bfloat16 too."""
    rng = np.random.default_rng(2)
    kind = tensors(dtype)[0].dtype
    return tuple(rng.integers(1, 16, SHAPE, endpoint=True).astype(kind) for _ in range(N_TENSORS))


@lru_cache
def _products(dtype: str):
    """(x, w, y) of a few products of integers."""
    rng, made = np.random.default_rng(3), []
    for _ in range(8):
        x = rng.integers(1, 64, (SHAPE[0], INNER), endpoint=True)
        w = rng.integers(1, 64, (INNER, SHAPE[1]), endpoint=True)
        y = (x @ w).astype(dtype)
        y.flags.writeable = False
        made.append((x.astype(dtype), w.astype(dtype), y))
    return made


def matmul(s: Scene):
    """y of one rank is wrong."""
    made = _products(s.dtype)
    i = int(s.rng.integers(len(made)))
    x, w, s.whole = made[i]
    s.earlier = made[i - 1][2]
    wrong, weight = s.wrong_whole(), _weight(s.dtype, i)

    def call(comm, ctx):
        y = wrong if comm.rank == s.hit else s.whole
        return spimpi.verify_matmul(comm, x, weight, y, s.tag, check=False, ctx=ctx)

    return call, None


@lru_cache
def _weight(dtype: str, i: int):
    return project_weight(_products(dtype)[i][1], spimpi.Tag(name="w", layer=i))


def sketches(s: Scene):
    """Two orders of a sum, one of them faulty: whether they are not called different."""
    parts = addends(s)
    other = float_sum([parts[i] for i in s.rng.permutation(s.n)])
    wrong = s.wrong_whole()

    def call(comm, ctx):
        part = s.parts[comm.rank]
        own = spimpi.sketch(wrong[part.start : part.stop], s.tag, part)
        found = spimpi.reduce_sketch(comm, own)
        given = [spimpi.sketch(one, s.tag) for one in parts]
        compared = spimpi.compare_sketches(spimpi.sketch(other, s.tag), found, given)
        return compared.verdict != "different"

    return call, None


class _Struck:
    """A communicator of whose sums ``wrong`` arrives."""

    def __init__(self, comm, wrong):
        self._comm, self._wrong = comm, wrong

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def Allreduce(self, send, receive, op):
        self._comm.Allreduce(send, receive, op=op)
        if op == MPI.SUM and send is not MPI.IN_PLACE:  # not the number of addends
            receive[...] = self._wrong


def exact_sum(s: Scene):
    """What MPI makes of the scaled integers is wrong: on all ranks, or a wrong replica on some."""
    chosen = s.rng.choice(N_TENSORS, s.n + 1, replace=False)
    floats = [tensors(s.dtype)[i] for i in chosen]
    numbers = [x.view(x.real.dtype) for x in floats]
    exponents = np.max([row_exponents(x) for x in numbers[:-1]], axis=0)
    _summed(s, [quantized([x], exponents, scaled_bits(s.n)) for x in numbers])
    wrong = s.wrong_whole()
    who = s.who(agreement=True) if s.fault in REPLICA else frozenset(range(s.n))
    s.rounds = 8  # the library's own, down to the last words

    def call(comm, ctx):
        session = copy(ctx.session)
        session.comm = _Struck(comm, wrong if comm.rank in who else s.whole)
        struck = SimpleNamespace(session=session, tracer=None, is_over=lambda comm: True)
        try:
            spimpi.exact_allreduce(comm, floats[comm.rank], tag=s.tag, ctx=struck)
        except spimpi.CorruptionError:
            return False
        return True

    return call, None
