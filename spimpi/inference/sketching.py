"""Sketches of what a run computes: of each tensor that a golden table has, of each step.

Each rank sketches what it owns of a tensor, where it lies and as it goes on into the next
computation. What several ranks hold counts once, as in the golden table: of a replicated tensor the
lowest tensor rank's copy, of a shared key/value head its owner's. Only a run with --sketch has a
Sketcher.
"""

import numpy as np

from spimpi.fingerprint.projections import sketch_block
from spimpi.fingerprint.tag import SKETCH, Tag
from spimpi.inference.tensors import GOLDEN_LAYER, Widths
from spimpi.trace.schema import SKETCH_SHARE

PROJECTIONS, SQUARES, LARGEST = slice(0, 8), 8, 9  # rows of what sketch_block adds up


class Sketcher:
    """One rank's sketches. ``append`` takes the rows (SKETCH_SHARE) of each step as it ends.

    ``layers``: the stage's Layers, which know the columns that this rank owns. Local.
    """

    def __init__(self, facts, layers, append):
        self.facts, self.append = facts, append
        config, widths = facts.config, Widths.of(facts.config)
        self.widths = {name: getattr(widths, name, widths.hidden) for name in GOLDEN_LAYER}
        self.widths |= {"embed": widths.hidden, "logits": config.vocab_size}
        shard = facts.part.shard
        heads, ffn, vocabulary = shard.heads, shard.ffn(), shard.vocabulary()
        d = config.head_dim
        replicated = [(0, 0, widths.hidden)] if facts.ctx.place.t == 0 else []
        # Blocks of columns that this rank owns: where each lies here, in the tensor, its width.
        self.blocks = dict.fromkeys(("embed", "resid", "hidden"), replicated) | {
            "qkv": layers.segments[layers.owned].tolist(),
            "attn": [(0, heads.start * d, heads.size * d)],
            "ffn": [(0, ffn.start, ffn.size)],
            "logits": [(0, vocabulary.start, vocabulary.size)],
        }
        self.sums, self.counts = {}, {}
        self.step = 0

    def begin(self, step: int) -> None:
        """A step begins: none of its microbatches has been seen."""
        self.step = step
        self.sums, self.counts = {}, {}

    def take(self, name: str, layer: int, array: np.ndarray, first_row: int) -> None:
        """Add this rank's part of some rows, float32 [rows, columns here], to a tensor's sketch.

        ``first_row``: the global row of the first one.
        """
        blocks = self.blocks[name]
        if not blocks or not array.size:
            return
        sums = self.sums.setdefault((name, layer), np.zeros((10, 2)))
        counts = self.counts.setdefault((name, layer), [0, 0])
        tag = Tag(self.facts.ctx.seed, name, layer, self.step)
        key = np.uint64(tag.key(SKETCH, self._shape(name), array.itemsize))
        for here, there, width in blocks:
            part = array[:, here : here + width]
            counts[0] += part.size
            counts[1] += sketch_block(part, key, first_row, there, self.widths[name], sums)

    def end(self) -> None:
        """The step has ended: hand on its rows. What ``append`` raises."""
        rows = np.zeros(len(self.sums), SKETCH_SHARE)
        index = self.facts.recorder.tensor_index
        rows["rank"], rows["step"] = self.facts.ctx.rank, self.step
        rows["repeat"] = self.facts.repeat
        for row, ((name, layer), sums) in zip(rows, self.sums.items()):
            total = sums.sum(axis=1)
            row["layer"], row["tensor"] = layer, index[name]
            row["size"], row["nonfinite"] = self.counts[name, layer]
            row["whole"] = np.prod(self._shape(name))
            row["absmax"], row["sumsq"] = sums[LARGEST, 0], total[SQUARES]
            row["projections"] = total[PROJECTIONS]
        self.append(rows)

    def _shape(self, name: str) -> tuple[int, int]:
        """The global shape of a tensor in this step."""
        facts = self.facts
        n_rows = len(facts.lengths) if name == "logits" else facts.n_rows(self.step)
        return n_rows, self.widths[name]
