"""What crosses between the ranks of a sequence group, checked: keys and values, last rows.

In every layer the group's ranks gather the keys and values of a microbatch, and each appends all
of them to its own cache, in the order of their positions; so every rank has the whole cache, and
computes its own rows as one rank alone would. The prefill's last rows are gathered once, because a
prompt's next token is chosen by the rank that decodes it.

What a gather is checked by: the XOR of the fingerprints that the pieces had when they were made is
everybody's fingerprint of the whole after its last use. A rank whose own piece came back changed
sent it wrong. The words of a group of steps (ledger.py) travel in one reduction.
"""

from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from spimpi.inference.kernels import fingerprint_rows
from spimpi.inference.sequence_kernels import gathered_words
from spimpi.inference.tensors import HIDDEN, QK_NORMED, QKV
from spimpi.reduction import blocks, empty_records
from spimpi.topology.sequence import last_row_holders
from spimpi.trace.schema import Established, Op, Stage, Status, blank_events

WHOLE, OWN = 0, 1  # of the words of a gathered tensor


@dataclass(frozen=True, eq=False)
class Gathered:
    """The rows of a microbatch, those of all sequence ranks one after the other.

    pieces: int64 [ranks, 2] of (first global row, number of rows); first_own: where this rank's
    rows begin; rows: their global rows; sequences and positions of all rows, as in Batch.
    """

    pieces: np.ndarray
    first_own: int
    rows: np.ndarray
    sequences: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, split, m: int, s: int, first_sequence: int) -> "Gathered":
        """Those of microbatch ``m`` of a Split, for sequence rank ``s``."""
        pieces = np.array([(start, stop - start) for start, stop in split.pieces[m]], np.int64)
        rows = split.gathered(m)
        at = rows - split.rows.start
        return cls(
            pieces, int(pieces[:s, 1].sum()), rows, split.rows.sequence[at] - first_sequence,
            split.rows.position[at],
        )  # fmt: skip


class SequenceGroup:
    """One rank's part in the gathers of its sequence group.

    ``splits``: the prefill's Split and a later step's. ``segments``: the column segments of this
    rank's q|k|v block (layers.py), of which all but the first are keys and values.
    """

    def __init__(self, facts, splits, segments, n_slots: int):
        self.facts, self.splits = facts, splits
        comm, n_layers = facts.ctx.sequence, len(facts.ctx.layers)
        self.rank, self.size = comm.rank, comm.size
        self.key = QK_NORMED if facts.config.qk_norm else QKV
        self.segments = segments[1:].copy()
        self.segments[:, 0] -= segments[0, 2]
        width = int(self.segments[:, 2].sum())
        self.width = width
        most = max(split.most_rows for split in splits)
        self.n_gathered = [
            [sum(b - a for a, b in piece) for piece in split.pieces] for split in splits
        ]
        first, s = splits[0].rows.sequence[0], self.rank
        self._rows = [
            [Gathered.of(split, m, s, first) for m in range(len(split.pieces))] for split in splits
        ]
        self.sent = np.empty((most, width), np.float32)
        self.kv = np.empty((max(max(n) for n in self.n_gathered), width), np.float32)
        self.words = np.zeros((n_slots, n_layers, 2), np.uint64)
        self.seconds = 0.0
        if facts.ctx.is_last_stage:
            self._prepare_last_rows()

    def rows_of(self, step: int, m: int, rows) -> Gathered:
        """The rows of a step's microbatch; ``rows``: those of the step (data.rows_of)."""
        gathered = self._rows[min(step, 1)][m]
        return replace(gathered, positions=rows.position[gathered.rows - rows.start])

    # Keys and values

    def gather(self, i: int, qkv: np.ndarray, batch) -> np.ndarray:
        """The keys and values of all rows of a microbatch, float32 [rows, key|value columns].

        ``qkv``: this rank's q|k|v block of layer ``i``. Collective over ctx.sequence.
        """
        facts, gathered = self.facts, batch.gathered
        layer = facts.ctx.layers[i]
        sent, kv = self.sent[: batch.n_rows], self.kv[: gathered.rows.size]
        sent[:] = qkv[:, qkv.shape[1] - self.width :]
        facts.watch.enter("allgather", "kv", batch.step, layer)
        counts = [int(n) * self.width for n in gathered.pieces[:, 1]]
        facts.ctx.sequence.Allgatherv(sent, blocks(kv, counts))
        if facts.faults is not None:
            facts.faults.payload("kv", layer, kv, gathered.rows)
        return kv

    def used(self, i: int, kv: np.ndarray, n_cols: int, batch) -> None:
        """What was gathered has had its last use; ``n_cols``: the global columns of qkv."""
        if not self.facts.checked:
            return
        start = perf_counter()
        slot = self.facts.ledger.slot_of(batch.microbatch)
        gathered_words(
            kv.view(np.uint32), batch.keys[i + 1], self.key, batch.gathered.pieces, self.rank,
            self.segments, n_cols, self.words[slot, i],
        )  # fmt: skip
        self.seconds += perf_counter() - start

    # The prefill's last rows

    def _prepare_last_rows(self) -> None:
        split, hidden = self.splits[0], self.facts.config.hidden_size
        holders = np.array(last_row_holders(split))
        rows = np.array([max(b for _, b in piece) - 1 for piece in split.pieces])
        prompts = np.argsort(holders, kind="stable")
        self.holds_last = holders == self.rank
        self.last_counts = [int((holders == s).sum()) for s in range(self.size)]
        self.last_prompts = prompts + int(split.rows.sequence[0])
        self.last_rows = np.ascontiguousarray(rows[prompts])
        own = self.last_counts[self.rank]
        self.last_sent = np.empty((own, hidden), np.float32)
        self.last = np.empty((len(prompts), hidden), np.float32)
        self.n_taken = 0
        self.last_words = np.zeros(3, np.uint64)  # result, own piece of it; share
        self._taken = np.zeros(1, np.uint64)

    def take_last(self, x: np.ndarray, batch) -> None:
        """Keep the last row of the prefill's microbatch where this rank holds it."""
        if not self.holds_last[batch.microbatch]:
            return
        row = batch.first_row + batch.n_rows - 1
        if self.n_taken == 0:
            self.last_words[2] = 0
        self.last_sent[self.n_taken] = x[-1]
        self.n_taken += 1
        if self.facts.checked:
            rows = np.array([row], np.int64)
            fingerprint_rows(x[-1:].view(np.uint32), rows, batch.keys[-1], HIDDEN, self._taken, 0)
            self.last_words[2] ^= self._taken[0]

    def gather_last(self, keys: np.ndarray, out: np.ndarray) -> np.uint64:
        """Give each rank the last rows of the prompts that it decodes: out, [prompts, hidden].

        ``keys``: Keys.of_step of the prefill. Returns the word of what it gave this rank, taken
        where it was gathered. Collective over ctx.sequence.
        """
        facts, last = self.facts, self.last
        facts.watch.enter("allgather", "last_rows", 0, -1)
        counts = [n * last.shape[1] for n in self.last_counts]
        facts.ctx.sequence.Allgatherv(self.last_sent, blocks(last, counts))
        if facts.faults is not None:
            facts.faults.payload("last_rows", -1, last, self.last_prompts)
        own = self.last_prompts - facts.first_prompt
        mine = (own >= 0) & (own < facts.n_prompts)
        out[own[mine]] = last[mine]
        self.n_taken = 0
        if facts.checked:
            start, bits = perf_counter(), last.view(np.uint32)
            first = sum(self.last_counts[: self.rank])
            piece = slice(first, first + self.last_counts[self.rank])
            for rows, words, slot in ((slice(None), self.last_words, WHOLE),
                                      (piece, self.last_words, OWN), (mine, self._taken, 0)):  # fmt: skip
                fingerprint_rows(bits[rows], self.last_rows[rows], keys[-1], HIDDEN, words, slot)
            self.seconds += perf_counter() - start
        return self._taken[0]

    # What the checks found

    def close(self, ledger) -> None:
        """Compare a group's words over the sequence ranks, and agree on the next group's size.

        Collective over ctx.sequence, after the tensor ranks have agreed on theirs.
        """
        start, n = perf_counter(), ledger.n_slots
        # After a QK norm each segment's word is that of its last use; all together are compared
        # with those made (at rest).
        results = ledger.results
        made = results.normed_found if self.facts.config.qk_norm else results.segments
        shares = np.bitwise_xor.reduce(made[:, 1:], axis=1)
        words = self.words[:n].reshape(-1, 2)
        self._with_last = self.facts.ctx.is_last_stage and ledger.places[0, 0] == 0
        if self._with_last:
            shares = np.append(shares, self.last_words[2])
            words = np.concatenate([words, self.last_words[None, :2]])
        records = empty_records(shares.size + 1)
        own = records[:-1]
        own["xor"], own["count"] = shares, words[:, OWN] != shares
        own["every"], own["none"] = words[:, WHOLE], ~words[:, WHOLE]
        records["place"][-1] = ledger.pace
        ctx = self.facts.ctx
        merged = ctx.records.merge(ctx.sequence, records)
        ledger.pace = int(merged["place"][-1])
        self._own, self._merged = own, merged[:-1]
        self.seconds += perf_counter() - start

    def events(self, ledger) -> np.ndarray:
        """The events of what ``close`` compared. Collective where a check failed."""
        facts, merged = self.facts, self._merged
        events = blank_events(merged.size)
        layers = facts.ctx.layers
        in_layers = events[: ledger.n_slots * len(layers)]
        step, microbatch, _ = np.repeat(ledger.places[: ledger.n_slots], len(layers), axis=0).T
        in_layers["step"], in_layers["microbatch"] = step, microbatch
        in_layers["layer"] = np.tile(np.arange(layers.start, layers.stop), ledger.n_slots)
        n_rows = [self.n_gathered[min(s, 1)][m] for s, m in zip(step, microbatch)]
        in_layers["bytes"] = np.array(n_rows) * 4 * self.width
        in_layers["t_start"], in_layers["t_end"] = ledger.results.times.T
        index = facts.recorder.tensor_index
        in_layers["tensor"] = index["kv"]
        if self._with_last:
            event = events[-1:]
            event["microbatch"], event["tensor"] = 0, index["last_rows"]
            event["bytes"] = self.last.nbytes
            event["t_start"], event["t_end"] = ledger.opened, ledger.closed
        events["repeat"], events["stage"], events["op"] = facts.repeat, Stage.SEQUENCE, Op.ALLGATHER
        events["established"] = Established.MOVED | Established.AGREED
        events["fingerprint"], events["expected"] = self._own["every"], merged["xor"]
        wrong = (merged["every"] != merged["xor"]) | (merged["none"] != ~merged["xor"])
        wrong |= merged["count"] > 0
        events["verdict"] = np.where(wrong, Status.FAILED, Status.VERIFIED)
        if wrong.any():
            self._name_culprits(events, np.flatnonzero(wrong))
        return events

    def _name_culprits(self, events, failed) -> None:
        """Name the rank behind each failed gather. Collective: all ranks saw it fail."""
        ctx = self.facts.ctx
        own = np.ascontiguousarray(self._own[failed])
        everyone = np.empty((self.size, *own.shape), own.dtype)
        ctx.sequence.Allgather(own.view(np.uint8), everyone.reshape(-1).view(np.uint8))
        place = ctx.place
        for j, i in enumerate(failed):
            rank = culprit(everyone[:, j], self._merged["xor"][i])
            if rank >= 0:
                events["peer"][i] = ctx.grid.rank_of(place.d, place.p, rank, place.t)
                events["fingerprint"][i] = everyone["every"][rank, j]  # not this rank's, if right


def culprit(everyone: np.ndarray, expected) -> int:
    """The one sequence rank that a failed gather points at, or -1.

    It is the only one whose result differs; or, where all have the same wrong result, the only one
    whose own piece came back other than it was made, so that it was sent wrong.
    """
    for suspects in (everyone["every"] != expected, everyone["count"] > 0):
        ranks = np.flatnonzero(suspects)
        if ranks.size == 1:
            return int(ranks[0])
    return -1
