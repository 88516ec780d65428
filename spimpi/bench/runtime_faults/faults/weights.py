"""Weights: what is read, what is derived from it, and both in memory while the run goes on."""

import numpy as np

from spimpi.bench.runtime_faults.fault import (
    Fault, after, alike, before, larger_maximum, nudge, plus_one, returned,
)  # fmt: skip
from spimpi.bench.runtime_faults.faults.layers import FORWARD, exact, exact_many, weights_of_call

LOADER, EXACT = "spimpi.inference.weights:Loader", "spimpi.inference.exact"
READING, DERIVING, HELD = (
    "weights as they are read", "what is derived from the weights", "derived weights in memory",
)  # fmt: skip
MATRICES = ("qkv", "o", "gate_up", "down")
SHOWS = {"qkv": ("qkv",), "o": ("attn_out", "resid"), "gate_up": ("gate_up", "ffn"),
         "down": ("ffn_out", "hidden")}  # fmt: skip
ANY = tuple(dict.fromkeys(name for names in SHOWS.values() for name in names))


def in_weights(call):
    return call.now.part == "weights"


def _joined(array, rng):
    array = np.array(array)
    nudge(array, rng)
    return array


def _slice(call):
    """The raw weights of one slice, as they were read."""
    return call["slices"][-1].raw


def in_matrix(matrix, attribute, how=nudge, shows=None, **more):
    """A fault of an array of one matrix of the layer that is about to run."""
    words = {"values": "integers", "exponents": "exponents", "projection": "W·r", "r": "r"}

    def strike(call, hand):
        hand.edit(getattr(getattr(weights_of_call(call), matrix), attribute), how)
        call.proceed()

    return Fault(
        f"{words[attribute]} of {matrix} in memory", HELD, FORWARD, strike,
        shows or (*SHOWS[matrix], "weights"), fits=exact, **more,
    )  # fmt: skip


_MATRIX_MAXIMA = Fault(
    "row maxima of a split matrix, as reduced", DERIVING, f"{LOADER}._global_maxima",
    returned(lambda maxima, rng: _larger(maxima, rng)),
    ("attn_out", "resid", "ffn_out", "hidden", "weights"), fits=exact_many,
)  # fmt: skip


def _larger(maxima, rng):
    maxima = np.array(maxima)
    larger_maximum(maxima, rng)
    return maxima


FAULTS = (
    Fault("weights between their reading and their scaling", DERIVING,
          "spimpi.inference.weights:joined", returned(_joined), (*ANY, "logits", "weights")),
    Fault("raw weights in memory, before they are scaled", DERIVING, f"{LOADER}._matrix",
          before(_slice), (*ANY, "logits", "weights")),
    Fault("norm weights between their fingerprint and their use", READING, f"{LOADER}._layer",
          after(lambda call: call.result.attn_norm), ("qkv", "resid", "weights")),
    Fault("the embedding table between its fingerprint and its use", READING, f"{LOADER}.load",
          after(lambda call: call.result.embed[5:16]), ("embed", "weights"),
          lambda call: call.owner.ctx.is_first_stage),
    Fault("row maxima of a matrix, before it is scaled", DERIVING, f"{EXACT}:weight_absmax",
          returned(_larger), (*ANY, "logits", "weights"), in_weights, fits=exact),
    Fault("scaled weights before W·r is taken", DERIVING, f"{EXACT}:quantize_weights",
          after(lambda call: call.result[0]), (*ANY, "logits", "weights"), in_weights,
          fits=exact),
    Fault("exponents of weights as they are made", DERIVING, f"{EXACT}:quantize_weights",
          after(lambda call: call.result[1], how=plus_one), (*ANY, "logits", "weights"), in_weights,
          fits=exact),
    Fault("W·r as it is made", DERIVING, f"{EXACT}:project_weights",
          after(lambda call: call.result[0]), (*ANY, "logits", "weights"), in_weights, fits=exact,
          harmless=True),
    _MATRIX_MAXIMA, alike(_MATRIX_MAXIMA),
    Fault("a tensor of the checkpoint as this rank reads it", READING,
          "spimpi.inference.checkpoint_seeded:SeededCheckpoint.read",
          after(lambda call: call.result), ("weights",), in_weights),
    Fault("the second read of a tensor", READING, "spimpi.inference.weight_check:xor_flat",
          before("words"), ("weights",), harmless=True),
    *(in_matrix(matrix, "values", shows=(SHOWS[matrix][0],)) for matrix in MATRICES),
    *(in_matrix(matrix, "exponents", plus_one) for matrix in MATRICES),
    *(in_matrix(matrix, "projection", shows=(SHOWS[matrix][0],), harmless=True)
      for matrix in MATRICES),
)  # fmt: skip
