"""The whole tensors of a run that did not end, from its checks at rest.

A run of verify writes the fingerprints of its tensors when its inference ends. Before that each
rank's checks at rest hold what its share was made with, and how many bytes that is: where the
shares of a tensor add up to all of its bytes, their XOR is its fingerprint.
"""

import re
from math import prod

import numpy as np

from spimpi.trace.schema import Op, Stage

ENDED = ("verified", "failed", "incomplete")
REPLICATED = ("embed", "resid", "hidden", "tokens")  # every tensor rank has all columns
SPLIT = ("qkv", "attn", "ffn", "logits")
_SHARE = np.dtype([("run", "<u8"), ("place", "<u8"), ("word", "<u8"), ("bytes", "<u8")])
SETTLE = 1 << 20


class Shares:
    """What the ranks of an unfinished run say of its tensors. ``packed``: see contents.py."""

    def __init__(self, trace, packed):
        self.packed, self.rows, self.waiting, self.n_waiting = packed, _none(), [], 0
        facts = trace.attributes
        sizes = dict(re.findall(r"(tp|pp)=(\d+)", str(facts.get("topology", ""))))
        self.tp, pp = int(sizes.get("tp", 1)), int(sizes.get("pp", 1))
        self.n_rows = facts.get("prompt_tokens"), facts.get("prompts")
        # A recovered trace has an end state too, but perhaps no whole tensors.
        ended = facts.get("end_state") in ENDED and not facts.get("recovered")
        self.wanted = "model" in facts and not ended
        self.wanted &= None not in self.n_rows
        # Twice there are a head's keys and values on ranks that share it, and what a stage hands on.
        twice = ["qkv"] * (self.tp > 1) + ["hidden"] * (pp > 1)
        known = [name for name in (*REPLICATED, *SPLIT) if name not in twice]
        names = [tensor.name for tensor in trace.tensors]
        self.known = np.array([name in known for name in names] + [False])
        self.once = np.array([name in REPLICATED for name in names] + [False])
        self.sizes = np.array([_row_size(tensor) for tensor in trace.tensors], np.uint64)
        self.per_step = np.array([tensor.shape[:1] == (-1,) for tensor in trace.tensors], bool)

    def add(self, block) -> None:
        """Take a block's checks at rest."""
        if not self.wanted:
            return
        chosen = (block["op"] == Op.AT_REST) & (block["stage"] == Stage.COMPUTE)
        block = block.where(chosen)
        tensor = np.minimum(block["tensor"], len(self.once) - 1)
        first = block["rank"] % self.tp == 0  # world rank = … · tp + tensor rank
        block = block.where(self.known[tensor] & (first | ~self.once[tensor]))
        block["stage"][:], block["op"][:] = Stage.GOLDEN, Op.CONTENT
        words = self.packed(block)
        shares = np.empty(len(words), _SHARE)
        shares["run"], shares["place"] = words["run"], words["place"]
        shares["word"], shares["bytes"] = block["expected"], block["bytes"]
        self.waiting.append(shares)
        self.n_waiting += len(shares)
        if self.n_waiting > SETTLE:
            self._settle()

    def _settle(self) -> None:
        # Tokens are looked at again and again: the same share counts once.
        waiting = [np.unique(np.concatenate(self.waiting))] if self.waiting else []
        rows = np.concatenate([self.rows, *waiting])
        rows = rows[np.lexsort((rows["place"], rows["run"]))]
        new = np.ones(len(rows), bool)
        new[1:] = rows["run"][1:] != rows["run"][:-1]
        new[1:] |= rows["place"][1:] != rows["place"][:-1]
        starts = np.flatnonzero(new)
        self.rows = rows[starts]
        if len(starts):
            self.rows["word"] = np.bitwise_xor.reduceat(rows["word"], starts)
            self.rows["bytes"] = np.add.reduceat(rows["bytes"], starts)
        self.waiting, self.n_waiting = [], 0

    def whole(self, unpacked) -> np.ndarray:
        """Those tensors of which all bytes are there, as ``unpacked`` makes them of words."""
        self._settle()
        found = unpacked(self.rows, self.rows["word"])
        if not len(found):
            return found
        n_rows = np.where(found["step"] == 0, *self.n_rows).astype(np.uint64)
        sizes = self.sizes[found["tensor"]]
        sizes = np.where(self.per_step[found["tensor"]], sizes * n_rows, sizes)
        return found[self.rows["bytes"] == sizes]


def _none() -> np.ndarray:
    return np.zeros(0, _SHARE)


def _row_size(tensor) -> int:
    """Bytes of a tensor, or of one of its rows where their number depends on the step; 0: not known."""
    try:
        itemsize = np.dtype(tensor.dtype).itemsize
    except TypeError:  # bfloat16, and what is no dtype
        return 0
    shape = tensor.shape[1:] if tensor.shape[:1] == (-1,) else tensor.shape
    return itemsize * prod(shape) if min(shape, default=1) >= 0 else 0
