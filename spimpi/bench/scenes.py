"""A tensor on several ranks and one fault in it: what the confusion matrix's trials are made of."""

from functools import lru_cache

import numpy as np

from spimpi.bench.planted import (
    CONTRIBUTION, MOVEMENT, N_TENSORS, REPLICA, ROUNDING, SHAPE, STRIKE_ALL, tensors,
)  # fmt: skip
from spimpi.fingerprint.tag import Tag
from spimpi.partition import TensorPartition

CLEAN = "nothing"
RECORD = "the record of another hand-off"
# Of a sequence of hand-offs.
LOST, TWICE = "a hand-off lost", "a hand-off received twice"
REORDERED, MIXED = "two hand-offs in the other order", "two sequences of hand-offs mixed up"
SEQUENCE = (LOST, TWICE, REORDERED, MIXED)
FAULTS = {
    **MOVEMENT, **REPLICA, **CONTRIBUTION, **ROUNDING,
    **dict.fromkeys((RECORD, *SEQUENCE, CLEAN)),
}  # fmt: skip


@lru_cache
def partitions(n_ranks: int, dim: int = 0) -> tuple[TensorPartition, ...]:
    """Of SHAPE, one shard a rank."""
    return tuple(TensorPartition(dim, n_ranks, rank, SHAPE[dim]) for rank in range(n_ranks))


@lru_cache
def shards(dtype: str, number: int, n_ranks: int, dim: int = 0) -> tuple[np.ndarray, ...]:
    """The shards of a tensor of ``tensors(dtype)``, each in one piece."""
    whole = tensors(dtype)[number]
    cuts = [part.start for part in partitions(n_ranks, dim)][1:]
    return tuple(np.ascontiguousarray(shard) for shard in np.split(whole, cuts, dim))


class Scene:
    """A tensor ``whole``, the one of the step before, a tag; and a fault in the shard of ``hit``.

    ``wrong_shard`` and ``wrong_whole`` are what then arrived, new arrays; ``changed`` tells
    whether they differ from what should have. Without a fault they are copies.
    """

    def __init__(self, dtype: str, n_ranks: int, fault: str, rng, number: int | None = None):
        self.dtype, self.n, self.fault, self.rng = dtype, n_ranks, fault, rng
        self.plant = FAULTS[fault]
        self.number, past = (int(i) for i in rng.integers(N_TENSORS, size=2))
        past = (self.number + 1) % N_TENSORS if past == self.number else past
        self.whole, self.earlier = tensors(dtype)[self.number], tensors(dtype)[past]
        # A batch's checks have each a tag of their own: ``number`` is theirs.
        self.tag = _tag(int(rng.integers(1 << 16)) if number is None else number)
        self.hit = int(rng.integers(n_ranks))
        self.changed = self.plant is None
        self.more = {}  # what faults of sums need
        self.rounds = 1  # in which the check decides (one_process.py)

    @property
    def parts(self) -> tuple[TensorPartition, ...]:
        return partitions(self.n)

    @property
    def rows(self) -> slice:
        """Where the shard lies that is hit."""
        return slice(self.parts[self.hit].start, self.parts[self.hit].stop)

    def shard(self, rank: int) -> np.ndarray:
        """The intact shard."""
        return self.whole[self.parts[rank].start : self.parts[rank].stop]

    def wrong_shard(self) -> np.ndarray:
        """The shard of ``hit`` with the fault."""
        right = self.shard(self.hit)
        return self._struck(right.copy(), right, self.rows)

    def wrong_whole(self) -> np.ndarray:
        """The tensor with the fault, in the shard of ``hit`` unless it strikes all."""
        wrong = self.whole.copy()
        rows = slice(0, len(wrong)) if self.plant in STRIKE_ALL else self.rows
        self._struck(wrong[rows], self.whole[rows], rows)
        return wrong

    def _struck(self, block, right, rows):
        if self.plant is not None:
            self.plant(
                shard=block, whole=self.whole, earlier=self.earlier, rows=rows, rng=self.rng,
                **self.more,
            )  # fmt: skip
            self.changed = block.tobytes() != right.tobytes()
        return block

    def who(self, ranks=None, agreement: bool = False) -> frozenset[int]:
        """The ranks that hold the wrong tensor: all of ``ranks`` or one; where it is only
        ``agreement`` that can tell, and of a wrong replica, any but all."""
        ranks = range(self.n) if ranks is None else ranks
        if agreement or self.fault in REPLICA:
            n = int(self.rng.integers(1, self.n))
            return frozenset(self.rng.choice(self.n, n, replace=False).tolist())
        if self.rng.integers(2):
            return frozenset(ranks)
        return frozenset([ranks[int(self.rng.integers(len(ranks)))]])


@lru_cache(maxsize=None)
def _tag(number: int) -> Tag:
    return Tag(name="hidden", layer=number % 32, step=number)
