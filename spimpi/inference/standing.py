"""What stands in a rank's memory from loading to the end of a run, and no product would miss.

The embedding, norm weights, exponents of scaled weights, the rotary embedding's tables: each has a
word from when it was read or made, and must have it still after the last step. (Scaled weights
need none: every product is checked against W·r.)
"""

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import Tag
from spimpi.partition import Slab
from spimpi.trace.schema import Established, Op, Stage

ROTARY = "rotary"  # the tables, in the trace's table of tensors


@dataclass(frozen=True, eq=False)
class Standing:
    """An array that is not to change, and its fingerprint when it was read or made.

    name: the checkpoint's; layer -1: none; slab: its place in the stored tensor, None: an array of
    its own.
    """

    name: str
    layer: int
    array: np.ndarray
    word: int
    slab: Slab | None = None

    @classmethod
    def made(cls, seed: int, name: str, layer: int, array: np.ndarray) -> "Standing":
        """An array as it is now."""
        return cls(name, layer, array, fingerprint(array, Tag(seed, name)))

    def word_now(self, seed: int) -> int:
        return fingerprint(self.array, Tag(seed, self.name), self.slab)


def check_standing(ctx, part, layers, recorder, step: int, repeat: int) -> None:
    """Look at it all again after a run's last step, an event an array. Local.

    ``part``: weights.Part; ``layers``: the stage's Layers, whose tables are made once more.
    """
    places = dict(step=step, repeat=repeat)
    for one in part.standing:
        start = perf_counter()
        found = one.word_now(ctx.seed)
        recorder.one(
            one.name, Op.AT_REST, Stage.WEIGHTS, Established.MOVED, found, one.word,
            found != one.word, t_start=start, layer=one.layer, bytes=one.array.nbytes, **places,
        )  # fmt: skip
    start = perf_counter()
    held, again = layers.constants(), layers.constants_again()
    found, expected = (_together(ctx.seed, arrays) for arrays in (held, again))
    recorder.one(
        ROTARY, Op.AT_REST, Stage.WEIGHTS, Established.MOVED, found, expected, found != expected,
        t_start=start, bytes=sum(a.nbytes for a in held), **places,
    )  # fmt: skip


def _together(seed: int, arrays) -> int:
    """One word of several arrays, each of which has a stream of its own."""
    word = 0
    for i, array in enumerate(arrays):
        word ^= fingerprint(array, Tag(seed, ROTARY, i))
    return word
