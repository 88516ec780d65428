"""A rank's part of the model: read slice by slice, fingerprinted raw, then scaled to integers.

Each rank reads only what it owns. The raw slices' fingerprints are kept as evidence for the
weights check (weight_check.py); what the run computes with is derived from them.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from mpi4py import MPI

from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import LINEAR, Tag
from spimpi.inference import exact
from spimpi.inference.checkpoint import float32
from spimpi.inference.kernels import pack_maxima, unpack_maxima
from spimpi.inference.standing import Standing
from spimpi.partition import Slab
from spimpi.reduction import PATIENCE, together
from spimpi.topology.tensor import TensorShard

EMBEDDING = "model.embed_tokens.weight"
TIED_COPY = "lm_head.weight (tied copy)"
# Matrices that are made of several of the checkpoint's, by the first of them.
FIRST_OF = {
    "qkv": "self_attn.q_proj", "o_proj": "self_attn.o_proj", "gate_up": "mlp.gate_proj",
    "down_proj": "mlp.down_proj",
}  # fmt: skip
# Norms over the hidden width, and how --inject names them.
NORM_PLACES = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "post_norm",
    "post_feedforward_layernorm": "ffn_norm",
}


def layer_norms(config) -> tuple[str, str]:
    """A layer's two norms over the hidden width: before (Llama) or after (OLMo) its blocks."""
    names = tuple(NORM_PLACES)
    return names[1:] if config.qk_norm else names[:2]


@dataclass
class Matrix:
    """A slice of a weight matrix as a matmul takes it, [outputs, inputs], float32.

    In exact arithmetic ``values`` are integers of ``bits`` bits, row n scaled by
    2**(exponents[n] - bits); ``r`` and ``projection`` = values·r mod 2^64 serve the matmul check.
    With BLAS ``values`` are the weights and the rest is None.
    """

    values: np.ndarray
    bits: int = 0
    exponents: np.ndarray | None = None
    r: np.ndarray | None = None
    projection: np.ndarray | None = None

    @property
    def n_bytes(self) -> int:
        arrays = (self.values, self.exponents, self.r, self.projection)
        return sum(a.nbytes for a in arrays if a is not None)


@dataclass
class Layer:
    """A layer's weights here. The norms stand before their blocks (Llama) or after them (OLMo).

    qk_norm: OLMo's norm of the queries, then of the keys, that this rank holds; else None.
    """

    attn_norm: np.ndarray
    qkv: Matrix
    o: Matrix
    ffn_norm: np.ndarray
    gate_up: Matrix
    down: Matrix
    qk_norm: np.ndarray | None = None


@dataclass
class Part:
    """What one rank holds of the model, and the evidence of how it was read."""

    shard: TensorShard
    layers: list[Layer]
    embed: np.ndarray | None = None
    norm: np.ndarray | None = None
    head: Matrix | None = None
    shares: dict[str, int] = field(default_factory=dict)
    bytes_of: dict[str, int] = field(default_factory=dict)
    copies: dict[tuple[str, int], int] = field(default_factory=dict)
    maxima: list[tuple[int, str, int, int]] = field(default_factory=list)
    standing: list[Standing] = field(default_factory=list)
    problem: str = ""

    @property
    def n_bytes(self) -> int:
        """Bytes that stay resident for the weights."""
        matrices = [m for a in self.layers for m in (a.qkv, a.o, a.gate_up, a.down)]
        matrices += [self.head] if self.head else []
        norms = [n for a in self.layers for n in (a.attn_norm, a.ffn_norm, a.qk_norm)]
        plain = [a for a in (*norms, self.embed, self.norm) if a is not None]
        return sum(m.n_bytes for m in matrices) + sum(a.nbytes for a in plain)


def slab_of(shape, rows, cols) -> Slab:
    """The place of a slice of a stored tensor; None: all rows, all columns."""
    return Slab(shape, tuple(r[0] if r else 0 for r in (rows, cols)[: len(shape)]))


@dataclass(frozen=True, eq=False)
class Slice:
    """A raw slice of the stored tensor ``name``, and the name under which its share counts."""

    key: str
    name: str
    rows: tuple[int, int] | None
    cols: tuple[int, int] | None
    kv_heads: range | None
    raw: np.ndarray


def joined(slices) -> np.ndarray:
    """Slices one after the other along the first axis, a float32 copy."""
    pieces = [float32(one.raw) for one in slices]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Loader:
    """Reads this rank's slices of a checkpoint; ``load`` is collective over ctx.tensor.

    An error that one tensor rank meets is raised on all of them, never on one alone.
    """

    def __init__(self, ctx, config, checkpoint, exact_arithmetic: bool, faults=None):
        self.ctx, self.config, self.checkpoint = ctx, config, checkpoint
        self.exact, self.faults = exact_arithmetic, faults
        self.shard = TensorShard(
            ctx.place.t,
            ctx.grid.tp,
            config.n_heads,
            config.n_kv_heads,
            config.intermediate_size,
            config.vocab_size,
        )
        self.part = Part(self.shard, [])
        self.reads = []

    def load(self, progress=None) -> Part:
        ctx, config, part = self.ctx, self.config, self.part
        vocabulary = self.shard.vocabulary()
        vocab = (vocabulary.start, vocabulary.stop)
        if ctx.is_first_stage:
            with together(ctx.tensor, PATIENCE):
                embed = self._read(EMBEDDING, "embed_tokens", -1, vocab)
            part.embed = embed.raw
            self._account(embed)
            slab = slab_of(self.checkpoint.tensors[EMBEDDING].shape, vocab, None)
            part.standing.append(Standing(EMBEDDING, -1, embed.raw, part.shares[EMBEDDING], slab))
        for layer in ctx.layers:
            part.layers.append(self._layer(layer))
            if progress:
                progress(layer)
        if ctx.is_last_stage:
            with together(ctx.tensor, PATIENCE):
                norm = self._read("model.norm.weight", "norm", -1)
                if not config.tie_word_embeddings:
                    head = self._read("lm_head.weight", "lm_head", -1, vocab)
                elif not ctx.is_first_stage:
                    head = self._read(EMBEDDING, "lm_head", -1, vocab, share_as=TIED_COPY)
                else:
                    head = embed  # has its share already
            part.norm = self._vector(-1, [norm])
            part.head = self._matrix("lm_head", -1, [head], config.hidden_size)
        return part

    def _layer(self, layer) -> Layer:
        config = self.config
        with together(self.ctx.tensor, PATIENCE):
            norms, qkv, o, gate_up, down, qk_norms = self._read_layer(layer)
        hidden, attn = config.hidden_size, config.n_heads * config.head_dim
        return Layer(
            self._vector(layer, norms[:1]),
            self._matrix("qkv", layer, qkv, hidden),
            self._matrix("o_proj", layer, o, attn, split=True),
            self._vector(layer, norms[1:]),
            self._matrix("gate_up", layer, gate_up, hidden),
            self._matrix("down_proj", layer, down, config.intermediate_size, split=True),
            self._vector(layer, qk_norms) if qk_norms else None,
        )

    def _vector(self, layer, slices) -> np.ndarray:
        """Norm weights, float32, which must stay what the raw slices give."""
        array = joined(slices)
        self._stands(slices[0].name, layer, array, joined(slices))
        for one in slices:
            self._account(one)
        return array

    def _stands(self, name, layer, array, now) -> None:
        """An array stays as it is ``now``, an array of the same values, until the end of the run."""
        word = Standing.made(self.ctx.seed, name, layer, now).word
        self.part.standing.append(Standing(name, layer, array, word))

    def _read_layer(self, layer):
        """The raw slices of one layer."""
        config, shard, read = self.config, self.shard, self._read
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        heads = shard.q(config.head_dim)
        queries = (heads.start, heads.stop)
        held = shard.kv_heads
        kv = (held.start * config.head_dim, held.stop * config.head_dim)
        ffn = (shard.ffn().start, shard.ffn().stop)
        norms = [
            read(f"{prefix}{name}.weight", NORM_PLACES[name], layer)
            for name in layer_norms(config)
        ]
        qkv = [
            read(attention + "q_proj.weight", "q_proj", layer, queries),
            read(attention + "k_proj.weight", "k_proj", layer, kv, kv_heads=held),
            read(attention + "v_proj.weight", "v_proj", layer, kv, kv_heads=held),
        ]
        qk_norms = []
        if config.qk_norm:
            qk_norms = [
                read(attention + "q_norm.weight", "q_norm", layer, queries),
                read(attention + "k_norm.weight", "k_norm", layer, kv, kv_heads=held),
            ]
        gate_up = [
            read(mlp + "gate_proj.weight", "gate_proj", layer, ffn),
            read(mlp + "up_proj.weight", "up_proj", layer, ffn),
        ]
        o = read(attention + "o_proj.weight", "o_proj", layer, None, queries)
        down = read(mlp + "down_proj.weight", "down_proj", layer, None, ffn)
        return norms, qkv, [o], gate_up, [down], qk_norms

    def _read(self, name, short, layer, rows=None, cols=None, kv_heads=None, share_as=None):
        """A Slice of a stored tensor."""
        record = self.checkpoint.tensors[name]
        ranges = (rows, cols)
        if self.faults:
            read = partial(self.checkpoint.read, name)
            ranges = self.faults.misread(short, layer, record.shape, ranges, read)
        raw = self.checkpoint.read(name, *ranges)
        if self.faults:
            raw = self.faults.weights(short, layer, raw)
        return Slice(share_as or name, name, rows, cols, kv_heads, raw)

    def _account(self, one: Slice, right=True) -> None:
        """Take down a slice's share of its tensor's fingerprint, once it has been used.

        A slice of which something wrong was made (not ``right``) has no share that is right.
        """
        shape, part = self.checkpoint.tensors[one.name].shape, self.part
        slab = slab_of(shape, one.rows, one.cols)
        share, copies = self.share_of(one.name, one.raw, slab, one.kv_heads)
        share ^= not right
        part.copies.update(copies)
        self.reads.append((one.key, one.name, one.rows, one.cols, one.kv_heads, share, copies))
        part.shares[one.key] = part.shares.get(one.key, 0) ^ share
        part.bytes_of[one.key] = part.bytes_of.get(one.key, 0) + one.raw.nbytes

    def share_of(self, name, raw, slab, kv_heads) -> tuple[int, dict]:
        """The slice's share of the tensor's fingerprint; replicas count for the lowest rank.

        Second, fingerprints by (name, key/value head or -1) of what several tensor ranks hold
        (whole norms, shared heads), to be compared by agreement.
        """
        tag = Tag(self.ctx.seed, name)
        if kv_heads is None:
            share = fingerprint(raw, tag, slab)
            if len(slab.global_shape) > 1 or raw.shape != slab.global_shape:
                return share, {}
            return share if self.ctx.place.t == 0 else 0, {(name, -1): share}
        width = self.config.head_dim
        share, copies = 0, {}
        for i, head in enumerate(kv_heads):
            place = Slab(slab.global_shape, (head * width, 0)[: len(slab.global_shape)])
            own = fingerprint(raw[i * width : (i + 1) * width], tag, place)
            if head in self.shard.owned_kv_heads:
                share ^= own
            if len(self.shard.holders(head)) > 1:
                copies[name, head] = own
        return share, copies

    def read_again(self, wanted: str) -> bool:
        """Whether this rank's slices of a tensor read now as they did at first."""
        intact = True
        for key, name, rows, cols, kv_heads, *first in self.reads:
            if key == wanted:
                shape = self.checkpoint.tensors[name].shape
                raw = self.checkpoint.read(name, rows, cols)
                slab = slab_of(shape, rows, cols)
                intact &= [*self.share_of(name, raw, slab, kv_heads)] == first
        return intact

    def _matrix(self, name, layer, slices, global_inputs, split=False) -> Matrix:
        """Scale and round to integers; ``split``: the inputs are spread over the tensor ranks.

        W·r is taken of the raw slices once more, not of the integers: every product then holds
        these to the slices, whose share is taken last.
        """
        values = joined(slices)
        if not self.exact:
            self._account_once(slices)
            return Matrix(values)
        largest = own = exact.weight_absmax(values)
        split = split and self.ctx.tensor.size > 1
        if split:
            largest = self._global_maxima(name, layer, np.array(own))
        bits = exact.bits(global_inputs)
        result = exact.quantize_weights(values, largest, bits)
        integers, exponents, n_bad, first_bad = result
        if n_bad:
            # Raised after the weights check: it may be a flipped bit, which that check names.
            self.part.problem = self.part.problem or (
                f"{name} of layer {layer} has {n_bad} rows with NaN or Inf, the first is row "
                f"{first_bad} of rank {self.ctx.rank}'s slice; exact arithmetic needs finite weights"
            )
        key = Tag(self.ctx.seed, f"{name} r", layer).key(LINEAR, (values.shape[0],), 8)
        r = exact.odd_vector(np.uint64(key), values.shape[0])
        del values
        again = joined(slices)
        projection, n_wrong = exact.project_weights(again, own, largest, exponents, bits, r)
        if split and not np.array_equal(largest, self.reduced):
            self.part.maxima[-1] = (*self.part.maxima[-1][:3], 1)  # not as they arrived
        self._account_once(slices, not n_wrong)
        self._stands(self._first_of(name, layer), layer, exponents, exponents)
        return Matrix(integers, bits, exponents, r, projection)

    def _account_once(self, slices, right=True) -> None:
        """As ``_account``; a tied head is a slice of the embedding, which has its share."""
        for one in slices:
            if not right or one.raw is not self.part.embed:
                self._account(one, right)

    def _first_of(self, name, layer) -> str:
        """The checkpoint's first tensor of a matrix."""
        if layer >= 0:
            return f"model.layers.{layer}.{FIRST_OF[name]}.weight"
        return EMBEDDING if self.config.tie_word_embeddings else "lm_head.weight"

    def _global_maxima(self, name, layer, largest):
        """The rows' maxima over all tensor ranks, by one MPI_MAX, kept with their evidence."""
        tensor = self.ctx.tensor
        packed, reduced = np.empty((2, largest.size), np.uint64)
        pack_maxima(largest, np.uint64(tensor.rank), packed)
        tensor.Allreduce(packed, reduced, op=MPI.MAX)
        words = np.zeros(1, np.uint64)
        rank, size = np.uint64(tensor.rank), np.uint64(tensor.size)
        bad = unpack_maxima(packed, reduced, largest, rank, size, np.uint64(0), 0, words, 0)
        self.part.maxima.append((layer, name, int(words[0]), bad))
        self.reduced = largest.copy()
        return largest
