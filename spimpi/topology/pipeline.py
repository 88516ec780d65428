"""Which layers a pipeline stage holds, and how a step's rows travel through the stages."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

from spimpi.errors import UsageError
from spimpi.partition import balanced_sizes


def stage_ranges(layer_sizes) -> list[range]:
    """The layers of each stage."""
    return [range(start, stop) for start, stop in pairwise(accumulate(layer_sizes, initial=0))]


def stage_of(layer_sizes, layer: int) -> int:
    """The stage that holds a layer."""
    stops = list(accumulate(layer_sizes))
    if not 0 <= layer < stops[-1]:
        msg = f"layers are 0..{stops[-1] - 1}, found {layer}"
        raise UsageError(msg)
    return bisect_right(stops, layer)


def n_microbatches(n_rows: int, pp: int, step: int = 0) -> int:
    """How many microbatches a step of ``n_rows`` rows is cut into.

    In the prefill (step 0) as many as there are stages, so that each has one at work. A later step
    reads all weights once a microbatch, however few its rows: two are in flight, and no more. None
    is without rows, so a step of one row is one microbatch; without a pipeline there is one.
    """
    if n_rows < 1 or pp < 1:
        msg = f"a step needs rows and stages, found {n_rows} rows and {pp} stages"
        raise UsageError(msg)
    return min(n_rows, min(pp, 2) if step else pp)


def microbatches(n_rows: int, pp: int, step: int = 0) -> list[tuple[int, int]]:
    """The (start, stop) rows of each microbatch: balanced blocks of a data rank's rows."""
    sizes = balanced_sizes(n_rows, n_microbatches(n_rows, pp, step))
    return list(pairwise(accumulate(sizes, initial=0)))


@dataclass(frozen=True)
class Schedule:
    """The microbatches that cross one link of a pipeline: the prefill's, then each step's.

    A link joins a stage with the next one, for one data and one tensor rank. Its hand-offs are
    numbered from 0 without a gap, so that a stale, lost or reordered buffer shows.
    """

    pp: int
    n_prefill: int
    n_decode: int
    n_steps: int

    def __post_init__(self):
        if min(self.pp, self.n_prefill, self.n_decode, self.n_steps) < 1:
            msg = f"a schedule needs stages, microbatches and steps, found {self}"
            raise UsageError(msg)

    def in_step(self, step: int) -> int:
        """The number of microbatches of a step; step 0 is the prefill."""
        self._require(0 <= step < self.n_steps, f"steps are 0..{self.n_steps - 1}", step)
        return self.n_decode if step else self.n_prefill

    def sequence(self, step: int, microbatch: int) -> int:
        """The hand-off's number on its link."""
        n = self.in_step(step)
        self._require(0 <= microbatch < n, f"microbatches are 0..{n - 1}", microbatch)
        return microbatch + (self.n_prefill + (step - 1) * self.n_decode if step else 0)

    def place(self, sequence: int) -> tuple[int, int]:
        """The (step, microbatch) of a hand-off's number."""
        n = self.per_link
        self._require(0 <= sequence < n, f"hand-offs are 0..{n - 1}", sequence)
        if sequence < self.n_prefill:
            return 0, sequence
        step, microbatch = divmod(sequence - self.n_prefill, self.n_decode)
        return step + 1, microbatch

    @property
    def per_link(self) -> int:
        """Hand-offs over one link in the whole run."""
        return self.n_prefill + (self.n_steps - 1) * self.n_decode

    @property
    def handoffs(self) -> int:
        """Hand-offs over all links of one pipeline (one data rank, one tensor rank)."""
        return (self.pp - 1) * self.per_link

    @staticmethod
    def _require(holds, expected, found):
        if not holds:
            msg = f"{expected}, found {found}"
            raise UsageError(msg)


def schedule(pp: int, prefill_rows: int, decode_rows: int, n_steps: int) -> Schedule:
    """The schedule of a data rank: its rows in the prefill and in each later step.

    ``n_steps`` counts the prefill. Pipelines of different data ranks may differ.
    """
    return Schedule(pp, n_microbatches(prefill_rows, pp), n_microbatches(decode_rows, pp, 1), n_steps)
