"""What the checks of some steps found, compared over the tensor ranks in one reduction.

On the way a check costs no more than the kernel that leaves a word or two in the arrays here. When
a quarter of a second's worth of steps has gone by, the group is closed: one non-blocking reduction
of records compares all of it over the tensor ranks, and all its events are made at once. Between
two matmuls of decoding the caches are full of weights, so that each Python call costs several
times what a loop around it measures; that is why nothing here happens once a step.
"""

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from spimpi.inference.tensors import REST
from spimpi.reduction import ALL_ONES, empty_records

# Positions in ``rest_*``: tensors that are fingerprinted when made and again when used up.
INPUT, QKV, ATTN, RESID, FFN, ATTN_OUT, FFN_OUT, QK_SUM, QK_NORMED = range(len(REST))
SUMS = slice(ATTN_OUT, QK_SUM + 1)  # where rest_* and sums_by_tensor hold what is summed
QK = 2  # place of a QK norm among the sums and the maxima
# Columns of ``logits`` and ``tokens``: when made, as gathered or handed on, after the last use.
MADE, GATHERED, AGAIN = range(3)

MOST_STEPS = 16
SECONDS = 0.25  # of steps in a group; what a killed process loses at most, or one step


@dataclass(frozen=True)
class Columns:
    """Columns of a layer's records: two sums, two maxima, resid, hidden; with a QK norm its sum
    and its maximum; then the shared heads."""

    sums: tuple[int, ...]
    maxima: tuple[int, ...]
    resid: int
    hidden: int
    heads: int

    @classmethod
    def of(cls, qk_norm: bool) -> "Columns":
        return cls((0, 1, 6), (2, 3, 7), 4, 5, 8) if qk_norm else cls((0, 1), (2, 3), 4, 5, 6)

    def at(self, kind: str, index: int) -> int:
        """The column of a layer check's source (layer_checks.LayerCheck)."""
        start = getattr(self, kind)
        return start + index if isinstance(start, int) else start[index]

    def words(self, results) -> np.ndarray:
        """This rank's results in that order, uint64 [layers, columns]."""
        words = np.empty((results.hidden.size, self.heads + results.heads.shape[1]), np.uint64)
        words[:, self.sums] = results.sums[:, : len(self.sums)]
        words[:, self.maxima] = results.maxima[:, : len(self.maxima)]
        words[:, self.resid] = results.rest_expected[:, RESID]
        words[:, self.hidden] = results.hidden
        words[:, self.heads :] = results.heads
        return words


class LayerResults:
    """What the checks of the decoder layers found; every array is [layers, …].

    Of one microbatch, as the layers fill it; or of several, their layers one after the other.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.__dict__.update(arrays)
        self.sums = self.sums_by_tensor[:, SUMS]
        self.seconds = 0.0


def _arrays(n_slots: int, n_layers: int, n_segments: int, n_heads: int) -> dict[str, np.ndarray]:
    words = {
        "rest_expected": len(REST), "rest_found": len(REST), "sums_by_tensor": len(REST),
        "product_found": 6, "product_expected": 6, "maxima": 3, "segments": n_segments,
        "segments_found": n_segments, "normed_found": n_segments, "heads": n_heads, "held": 3,
    }  # fmt: skip
    counts = {"max_bad": 3, "product_bad": 6, "nonfinite": 5}
    arrays = {k: np.zeros((n_slots, n_layers, n), np.uint64) for k, n in words.items()}
    arrays |= {k: np.zeros((n_slots, n_layers, n), np.int64) for k, n in counts.items()}
    arrays["hidden"] = np.zeros((n_slots, n_layers), np.uint64)
    arrays["times"] = np.zeros((n_slots, n_layers, 2))
    return arrays


class Ledger:
    """The current group of steps of one rank.

    A slot is one microbatch of one step; ``slots[s]`` takes what its layers found. ``steps[i]`` is
    the group's i-th step. held: which of the shared key/value heads this rank holds; shared_at:
    pairs of (shared head, its column segment).
    """

    def __init__(self, facts, cuts, n_layers, n_segments, held, shared_at, exact):
        self.columns = Columns.of(facts.config.qk_norm)
        self.facts, self.held, self.shared_at, self.exact = facts, held, shared_at, exact
        n_slots = max(len(cuts[0]), MOST_STEPS * len(cuts[1]))
        self._layers = _arrays(n_slots, n_layers, n_segments, held.size)
        self.slots = [
            LayerResults({k: a[s] for k, a in self._layers.items()}) for s in range(n_slots)
        ]
        self.places = np.zeros((n_slots, 3), np.int64)  # step, microbatch, rows
        self.embedded = np.zeros((n_slots, 2), np.uint64)  # share, result
        self.absent = [None] * n_slots  # what a missing share leaves in the result
        self.last_found = np.zeros(n_slots, np.uint64)  # the stage's output after its last use
        self.logits = np.zeros((MOST_STEPS, 3), np.uint64)
        self.tokens = np.zeros((MOST_STEPS, 3), np.uint64)
        self.rows = np.zeros((MOST_STEPS, 2), np.uint64)  # the head's: as taken, as used
        # The head's product; product_bad: failing rows, rows that are not finite.
        self.product_found, self.product_expected = np.zeros((2, 1, MOST_STEPS), np.uint64)
        self.product_bad = np.zeros((2, MOST_STEPS), np.int64)
        self.times = np.zeros(MOST_STEPS)  # when the sampled tokens were checked
        self._request = None
        self.restart()

    def restart(self) -> None:
        """A run begins: its prefill is a group of its own."""
        self._open(size=1)

    def _open(self, size: int) -> None:
        """Make room for a group of ``size`` steps."""
        for slot in self.slots:
            slot.seconds = 0.0
        for name in ("max_bad", "product_bad", "nonfinite"):
            self._layers[name][:] = 0
        self.product_bad[:] = 0
        self.size, self.n_slots, self.n_steps = size, 0, 0
        self.seconds, self.opened, self.closed = 0.0, perf_counter(), 0.0

    def begin(self, step: int, rows) -> list[LayerResults]:
        """Slots for the microbatches of a step, which have so many rows each."""
        if not self.facts.checked:
            self.n_slots = self.n_steps = 0
        first = self.n_slots
        for m, n_rows in enumerate(rows):
            self.places[first + m] = step, m, n_rows
        self.n_slots += len(rows)
        self.n_steps += 1
        return self.slots[first : self.n_slots]

    @property
    def now(self) -> int:
        """Position of the current step in the group."""
        return self.n_steps - 1

    def slot_of(self, microbatch: int) -> int:
        """The slot of one of the current step's microbatches."""
        return self.n_slots - 1 - int(self.places[self.n_slots - 1, 1]) + microbatch

    def is_full(self, step: int) -> bool:
        """Whether the group ends with this step; the same on all tensor and sequence ranks."""
        return self.n_steps == self.size or step == self.facts.n_steps - 1

    def start(self) -> None:
        """Send the group's records on their way. Collective over ctx.tensor."""
        n, a = self.n_slots, self._layers
        np.bitwise_xor.reduce(a["segments"][:n], axis=2, out=a["rest_expected"][:n, :, QKV])
        np.bitwise_xor.reduce(a["segments_found"][:n], axis=2, out=a["rest_found"][:n, :, QKV])
        if self.facts.config.qk_norm:
            found = a["rest_found"][:n, :, QK_NORMED]
            np.bitwise_xor.reduce(a["normed_found"][:n], axis=2, out=found)
        a["rest_expected"][:n, 1:, INPUT] = a["hidden"][:n, :-1]
        a["heads"][:n] = 0
        for head, segment in self.shared_at:
            a["heads"][:n, :, head] ^= a["segments"][:n, :, segment]
        together = n * a["hidden"].shape[1]
        self.results = LayerResults(
            {k: v[:n].reshape(together, *v.shape[2:]) for k, v in a.items()}
        )
        took = (perf_counter() - self.opened) / self.n_steps
        self.pace = min(max(int(SECONDS / took), 1), MOST_STEPS)
        self.records = self.merged = None
        self.once = ()
        if self.facts.ctx.tensor.size > 1:
            words, pairs = self.columns.words(self.results), self.comparisons()
            self._own = empty_records(words.size + len(pairs) + 1)
            self._layer_records(words, self._own[: words.size].reshape(words.shape))
            self._other_records(pairs, self._own[words.size :])
            self._merged = np.empty_like(self._own)
            records, tensor = self.facts.ctx.records, self.facts.ctx.tensor
            self._request = records.start(tensor, self._own, self._merged)

    def finish(self) -> None:
        """Wait for the records. ``records`` and ``merged`` [layers, records] are then the layers',
        ``once`` the others', in the order of ``comparisons``."""
        self.closed = perf_counter()
        if self._request is None:
            return
        self._request.Wait()
        self._request = None
        n = self.results.hidden.size
        width = self.columns.heads + self.held.size
        self.records, self.merged = (
            words[: n * width].reshape(n, width) for words in (self._own, self._merged)
        )
        self.once = self._merged[n * width : -1]
        self.pace = int(self._merged["place"][-1])

    def close(self) -> None:
        """The group's events are made: the next step opens a new group."""
        self._open(self.pace)

    def comparisons(self) -> list[tuple]:
        """(share, result, absent) of what several ranks put together outside the layers."""
        facts, n = self.facts, self.n_steps
        pairs = []
        if facts.ctx.is_first_stage:
            slots = range(self.n_slots)
            pairs += [(*self.embedded[s], self.absent[s]) for s in slots]
        if facts.ctx.is_last_stage:
            pairs += [(one[MADE], one[GATHERED], lambda: 0) for one in self.logits[:n]]
            pairs += [(None, word, None) for word in self.tokens[:n, MADE]]
        return pairs

    def _layer_records(self, words, records) -> None:
        results, held, columns = self.results, self.held, self.columns
        records["every"], records["none"] = words, ~words
        if not self.exact:
            held = np.zeros_like(held)
        if not held.all():  # what a rank does not hold must change nothing
            apart = columns.heads + np.flatnonzero(~held)
            records["every"][:, apart] = records["none"][:, apart] = ALL_ONES
        if self.exact:
            n_sums, n_maxima = len(columns.sums), len(columns.maxima)
            records["total"][:, columns.sums] = results.rest_expected[:, SUMS][:, :n_sums]
            records["count"][:, columns.maxima] = results.max_bad[:, :n_maxima]

    def _other_records(self, pairs, records) -> None:
        shares = [0 if share is None else share for share, _, _ in pairs]
        records["xor"][:-1] = np.array(shares, np.uint64)
        results = np.array([result for _, result, _ in pairs], np.uint64)
        records["every"][:-1], records["none"][:-1] = results, ~results
        # The ranks differ in how long they took: the smallest pace is everybody's.
        records["place"][-1] = self.pace
