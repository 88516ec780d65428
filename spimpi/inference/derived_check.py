"""The check of what was derived from the weights: the scaled integers and exponents in memory.

Their fingerprints, in terms of the checkpoint's own tensors, against those that were known
beforehand: whenever asked, for they stay in memory as long as the run goes on.
"""

from dataclasses import dataclass, field

import numpy as np
from mpi4py import MPI

from spimpi.inference.derived import derived_names, scaled
from spimpi.inference.weight_check import (
    SOURCE_OF_COPY,
    check_copies,
    compare_slices,
    from_rank_0,
    shared_heads,
)
from spimpi.inference.weights import slab_of
from spimpi.reduction import PATIENCE, together

JOINED = (
    ("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("o", ("self_attn.o_proj",)),
    ("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    ("down", ("mlp.down_proj",)),
)
SPLIT_BY_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")  # each tensor rank has all exponents
HEADS_SHARED = ("self_attn.k_proj", "self_attn.v_proj")


@dataclass
class _Slices:
    """A rank's shares of the derived tensors, as weights.Part keeps them of the raw ones."""

    shares: dict[str, int] = field(default_factory=dict)
    bytes_of: dict[str, int] = field(default_factory=dict)
    copies: dict[tuple[str, int], int] = field(default_factory=dict)


def multiplied(config) -> list[str]:
    """The checkpoint's tensors that matmuls take, in program order."""
    layers = [
        f"model.layers.{layer}.{name}.weight"
        for layer in range(config.n_layers)
        for _, names in JOINED
        for name in names
    ]
    return [*layers, SOURCE_OF_COPY if config.tie_word_embeddings else "lm_head.weight"]


def check_derived(ctx, config, loader, expected, recorder, step: int = 0) -> None:
    """Compare the integers and exponents in memory with what was expected, an event a tensor here.

    ``expected``: the words of all derived tensors, by name; rank 0's count. ``step``: after which
    this is asked. Collective over the world. Where a tensor differs, its holders derive their
    slices once more from the checkpoint, and those that hold something else are named.
    """
    names = [derived for name in multiplied(config) for derived in derived_names(name)]
    slices = _Slices()
    reads = _reads(loader)
    for name, integers, exponents in _held(loader, reads):
        _take(loader, slices, reads[name], integers, exponents)

    def is_intact(derived) -> bool:
        again = _Slices()
        read = next(reads[name] for name in reads if derived in derived_names(name))
        _take(loader, again, read, *_derive_again(loader, read))
        kept = ({k: v for k, v in s.copies.items() if k[0] == derived} for s in (slices, again))
        return slices.shares[derived] == again.shares[derived] and next(kept) == next(kept)

    shares = from_rank_0(ctx, names, expected)
    compare_slices(ctx, names, slices, shares, is_intact, recorder, True, step)
    if ctx.tensor.size > 1:
        universe = _copies(config, ctx.layers, loader.part.shard)
        check_copies(ctx, universe, slices, is_intact, recorder, step)


def _reads(loader) -> dict[str, tuple]:
    """(tensor, rows, columns, key/value heads) of what this rank read, by name."""
    return {name: (name, rows, cols, kv) for _, name, rows, cols, kv, *_ in loader.reads}


def _held(loader, reads):
    """(tensor, integers, exponents) of every matrix slice here, cut where tensors were joined."""
    part = loader.part
    for layer, weights in zip(loader.ctx.layers, part.layers):
        for attribute, names in JOINED:
            matrix, at = getattr(weights, attribute), 0
            for name in names:
                name = f"model.layers.{layer}.{name}.weight"
                rows = reads[name][1] or (0, loader.checkpoint.tensors[name].shape[0])
                stop = at + rows[1] - rows[0]
                yield name, matrix.values[at:stop], matrix.exponents[at:stop]
                at = stop
    if part.head is not None:
        tied = loader.config.tie_word_embeddings
        name = SOURCE_OF_COPY if tied else "lm_head.weight"
        yield name, part.head.values, part.head.exponents


def _take(loader, slices, read, integers, exponents) -> None:
    """Fingerprint a slice's integers and exponents."""
    name, rows, cols, kv_heads = read
    shape = loader.checkpoint.tensors[name].shape
    pieces = (integers, slab_of(shape, rows, cols)), (exponents, slab_of(shape[:1], rows, None))
    for derived, (array, slab) in zip(derived_names(name), pieces):
        share, copies = loader.share_of(derived, array, slab, kv_heads)
        slices.shares[derived], slices.bytes_of[derived] = share, array.nbytes
        slices.copies.update(copies)


def _derive_again(loader, read):
    """(integers, exponents) of this rank's slice, from the checkpoint. Collective over ctx.tensor."""
    name, rows, cols, _ = read
    tensor = loader.ctx.tensor
    with together(tensor, PATIENCE):
        raw = loader.checkpoint.read(name, rows, cols)

    def over_ranks(maxima):
        result = np.empty_like(maxima)
        tensor.Allreduce(maxima, result, op=MPI.MAX)
        return result

    n_inputs = loader.checkpoint.tensors[name].shape[1]
    return scaled(raw, n_inputs, over_ranks if cols else None)[:2]


def _copies(config, stage_layers, shard) -> list[tuple[str, int]]:
    """(derived tensor, key/value head or -1) of all that several tensor ranks of a stage hold."""
    shared, copies = shared_heads(config, shard), []
    for layer in stage_layers:
        for name in SPLIT_BY_COLUMNS:
            copies.append((derived_names(f"model.layers.{layer}.{name}.weight")[1], -1))
        for name in HEADS_SHARED:
            for derived in derived_names(f"model.layers.{layer}.{name}.weight"):
                copies += [(derived, head) for head in shared]
    return copies
