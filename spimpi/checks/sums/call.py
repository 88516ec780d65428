"""What a rank brings to the check of a sum: its arguments, checked, and how its words are laid out.

Local; docs/sums.md says what is checked of which operation and dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from mpi4py import MPI

from spimpi.checks.check import Check, cut_of, same_memory
from spimpi.checks.sums import float_bound, words as sum_words
from spimpi.errors import UsageError
from spimpi.fingerprint.arrays import share_memory
from spimpi.fingerprint.tag import Tag
from spimpi.partition import TensorPartition

_CHECKED = ("SUM", "MAX", "MIN", "BXOR")
_REFUSED = ("BAND", "BOR", "PROD", "LAND", "LOR", "LXOR", "MAXLOC", "MINLOC")

# The header of a rank's words, uint64; then P linear words, then the projections.
RESULT, OWN, INTEGRAL, BAD, LARGEST, LOW, HIGH, PIECES, LINEAR = range(9)
HEADER = 16


@dataclass(frozen=True)
class SumCall:
    """What this rank brings to a check: its blocks, and how they are summed."""

    name: str
    op: str
    kind: str  # "one rank", "float", "integer", "extreme", "bits"
    dtype: np.dtype  # of an item
    blocks: sum_words.Blocks
    tag: Tag
    unchanged: Callable = lambda: True  # whether the arrays still give the words that were sent
    known: dict = field(default_factory=dict)  # what ``reused`` has found

    def reused(self, comm) -> tuple[int, ...]:
        """Ranks whose arrays have changed since their words were made: to be asked before they are
        read again. Collective, once."""
        if "reused" not in self.known:
            everyone = np.empty(comm.size, np.uint8)
            comm.Allgather(np.array([not self.unchanged()], np.uint8), everyone)
            self.known["reused"] = tuple(np.flatnonzero(everyone).tolist())
        return self.known["reused"]

    @property
    def n_elements(self) -> int:
        """Of the whole tensor, in items."""
        return sum(x.size for x in self.blocks.blocks)

    @property
    def scattered(self) -> bool:
        return self.name == "reduce_scatter"

    def held(self, rank: int) -> int:
        """The block that a rank's result is."""
        return rank if self.scattered else 0


def n_words(size: int) -> int:
    return HEADER + size + 3 * max(float_bound.most_bins(size), size)


def regions(everyone: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of the words of ranks [n, W]: projection and norm [n, 2, B], results' [n, 1, B]."""
    bins = max(float_bound.most_bins(size), size)
    sums = everyone[:, HEADER + size :].view(np.float64).reshape(len(everyone), 3, bins)
    return sums[:, :2], sums[:, 2:]


def prepare(comm, c: Check, contribution, result, partition, op) -> SumCall:
    """This rank's part of a check, which is told what all ranks must say alike."""
    contribution, result = sum_words.same_arrays(contribution, result)
    x, r = sum_words.items(contribution), sum_words.items(result)
    op_name = _name_of(op)
    kind = _kind(op_name, x.dtype, c.name, contribution.dtype)
    c.of(contribution.shape, contribution.dtype)
    c.settings = f"op MPI.{op_name}"
    most = float_bound.most_bins(comm.size)
    if c.name == "allreduce":
        if x.shape != r.shape:
            msg = (
                f"contribution and result of an allreduce have one shape, "
                f"found {contribution.shape} and {result.shape}"
            )
            raise UsageError(msg)
        parts, layout, own = (x,), sum_words.layout_of(x.shape, most), 0
    else:
        parts, layout = _shards(comm, x, r, partition, most)
        own, c.layout = comm.rank, cut_of(partition)
    key = sum_words.sketch_key(c.tag, x.shape, x.dtype.itemsize)
    blocks = sum_words.Blocks(parts, r, own, key, layout)
    c.contributed = [(x, sum_words.layout_of(x.shape, most).slabs[0])]
    c.held = [(r, layout.slabs[own])]
    if comm.size > 1 and share_memory(contribution, result):
        raise UsageError(same_memory("contribution", "result"))
    c.n_bytes = x.nbytes + r.nbytes
    kind = "one rank" if comm.size == 1 else kind
    return SumCall(c.name, op_name, kind, x.dtype, blocks, c.tag)


def _name_of(op) -> str:
    """The name of an operation that can be checked."""
    for name in _CHECKED + _REFUSED:
        if op == getattr(MPI, name):
            found = f"MPI.{name}"
            break
    else:
        name, found = None, "a user-defined operation" if isinstance(op, MPI.Op) else repr(op)
    if name in _CHECKED:
        return name
    msg = f"no check of {found} is known: expected one of MPI.{', MPI.'.join(_CHECKED)}"
    raise UsageError(msg)


@lru_cache(maxsize=256)
def _kind(op: str, dtype, name: str, given) -> str:
    is_integer = dtype.kind in "iu"
    is_float = float_bound.format_of(dtype) is not None
    if op == "SUM" and (is_integer or is_float):
        return "integer" if is_integer else "float"
    if op in ("MAX", "MIN") and name == "allreduce" and given.kind != "c":
        if is_integer or is_float:
            return "extreme"
    if op == "BXOR" and (is_integer or dtype.kind == "b"):
        return "bits"
    msg = f"no check is known for {name} of {given} by MPI.{op}"
    raise UsageError(msg)


def _shards(comm, x, r, partition, most):
    if not isinstance(partition, TensorPartition):
        msg = f"partition must be a TensorPartition, found {type(partition).__name__}"
        raise UsageError(msg)
    if (partition.n_shards, partition.shard_id) != (comm.size, comm.rank):
        msg = (
            f"a reduce-scatter has one shard a rank: expected shard {comm.rank} of {comm.size}, "
            f"found shard {partition.shard_id} of {partition.n_shards}"
        )
        raise UsageError(msg)
    if partition.slab(r.shape).global_shape != x.shape:
        msg = (
            f"a shard of shape {r.shape} makes a tensor of shape "
            f"{partition.slab(r.shape).global_shape}, but the contribution has {x.shape}"
        )
        raise UsageError(msg)
    cut = (slice(None),) * partition.dim
    starts = partition.starts
    parts = tuple(x[(*cut, slice(start, stop))] for start, stop in zip(starts, starts[1:]))
    return parts, sum_words.layout_of(x.shape, most, partition.dim, starts)
