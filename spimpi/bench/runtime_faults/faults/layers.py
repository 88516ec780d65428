"""The decoder layers: embedding, norms, scaling, products, sums, residual stream."""

import numpy as np
from mpi4py import MPI

from spimpi.bench.runtime_faults.fault import (
    IN_A_SUM, SCALED_BACK, Fault, after, alike, another_id, before, given, larger_maximum, plus_one,
    swapped_rows,
)  # fmt: skip

LAYERS, EXACT, KERNELS, PRODUCT = (
    f"spimpi.inference.{place}" for place in ("layers:Layers", "exact", "kernels", "product")
)
FORWARD = f"{LAYERS}.forward"
EXACT_LAYERS = "spimpi.inference.layers:ExactLayers"
EMBED, NORM, SCALING, PRODUCTS, SUMS, STREAM = (
    "the embedding", "norms", "row maxima and scaled inputs", "products", "sums over ranks",
    "the residual stream",
)  # fmt: skip


def exact(mode):
    return mode.exact


def many(mode):
    return mode.grid.tp > 1


def llama(mode):
    return not mode.olmo


def olmo(mode):
    return mode.olmo


def exact_many(mode):
    return mode.exact and mode.grid.tp > 1


def in_layer(call):
    return call.now.part == "layer"


def weights_here(call):
    """The weights of the layer that runs (weights.Layer)."""
    stage = call.now.stage
    return stage.part.layers[call.now.layer - stage.ctx.layers.start]


def at_norm(which):
    """The rmsnorm of one of the layer's two norms."""
    return lambda call: in_layer(call) and call["weight"] is getattr(weights_here(call), which)


def of_matrix(*names):
    """Products with a matrix of the layer: ``exact.matmul`` and what follows it."""

    def only(call):
        here = weights_here(call) if in_layer(call) else None
        return here is not None and any(call["wq"] is getattr(here, n).values for n in names)

    return only


def scaling_of(buffer):
    """row_absmax and quantize_rows of a buffer of the workspace, by its name."""

    def only(call):
        if not in_layer(call):
            return False
        space = call.now.stage.space
        return np.shares_memory(call["x"], getattr(space, buffer))

    return only


def finishing(name):
    """finish_projection or finish_partial of one matrix."""

    def only(call):
        return in_layer(call) and call["r"] is getattr(weights_here(call), name).r

    return only


def scaled_back_from(call, hand):
    """Other integers are scaled back than those that were checked: y changes in between.

    The kernel runs twice, on the right y for the words of its check and on the wrong one for what
    is made of it.
    """
    call.proceed()
    words = [call[name].copy() for name in ("found", "expected", "bad")]
    hand.edit(call["y"])
    call.proceed()
    for name, word in zip(("found", "expected", "bad"), words):
        call[name][...] = word


def _changed_id(ids, rng):
    ids = np.array(ids)
    another_id(ids, rng)
    return ids


_EMBED_IDS = Fault(
    "an embedded row's id on one rank of several", EMBED, "spimpi.inference.model:embed",
    given("ids", _changed_id), ("prompts", "embed"), fits=many,
    only=lambda call: call.now.step == 0,
)  # fmt: skip


def _wrong_row(call, hand):
    """A row of the embedding table as it is looked up: each rank's own part, in memory."""
    embed = call["facts"].part.embed
    shard = call["facts"].part.shard.vocabulary()
    ids = [int(i) - shard.start for i in call["ids"] if shard.start <= i < shard.stop]
    if ids:
        hand.edit(embed[ids[int(hand.rng.integers(len(ids)))]])
    call.proceed()


_ATTN_NORMED = Fault(
    "attention's normed input", NORM, f"{KERNELS}:rmsnorm", after("out"), ("qkv",),
    at_norm("attn_norm"), fits=llama,
)  # fmt: skip
_FFN_NORMED = Fault(
    "the FFN's normed input", NORM, f"{KERNELS}:rmsnorm", after("out"), ("gate_up", "ffn"),
    at_norm("ffn_norm"), fits=llama,
)  # fmt: skip
_ATTN_NORM = Fault(
    "weights of the norm before attention, in memory", NORM, FORWARD,
    before(lambda call: weights_of_call(call).attn_norm), ("qkv", "weights"), fits=llama,
)  # fmt: skip
_FFN_NORM = Fault(
    "weights of the norm before the FFN, in memory", NORM, FORWARD,
    before(lambda call: weights_of_call(call).ffn_norm), ("gate_up", "ffn", "weights"), fits=llama,
)  # fmt: skip
_AFTER_ATTN_NORM = Fault(
    "weights of the norm after attention, in memory", NORM, FORWARD,
    before(lambda call: weights_of_call(call).attn_norm), ("resid", "weights"), fits=olmo,
)  # fmt: skip
_AFTER_FFN_NORM = Fault(
    "weights of the norm after the FFN, in memory", NORM, FORWARD,
    before(lambda call: weights_of_call(call).ffn_norm), ("hidden", "weights"), fits=olmo,
)  # fmt: skip


def weights_of_call(call):
    return call.owner.part.layers[call["i"]]


_EPS = Fault(
    "eps of a norm", NORM, f"{KERNELS}:rmsnorm", given("eps", lambda eps, rng: eps + 0.25),
    ("qkv", "gate_up", "ffn", "resid", "hidden"), in_layer,
)  # fmt: skip

_MAXIMA = Fault(
    "row maxima of a normed input", SCALING, f"{EXACT}:row_absmax",
    after("out", how=larger_maximum), ("qkv", "gate_up", "ffn"), scaling_of("normed"), fits=llama,
)  # fmt: skip
_FFN_MAXIMA = Fault(
    "row maxima of the residual stream before the FFN", SCALING, f"{EXACT}:row_absmax",
    after("out", how=larger_maximum), ("gate_up", "ffn"), scaling_of("resid"), fits=olmo,
)  # fmt: skip
_ATTN_MAXIMA = Fault(
    "own row maxima of attn, before they are reduced", SCALING, f"{EXACT}:row_absmax",
    after("out", how=larger_maximum), ("attn", "attn_out", "attn_max", "resid"), scaling_of("attn"),
)  # fmt: skip
_FFN_OWN = Fault(
    "own row maxima of ffn, before they are reduced", SCALING, f"{EXACT}:row_absmax",
    after("out", how=larger_maximum), ("ffn", "ffn_out", "ffn_max", "hidden"), scaling_of("ffn"),
)  # fmt: skip
_REDUCED_MAXIMA = Fault(
    "reduced row maxima, as they are used", SCALING, f"{EXACT_LAYERS}.global_maxima",
    after("maxima", how=larger_maximum),
    ("attn_max", "ffn_max", "qk_max", "attn_out", "ffn_out", "qk_sum", "resid", "hidden",
     "qk_normed"),
    fits=exact_many,
)  # fmt: skip
_SCALED = Fault(
    "scaled integers of a normed input", SCALING, f"{EXACT}:quantize_rows", after("out"),
    ("qkv", "gate_up", "ffn"), scaling_of("normed"), fits=llama,
)  # fmt: skip
_SCALED_X = Fault(
    "scaled integers of a layer's input", SCALING, f"{EXACT}:quantize_rows", after("out"),
    ("gate_up", "ffn"), scaling_of("resid"), fits=olmo,
)  # fmt: skip
_EXPONENTS = Fault(
    "exponents of the rows of a product's input", SCALING, f"{EXACT}:quantize_rows",
    after("exps", how=plus_one),
    ("qkv", "attn_out", "gate_up", "ffn", "ffn_out", "resid", "hidden"), in_layer,
)  # fmt: skip


def _added_wrong(call, hand):
    """What is added to the residual stream changes between its word and the sum: the kernel runs
    twice, on the right input for the words of its checks and on the wrong one for what is made."""
    call.proceed()
    names = ("found", "held", "product_found", "product_bad")
    words = [call[name].copy() for name in names]
    hand.edit(call["delta"])
    call.proceed()
    for name, word in zip(names, words):
        call[name][...] = word


def _gated_wrong(call, hand):
    """gate_up changes inside swiglu, after its word was compared."""
    call.proceed()
    names = ("held", "product_found", "product_bad")
    words = [call[name].copy() for name in names]
    hand.edit(call["gate_up"])
    call.proceed()
    for name, word in zip(names, words):
        call[name][...] = word


_ADDED = Fault(
    "the residual sum computed wrong", STREAM, f"{KERNELS}:add_residual", _added_wrong,
    ("resid", "hidden"), in_layer, why=IN_A_SUM,
)  # fmt: skip


def _delta_after(which):
    def strike(call, hand):
        call.proceed()
        hand.edit(call["b"].space.delta)

    return Fault(
        f"{which[0]} after its sum, before it is added", STREAM, f"{EXACT_LAYERS}._reduce", strike,
        (which[1], which[0]), lambda call: call["tensor"] == which[0], fits=exact,
    )  # fmt: skip


_DELTA_0, _DELTA_1 = _delta_after(("attn_out", "resid")), _delta_after(("ffn_out", "hidden"))


def reduction(op):
    """The layers' reductions by one MPI operation."""
    return lambda call: in_layer(call) and call.kwargs.get("op") == op


def of_embedding(call):
    return call.now.part == "step" and call.kwargs.get("op") == MPI.BOR


_SUM = Fault(
    "the result of a sum", SUMS, "tensor.Allreduce", after(1),
    ("attn_out", "ffn_out", "qk_sum"), reduction(MPI.SUM), fits=many,
)  # fmt: skip
_DROPPED = Fault(
    "a contribution to a sum dropped", SUMS, "tensor.Allreduce",
    lambda call, hand: _without(call, hand), ("attn_out", "ffn_out", "qk_sum"),
    reduction(MPI.SUM), fits=many,
)  # fmt: skip
_MAX = Fault(
    "the result of a maximum", SUMS, "tensor.Allreduce",
    after(1, how=lambda array, rng: _wrong_max(array, rng)),
    ("attn_max", "ffn_max", "qk_max"), reduction(MPI.MAX), fits=exact_many,
)  # fmt: skip


def _without(call, hand):
    sent = call[0]
    call[0] = hand.swapped_for(sent, np.zeros_like(sent))
    call.proceed()


def _doubled(call, hand):
    sent = call[0]
    call[0] = hand.swapped_for(sent, sent * 2)
    call.proceed()


def _wrong_max(array, rng):
    flat = array.reshape(-1)
    if flat.size:
        flat[int(rng.integers(flat.size))] += np.uint64(1 << (32 + 24))


FAULTS = (
    Fault("a row of the embedding table, in memory", EMBED, "spimpi.inference.model:embed",
          _wrong_row, ("embed", "weights")),
    _EMBED_IDS,
    Fault("the embedding's rows after their reduction", EMBED, "tensor.Allreduce",
          after(1), ("embed",), of_embedding, fits=many),
    Fault("the embedding's rows after their reduction, alike on all tensor ranks", EMBED,
          "tensor.Allreduce", after(1), ("embed",),
          of_embedding, fits=many, alike=True),
    Fault("embedded rows before their layers", EMBED, "spimpi.inference.model:embed", after("out"),
          ("embed",)),
    _ATTN_NORMED, alike(_ATTN_NORMED), _FFN_NORMED, alike(_FFN_NORMED),
    _ATTN_NORM, alike(_ATTN_NORM), _FFN_NORM, alike(_FFN_NORM),
    _AFTER_ATTN_NORM, alike(_AFTER_ATTN_NORM), _AFTER_FFN_NORM, alike(_AFTER_FFN_NORM),
    _EPS, alike(_EPS),
    _MAXIMA, alike(_MAXIMA), _FFN_MAXIMA, alike(_FFN_MAXIMA), _ATTN_MAXIMA, _FFN_OWN,
    _REDUCED_MAXIMA, alike(_REDUCED_MAXIMA),
    _SCALED, alike(_SCALED), _SCALED_X, alike(_SCALED_X),
    Fault("scaled integers of attn", SCALING, f"{EXACT}:quantize_rows", after("out"),
          ("attn_out", "attn", "resid"), scaling_of("attn")),
    Fault("scaled integers of ffn", SCALING, f"{EXACT}:quantize_rows", after("out"),
          ("ffn_out", "ffn", "hidden"), scaling_of("ffn")),
    _EXPONENTS, alike(_EXPONENTS),
    *(Fault(f"the product {tensor}", PRODUCTS, f"{EXACT}:matmul", after("out"), (tensor,),
            of_matrix(matrix))
      for tensor, matrix in (("qkv", "qkv"), ("attn_out", "o"), ("gate_up", "gate_up"),
                             ("ffn_out", "down"))),
    *(Fault(f"the product {tensor}, before it is scaled back", PRODUCTS, f"{PRODUCT}:{kernel}",
            scaled_back_from, shows, finishing(matrix), fits=fits, why=SCALED_BACK)
      for tensor, matrix, kernel, shows, fits in (
          ("qkv", "qkv", "finish_projection", ("qkv",), exact),
          ("gate_up", "gate_up", "finish_projection", ("gate_up", "ffn"), exact),
          ("attn_out", "o", "finish_partial", ("attn_out", "resid"), exact_many),
          ("ffn_out", "down", "finish_partial", ("ffn_out", "hidden"), exact_many))),
    Fault("the product attn_out of one rank, before it is scaled back", PRODUCTS,
          f"{PRODUCT}:finish_projection", scaled_back_from, ("attn_out", "resid"), finishing("o"),
          fits=lambda mode: mode.exact and mode.grid.tp == 1, why=SCALED_BACK),
    Fault("the product ffn_out of one rank, before it is scaled back", PRODUCTS,
          f"{PRODUCT}:finish_projection", scaled_back_from, ("ffn_out", "hidden"),
          finishing("down"), fits=lambda mode: mode.exact and mode.grid.tp == 1, why=SCALED_BACK),
    Fault("qkv in memory", PRODUCTS, f"{PRODUCT}:finish_projection", after("out"), ("qkv",),
          finishing("qkv")),
    Fault("gate_up in memory", PRODUCTS, f"{KERNELS}:swiglu", before("gate_up"),
          ("gate_up", "ffn")),
    Fault("ffn in memory", PRODUCTS, f"{KERNELS}:swiglu", after("out"), ("ffn",)),
    _SUM, alike(_SUM), _DROPPED,
    Fault("a contribution to a sum counted twice", SUMS, "tensor.Allreduce", _doubled,
          ("attn_out", "ffn_out", "qk_sum"), reduction(MPI.SUM), fits=many),
    Fault("an own share of a sum in memory", SUMS, "tensor.Allreduce", before(0),
          ("attn_out", "ffn_out", "qk_sum"), reduction(MPI.SUM), fits=many),
    _MAX, alike(_MAX),
    Fault("SwiGLU computed wrong", PRODUCTS, f"{KERNELS}:swiglu", _gated_wrong,
          ("gate_up", "ffn"), why=IN_A_SUM),
    _ADDED, alike(_ADDED),
    _DELTA_0, alike(_DELTA_0), _DELTA_1, alike(_DELTA_1),
    Fault("the layer's input before it is added", STREAM, f"{KERNELS}:add_residual", before("x"),
          ("hidden", "embed", "resid"), in_layer),
    Fault("the residual stream in memory", STREAM, f"{KERNELS}:add_residual", after("out"),
          ("resid", "hidden"), in_layer),
    Fault("two rows of the residual stream exchanged", STREAM, f"{KERNELS}:add_residual",
          after("out", how=swapped_rows), ("resid", "hidden"), in_layer),
)  # fmt: skip
