"""Sums of floats over the tensor ranks, of plain float32 arithmetic: within what rounding explains.

Agreement says that all ranks got the same; docs/sums.md's bound that it is the sum of what they
gave, in any order of additions. Imported only where --arith blas runs on several tensor ranks.
"""

import numpy as np

from spimpi.checks.sums import float_bound
from spimpi.fingerprint.projections import project_both
from spimpi.fingerprint.tag import SKETCH, Tag
from spimpi.units import ranks_text

MOST_BINS = 16  # of a tensor: words that a sum adds to a group's exchange
SUMMED = ("attn_out", "ffn_out", "qk_sum")
OWN, NORM, RESULT = range(3)


class FloatSums:
    """The words of a group's sums, and what they say once all ranks' are together.

    ``bad`` bool [slots·layers, sums]: which sums are further off than rounding explains;
    ``nonfinite``: rows of a sum with NaN or Inf that were given, or come of an overflow; ``peers``:
    the tensor rank that explains either, -1 where none does alone.
    """

    def __init__(self, facts, n_slots: int, n_layers: int):
        self.facts, self.n_layers = facts, n_layers
        self.words = np.zeros((n_slots, n_layers, len(SUMMED), 3, MOST_BINS))
        self.rows = np.zeros((n_slots, n_layers, len(SUMMED)), np.int64)
        self.cuts = {}
        self.bad = self.nonfinite = self.peers = None

    def take(self, tensor: str, i: int, sent, summed, batch) -> None:
        """What this rank gave to a sum, and what it got."""
        facts, kind = self.facts, SUMMED.index(tensor)
        slot = facts.ledger.slot_of(batch.microbatch)
        cuts = float_bound.bins_of(summed.shape, MOST_BINS)
        self.cuts[slot, kind] = cuts
        tag = Tag(facts.ctx.seed, tensor, facts.ctx.layers[i], batch.step)
        key = np.uint64(tag.key(SKETCH, summed.shape, summed.itemsize))
        words = self.words[slot, i, kind, :, : len(cuts) - 1]
        words[:] = 0
        sums, hashes = np.zeros(words.shape), np.zeros((2, words.shape[1]), np.uint64)
        project_both(sent.reshape(-1), summed.reshape(-1), 0, cuts, key, sums, hashes)
        words[:] = sums
        odd = 0
        if not np.isfinite(words[RESULT]).all():
            odd = np.count_nonzero(~np.isfinite(summed).all(axis=-1))
        self.rows[slot, i, kind] = odd

    def close(self, ledger) -> None:
        """Judge a group's sums. Collective over ctx.tensor."""
        tensor, n = self.facts.ctx.tensor, ledger.n_slots
        own = np.ascontiguousarray(self.words[:n])
        everyone = np.empty((tensor.size, *own.shape))
        tensor.Allgather(own, everyone)
        self.bad = np.zeros((n, self.n_layers, len(SUMMED)), bool)
        self.peers = np.full(self.bad.shape, -1)
        # Backwards: of a layer's sums the first that is wrong has the last word.
        for (slot, kind), cuts in reversed(self.cuts.items()):
            if slot < n and len(cuts) > 1:
                words = everyone[:, slot, :, kind, :, : len(cuts) - 1]
                for layer in range(self.n_layers):
                    self._judge(slot, layer, kind, words[:, layer], np.diff(cuts), ledger)
        self.cuts = {}
        found = self.bad, self.rows[:n], self.peers
        self.bad, self.nonfinite, self.peers = (a.reshape(-1, len(SUMMED)) for a in found)

    def _judge(self, slot, layer, kind, words, sizes, ledger) -> None:
        """``words`` [ranks, 3, bins] of one sum; every rank's result is this rank's, or disagrees."""
        facts = self.facts
        n_ranks, largest = len(words), float_bound.format_of(np.float32).largest
        own, result = words[:, :RESULT], words[facts.ctx.tensor.rank, RESULT:]
        given, made = ~np.isfinite(own[:, NORM]), ~np.isfinite(result[0])
        with np.errstate(all="ignore"):
            limit = float_bound.limits(own[:, NORM], sizes, n_ranks, np.float32)
            off = np.abs(float_bound.excess(own, result))[0]
            # A sum that is finite did not overflow, and nothing in it was NaN or Inf.
            overflowed = made & (own[:, NORM].sum(axis=0) >= largest)
            wrong = np.flatnonzero(~(off <= limit) & ~given.any(axis=0) & ~overflowed)
        lost = given.any(axis=0) & ~made
        if wrong.size:
            detail = self._too_far(slot, layer, kind, off[wrong], limit[wrong],
                                   own[:, :, wrong], result[:, wrong])  # fmt: skip
        elif lost.any():
            detail = f"NaN or Inf of {self._givers(given[:, lost])} are not in the sum"
        elif given.any():
            detail = f"NaN or Inf given by {self._givers(given)}"
            ranks = np.flatnonzero(given.any(axis=1))
            self.peers[slot, layer, kind] = ranks[0] if ranks.size == 1 else -1
        elif overflowed.any():
            detail = "the sum of finite numbers may have overflowed"
        else:
            return
        self.bad[slot, layer, kind] = wrong.size or lost.any()
        step, microbatch, _ = (int(n) for n in ledger.places[slot])
        facts.recorder.note(step, microbatch, facts.ctx.layers[layer], detail)

    def _givers(self, given) -> str:
        """Which ranks' contributions are not finite; ``given`` bool [ranks, bins]."""
        return ranks_text([self.facts.world_rank(r) for r in np.flatnonzero(given.any(axis=1))])

    def _too_far(self, slot, layer, kind, off, limit, own, result) -> str:
        """How far a sum is off in its wrong bins, and by whose contribution."""
        worst = np.argmax(off / np.maximum(limit, 1e-300))
        detail = f"the sum is off by {off[worst]:.3g}, where rounding explains {limit[worst]:.3g}"
        blamed = float_bound.blame(own, result, limit)
        if blamed is None:
            return detail
        self.peers[slot, layer, kind] = blamed.rank
        what = "counted twice" if blamed.doubled else "missing"
        rank = self.facts.world_rank(blamed.rank)
        return f"{detail}; the contribution of rank {rank} is {what}"
