"""Which rows of each microbatch a sequence rank holds.

The prefill has one microbatch a prompt, and each prompt is cut into balanced blocks of adjacent
tokens, one a sequence rank; the last ones are empty where a prompt is shorter than that. In a later
step, which has one row a prompt, the prompts are cut instead: each sequence rank decodes a block
of them, in the microbatches of a pipeline's step. All ranks of a sequence group have the same
number of microbatches, for they gather keys and values in each.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from spimpi.partition import balanced_sizes
from spimpi.topology.data import Rows, rows_of
from spimpi.topology.pipeline import microbatches, n_microbatches


@dataclass(frozen=True, eq=False)
class Split:
    """A step's rows of one data rank, cut into microbatches and over its sequence ranks.

    ``pieces[m][s]`` is the (start, stop), in the step's global rows, of what sequence rank s has
    of microbatch m; it may be empty.
    """

    rows: Rows
    pieces: list[list[tuple[int, int]]]

    def own(self, s: int) -> list[tuple[int, int]]:
        """The (start, stop) of each microbatch of sequence rank ``s``."""
        return [piece[s] for piece in self.pieces]

    def rows_of(self, s: int) -> np.ndarray:
        """All global rows of sequence rank ``s`` (int64), in the order of its microbatches."""
        return _joined(self.own(s))

    def gathered(self, m: int) -> np.ndarray:
        """The global rows (int64) of microbatch ``m``, all sequence ranks' one after the other."""
        return _joined(self.pieces[m])

    @property
    def most_rows(self) -> int:
        """The most rows that a rank has of a microbatch."""
        return max(stop - start for piece in self.pieces for start, stop in piece)


def _joined(pieces) -> np.ndarray:
    return np.concatenate([np.arange(start, stop) for start, stop in pieces])


def split_rows(lengths, grid, d: int, step: int = 0) -> Split:
    """How the rows of data rank ``d`` in a step are cut; lengths: tokens of every prompt."""
    rows = rows_of(lengths, grid.dp, d, step)
    if grid.sp == 1:
        cuts = microbatches(rows.size, grid.pp, step)
        pieces = [[(rows.start + start, rows.start + stop)] for start, stop in cuts]
    elif step == 0:
        ends = np.flatnonzero(np.diff(rows.sequence, prepend=-1, append=-1))
        pieces = [_cut(rows.start + int(a), int(b - a), grid.sp) for a, b in pairwise(ends)]
    else:
        blocks = prompts_of(rows.size, grid.sp)
        n = n_microbatches(blocks[0][1], grid.pp, step)  # the first block is the longest
        by_rank = [_cut(rows.start + start, stop - start, n) for start, stop in blocks]
        pieces = [list(piece) for piece in zip(*by_rank)]
    return Split(rows, pieces)


def prompts_of(n_prompts: int, sp: int) -> list[tuple[int, int]]:
    """The (start, stop) of each sequence rank's prompts in decoding; of ``n_prompts`` in all."""
    return _cut(0, n_prompts, sp)


def _cut(start: int, size: int, n: int) -> list[tuple[int, int]]:
    """Balanced blocks of so many rows, the first ones one longer; may be empty."""
    return list(pairwise(accumulate(balanced_sizes(size, n), initial=start)))


def last_row_holders(prefill: Split) -> list[int]:
    """The sequence rank that holds each prompt's last row in a prefill cut over several."""
    return [max(s for s, (a, b) in enumerate(piece) if b > a) for piece in prefill.pieces]
