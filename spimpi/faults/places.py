"""Where a fault can strike: the tensors of a run, in program order, and what a rank has of each.

A tensor's elements are counted in row-major order over its GLOBAL shape at the fault's step,
with R rows: the prefill has one row a prompt token, later steps one a prompt.
"""

from dataclasses import dataclass
from functools import cached_property

from spimpi.topology.data import rows_of
from spimpi.topology.tensor import TensorShard

PAYLOAD = ("bitflip", "swap", "stale", "misplace")
WEIGHT_KINDS = ("bitflip", "swap", "misplace")
WEIGHT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class TensorPlace:
    """One tensor that faults can strike.

    scope: "layer", or where a tensor that belongs to no layer is: "first" or "last" stage.
    itemsize: bytes in memory, 0 for weights (those of the checkpoint). kinds: what can happen
    to it; those in ``shared`` only where several tensor ranks share the work (tp > 1). models: ""
    for all, "llama" or "olmo" for what only those have.
    """

    name: str
    what: str
    shape: str
    held: str
    kinds: tuple[str, ...]
    shared: tuple[str, ...] = ()
    itemsize: int = 4
    scope: str = "layer"
    models: str = ""

    def exists_in(self, config) -> bool:
        """Whether a model (ModelConfig) has such a tensor."""
        return self.models in ("", "olmo" if config.qk_norm else "llama")

    @property
    def is_weight(self) -> bool:
        return self.itemsize == 0

    @property
    def in_layer(self) -> bool:
        return self.scope == "layer"


def _weight(name, what, shape, held="split over tp", scope="layer", models=""):
    kinds = WEIGHT_KINDS if held != "on every rank" else WEIGHT_KINDS[:2]
    return TensorPlace(name, what, shape, held, kinds, ("misplace",), 0, scope, models)


_REPLICA, _DROP = ("replica",), ("drop",)
_SUMMED = (*PAYLOAD, *_DROP)
_COPIED = "on every rank"
_SHARE = "a share on every rank"
_SPLIT = "split over tp"

PLACES: dict[str, TensorPlace] = {
    place.name: place
    for place in (
        TensorPlace("embed", "rows of the embedding, put together over the vocabulary", "(R, H)",
                    _COPIED, (*PAYLOAD, "drop", "replica"), ("drop", "replica"), scope="first"),
        TensorPlace("qkv", "queries, then keys, then values", "(R, (heads + 2 kv heads)·D)",
                    "split over tp by heads", (*PAYLOAD, "miscompute")),
        TensorPlace("qk_max", "row maxima of queries and of keys, to be reduced over tp",
                    "(R, 2)", _SHARE, ("bitflip",), ("bitflip",), models="olmo"),
        TensorPlace("qk_sum", "sums of their squares, to be added up over tp", "(R, 2)", _SHARE,
                    _SUMMED, _SUMMED, itemsize=8, models="olmo"),
        TensorPlace("qk_normed", "queries and keys after their norm, then values",
                    "(R, (heads + 2 kv heads)·D)", "split over tp by heads", PAYLOAD,
                    models="olmo"),
        TensorPlace("scores", "query times first key that the row sees", "(R, heads)",
                    "split over tp by heads", ("miscompute",), itemsize=8),
        TensorPlace("attn", "attention's output", "(R, heads·D)", "split over tp by heads",
                    (*PAYLOAD, "miscompute")),
        TensorPlace("attn_max", "row maxima of attn, to be reduced over tp", "(R,)", _SHARE,
                    ("bitflip",), ("bitflip",)),
        TensorPlace("attn_out", "partial sums of the output projection", "(R, H)", _SHARE,
                    (*_SUMMED, "miscompute"), _SUMMED, itemsize=8),
        TensorPlace("resid", "residual stream after attention", "(R, H)", _COPIED,
                    (*PAYLOAD, "replica"), _REPLICA),
        TensorPlace("gate_up", "gate columns, then up columns", "(R, 2F)", _SPLIT,
                    ("miscompute",)),
        TensorPlace("ffn", "input of the down projection", "(R, F)", _SPLIT, PAYLOAD),
        TensorPlace("ffn_max", "row maxima of ffn, to be reduced over tp", "(R,)", _SHARE,
                    ("bitflip",), ("bitflip",)),
        TensorPlace("ffn_out", "partial sums of the down projection", "(R, H)", _SHARE,
                    (*_SUMMED, "miscompute"), _SUMMED, itemsize=8),
        TensorPlace("hidden", "the layer's output, handed to the next stage", "(R, H)", _COPIED,
                    (*PAYLOAD, "replica"), _REPLICA),
        TensorPlace("logits", "logits of each prompt's last row", "(prompts, V)", _SPLIT,
                    (*PAYLOAD, "miscompute"), scope="last"),
        TensorPlace("tokens", "chosen tokens; the ring's closing hop", "(prompts,)", _COPIED,
                    (*PAYLOAD, "replica"), _REPLICA, itemsize=8, scope="last"),
        _weight("embed_tokens", "embedding", "(V, H)", scope="first"),
        _weight("input_norm", "norm before attention", "(H,)", _COPIED, models="llama"),
        _weight("q_proj", "query projection", "(heads·D, H)"),
        _weight("k_proj", "key projection", "(kv heads·D, H)"),
        _weight("v_proj", "value projection", "(kv heads·D, H)"),
        _weight("q_norm", "norm of the queries", "(heads·D,)", models="olmo"),
        _weight("k_norm", "norm of the keys", "(kv heads·D,)", models="olmo"),
        _weight("o_proj", "output projection", "(H, heads·D)"),
        _weight("post_norm", "norm before the FFN; OLMo: after attention", "(H,)", _COPIED),
        _weight("gate_proj", "gate projection", "(F, H)"),
        _weight("up_proj", "up projection", "(F, H)"),
        _weight("down_proj", "down projection", "(H, F)"),
        _weight("ffn_norm", "norm after the FFN", "(H,)", _COPIED, models="olmo"),
        _weight("norm", "last norm", "(H,)", _COPIED, scope="last"),
        _weight("lm_head", "head", "(V, H)", scope="last"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What a rank has of a global tensor: some of its rows, some of its columns.

    A tensor of one dimension counts as a single column.
    """

    shape: tuple[int, ...]
    rows: range
    columns: tuple[range, ...]

    @cached_property
    def width(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def size(self) -> int:
        return len(self.rows) * sum(map(len, self.columns))

    @property
    def is_whole(self) -> bool:
        total = self.width * self.shape[0]
        return self.size == total

    @property
    def first(self) -> int:
        """The global linear index of the part's first element."""
        return self.rows.start * self.width + next(c for c in self.columns if c).start

    def holds(self, element: int) -> bool:
        row, column = divmod(element, self.width)
        return row in self.rows and any(column in block for block in self.columns)

    def local(self, element: int) -> tuple[int, int]:
        """(row, column) of a global element in the rank's own array.

        Rows count from the rank's first, over all microbatches; the column blocks follow each
        other. ValueError where the rank does not hold the element.
        """
        row, column = divmod(element, self.width)
        before = 0
        for block in self.columns:
            if column in block:
                return self.rows.index(row), before + column - block.start
            before += len(block)
        raise ValueError(element)


def part_of(tensor: str, rank: int, grid, config, lengths, step: int = 0) -> Part:
    """What world rank ``rank`` has of a tensor at a step.

    ``config`` has the model's sizes (spimpi.inference.config.ModelConfig), ``lengths`` are those
    of all prompts, in tokens.
    """
    d, _, t = grid.coordinates(rank)
    shard = TensorShard(
        t, grid.tp, config.n_heads, config.n_kv_heads, config.intermediate_size, config.vocab_size
    )
    block = rows_of(lengths, grid.dp, d, step)
    rows, n_rows = range(block.start, block.stop), block.total
    hidden, n_ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q = _range(shard.q(config.head_dim))
    held = shard.kv_heads
    kv = range(held.start * config.head_dim, held.stop * config.head_dim)
    ffn, words = _range(shard.ffn()), _range(shard.vocabulary())
    n_q, n_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    single, full = range(1), range(hidden)
    if tensor in ("logits", "tokens"):
        own = rows_of(lengths, grid.dp, d, 1)
        rows, n_rows = range(own.start, own.stop), own.total
    qkv = (n_q + 2 * n_kv, q, _shift(kv, n_q), _shift(kv, n_q + n_kv))
    activations = {
        "qkv": qkv,
        "qk_max": (2, range(2)),
        "qk_sum": (2, range(2)),
        "qk_normed": qkv,
        "scores": (config.n_heads, _range(shard.heads)),
        "attn": (n_q, q),
        "gate_up": (2 * n_ffn, ffn, _shift(ffn, n_ffn)),
        "ffn": (n_ffn, ffn),
        "logits": (vocab, words),
    }
    if tensor in activations:
        width, *columns = activations[tensor]
        return Part((n_rows, width), rows, tuple(columns))
    if tensor in ("attn_max", "ffn_max", "tokens"):
        return Part((n_rows,), rows, (single,))
    if not PLACES[tensor].is_weight:
        return Part((n_rows, hidden), rows, (full,))
    weights = {
        "q_norm": Part((n_q,), q, (single,)),
        "k_norm": Part((n_kv,), kv, (single,)),
        "q_proj": Part((n_q, hidden), q, (full,)),
        "o_proj": Part((hidden, n_q), full, (q,)),
        "down_proj": Part((hidden, n_ffn), full, (ffn,)),
    }
    weights |= dict.fromkeys(("k_proj", "v_proj"), Part((n_kv, hidden), kv, (full,)))
    weights |= dict.fromkeys(("gate_proj", "up_proj"), Part((n_ffn, hidden), ffn, (full,)))
    weights |= dict.fromkeys(("embed_tokens", "lm_head"), Part((vocab, hidden), words, (full,)))
    return weights.get(tensor) or Part((hidden,), full, (single,))


def _range(partition) -> range:
    return range(partition.start, partition.stop)


def _shift(block: range, by: int) -> range:
    return range(block.start + by, block.stop + by)
