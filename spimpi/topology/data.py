"""Which prompts a data rank holds, and which packed rows of a step are theirs.

A step's rows are packed: the prefill has one row a token of every prompt, prompt after prompt;
a later step has one row a prompt. Prompts are cut into balanced blocks, so a data rank's rows
are one contiguous range of every step.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from spimpi.errors import UsageError
from spimpi.partition import TensorPartition


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows ``start`` to ``stop - 1`` of a step's ``total``; row r is token ``position[r - start]``
    of prompt ``sequence[r - start]`` (both int64, read-only)."""

    total: int
    start: int
    stop: int
    sequence: np.ndarray
    position: np.ndarray

    @property
    def size(self) -> int:
        return self.stop - self.start


def prompt_block(n_prompts: int, dp: int, d: int) -> TensorPartition:
    """The prompts of data rank ``d``; UsageError where there are fewer prompts than ranks."""
    if n_prompts < dp:
        msg = (
            f"{dp} data ranks need at least {dp} prompts, found {n_prompts}; "
            f"give more prompts or use dp={max(n_prompts, 1)} or less"
        )
        raise UsageError(msg)
    return TensorPartition(dim=0, n_shards=dp, shard_id=d, global_size=n_prompts)


def rows_of(lengths, dp: int, d: int, step: int = 0) -> Rows:
    """The rows of data rank ``d`` in a step, for the prompts' lengths in tokens.

    Step 0 is the prefill; step s > 0 feeds each prompt its s-th new token, at position
    length + s - 1.
    """
    lengths = [int(n) for n in lengths]
    if step < 0 or any(n < 1 for n in lengths):
        msg = f"prompts need one token or more, steps 0 or more; found {lengths}, step {step}"
        raise UsageError(msg)
    block = prompt_block(len(lengths), dp, d)
    prompts = np.arange(block.start, block.stop)
    own = np.array(lengths[block.start : block.stop], dtype=np.int64)
    if step:
        total, start, stop = len(lengths), block.start, block.stop
        sequence, position = prompts, own + (step - 1)
    else:
        offsets = list(accumulate(lengths, initial=0))
        total, start, stop = offsets[-1], offsets[block.start], offsets[block.stop]
        sequence = np.repeat(prompts, own)
        position = np.arange(start, stop) - np.repeat(offsets[block.start : block.stop], own)
    sequence.flags.writeable = position.flags.writeable = False
    return Rows(total, start, stop, sequence, position)


def last_rows(rows: Rows) -> np.ndarray:
    """Which of the rows (counted from ``rows.start``) are the last of their prompt, ascending.

    They are the ones whose logits give the next token.
    """
    return np.flatnonzero(np.diff(rows.sequence, append=-1) != 0)
