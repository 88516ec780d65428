"""Which of many failures comes first in the program, over all ranks."""

import numpy as np

from spimpi.inference.tensors import PROGRAM
from spimpi.trace.schema import Op, Stage

# Within one tensor: what names the rank at fault comes before what only sees the consequence.
OPS = (Op.NONFINITE, Op.MATMUL, Op.AT_REST, Op.ALLREDUCE_MAX, Op.ALLREDUCE_SUM, Op.ALLREDUCE_BOR,
       Op.ALLREDUCE_BXOR, Op.ALLGATHER, Op.BROADCAST, Op.AGREEMENT, Op.HANDOFF, Op.CONTENT)  # fmt: skip
_PHASES = {Stage.FABRIC: 0, Stage.WEIGHTS: 1}
AFTER_LAYERS = ("logits", "tokens")
# NaN and Inf are met when a tensor is scaled, by row maxima that were reduced before: a corrupted
# maximum is what comes first.
SCALED_BY = {"attn": "attn_max", "ffn": "ffn_max", "qkv": "qk_max"}


def order_codes(events: np.ndarray, tensor_names: list[str]) -> np.ndarray:
    """uint64 codes that sort events in program order; equal on all ranks for the same check."""
    codes = np.zeros(events.size, np.uint64)
    for i, event in enumerate(events):
        name = tensor_names[event["tensor"]]
        phase = _PHASES.get(Stage(int(event["stage"])), 2)
        after = phase == 2 and name in AFTER_LAYERS
        layer = 0xFFFF if after else int(event["layer"]) + 1
        op = OPS.index(Op(int(event["op"])))
        if name in SCALED_BY and event["nonfinite"] and event["fingerprint"] == event["expected"]:
            name, op = SCALED_BY[name], len(OPS)
        position = PROGRAM.index(name) if name in PROGRAM else 0
        code = min(int(event["repeat"]), 0xFFF)
        for value, width in (
            (phase, 2),
            (min(int(event["step"]), 0x3FFFF), 18),
            (layer, 16),
            (position, 5),
            (op, 4),
        ):
            code = code << width | value
        codes[i] = code
    return codes
