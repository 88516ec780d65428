"""What a tensor rank holds: attention heads, FFN columns and vocabulary entries."""

from dataclasses import dataclass
from functools import cached_property

from spimpi.errors import UsageError
from spimpi.partition import TensorPartition


@dataclass(frozen=True)
class TensorShard:
    """Tensor rank ``rank`` of ``tp``: balanced blocks of query heads, FFN and vocabulary.

    Query head h uses key/value head h // (n_heads / n_kv_heads). A rank HOLDS the key/value
    heads that its query heads use; a head that several ranks hold is OWNED by the lowest, which
    alone counts it in a fingerprint.
    """

    rank: int
    tp: int
    n_heads: int
    n_kv_heads: int
    intermediate: int
    vocab: int

    def __post_init__(self):
        if not 0 <= self.rank < self.tp:
            msg = f"tensor ranks of tp={self.tp} are 0..{self.tp - 1}, found {self.rank}"
            raise UsageError(msg)
        if min(self.n_heads, self.n_kv_heads, self.intermediate, self.vocab) < 1:
            msg = f"a model needs heads, FFN columns and a vocabulary, found {self}"
            raise UsageError(msg)
        if self.n_heads % self.n_kv_heads:
            msg = (
                f"the query heads must be a multiple of the key/value heads, found {self.n_heads} "
                f"and {self.n_kv_heads}"
            )
            raise UsageError(msg)
        if self.tp > self.n_heads:
            msg = f"{self.tp} tensor ranks are more than the model's {self.n_heads} heads"
            raise UsageError(msg)

    @property
    def group(self) -> int:
        """How many query heads share a key/value head."""
        return self.n_heads // self.n_kv_heads

    @cached_property
    def heads(self) -> TensorPartition:
        """The query heads, as a partition of an axis that counts heads."""
        return TensorPartition(0, self.tp, self.rank, self.n_heads)

    def ffn(self, dim: int = 0) -> TensorPartition:
        """The FFN's columns, as the partition of axis ``dim`` (0: gate and up; 1: down)."""
        return TensorPartition(dim, self.tp, self.rank, self.intermediate)

    def vocabulary(self, dim: int = 0) -> TensorPartition:
        """The vocabulary, as the partition of axis ``dim`` (0: weights; 1: logits)."""
        return TensorPartition(dim, self.tp, self.rank, self.vocab)

    def q(self, head_dim: int, dim: int = 0) -> TensorPartition:
        """The query heads' elements, as the partition of axis ``dim`` (0: q_proj; 1: o_proj)."""
        sizes = tuple(n * head_dim for n in self.heads.all_sizes)
        return TensorPartition(dim, self.tp, self.rank, self.n_heads * head_dim, sizes)

    @property
    def kv_heads(self) -> range:
        """The key/value heads that the rank holds."""
        return self._held(self.rank)

    @property
    def owned_kv_heads(self) -> range:
        """Those of them that no lower rank holds; may be empty."""
        return self._owned(self.rank)

    def owned_kv(self, head_dim: int, dim: int = 0) -> TensorPartition:
        """The owned key/value heads' elements, as the partition of axis ``dim``; may be empty."""
        sizes = tuple(len(self._owned(t)) * head_dim for t in range(self.tp))
        return TensorPartition(dim, self.tp, self.rank, self.n_kv_heads * head_dim, sizes)

    def holders(self, kv_head: int) -> tuple[int, ...]:
        """The tensor ranks that hold a key/value head; the first one owns it."""
        if not 0 <= kv_head < self.n_kv_heads:
            msg = f"key/value heads are 0..{self.n_kv_heads - 1}, found {kv_head}"
            raise UsageError(msg)
        return tuple(t for t in range(self.tp) if kv_head in self._held(t))

    def _held(self, t: int) -> range:
        # tp is at most the number of heads, so no rank is without query heads
        start, size = self.heads.starts[t], self.heads.all_sizes[t]
        return range(start // self.group, (start + size - 1) // self.group + 1)

    def _owned(self, t: int) -> range:
        held = self._held(t)
        return range(max(held.start, self._held(t - 1).stop), held.stop) if t else held


def tensor_shards(tp, n_heads, n_kv_heads, intermediate, vocab) -> list[TensorShard]:
    """The shards of all ``tp`` tensor ranks."""
    return [TensorShard(t, tp, n_heads, n_kv_heads, intermediate, vocab) for t in range(tp)]
