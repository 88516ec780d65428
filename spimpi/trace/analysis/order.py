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
FABRIC, WEIGHTS, INFERENCE = range(3)
AFTER_LAYERS = np.iinfo(np.int32).max
# NaN and Inf are met when a tensor is scaled, by row maxima that were reduced before: a corrupted
# maximum is what comes first.
SCALED_BY = {"attn": "attn_max", "ffn": "ffn_max", "qkv": "qk_max"}


def phase_of(events) -> np.ndarray:
    """FABRIC, WEIGHTS or INFERENCE of each event, which follow each other."""
    stage = events["stage"]
    phases = np.full(256, INFERENCE)
    phases[Stage.FABRIC], phases[Stage.WEIGHTS] = FABRIC, WEIGHTS
    return phases[stage]


def only_met(events) -> np.ndarray:
    """Events whose data were as expected, NaN and Inf included: these came from before."""
    return (events["nonfinite"] > 0) & (events["fingerprint"] == events["expected"])


def program_keys(events, first_layered: int, names=()) -> tuple[np.ndarray, ...]:
    """Columns that tell the program order of events, the weightiest first: repetition, phase,
    step, layer, tensor, op.

    Fabric and weights come before the inference, which goes by step, layer and tensor (rows of
    /tensors stand in program order; ``names`` are theirs). A tensor of no layer comes before the
    layers or after them: ``first_layered`` is the first row of /tensors that has a layer.
    ``events``: columns by name, of a Block or a structured array.
    """
    phase = phase_of(events)
    layer = events["layer"].astype(np.int64)
    after = (phase == INFERENCE) & (layer < 0) & (events["tensor"] >= first_layered)
    layer[after] = AFTER_LAYERS
    op_rank = 2 * np.array([_OPS.index(op) for op in Op] + [len(_OPS)])
    op = op_rank[np.minimum(events["op"], len(Op))]
    tensor = events["tensor"].astype(np.int64)
    met = only_met(events) & (phase == INFERENCE)
    if met.any():
        op[met] = 2 * _OPS.index(Op.CONTENT) - 1  # after all that tells where they came from
        rows = {name: row for row, name in enumerate(names)}
        for name, before in SCALED_BY.items():
            if name in rows and before in rows:
                chosen = met & (tensor == rows[name])
                tensor[chosen] = rows[before]
    return events["repeat"], phase, events["step"], layer, tensor, op


def program_order(events, ranks: np.ndarray, first_layered: int, names=()) -> np.ndarray:
    """Positions that sort events in program order (``program_keys``), then by microbatch, rank."""
    keys = program_keys(events, first_layered, names) + (events["microbatch"], ranks)
    return np.lexsort(keys[::-1])


def first_layered_tensor(events) -> int:
    """First row of /tensors that has a layer, of these events; a large number where none has."""
    layered = events["tensor"][(events["layer"] >= 0) & (phase_of(events) == INFERENCE)]
    return int(layered.min()) if len(layered) else np.iinfo(np.uint16).max
