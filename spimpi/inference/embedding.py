"""The embedding: rows split by vocabulary over the tensor ranks, put together as bits (MPI_BOR)."""

from time import perf_counter

import numpy as np
from mpi4py import MPI

from spimpi.checks.assembled import compare_assembled
from spimpi.inference import kernels
from spimpi.inference.checkpoint import float32
from spimpi.inference.layer_checks import INPUT
from spimpi.inference.tensors import HIDDEN
from spimpi.trace.schema import Established, Op, Stage


def embed(facts, ids, batch, out) -> None:
    """out[row] = embedding of ids[row], float32. Collective over ctx.tensor."""
    tensor, faults = facts.ctx.tensor, facts.faults
    shard = facts.part.shard.vocabulary()
    mine = (ids >= shard.start) & (ids < shard.stop)
    out[:] = 0
    out[mine] = float32(facts.part.embed[ids[mine] - shard.start])
    bits, keys = out.view(np.uint32), batch.keys[0]
    share, result = np.zeros((2, 1), np.uint64)
    start = perf_counter()
    if tensor.size > 1:
        if facts.checked:
            kernels.fingerprint_chosen_rows(bits, mine, keys, HIDDEN, batch.first_row, share, 0)
        if faults is not None and faults.drop("embed", -1, mine.any()):
            out[:] = 0
        facts.watch.enter("allreduce bor", "embed", batch.step, -1)
        tensor.Allreduce(MPI.IN_PLACE, bits, op=MPI.BOR)
    if faults is not None:
        faults.replica("embed", -1, out, batch.first_row)
    if facts.checked:
        kernels.fingerprint_block(bits, keys, HIDDEN, batch.first_row, 0, out.shape[1], result, 0)
        batch.results.rest_expected[0, INPUT] = result[0]
        if tensor.size > 1:
            def zeros():
                empty, word = np.zeros_like(bits), np.zeros(1, np.uint64)
                kernels.fingerprint_chosen_rows(
                    empty, mine, keys, HIDDEN, batch.first_row, word, 0
                )
                return word[0]

            found = compare_assembled(facts.ctx.records, tensor, share[0], result[0], zeros)
            facts.recorder.one(
                "embed", Op.ALLREDUCE_BOR, Stage.TENSOR, Established.MOVED | Established.AGREED,
                result[0], found.expected, found.wrong, t_start=start, step=batch.step,
                microbatch=batch.microbatch, repeat=facts.repeat, bytes=out.nbytes,
                peer=facts.world_rank(found.rank),
            )  # fmt: skip
    if faults is not None:
        faults.payload("embed", -1, out, batch.first_row)
