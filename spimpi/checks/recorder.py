"""Where every check of a run ends up: counted, written to the journal, failures kept."""

from dataclasses import dataclass
from threading import Lock
from time import perf_counter

import numpy as np

from spimpi.trace.schema import EVENT, Op, Stage, Status, joined_events

KEPT_FAILURES = 1000
FLUSH_SECONDS = 0.25
LOCAL = (Op.MATMUL, Op.AT_REST)  # a failure of these is the recording rank's own


@dataclass
class StageTotals:
    """What was checked in one stage of the run, on one rank or summed over ranks."""

    checks: int = 0
    failed: int = 0
    n_bytes: int = 0
    seconds: float = 0.0


class Recorder:
    """Takes events, one or many at a time. Local: nothing here communicates.

    ``tensor_index``: name -> position in the trace's table of tensors. Events wait in lists, and
    are counted and journalled many at a time: on the decoding path every microsecond is felt.
    """

    def __init__(self, tensor_index: dict[str, int], rank: int = 0, journal=None):
        self.tensor_index, self.rank, self.journal = tensor_index, rank, journal
        self.origin = perf_counter()
        self.notes: dict[tuple[int, int, int], str] = {}
        self.n_events = 0
        self._totals = {stage: StageTotals() for stage in Stage}
        self._failures: list[np.ndarray] = []
        self._n_differing, self.most_kept = 0, KEPT_FAILURES
        self._golden_failures: set[tuple[int, int, int, int]] = set()
        self._rows: list[tuple] = []
        self._blocks: list[np.ndarray] = []
        self._urgent = False
        self._settled = self.origin
        self._settling = Lock()

    def add(self, events: np.ndarray, seconds: dict[Stage, float]) -> None:
        """Take many events; so many seconds were spent on their checks, by stage.

        Events that are NOT_ESTABLISHED go to the journal, and are not counted as checks.
        """
        self._blocks.append(events)
        self.n_events += int((events["verdict"] != Status.NOT_ESTABLISHED).sum())
        for stage, spent in seconds.items():
            self._totals[stage].seconds += spent
        self._urgent |= bool((events["verdict"] == Status.FAILED).any())

    def one(
        self, tensor, op, stage, established, fingerprint, expected, failed,
        *, t_start, step=0, microbatch=0, layer=-1, bytes=0, sequence=0, repeat=0, peer=-1,
        nonfinite=0, element=-1,
    ) -> None:  # fmt: skip
        """Take one event; it ends now."""
        now = perf_counter()
        if failed and peer < 0 and op in LOCAL:
            peer = self.rank
        self.row((
            step, microbatch, repeat, layer, stage, op,
            Status.FAILED if failed else Status.VERIFIED, established, self.tensor_index[tensor],
            min(int(nonfinite), 0xFFFF), peer, sequence, element, fingerprint, expected, bytes,
            t_start, now,
        ), now - t_start)  # fmt: skip

    def row(self, row: tuple, spent: float) -> None:
        """As ``add``, one event, in the order of EVENT's fields; its check took so many seconds."""
        self._rows.append(row)
        self.n_events += row[6] != Status.NOT_ESTABLISHED
        self._totals[row[4]].seconds += spent
        self._urgent |= row[6] == Status.FAILED

    def flush(self) -> None:
        """A step has ended: from time to time, and after a failure, write down what there is.

        What a killed process loses is at most what it recorded in the last FLUSH_SECONDS.
        """
        if self._urgent or perf_counter() - self._settled > FLUSH_SECONDS:
            self.write_down()

    def write_down(self) -> None:
        """Write down all that there is. Also for another thread than the one that records."""
        self._settle()
        if self.journal is not None:
            self.journal.flush()

    def note(self, step: int, microbatch: int, layer: int, text: str) -> None:
        """Keep words that say more about a failed check than its numbers."""
        self.notes[step, microbatch, layer] = text

    @property
    def totals(self) -> dict[Stage, StageTotals]:
        """What was checked so far, by stage."""
        self._settle()
        return self._totals

    @property
    def golden_failures(self) -> set[tuple[int, int, int, int]]:
        """Places (``place_of``) whose golden comparison failed."""
        self._settle()
        return self._golden_failures

    @property
    def n_differing(self) -> int:
        """Failed checks that found more than NaN or Inf in what is otherwise as it was made."""
        self._settle()
        return self._n_differing

    def all_failures(self) -> np.ndarray:
        """The events of failed checks, the first ``most_kept`` or a few more."""
        self._settle()
        return joined_events(self._failures)

    def _settle(self) -> None:
        """Count and journal all events that wait."""
        with self._settling:
            self._settle_alone()

    def _settle_alone(self) -> None:
        self._settled, self._urgent = perf_counter(), False
        # Taken from the front: the recording thread may append meanwhile, without a lock.
        rows, blocks = self._rows[:], self._blocks[:]
        del self._rows[: len(rows)], self._blocks[: len(blocks)]
        if not rows and not blocks:
            return
        events = joined_events([np.array(rows, EVENT), *blocks])
        events["t_start"] -= self.origin
        events["t_end"] -= self.origin
        if self.journal is not None:
            self.journal.append(events)
        n_stages = len(Stage)
        events = events[events["verdict"] != Status.NOT_ESTABLISHED]
        failed = events["verdict"] == Status.FAILED
        counts = np.bincount(events["stage"], minlength=n_stages)
        wrong = np.bincount(events["stage"][failed], minlength=n_stages)
        for stage in Stage:
            totals = self._totals[stage]
            totals.checks += int(counts[stage])
            totals.failed += int(wrong[stage])
            if counts[stage]:
                totals.n_bytes += int(events["bytes"][events["stage"] == stage].sum())
        bad = events[failed]
        self._golden_failures |= {place_of(e) for e in bad if e["stage"] == Stage.GOLDEN}
        alike = (bad["nonfinite"] > 0) & (bad["fingerprint"] == bad["expected"])
        self._n_differing += int(bad.size - alike.sum())
        if bad.size and sum(a.size for a in self._failures) < self.most_kept:
            self._failures.append(bad)


def place_of(event) -> tuple[int, int, int, int]:
    """(tensor, layer, step, repeat) of an event."""
    return tuple(int(event[name]) for name in ("tensor", "layer", "step", "repeat"))
