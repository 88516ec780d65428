"""Program order: which of many checks of many ranks comes first."""

import numpy as np

from spimpi.trace.schema import Op, Stage

# Within one tensor: what names the rank at fault comes before what sees the consequence.
_OPS = (
    Op.NONFINITE, Op.MATMUL, Op.AT_REST, Op.ALLREDUCE_MAX, Op.ALLREDUCE_MIN, Op.ALLREDUCE_SUM,
    Op.ALLREDUCE_BOR, Op.ALLREDUCE_BXOR, Op.REDUCE_SCATTER, Op.ALLGATHER, Op.GATHER, Op.SCATTER,
    Op.ALLTOALL, Op.RING, Op.BROADCAST, Op.AGREEMENT, Op.HANDOFF, Op.MESSAGE, Op.COLOURS,
    Op.CONTENT,
)  # fmt: skip
_PHASES = {Stage.FABRIC: 0, Stage.WEIGHTS: 1}
_INFERENCE = 2
_AFTER_LAYERS = np.iinfo(np.int32).max


def program_order(events: np.ndarray, ranks: np.ndarray, first_layered: int) -> np.ndarray:
    """Positions that sort failures in program order.

    Fabric and weights come before the inference, which goes by step, layer and tensor (rows of
    /tensors stand in program order). A tensor of no layer comes before the layers or after them:
    ``first_layered`` is the first row of /tensors that has a layer.
    """
    phase = np.full(len(events), _INFERENCE)
    for stage, number in _PHASES.items():
        phase[events["stage"] == stage] = number
    layer = events["layer"].astype(np.int64)
    after = (phase == _INFERENCE) & (layer < 0) & (events["tensor"] >= first_layered)
    layer[after] = _AFTER_LAYERS
    op_rank = np.array([_OPS.index(op) for op in Op] + [len(_OPS)])
    op = op_rank[np.minimum(events["op"], len(Op))]
    keys = (events["repeat"], phase, events["step"], layer, events["tensor"], op)
    keys += (events["microbatch"], ranks)
    return np.lexsort(keys[::-1])


def first_layered_tensor(rows: np.ndarray) -> int:
    """First row of /tensors that has a layer, of these events; a large number where none has."""
    outside = (rows["stage"] == Stage.FABRIC) | (rows["stage"] == Stage.WEIGHTS)
    layered = rows["tensor"][(rows["layer"] >= 0) & ~outside]
    return int(layered.min()) if len(layered) else np.iinfo(np.uint16).max
