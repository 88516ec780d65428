"""The tensors of a run that are checked: their names, and where their keys stand.

``Keys`` derives the stream keys of one step for all layers at once: 64 ranks on few cores cannot
afford to do that in Python for every tensor.
"""

from dataclasses import dataclass

import numpy as np

from spimpi.fingerprint.tag import CONTENT, GOLDEN, LINEAR, MASK, VERSION, absorb, mix

# Positions in a row of keys.
HIDDEN, QKV, ATTN, RESID, FFN, ATTN_OUT, FFN_OUT, ATTN_MAX, FFN_MAX = range(9)
QK_NORMED, QK_SUM, QK_MAX = range(9, 12)  # of models with a QK norm
LAYER_TENSORS = ("hidden", "qkv", "attn", "resid", "ffn", "attn_out", "ffn_out", "attn_max",
                 "ffn_max", "qk_normed", "qk_sum", "qk_max")  # fmt: skip
# Tensors that are fingerprinted when made and again after their last use, as results hold them.
REST = ("input", "qkv", "attn", "resid", "ffn", "attn_out", "ffn_out", "qk_sum", "qk_normed")
# Products of a layer, in program order.
PRODUCTS = ("qkv", "scores", "attn", "attn_out", "gate_up", "ffn_out")
# What is scaled to integers, in the order of the counts of rows with NaN or Inf; "qkv" only with a
# QK norm.
NONFINITE = ("input", "attn", "resid", "ffn", "qkv")

# Fingerprints that a golden run writes down for each layer, in program order.
GOLDEN_LAYER = ("qkv", "attn", "resid", "ffn", "hidden")
GOLDEN_ENDS = ("embed", "logits", "tokens")

# All tensors of the inference in program order, as `--inject` and the trace name them.
PROGRAM = ("rotary", "prompts", "embed", "qkv", "qk_max", "qk_sum", "qk_normed", "kv", "scores", "attn",
           "attn_max", "attn_out", "resid", "gate_up", "ffn", "ffn_max", "ffn_out", "hidden",
           "last_rows", "logits", "tokens")  # fmt: skip


def program_tensors(qk_norm: bool) -> list[str]:
    """Those of PROGRAM that a model has."""
    return [name for name in PROGRAM if qk_norm or not name.startswith("qk_")]


def golden_columns(n_layers: int) -> list[tuple[str, int]]:
    """(tensor, layer) of each column of a golden table, in program order."""
    columns = [("embed", -1)]
    columns += [(name, layer) for layer in range(n_layers) for name in GOLDEN_LAYER]
    return columns + [("logits", -1), ("tokens", -1)]


def _prefix(seed: int, domain: int, name: str) -> int:
    """A stream key after the tensor's name, before layer and step."""
    text = name.encode()
    key = mix((seed + GOLDEN) & MASK)
    for word in (VERSION, domain, len(text)):
        key = absorb(key, word)
    for i in range(0, len(text), 8):
        key = absorb(key, int.from_bytes(text[i : i + 8], "little"))
    return key


@dataclass(frozen=True)
class Widths:
    """Columns of the global two-dimensional tensors of a layer."""

    hidden: int
    qkv: int
    attn: int
    ffn: int

    @classmethod
    def of(cls, config):
        heads = config.n_heads + 2 * config.n_kv_heads
        return cls(
            config.hidden_size,
            heads * config.head_dim,
            config.n_heads * config.head_dim,
            config.intermediate_size,
        )


class Keys:
    """Stream keys of a stage's layer tensors: ``of_step`` gives one row a layer.

    Row 0 belongs to the layer before the stage's first (its output is the stage's input); for
    layer -1 that output is ``embed``.
    """

    def __init__(self, seed: int, config, layers: range):
        self.seed, self.widths = seed, Widths.of(config)
        self.layers = np.arange(layers.start - 1, layers.stop, dtype=np.int64)
        domains = [CONTENT] * 5 + [LINEAR] * 2 + [CONTENT] * 3 + [LINEAR, CONTENT]
        self.prefixes = np.array(
            [_prefix(seed, d, n) for d, n in zip(domains, LAYER_TENSORS)], np.uint64
        )
        self._shapes: dict[int, np.ndarray] = {}
        self.embed_prefix = np.array([_prefix(seed, CONTENT, "embed")], np.uint64)

    def of_step(self, step: int, n_rows: int) -> np.ndarray:
        """uint64 [layers + 1, tensors] for a step that has ``n_rows`` rows globally."""
        from spimpi.inference.kernels import stream_keys

        if n_rows not in self._shapes:
            self._shapes[n_rows] = self._shapes_of(n_rows)
        shapes = self._shapes[n_rows]
        keys = np.empty((self.layers.size, len(LAYER_TENSORS)), np.uint64)
        stream_keys(self.prefixes, self.layers, step, shapes, keys)
        if self.layers[0] == -1:
            stream_keys(self.embed_prefix, self.layers[:1], step, shapes, keys[:1, HIDDEN:])
        return keys

    def _shapes_of(self, n_rows: int) -> np.ndarray:
        """Rows of (item size, number of axes, dim 0, dim 1), one a tensor."""
        w = self.widths
        columns = (w.hidden, w.qkv, w.attn, w.hidden, w.ffn, w.hidden, w.hidden)
        shapes = [(4, 2, n_rows, c) for c in columns[:5]]
        shapes += [(8, 2, n_rows, c) for c in columns[5:]]
        shapes += [(4, 1, n_rows, 0)] * 2
        shapes += [(4, 2, n_rows, w.qkv), (8, 2, n_rows, 2), (4, 2, n_rows, 2)]
        return np.array(shapes, np.int64)
