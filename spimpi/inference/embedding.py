"""The embedding: rows split by vocabulary over the tensor ranks, put together as bits (MPI_BOR)."""

from functools import partial
from time import perf_counter

import numpy as np
from mpi4py import MPI

from spimpi.inference import kernels
from spimpi.inference.checkpoint import float32
from spimpi.inference.ledger import INPUT
from spimpi.inference.tensors import HIDDEN


def embed(facts, ids, batch, out) -> None:
    """out[row] = embedding of ids[row], float32. Collective over ctx.tensor."""
    tensor, faults = facts.ctx.tensor, facts.faults
    shard = facts.part.shard.vocabulary()
    mine = (ids >= shard.start) & (ids < shard.stop)
    out[:] = 0
    out[mine] = float32(facts.part.embed[ids[mine] - shard.start])
    bits, keys, ledger = out.view(np.uint32), batch.keys[0], facts.ledger
    slot = ledger.slot_of(batch.microbatch)
    words = ledger.embedded[slot]  # share, result
    if facts.checked:
        start = perf_counter()
        facts.use_ids(batch.step, ids, batch.first_row)
        _fingerprint_looked_up(facts.part.embed, ids, shard, keys, batch.first_row, words)
        ledger.seconds += perf_counter() - start
    if tensor.size > 1:
        if faults is not None and faults.drop("embed", -1, mine.any()):
            out[:] = 0
        facts.watch.enter("allreduce bor", "embed", batch.step, -1)
        tensor.Allreduce(MPI.IN_PLACE, bits, op=MPI.BOR)
    if faults is not None:
        faults.replica("embed", -1, out, batch.first_row)
    if facts.checked:
        start = perf_counter()
        kernels.fingerprint_block(bits, keys, HIDDEN, batch.first_row, 0, out.shape[1], words, 1)
        batch.results.rest_expected[0, INPUT] = words[1] if tensor.size > 1 else words[0]
        ledger.absent[slot] = partial(_zeros, bits.shape, mine, keys, batch.first_row)
        ledger.seconds += perf_counter() - start
    if faults is not None:
        faults.payload("embed", -1, out, batch.first_row)


def _fingerprint_looked_up(table, ids, shard, keys, first_row, words) -> None:
    """words[0] = share of this rank's rows of the embedding, looked up once more."""
    at = np.flatnonzero((ids >= shard.start) & (ids < shard.stop))
    rows = float32(np.take(table, ids[at] - shard.start, axis=0)).view(np.uint32)
    kernels.fingerprint_rows(rows, first_row + at, keys, HIDDEN, words, 0)


def _zeros(shape, mine, keys, first_row) -> np.uint64:
    """The share of this rank's rows where zeros stand in their place."""
    word, rows = np.zeros(1, np.uint64), first_row + np.flatnonzero(mine)
    zeros = np.zeros((rows.size, shape[1]), np.uint32)
    kernels.fingerprint_rows(zeros, rows, keys, HIDDEN, word, 0)
    return word[0]
