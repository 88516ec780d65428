"""The weights check: what the ranks read XORs to the fingerprints of the checkpoint's tensors.

The expected fingerprints come from a manifest, or from a second read, cut by bytes over all ranks
instead of by owner, through other code: the same read twice would prove nothing.
"""

from time import perf_counter

import numpy as np
from mpi4py import MPI

from spimpi.fingerprint import xor_flat
from spimpi.fingerprint.tag import CONTENT, Tag
from spimpi.inference.weights import TIED_COPY, layer_norms
from spimpi.reduction import empty_records, reduce_fingerprints
from spimpi.trace.schema import Established, Op, Stage

SOURCE_OF_COPY = "model.embed_tokens.weight"


def weight_names(checkpoint, config, grid) -> list[str]:
    """Tensors of the weights check; a tied head on a stage of its own is one more."""
    names = list(checkpoint.tensors)
    if config.tie_word_embeddings and grid.pp > 1:
        names.append(TIED_COPY)
    return names


def second_read(ctx, checkpoint) -> dict[str, int]:
    """Share of every tensor's fingerprint in this rank's byte range of the checkpoint. Local."""
    keys = {
        name: Tag(ctx.seed, name).key(CONTENT, record.shape, record.itemsize)
        for name, record in checkpoint.tensors.items()
    }
    shares = dict.fromkeys(checkpoint.tensors, 0)
    for name, first, words in checkpoint.pieces(ctx.world.rank, ctx.world.size):
        shares[name] ^= xor_flat(words, keys[name], first)
    return shares


def from_rank_0(ctx, names, words) -> dict[str, int]:
    """Words that are known beforehand, as shares over the world: rank 0's count. Local."""
    return {name: words[name] if ctx.rank == 0 else 0 for name in names}


def check_weights(ctx, config, checkpoint, loader, expected_shares, recorder, known=False) -> int:
    """Compare what was read with what was expected, an event a tensor that this rank holds.

    ``expected_shares``: XOR over the world to the expected words, which ``known`` says were known
    beforehand. Returns failures here. Collective over the world. Where a tensor differs, its
    holders read their slices once more, and those whose bits changed are named.
    """
    part, again = loader.part, loader.read_again
    names = weight_names(checkpoint, config, ctx.grid)
    shares = {n: expected_shares[SOURCE_OF_COPY if n == TIED_COPY else n] for n in names}
    failed = compare_slices(ctx, names, part, shares, again, recorder, known)
    if ctx.tensor.size > 1:
        universe = copy_universe(config, ctx.layers, ctx.is_last_stage, part.shard)
        failed += check_copies(ctx, universe, part, again, recorder)
    return failed + _check_maxima(ctx, part, recorder)


def compare_slices(ctx, names, held, expected_shares, is_intact, recorder, known, step=0) -> int:
    """What the ranks of a replica hold of each tensor XORs to the expected word.

    ``held``: shares and bytes_of by name; ``is_intact(name)``: whether this rank's slice of a
    failing tensor, made again, is what it holds. Returns failures here. Collective over the world.
    """
    start = perf_counter()
    found = reduce_fingerprints(ctx.replica, [held.shares.get(n, 0) for n in names])
    expected = reduce_fingerprints(ctx.world, [expected_shares[n] for n in names])
    differs = np.array([f != e for f, e in zip(found, expected)], np.uint8)
    anywhere = np.array(reduce_flags(ctx.world, differs))
    failing = [name for name, bad in zip(names, anywhere) if bad]
    culprits = _name_holders(ctx, ctx.replica, failing, held, is_intact) if failing else {}
    seconds = (perf_counter() - start) / max(len(held.shares), 1)
    kinds = Established.MOVED | (Established.EXPECTED if known else Established(0))
    for i, name in enumerate(names):
        if name in held.shares:
            recorder.one(
                name, Op.CONTENT, Stage.WEIGHTS, kinds, found[i], expected[i],
                bool(differs[i]), t_start=perf_counter() - seconds, bytes=held.bytes_of[name],
                layer=_layer_of(name), step=step,
                peer=culprits.get(name, -1) if differs[i] else -1,
            )  # fmt: skip
    return int(differs.sum())


def reduce_flags(comm, flags: np.ndarray) -> np.ndarray:
    """Logical OR of flags over the ranks. Collective."""
    result = np.empty_like(flags)
    comm.Allreduce(flags, result, op=MPI.MAX)
    return result


def _layer_of(name: str) -> int:
    pieces = name.split(".")
    return int(pieces[2]) if len(pieces) > 2 and pieces[1] == "layers" else -1


def _name_holders(ctx, comm, failing, held, is_intact) -> dict[str, int]:
    """The lowest world rank whose slice of a failing tensor comes out differently now.

    Collective over ``comm``, whose ranks all give the same names.
    """
    own = np.full(len(failing), ctx.world.size, np.int64)
    for i, name in enumerate(failing):
        if name in held.shares and not is_intact(name):
            own[i] = ctx.world.rank
    lowest = np.empty_like(own)
    comm.Allreduce(own, lowest, op=MPI.MIN)
    return {n: int(r) for n, r in zip(failing, lowest) if r < ctx.world.size}


def shared_heads(config, shard) -> list[int]:
    """The key/value heads that several tensor ranks hold."""
    return [h for h in range(config.n_kv_heads) if len(shard.holders(h)) > 1]


def copy_universe(config, stage_layers, is_last_stage, shard) -> list[tuple[str, int]]:
    """(tensor, key/value head or -1) of all that several tensor ranks of a stage hold."""
    copies = []
    shared = shared_heads(config, shard)
    for layer in stage_layers:
        prefix = f"model.layers.{layer}."
        for name in layer_norms(config):
            copies.append((f"{prefix}{name}.weight", -1))
        for name in ("k_proj", "v_proj", "k_norm")[: 3 if config.qk_norm else 2]:
            copies += [(f"{prefix}self_attn.{name}.weight", head) for head in shared]
    if is_last_stage:
        copies.append(("model.norm.weight", -1))
    return copies


def check_copies(ctx, universe, held, is_intact, recorder, step=0) -> int:
    """What several tensor ranks hold agrees. Collective over ctx.tensor.

    ``universe``: (tensor, key/value head or -1) of all such copies of the stage; ``held.copies``:
    the words of those that this rank has. Returns failures here.
    """
    start = perf_counter()
    records = empty_records(len(universe))
    own = [i for i, copy in enumerate(universe) if copy in held.copies]
    for i in own:
        word = np.uint64(held.copies[universe[i]])
        records[i]["every"], records[i]["none"] = word, ~word
    merged = ctx.records.merge(ctx.tensor, records)
    wrong = merged["every"] != ~merged["none"]
    failing = sorted({universe[i][0] for i in np.flatnonzero(wrong)})
    culprits = _name_holders(ctx, ctx.tensor, failing, held, is_intact) if failing else {}
    seconds = (perf_counter() - start) / max(len(own), 1)
    for i in own:
        name, _ = universe[i]
        recorder.one(
            name, Op.AGREEMENT, Stage.WEIGHTS, Established.AGREED, records[i]["every"],
            merged[i]["every"], bool(wrong[i]), t_start=perf_counter() - seconds,
            layer=_layer_of(name), bytes=8, step=step,
            peer=culprits.get(name, -1) if wrong[i] else -1,
        )  # fmt: skip
    return int(wrong[own].sum())


def _check_maxima(ctx, part, recorder) -> int:
    """The global row maxima of split matrices: right on every rank, and the same. Collective."""
    if not part.maxima:
        return 0
    start = perf_counter()
    records = empty_records(len(part.maxima))
    for record, (_, _, word, bad) in zip(records, part.maxima):
        record["every"], record["none"] = np.uint64(word), ~np.uint64(word)
        record["count"] = bad
    merged = ctx.records.merge(ctx.tensor, records)
    wrong = (merged["every"] != ~merged["none"]) | (merged["count"] > 0)
    seconds = (perf_counter() - start) / len(part.maxima)
    for (layer, name, word, bad), record, failed in zip(part.maxima, merged, wrong):
        tensor = f"model.layers.{layer}.{'self_attn' if name == 'o_proj' else 'mlp'}.{name}.weight"
        recorder.one(
            tensor, Op.ALLREDUCE_MAX, Stage.WEIGHTS, Established.MOVED | Established.COMPUTED, word,
            record["every"], bool(failed), t_start=perf_counter() - seconds, layer=layer, bytes=8,
            peer=ctx.rank if bad else -1,
        )  # fmt: skip
    return int(wrong.sum())
