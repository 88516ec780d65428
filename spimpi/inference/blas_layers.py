"""The decoder layers in float32 BLAS and MPI_SUM of floats, for comparison with the exact ones.

The same steps; checked are what is moved, agreement, and that sums over ranks are within rounding.
"""

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from spimpi.inference import kernels
from spimpi.inference.layers import Layers
from spimpi.inference.ledger import ATTN, ATTN_OUT, FFN
from spimpi.inference.tensors import QK_NORMED as KEY_QK_NORMED
from spimpi.inference.tensors import QKV


class BlasLayers(Layers):
    """Layers in float32 BLAS and MPI_SUM of floats: another split, other bits."""

    exact = False
    float_sums = None  # float_sums.FloatSums, where several tensor ranks are checked

    def sum_over_ranks(self, tensor, i, sent, summed, b):
        super().sum_over_ranks(tensor, i, sent, summed, b)
        if self.float_sums is not None:
            self.float_sums.take(tensor, i, sent, summed, b)

    def _project(self, tensor, i, x, norm, matrix, out, b):
        np.matmul(self._normed(x, norm, b), matrix.values.T, out=out)
        if tensor == "qkv":
            self.fingerprint_qkv(b.results.segments[i], QKV, i, b)

    def _qk_norm(self):
        from spimpi.inference.qk_norm import FloatQKNorm

        return FloatQKNorm(self)

    def fingerprint_qkv(self, words, key, i, b):
        """words = those of qkv's column segments, under the key of QKV or of QK_NORMED."""
        if self.checked:
            start = perf_counter()
            kernels.fingerprint_segments(
                b.space.qkv.view(np.uint32), b.keys[i + 1], key, b.first_row, self.segments,
                self.widths.qkv, words, 0,
            )  # fmt: skip
            b.results.seconds += perf_counter() - start

    def _cache(self):
        shape = (
            self.n_sequences, len(self.part.shard.kv_heads), self.n_positions, self.config.head_dim
        )  # fmt: skip
        return FloatCache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def _attend(self, i, b):
        d, n_heads, cache = self.config.head_dim, self.kv_of_head.size, self.caches[i]
        n_kv = len(self.part.shard.kv_heads)
        heads = b.space.qkv.reshape(b.n_rows, n_heads + 2 * n_kv, d)
        cosines, sines = (table[b.positions][:, None] for table in self.rotary[self.sliding[i]])
        window = self._window(self.sliding[i])
        low, high = heads[:, : n_heads + n_kv, : d // 2], heads[:, : n_heads + n_kv, d // 2 :]
        rotated = np.concatenate(
            [low * cosines - high * sines, high * cosines + low * sines], axis=2
        )
        if self.sequence:
            self._append_gathered(i, b)
        else:
            cache.keys[b.sequences, :, b.positions] = rotated[:, n_heads:]
            cache.values[b.sequences, :, b.positions] = heads[:, n_heads + n_kv :]
        out = b.space.attn.reshape(b.n_rows, n_heads, d)
        scale = np.float32(1 / np.sqrt(d))
        for sequence in np.unique(b.sequences):
            rows = np.flatnonzero(b.sequences == sequence)
            positions = b.positions[rows]
            n_keys = int(positions.max()) + 1
            ages = positions[:, None] - np.arange(n_keys)[None, :]
            masked = (ages < 0) | (ages >= window)
            for head in range(n_heads):
                kv = self.kv_of_head[head]
                scores = rotated[rows, head] @ cache.keys[sequence, kv, :n_keys].T * scale
                scores[masked] = -np.inf
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                out[rows, head] = weights @ cache.values[sequence, kv, :n_keys]
        if self.qk_norm:
            self.fingerprint_qkv(b.results.normed_found[i], KEY_QK_NORMED, i, b)
        else:
            self.fingerprint_qkv(b.results.segments_found[i], QKV, i, b)
        self.fingerprint(b.results.rest_expected[i], ATTN, i, b.space.attn, b)

    def _append_gathered(self, i, b):
        """Keys and values of all sequence ranks' rows, into the cache."""
        rows, kv, _, _ = self._keys_and_values(i, b)
        d, n_kv, cache = self.config.head_dim, len(self.part.shard.kv_heads), self.caches[i]
        heads = kv.reshape(len(kv), 2 * n_kv, d)
        cosines, sines = (table[rows.positions][:, None] for table in self.rotary[self.sliding[i]])
        low, high = heads[:, :n_kv, : d // 2], heads[:, :n_kv, d // 2 :]
        cache.keys[rows.sequences, :, rows.positions] = np.concatenate(
            [low * cosines - high * sines, high * cosines + low * sines], axis=2
        )
        cache.values[rows.sequences, :, rows.positions] = heads[:, n_kv:]
        self.sequence.used(i, kv, self.widths.qkv, b)

    def _reduce(self, tensor, which, i, x, matrix, b):
        space, results = b.space, b.results
        rest = ATTN if which == 0 else FFN
        if not self.many:
            np.matmul(x, matrix.values.T, out=space.delta)
            self.fingerprint(results.rest_found[i], rest, i, x, b)
            return
        sent, summed = space.sent[which], space.summed[which]
        np.matmul(x, matrix.values.T, out=sent)
        self.fingerprint(results.rest_expected[i], ATTN_OUT + which, i, sent, b)
        self.sum_over_ranks(tensor, i, sent, summed, b)
        space.delta[:] = summed
        self.fingerprint(results.rest_found[i], ATTN_OUT + which, i, sent, b)
        self.fingerprint(results.sums_by_tensor[i], ATTN_OUT + which, i, summed, b)
        self.fingerprint(results.rest_found[i], rest, i, x, b)


@dataclass
class FloatCache:
    """Rotated keys and values of one layer in float32."""

    keys: np.ndarray
    values: np.ndarray

    def clear(self):
        """Nothing to reset: positions are overwritten before they are read."""
