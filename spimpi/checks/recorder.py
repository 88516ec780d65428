"""Where every check of a run ends up: counted, written to the journal, failures kept."""

from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from spimpi.trace.schema import EVENT, Op, Stage, Status

KEPT_FAILURES = 1000
LOCAL = (Op.MATMUL, Op.AT_REST)  # a failure of these is the recording rank's own


@dataclass
class StageTotals:
    """What was checked in one stage of the run, on one rank or summed over ranks."""

    checks: int = 0
    failed: int = 0
    n_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Recorder:
    """Takes events, one or many at a time. Local: nothing here communicates.

    ``tensor_index``: name -> position in the trace's table of tensors.
    """

    tensor_index: dict[str, int]
    rank: int = 0
    journal: object = None
    origin: float = field(default_factory=perf_counter)
    totals: dict[Stage, StageTotals] = field(
        default_factory=lambda: {stage: StageTotals() for stage in Stage}
    )
    failures: list[np.ndarray] = field(default_factory=list)
    notes: dict[tuple[int, int, int], str] = field(default_factory=dict)
    n_events: int = 0
    golden_failures: set[tuple[int, int, int, int]] = field(default_factory=set)

    def add(self, events: np.ndarray, seconds: float) -> None:
        """Take many events of the decoder layers; ``seconds`` were spent on their checks."""
        events["t_start"] -= self.origin
        events["t_end"] -= self.origin
        self._take(events)
        for stage in np.unique(events["stage"]):
            chosen = events["stage"] == stage
            totals = self.totals[Stage(int(stage))]
            totals.checks += int(chosen.sum())
            totals.n_bytes += int(events["bytes"][chosen].sum())
        self.totals[Stage.COMPUTE].seconds += seconds

    def one(
        self, tensor, op, stage, established, fingerprint, expected, failed,
        *, t_start, step=0, microbatch=0, layer=-1, bytes=0, sequence=0, repeat=0, peer=-1,
        nonfinite=0, element=-1,
    ) -> None:  # fmt: skip
        """Take one event; it ends now."""
        now = perf_counter()
        status = Status.FAILED if failed else Status.VERIFIED
        if failed and peer < 0 and op in LOCAL:
            peer = self.rank
        # In the order of EVENT's fields: one assignment, because this is on the decoding path.
        values = (
            step, microbatch, repeat, layer, stage, op, status, established,
            self.tensor_index[tensor], min(int(nonfinite), 0xFFFF), peer, sequence, element,
            fingerprint, expected, bytes, t_start - self.origin, now - self.origin,
        )  # fmt: skip
        self._take(np.array([values], EVENT))
        totals = self.totals[stage]
        totals.checks += 1
        totals.n_bytes += int(bytes)
        totals.seconds += now - t_start

    def _take(self, events: np.ndarray) -> None:
        self.n_events += events.size
        if self.journal is not None:
            self.journal.append(events)
        bad = events["verdict"] == Status.FAILED
        if bad.any():
            for event in events[bad]:
                self.totals[Stage(int(event["stage"]))].failed += 1
                if event["stage"] == Stage.GOLDEN:
                    self.golden_failures.add(place_of(event))
            if sum(a.size for a in self.failures) < KEPT_FAILURES:
                self.failures.append(events[bad].copy())

    def flush(self) -> None:
        """A step has ended: what was recorded so far survives a killed process."""
        if self.journal is not None:
            self.journal.flush()

    def note(self, step: int, microbatch: int, layer: int, text: str) -> None:
        """Keep words that say more about a failed check than its numbers."""
        self.notes[step, microbatch, layer] = text

    def all_failures(self) -> np.ndarray:
        return np.concatenate(self.failures) if self.failures else np.zeros(0, EVENT)


def place_of(event) -> tuple[int, int, int, int]:
    """(tensor, layer, step, repeat) of an event."""
    return tuple(int(event[name]) for name in ("tensor", "layer", "step", "repeat"))
