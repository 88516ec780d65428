"""The decoder layers of one stage, with the checks of everything that they compute and move.

``ExactLayers`` computes in exact arithmetic: any split gives the same bits. ``BlasLayers``
(blas_layers.py) is plain float32 for comparison. Both run the skeleton of ``Layers.forward``; shapes
are those of packed rows (tensors.py).
"""

from dataclasses import dataclass
from time import perf_counter

import numpy as np
from mpi4py import MPI

from spimpi.inference import exact, kernels, product
from spimpi.inference.attention import NO_FAULT, Cache, attend, attention_bits
from spimpi.inference.exact import odd_vector
from spimpi.inference.kernels import HELD_GATE_UP as GATE_UP
from spimpi.inference.ledger import ATTN, ATTN_OUT, FFN, FFN_OUT, QK_SUM, LayerResults
from spimpi.inference.product import NO_NORM, NO_SEGMENTS, NOT_HELD
from spimpi.inference.rope import rope_factor, rope_inverse_frequencies
from spimpi.inference.tensors import ATTN as KEY_ATTN
from spimpi.inference.tensors import ATTN_MAX, PRODUCTS, QKV, Widths
from spimpi.inference.tensors import QK_NORMED as KEY_QK_NORMED
from spimpi.inference.tensors import QK_SUM as KEY_QK_SUM
from spimpi.inference.tensors import ATTN_OUT as KEY_ATTN_OUT
from spimpi.inference.tensors import FFN as KEY_FFN
from spimpi.inference.tensors import FFN_OUT as KEY_FFN_OUT
from spimpi.inference.workspace import Workspace
from spimpi.watchdog import Unwatched

MAXIMA = ("attn_max", "ffn_max")


@dataclass
class Batch:
    """One microbatch of one step, as a rank holds it."""

    step: int
    microbatch: int
    first_row: int
    n_rows: int
    sequences: np.ndarray
    positions: np.ndarray
    keys: np.ndarray
    space: Workspace
    results: LayerResults
    gathered: object = None  # sequence.Gathered, where there are several sequence ranks


class Layers:
    """What both arithmetics share: the skeleton, attention's cache, fingerprints, faults."""

    exact: bool

    def __init__(
        self, ctx, config, part, n_sequences, n_positions, checked=True, faults=None, watch=None
    ):
        self.ctx, self.config, self.part = ctx, config, part
        self.checked, self.faults, self.watch = checked, faults, watch or Unwatched()
        self.sketcher = None  # sketching.Sketcher, in a run that takes sketches
        self.widths = Widths.of(config)
        self.many = ctx.tensor.size > 1
        shard, d = part.shard, config.head_dim
        self.kv_of_head = self._kv_of_head()
        self.segments, self.owned, self.shared, self.shared_at = _segments(shard, config)
        hidden = (0, self.widths.hidden)
        # Tensor -> (its key, its first column here, its global columns).
        self.columns = {
            ATTN: (KEY_ATTN, shard.heads.start * d, self.widths.attn),
            FFN: (KEY_FFN, shard.ffn().start, self.widths.ffn),
            ATTN_OUT: (KEY_ATTN_OUT, *hidden),
            FFN_OUT: (KEY_FFN_OUT, *hidden),
            QK_SUM: (KEY_QK_SUM, 0, 2),
        }
        self.n_sequences, self.n_positions = n_sequences, n_positions
        self.sliding = [config.is_sliding(layer) for layer in ctx.layers]
        self.rotary = {sliding: self._rotary(sliding) for sliding in set(self.sliding)}
        self.caches = [self._cache() for _ in part.layers]
        self.sequence = None  # sequence.SequenceGroup, where there are several sequence ranks
        self.weights = self._held_weights()
        self.qk_norm = self._qk_norm() if config.qk_norm else None

    def _kv_of_head(self) -> np.ndarray:
        """Which of the key/value heads here each head here attends to."""
        shard = self.part.shard
        heads = range(shard.heads.start, shard.heads.stop)
        return np.array([h // shard.group - shard.kv_heads.start for h in heads], np.int64)

    def constants(self) -> list[np.ndarray]:
        """What layers are computed with beside weights, in an order of its own."""
        tables = [table for sliding in sorted(self.rotary) for table in self.rotary[sliding]]
        return [self.kv_of_head, *tables]

    def constants_again(self) -> list[np.ndarray]:
        """The same, made once more."""
        tables = [table for sliding in sorted(self.rotary) for table in self._rotary(sliding)]
        return [self._kv_of_head(), *tables]

    def _rotary(self, sliding: bool):
        """Cosines and sines of the rotary embedding, float32 [positions, head_dim / 2]."""
        shape = (self.n_positions, self.config.head_dim // 2)
        cosines, sines = np.empty(shape, np.float32), np.empty(shape, np.float32)
        kernels.rope_table(rope_inverse_frequencies(self.config, sliding), cosines, sines)
        factor = rope_factor(self.config, sliding)
        return cosines * factor, sines * factor

    def _held_weights(self) -> np.ndarray:
        """Odd uint32, one a column of the widest array that a kernel leaves for the next."""
        matrices = [m for a in self.part.layers for m in (a.o, a.gate_up)]
        widest = max(m.values.shape[0] for m in matrices)
        return odd_vector(np.uint64(self.ctx.seed), widest).astype(np.uint32)

    def _window(self, sliding: bool) -> int:
        """How many positions a row of such a layer sees, its own included."""
        return self.config.sliding_window if sliding else self.n_positions

    def _cache(self):
        return Cache.empty(
            self.n_sequences, len(self.part.shard.kv_heads), self.n_positions, self.config.head_dim
        )

    def clear(self):
        for cache in self.caches:
            cache.clear()

    def workspace(self, n_rows) -> Workspace:
        return Workspace(n_rows, self.widths, self.part, self.config.head_dim, self.exact)

    def forward(self, i: int, x, out, b: Batch):
        """Layer ``i`` of the stage: out = decoder layer of x, float32 [rows, hidden].

        Collective over ctx.tensor.
        """
        layer, space, results = self.part.layers[i], b.space, b.results
        name = self.ctx.layers[i]
        results.times[i, 0] = perf_counter()
        self.watch.enter("matmuls and checks", "qkv", b.step, name)
        first_norm, second_norm = self._norms_before(layer)
        self._project("qkv", i, x, first_norm, layer.qkv, space.qkv, b)
        self._made("qkv", name, space.qkv, b)
        if self.qk_norm is not None:
            self.qk_norm.apply(i, b)
            self._fault("qk_normed", name, space.qkv, b)
        self._attend(i, b)
        self._made("attn", name, space.attn, b)
        self._reduce("attn_out", 0, i, space.attn, layer.o, b)
        self._add("resid", 0, i, x, layer.attn_norm, space.resid, b)
        self._made("resid", name, space.resid, b)
        self._project("gate_up", i, space.resid, second_norm, layer.gate_up, space.gate_up, b)
        first_col, n_cols = self.columns[FFN][1:]
        kernels.swiglu(
            space.gate_up, space.ffn, b.keys, i, b.first_row, first_col, n_cols, self.checked,
            results.rest_expected, self.weights, results.held, results.product_found,
            results.product_bad,
        )  # fmt: skip
        self._made("ffn", name, space.ffn, b)
        self._reduce("ffn_out", 1, i, space.ffn, layer.down, b)
        self._add("hidden", 1, i, space.resid, layer.ffn_norm, out, b)
        self._made("hidden", name, out, b)
        results.times[i, 1] = perf_counter()

    def _keys_and_values(self, i, b):
        """(rows, their keys and values, which of them is this rank's first, column of the keys).

        Collective over ctx.sequence.
        """
        if self.sequence:
            return b.gathered, self.sequence.gather(i, b.space.qkv, b), b.gathered.first_own, 0
        return b, b.space.qkv, 0, self.kv_of_head.size * self.config.head_dim

    def _norms_before(self, layer):
        """The norms of the inputs of attention and of the FFN; None where they come after."""
        return (None, None) if self.config.qk_norm else (layer.attn_norm, layer.ffn_norm)

    def _add(self, tensor, half, i, x, norm, out, b):
        """out = x + what a block made, in OLMo after a norm: the residual stream."""
        delta, results = b.space.delta, b.results
        if self.faults is not None:
            self._different(tensor, half, i, delta, b)
        kernels.add_residual(
            x, delta, norm if self.config.qk_norm else NO_NORM, self.config.rms_norm_eps, out,
            b.keys, i, b.first_row, half, self.checked, results.rest_found, results.rest_expected,
            results.hidden, self.weights, results.held, results.product_found, results.product_bad,
        )  # fmt: skip

    def _different(self, tensor, half, i, delta, b):
        """A fault's replica: what this rank adds comes out different, before any word of it."""
        before = delta.tobytes()
        self.faults.replica(tensor, self.ctx.layers[i], delta, b.first_row)
        if delta.tobytes() != before and self.checked:
            kernels.hold(delta.view(np.uint32), self.weights, b.results.held, i, half)

    def _normed(self, x, norm, b):
        """norm(x), or x where a block's input has no norm."""
        if norm is None:
            return x
        kernels.rmsnorm(x, norm, self.config.rms_norm_eps, b.space.normed)
        return b.space.normed

    def _fault(self, tensor, layer, array, b):
        if self.faults is not None:
            self.faults.payload(tensor, layer, array, b.first_row)

    def _made(self, tensor, layer, array, b):
        """A tensor of golden tables is there: faults are planted, then it is sketched."""
        if self.faults is not None:
            self.faults.payload(tensor, layer, array, b.first_row)
        if self.sketcher is not None:
            self.sketcher.take(tensor, layer, array, b.first_row)

    def sum_over_ranks(self, tensor, i, sent, summed, b):
        """summed = the partial sums of all tensor ranks, by MPI_SUM. Collective over ctx.tensor."""
        name, outgoing = self.ctx.layers[i], sent
        self._fault(tensor, name, sent, b)
        if self.faults is not None and self.faults.drop(tensor, name):
            outgoing = np.zeros_like(sent)
        self.watch.enter("allreduce sum", tensor, b.step, name)
        self.ctx.tensor.Allreduce(outgoing, summed, op=MPI.SUM)

    def fingerprint(self, words, tensor, i, array, b):
        """words[tensor] = fingerprint of a tensor of layer i, as it was made or after its last use."""
        if not self.checked:
            return
        start = perf_counter()
        key, first_col, n_cols = self.columns[tensor]
        kernels.fingerprint_block(
            array.view(np.uint32), b.keys[i + 1], key, b.first_row, first_col, n_cols, words,
            tensor,
        )  # fmt: skip
        b.results.seconds += perf_counter() - start


class ExactLayers(Layers):
    """Layers in exact arithmetic: matmuls of scaled integers, sums of int64."""

    exact = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        config = self.config
        self.settings = self._settings()
        n_random = max(self.n_positions, config.head_dim)
        self.r = odd_vector(np.uint64(self.ctx.seed), n_random)
        matrices = [m for a in self.part.layers for m in (a.qkv, a.o, a.gate_up, a.down)]
        matrices += [self.part.head] if self.part.head else []
        self.scratch = exact.Scratch.for_matrices([m.values.shape for m in matrices])

    def _settings(self) -> dict[bool, np.ndarray]:
        """``settings`` of attention.attend, for layers with a window and without."""
        config = self.config
        key_bits, value_bits = attention_bits(config.head_dim, config.max_position_embeddings)
        key = KEY_QK_NORMED if config.qk_norm else QKV
        return {
            sliding: np.array(
                [config.head_dim, len(self.part.shard.kv_heads), key_bits, value_bits,
                 self.checked, self.widths.qkv, *self.columns[ATTN][1:], key,
                 self._window(sliding)],
                np.int64,
            )
            for sliding in self.rotary
        }  # fmt: skip

    def constants(self):
        return [*super().constants(), *self.settings.values()]

    def constants_again(self):
        return [*super().constants_again(), *self._settings().values()]

    def _qk_norm(self):
        from spimpi.inference.qk_norm import ExactQKNorm

        return ExactQKNorm(self)

    def _product(self, tensor, i, x, maxima, matrix, b):
        """(x, scaled to integers, times the matrix; how many rows are not finite)."""
        space = b.space
        scaled, y = space.scaled(*x.shape), space.product(b.n_rows, matrix.values.shape[0])
        bad_rows = exact.quantize_rows(x, maxima, matrix.bits, scaled, space.exponents)
        exact.matmul(scaled, matrix.values, y, self.scratch)
        if self.faults is not None:
            self.faults.miscompute(tensor, self.ctx.layers[i], y, b.first_row)
        return y, bad_rows

    def _project(self, tensor, i, x, norm, matrix, out, b):
        """out = norm(x), or x without a norm, times a matrix whose outputs this rank holds."""
        space, normed = b.space, self._normed(x, norm, b)
        exact.row_absmax(normed, space.maxima)
        y, bad = self._product(tensor, i, normed, space.maxima, matrix, b)
        segments, held = (self.segments, NOT_HELD) if tensor == "qkv" else (NO_SEGMENTS, GATE_UP)
        self._finish(tensor, i, x, norm, y, matrix, out, segments, held, b)
        if bad:
            b.results.nonfinite[i, 0 if tensor == "qkv" else 2] += bad

    def _finish(self, tensor, i, x, norm, y, matrix, out, segments, held, b):
        results = b.results
        product.finish_projection(
            x, NO_NORM if norm is None else norm, self.config.rms_norm_eps, matrix.projection, y,
            matrix.r, b.space.exponents, matrix.exponents, matrix.bits, out, self.checked, i,
            PRODUCTS.index(tensor), results.product_found, results.product_expected,
            results.product_bad, b.keys, b.first_row, segments, self.widths.qkv, results.segments,
            self.weights, results.held, held,
        )  # fmt: skip

    def _attend(self, i, b):
        cache, results = self.caches[i], b.results
        sliding = self.sliding[i]
        found = results.normed_found if self.qk_norm else results.segments_found
        rows, kv, first_own, key_column = self._keys_and_values(i, b)
        fault = NO_FAULT
        if self.faults is not None:
            fault = self.faults.in_attention(self.ctx.layers[i], b.first_row, b.n_rows)
        attend(
            b.space.qkv, rows.sequences, rows.positions, *self.rotary[sliding], self.kv_of_head,
            self.settings[sliding], cache.keys, cache.key_exponents, cache.key_sums, cache.values,
            cache.value_exponents, cache.value_sums, cache.seals, cache.lengths, self.r, fault,
            b.space.attn, b.keys, i, b.first_row, self.segments, found,
            results.rest_expected, kv, first_own, key_column, results.product_found,
            results.product_expected, results.product_bad, results.nonfinite,
        )  # fmt: skip
        if self.sequence:
            self.sequence.used(i, kv, self.widths.qkv, b)

    def _reduce(self, tensor, which, i, x, matrix, b):
        """space.delta = x times a matrix whose inputs this rank holds, summed over the ranks."""
        space, results = b.space, b.results
        exact.row_absmax(x, space.maxima)
        if self.many:
            self.global_maxima(
                MAXIMA[which], which, ATTN_MAX + which, space.maxima, space.words, i, b
            )
        y, bad = self._product(tensor, i, x, space.maxima, matrix, b)
        if bad:
            results.nonfinite[i, 1 + 2 * which] += bad
        rest = ATTN if which == 0 else FFN
        if not self.many:
            self._finish(tensor, i, x, None, y, matrix, space.delta, NO_SEGMENTS, which, b)
            self.fingerprint(results.rest_found[i], rest, i, x, b)
            return
        sent, summed = space.sent[which], space.summed[which]
        product.finish_partial(
            x, space.words[0], space.maxima, matrix.projection, y, matrix.r, matrix.bits, sent,
            self.checked, i, PRODUCTS.index(tensor), results.product_found, results.product_expected,
            results.product_bad, b.keys, b.first_row, which, results.rest_expected,
        )  # fmt: skip
        self.sum_over_ranks(tensor, i, sent, summed, b)
        first_col, n_cols = self.columns[rest][1:]
        product.finish_sum(
            x.view(np.uint32), sent, summed, space.maxima, matrix.exponents, matrix.bits,
            space.delta, self.checked, i, which, b.first_row, first_col, n_cols, b.keys,
            results.rest_found, results.sums_by_tensor, results.maxima, results.max_bad,
            self.weights, results.held,
        )  # fmt: skip

    def global_maxima(self, name, slot, key, maxima, words, i, b):
        """maxima (uint32 [rows], or [rows, some]) = those over the tensor ranks, with their owners,
        checked; ``words``: two uint64 arrays of that shape. Collective over ctx.tensor."""
        results, tensor, (packed, reduced) = b.results, self.ctx.tensor, words
        width = 1 if maxima.ndim == 1 else maxima.shape[1]  # a rank may have no rows
        flat, packed, reduced = (a.reshape(-1) for a in (maxima, packed, reduced))
        kernels.pack_maxima(flat, tensor.rank, packed)
        if self.faults is not None:
            values = packed.view(np.uint32)[1::2]  # the high halves, little-endian
            self._fault(name, self.ctx.layers[i], values.reshape(b.n_rows, width), b)
        self.watch.enter("allreduce max", name, b.step, self.ctx.layers[i])
        tensor.Allreduce(packed, reduced, op=MPI.MAX)
        first = b.first_row * width
        results.max_bad[i, slot] = kernels.unpack_maxima(
            packed, reduced, flat, tensor.rank, tensor.size, b.keys[i + 1, key], first,
            results.maxima[i], slot,
        )  # fmt: skip


def _segments(shard, config):
    """Column segments of this rank's q|k|v block: where each lies here and in the global tensor.

    Returns (segments int64 [n, 3] of (local column, global column, width), which of them this
    rank owns, the key/value heads that several ranks hold, and for those held here pairs of
    (place among the shared heads, segment)).
    """
    d, n_heads = config.head_dim, shard.heads.size
    k_global = config.n_heads * d
    v_global = k_global + config.n_kv_heads * d
    shared = tuple(h for h in range(config.n_kv_heads) if len(shard.holders(h)) > 1)
    segments = [(0, shard.heads.start * d, n_heads * d)]
    owned, shared_at = [True], []
    for start_local, start_global in ((n_heads, k_global), (n_heads + len(shard.kv_heads), v_global)):
        for j, head in enumerate(shard.kv_heads):
            if head in shared:
                shared_at.append((shared.index(head), len(segments)))
            owned.append(head in shard.owned_kv_heads)
            segments.append(((start_local + j) * d, start_global + head * d, d))
    return np.array(segments, np.int64), np.array(owned), shared, tuple(shared_at)
