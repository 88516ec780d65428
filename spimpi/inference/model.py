"""One rank's share of the decoder: embedding, its stage's layers, head, and their checks.

``Stage.step`` takes a step's rows through the stage, microbatch after microbatch: receive or
embed, layers, hand on or sample. All ranks of the grid call it in the same order.
"""

from time import perf_counter

import numpy as np

from spimpi.inference import kernels
from spimpi.inference.blas_layers import BlasLayers
from spimpi.inference.embedding import embed
from spimpi.inference.head import Head
from spimpi.inference.layer_checks import EventWriter, layer_plan
from spimpi.inference.layers import Batch, ExactLayers
from spimpi.inference.ledger import ATTN, FFN, INPUT, MADE, RESID, Ledger
from spimpi.inference.links import Links
from spimpi.inference.once_a_step import StepEvents
from spimpi.inference.stage_facts import StageFacts
from spimpi.inference.tensors import GOLDEN_LAYER, Keys, golden_columns
from spimpi.topology.data import last_rows, rows_of
from spimpi.topology.pipeline import Schedule
from spimpi.topology.sequence import split_rows
from spimpi.trace.schema import Stage as Phase, joined_events
from spimpi.watchdog import Unwatched


def _checking_speed() -> float:
    """Seconds that fingerprinting a byte takes here, the best of a few tries."""
    rows, words, keys = np.zeros((64, 1024), np.uint32), np.zeros(1, np.uint64), np.ones(1, np.uint64)
    best = np.inf
    for _ in range(5):
        start = perf_counter()
        kernels.fingerprint_block(rows, keys, 0, 0, 0, 1024, words, 0)
        best = min(best, perf_counter() - start)
    return best / rows.nbytes


class Stage:
    """A rank's part of a run over a fixed batch of prompts.

    lengths: tokens of every prompt (all data ranks'); n_steps: the prefill and every later step.
    ``recorder`` takes the events; None runs without checks. ``sketches`` takes the sketches
    (SKETCH_SHARE) of the first run's steps; None takes none.
    """

    def __init__(
        self, ctx, config, part, lengths, n_steps, exact_arithmetic, recorder, faults=None,
        watch=None, sketches=None,
    ):  # fmt: skip
        place, grid = ctx.place, ctx.grid
        self.splits = [split_rows(lengths, grid, place.d, step) for step in (0, 1)]
        decoded = self.splits[1].rows_of(place.s)
        later = self.splits[1].rows
        self.first_sequence = later.start
        first = int(decoded[0]) if decoded.size else later.stop
        self.cuts = [split.own(place.s) for split in self.splits]
        self.facts = StageFacts(
            ctx, config, part, list(lengths), n_steps, first, decoded.size,
            Schedule(grid.pp, *map(len, self.cuts), n_steps),
            np.zeros((n_steps, len(golden_columns(config.n_layers))), np.uint64),
            recorder, faults, watch or Unwatched(), chosen=np.zeros(n_steps, np.uint64),
            used=np.zeros(n_steps, np.uint64),
        )  # fmt: skip
        self.ctx, self.config, self.part = ctx, config, part
        kind = ExactLayers if exact_arithmetic else BlasLayers
        checked = self.facts.checked
        self.layers = kind(
            ctx, config, part, later.size, max(lengths) + n_steps, checked, faults,
            self.facts.watch,
        )  # fmt: skip
        most = max(1, *(stop - start for cuts in self.cuts for start, stop in cuts))
        self.space = self.layers.workspace(most)
        self.views = {}
        self.hidden = [np.empty((most, config.hidden_size), np.float32) for _ in range(2)]
        self.keys = Keys(ctx.seed, config, ctx.layers)
        held = np.array([h in part.shard.kv_heads for h in self.layers.shared], bool)
        self.ledger = self.facts.ledger = Ledger(
            self.facts, self.cuts, len(part.layers), len(self.layers.segments), held,
            self.layers.shared_at, exact_arithmetic,
        )  # fmt: skip
        self.sequence = None
        if grid.sp > 1:
            from spimpi.inference.sequence import SequenceGroup

            self.sequence = self.layers.sequence = SequenceGroup(
                self.facts, self.splits, self.layers.segments, len(self.ledger.slots)
            )
        self.float_sums = None
        if checked and not exact_arithmetic and grid.tp > 1:
            from spimpi.inference.float_sums import FloatSums

            self.float_sums = self.layers.float_sums = FloatSums(
                self.facts, len(self.ledger.slots), len(part.layers)
            )
        self.links = Links(self.facts, most, self.keys)
        self.head = None
        if ctx.is_last_stage:
            scratch = self.layers.scratch if exact_arithmetic else None
            self.head = Head(self.facts, exact_arithmetic, scratch)
        self.sketcher = None
        if sketches is not None:
            from spimpi.inference.sketching import Sketcher

            self.sketcher = self.layers.sketcher = Sketcher(self.facts, self.layers, sketches)
        if checked:
            plan = layer_plan(exact_arithmetic, grid.tp, np.flatnonzero(held), config.qk_norm)
            index = recorder.tensor_index
            self._layer_events = EventWriter(ctx, plan, ctx.layers, index, self._row_bytes())
            self._step_events = StepEvents(self.facts, index, exact_arithmetic)
            self._seconds_per_byte = _checking_speed()

    @property
    def chosen(self) -> np.ndarray:
        """Each step's word of this rank's prompts' tokens as they were chosen, uint64 [steps]."""
        return self.facts.chosen

    @property
    def golden(self) -> np.ndarray:
        """This rank's shares of the golden table, uint64 [steps, columns]."""
        return self.facts.golden

    def _row_bytes(self) -> dict[str, int]:
        """Bytes of a row that this rank's check of a layer tensor covers."""
        space, n_heads = self.space, self.layers.kv_of_head.size
        partial = space.sent[0].itemsize
        width = self.config.hidden_size
        return {
            "input": 4 * width, "qkv": 4 * space.qkv.shape[1], "scores": 8 * n_heads,
            "attn": 4 * space.attn.shape[1], "attn_max": 4, "attn_out": partial * width,
            "resid": 4 * width, "gate_up": 4 * space.gate_up.shape[1],
            "ffn": 4 * space.ffn.shape[1], "ffn_max": 4, "ffn_out": partial * width,
            "hidden": 4 * width, "qk_max": 8, "qk_sum": 2 * partial,
            "qk_normed": 4 * space.qkv.shape[1],
        }  # fmt: skip

    def run(self, prompts, repeat=0, progress=None) -> np.ndarray | None:
        """Prefill and greedy decoding; the new tokens [prompts here, steps], None in mid-pipeline.

        ``prompts``: token ids of this data rank's prompts, used by the first stage; ``progress`` is
        told each step as it begins. The tokens are those of facts.n_prompts prompts. Collective.
        """
        self.layers.clear()
        self.ledger.restart()
        self.facts.golden[:] = self.facts.used[:] = 0
        self.facts.repeat = repeat
        if repeat:  # would have the same sketches
            self.sketcher = self.layers.sketcher = None
        tokens = self.own_tokens(prompts)
        made = []
        for step in range(self.facts.n_steps):
            if progress:
                progress(step)
            chosen = self.step(step, tokens)
            if chosen is not None:
                tokens = chosen.copy()
                made.append(tokens)
        if self.facts.checked and self.ctx.is_first_stage:
            self.facts.recorder.add(self._step_events.ids_used(), {})
        return np.stack(made, axis=1) if made else None

    def own_tokens(self, prompts) -> np.ndarray:
        """Those tokens of this data rank's prompts that are this rank's rows of the prefill."""
        prefill = self.splits[0]
        own = prefill.rows_of(self.ctx.place.s) - prefill.rows.start
        return np.concatenate(prompts)[own]

    def step(self, step: int, tokens) -> np.ndarray | None:
        """One step; returns the tokens that it chose, on the first and the last stage.

        ``tokens``: the ids of this rank's rows, used by the first stage.
        """
        facts, links = self.facts, self.links
        rows = rows_of(facts.lengths, self.ctx.grid.dp, self.ctx.place.d, step)
        cuts = self.cuts[min(step, 1)]
        keys = self.keys.of_step(step, rows.total)
        if facts.faults is not None:
            facts.faults.begin(step)
        if self.sketcher:
            self.sketcher.begin(step)
        links.begin_step(cuts)
        results = self.ledger.begin(step, [stop - start for start, stop in cuts])
        last = rows.start + last_rows(rows)
        last = last[facts.first_prompt - self.first_sequence :][: facts.n_prompts]
        at = 0
        for m, (start, stop) in enumerate(cuts):
            batch = self._batch(step, m, rows, start, stop, keys, results[m])
            if self.ctx.is_first_stage:
                x = self.hidden[1][: stop - start]
                embed(facts, tokens[at : at + stop - start], batch, x)
                if self.sketcher:
                    self.sketcher.take("embed", -1, x, batch.first_row)
            else:
                x = links.receive(batch)
            self._layers(x, batch, last)
            links.done_with(m, cuts)
            at += stop - start
        chosen = None
        if self.head:
            if self.sequence and step == 0:
                self.ledger.rows[self.ledger.now, MADE] = self.sequence.gather_last(
                    keys, self.head.rows
                )
            sampled = self.head.sample(step, last, keys)
            if self.sketcher:
                self.sketcher.take("logits", -1, self.head.logits, facts.first_prompt)
            chosen = links.hand_on_tokens(step, *sampled)
        if self.sketcher:
            self.sketcher.end()
        if facts.checked and self.ledger.is_full(step):
            self._close_group(step)
        else:
            links.end_step(step)
        return links.receive_tokens(step) if links.from_last else chosen

    def _batch(self, step, m, rows, start, stop, keys, results) -> Batch:
        n, own = stop - start, slice(start - rows.start, stop - rows.start)
        if n not in self.views:
            self.views[n] = self.space.first_rows(n)
        gathered = None
        if self.sequence:
            gathered = self.sequence.rows_of(step, m, rows)
        return Batch(
            step, m, start, n, rows.sequence[own] - self.first_sequence,
            np.array(rows.position[own]), keys, self.views[n], results, gathered,
        )  # fmt: skip

    def _layers(self, x, batch, last) -> None:
        """All layers of the stage on one microbatch, then on to the next stage or the head.

        ``last``: the global rows whose logits this rank computes.
        """
        n_layers, links = len(self.part.layers), self.links
        for i in range(n_layers):
            if i == n_layers - 1 and links.to_next:
                out = links.to_next.buffer(batch.n_rows)
            else:
                out = self.hidden[i % 2][: batch.n_rows]
            self.layers.forward(i, x, out, batch)
            x = out
        if links.to_next:
            links.send(batch)
        else:
            if self.sequence and batch.step == 0:
                self.sequence.take_last(x, batch)
            else:
                self.head.take(x, last, batch)
            links.check_last(x, batch)

    def _close_group(self, step) -> None:
        """Compare what a group of steps found, and record it.

        Collective over ctx.tensor, then over ctx.sequence.
        """
        facts, ledger = self.facts, self.ledger
        start = perf_counter()
        ledger.start()
        spent = perf_counter() - start
        self.links.end_step(step)
        facts.watch.enter("agreement", "all layers", step, -1)
        start = perf_counter()
        ledger.finish()
        if self.float_sums:
            self.float_sums.close(ledger)
        layers = self._layer_events.write(ledger, facts.repeat, self.float_sums)
        events = [layers, self._step_events.write(ledger)]
        self._share_golden()
        # Most checks of the layers ride in the kernels that compute: no clock sees them apart.
        riding = int(events[0]["bytes"].sum()) * self._seconds_per_byte
        seconds = {Phase.COMPUTE: riding + sum(slot.seconds for slot in ledger.slots)}
        across = Phase.TENSOR if self.ctx.tensor.size > 1 else Phase.COMPUTE
        spent += perf_counter() - start + ledger.seconds
        seconds[across] = seconds.get(across, 0) + spent
        if self.sequence:
            self.sequence.close(ledger)
            events.append(self.sequence.events(ledger))
            seconds[Phase.SEQUENCE] = self.sequence.seconds
            self.sequence.seconds = 0.0
        facts.recorder.add(joined_events(events), seconds)
        facts.recorder.flush()
        ledger.close()

    def _share_golden(self) -> None:
        """XOR this rank's share of the group's tensors into the golden table."""
        ledger, layers, n = self.ledger, self.ctx.layers, self.ledger.n_steps
        results, width = ledger.results, len(GOLDEN_LAYER)
        first_step, first = int(ledger.places[0, 0]), 1 + layers.start * width
        rows = self.facts.golden[first_step : first_step + n]

        def by_step(words):  # [slots × layers] -> [steps, layers]
            return np.bitwise_xor.reduce(words.reshape(n, -1, len(layers)), axis=1)

        table = rows[:, first : first + len(layers) * width].reshape(n, len(layers), width)
        table[:, :, 0] ^= by_step(
            np.bitwise_xor.reduce(results.segments[:, self.layers.owned], axis=1)
        )
        table[:, :, 1] ^= by_step(results.rest_expected[:, ATTN])
        table[:, :, 3] ^= by_step(results.rest_expected[:, FFN])
        if self.ctx.place.t == 0:
            table[:, :, 2] ^= by_step(results.rest_expected[:, RESID])
            table[:, :, 4] ^= by_step(results.hidden)
            if self.ctx.is_first_stage:
                rows[:, 0] ^= by_step(results.rest_expected[:, INPUT])[:, 0]
        rows[:, first : first + len(layers) * width] = table.reshape(n, -1)
        if self.head:
            rows[:, -2] ^= ledger.logits[:n, MADE]
            if self.ctx.place.t == 0:
                rows[:, -1] ^= ledger.tokens[:n, MADE]
