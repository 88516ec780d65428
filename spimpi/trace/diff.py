"""Two runs side by side: the first tensor that differs, and how the difference grows.

docs/trace-diff.md says what is compared and what is claimed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spimpi.distance import ERROR, distances, relative_distances
from spimpi.errors import UsageError
from spimpi.trace.contents import CONTENT, contents, order_of, paired
from spimpi.trace.order import first_layered_tensor
from spimpi.trace.rounding import JUMP, Judgement, judge
from spimpi.trace.schema import Stage
from spimpi.trace.summary import Failure, summarise

# A row of ``Difference.table``: one tensor of one step, in both runs. ``tensor``: an index into
# ``Difference.names``; ``a``, ``b``: the global fingerprints; ``relative``: ‖a - b‖ / ‖a‖ by the
# sketches, ``error`` its standard error, NaN where there are no sketches, infinite where NaN or
# Inf are in one of them and not in the other.
COMPARED = np.dtype(
    [(name, CONTENT[name]) for name in CONTENT.names if name != "fingerprint"]
    + [("a", "<u8"), ("b", "<u8"), ("differs", "?"), ("relative", "<f8"), ("error", "<f8")]
)


@dataclass(frozen=True)
class Side:
    """One of the runs. ``problems``: what its trace lacks; ``failure``: its first own failure."""

    path: Path
    attributes: dict
    ranks: int
    problems: tuple[str, ...]
    n_failed: int
    failure: Failure | None


@dataclass(frozen=True)
class Difference:
    """What a comparison of two runs found.

    ``table``: every tensor that both have, dtype COMPARED, in program order; ``first``: row of the
    first that differs, -1: none; ``judgement``: what kind of difference that is; ``jump``: first
    row at which the relative difference is more than JUMP times all before it, -1: none;
    ``diverged``: row of the first tokens that differ: later steps have other inputs; -1: none;
    ``notes``: what was not compared, ``missing``: what should have been and could not be.
    """

    a: Side
    b: Side
    names: tuple[str, ...]
    table: np.ndarray
    first: int
    judgement: Judgement
    jump: int
    diverged: int
    notes: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def n_differ(self) -> int:
        return int(self.table["differs"].sum())

    @property
    def exit_status(self) -> int:
        if self.first >= 0:
            return 1
        return 3 if self.missing else 0
