"""One rank's share of the decoder: embedding, its stage's layers, head, and their checks.

``Stage.step`` takes a step's rows through the stage, microbatch after microbatch: receive or
embed, layers, hand on or sample. All ranks of the grid call it in the same order.
"""

from time import perf_counter

import numpy as np
from mpi4py import MPI

from spimpi.checks.handoff import IN_FLIGHT, Receiver, Sender, describe_mismatch, same_place
from spimpi.fingerprint.tag import CONTENT, Tag
from spimpi.inference import exact, kernels
from spimpi.inference.checkpoint import float32
from spimpi.inference.layer_checks import INPUT, EventWriter, layer_plan
from spimpi.inference.layers import Batch, BlasLayers, ExactLayers
from spimpi.inference.tensors import GOLDEN_LAYER, HIDDEN, PROGRAM, Keys, golden_columns
from spimpi.reduction import blocks, empty_records, minority
from spimpi.topology.data import last_rows, rows_of
from spimpi.topology.pipeline import microbatches, schedule
from spimpi.trace.schema import Established, Op, Stage as Phase

MOVED, AGREED, COMPUTED = Established.MOVED, Established.AGREED, Established.COMPUTED


class Stage:
    """A rank's part of a run over a fixed batch of prompts.

    lengths: tokens of every prompt (all data ranks'); n_steps: the prefill and every later step.
    ``recorder`` takes the events; None runs without checks.
    """

    def __init__(self, ctx, config, part, lengths, n_steps, exact_arithmetic, recorder, faults=None):
        self.ctx, self.config, self.part = ctx, config, part
        self.lengths, self.n_steps = lengths, n_steps
        self.recorder, self.checked, self.faults = recorder, recorder is not None, faults
        place, grid = ctx.place, ctx.grid
        steps = (0, 1) if n_steps > 1 else (0,)
        self.rows = {s: rows_of(lengths, grid.dp, place.d, s) for s in steps}
        self.first_prompt = int(self.rows[0].sequence[0])
        self.n_prompts = int(self.rows[0].sequence[-1]) + 1 - self.first_prompt
        blocks = [microbatches(self.rows[s].size, grid.pp) for s in steps]
        self.blocks = {0: blocks[0], 1: blocks[-1]}
        self.schedule = schedule(grid.pp, self.rows[0].size, self.rows[steps[-1]].size, n_steps)
        kind = ExactLayers if exact_arithmetic else BlasLayers
        self.layers = kind(
            ctx, config, part, self.n_prompts, max(lengths) + n_steps, self.checked, faults
        )
        most = max(stop - start for b in blocks for start, stop in b)
        self.space = self.layers.workspace(most)
        self.views = {}
        self.hidden = [np.empty((most, config.hidden_size), np.float32) for _ in range(2)]
        self.keys = Keys(ctx.seed, config, ctx.layers)
        self.plan = layer_plan(exact_arithmetic, grid.tp, self.layers.shared)
        self.results = [self.layers.results() for _ in range(max(len(b) for b in blocks))]
        self.golden = np.zeros((n_steps, len(golden_columns(config.n_layers))), np.uint64)
        self._open_links(most)
        if self.checked:
            self._writer = EventWriter(
                ctx, self.plan, ctx.layers, recorder.tensor_index, self._row_bytes(), self._held()
            )
        if ctx.is_last_stage:
            self._open_head(exact_arithmetic)

    def _open_links(self, most):
        """The links to the next stage and from the previous one, and the ring's closing hop."""
        ctx, p, width = self.ctx, self.ctx.place.p, self.config.hidden_size
        self.to_next = self.from_previous = self.to_first = self.from_last = None
        last = ctx.grid.pp - 1
        if not ctx.is_last_stage:
            self.to_next = Sender(ctx.pipeline, p + 1, most, width, np.float32, self._sent_hidden)
        if not ctx.is_first_stage:
            self.from_previous = Receiver(ctx.pipeline, p - 1, most, width, np.float32)
        if last and ctx.is_last_stage:
            self.to_first = Sender(ctx.pipeline, 0, self.n_prompts, 1, np.int64, self._sent_tokens)
        if last and ctx.is_first_stage:
            self.from_last = Receiver(ctx.pipeline, last, self.n_prompts, 1, np.int64)

    def _open_head(self, exact_arithmetic):
        n, width = self.n_prompts, self.part.head.values.shape[0]
        self.head_rows = np.empty((n, self.config.hidden_size), np.float32)
        self.normed = np.empty_like(self.head_rows)
        self.logits = np.empty((n, width), np.float32)
        sizes = self.part.shard.vocabulary().all_sizes
        self.gathered = np.empty(n * sum(sizes), np.float32)
        ends = np.cumsum([n * size for size in sizes])
        self.blocks_of_logits = [
            block.reshape(n, size)
            for block, size in zip(np.split(self.gathered, ends[:-1]), sizes)
        ]
        self.tokens = np.empty((n, 1), np.int64)
        if exact_arithmetic:
            self.scaled = np.empty(self.head_rows.shape)
            self.product = np.empty(self.logits.shape)
            self.maxima, self.exponents = np.empty(n, np.uint32), np.empty(n, np.int32)

    def _held(self):
        return np.array([h in self.part.shard.kv_heads for h in self.layers.shared], bool)

    def _row_bytes(self) -> dict[str, int]:
        """Bytes of a row that this rank's check of a layer tensor covers."""
        space, n_attn = self.space, self.layers.kv_of_head.size
        partial = space.sent[0].itemsize
        width = self.config.hidden_size
        return {
            "input": 4 * width, "qkv": 4 * space.qkv.shape[1], "scores": 8 * n_attn,
            "attn": 4 * space.attn.shape[1], "attn_max": 4, "attn_out": partial * width,
            "resid": 4 * width, "gate_up": 4 * space.gate_up.shape[1],
            "ffn": 4 * space.ffn.shape[1], "ffn_max": 4, "ffn_out": partial * width,
            "hidden": 4 * width,
        }  # fmt: skip

    # A whole run over the batch

    def run(self, prompts, repeat=0, progress=None) -> np.ndarray | None:
        """Prefill and greedy decoding; the new tokens [prompts here, steps], None in mid-pipeline.

        ``prompts``: token ids of this data rank's prompts, used by the first stage. Collective.
        """
        self.layers.clear()
        self.golden[:] = 0
        self.repeat = repeat
        tokens = np.concatenate(prompts)
        made = []
        for step in range(self.n_steps):
            chosen = self.step(step, tokens)
            if chosen is not None:
                tokens = chosen.copy()
                made.append(tokens)
            if progress:
                progress(step)
        return np.stack(made, axis=1) if made else None

    def step(self, step: int, tokens):
        """One step; returns the tokens that it chose, on the first and the last stage."""
        rows = rows_of(self.lengths, self.ctx.grid.dp, self.ctx.place.d, step)
        cuts = self.blocks[min(step, 1)]
        keys = self.keys.of_step(step, rows.total)
        if self.faults is not None:
            self.faults.begin(step)
        if self.from_previous:
            for start, stop in cuts[:IN_FLIGHT]:
                self.from_previous.post(stop - start)
        last = last_rows(rows)
        batches = []
        for m, (start, stop) in enumerate(cuts):
            batch = self._batch(step, m, rows, start, stop, keys)
            batches.append(batch)
            if self.ctx.is_first_stage:
                x = self._embed(tokens[start:stop], batch)
            else:
                x = self._receive(batch)
            self._layers(x, batch, last, start)
            if self.from_previous and m + IN_FLIGHT < len(cuts):
                # Only now is the buffer of this microbatch free for one that is to come.
                start, stop = cuts[m + IN_FLIGHT]
                self.from_previous.post(stop - start)
        if self.ctx.is_last_stage:
            chosen = self._sample(step, rows)
        if self.to_next:
            self.to_next.drain()
        self._record(batches)
        if self.from_last:
            chosen = self._receive_tokens(step)
        elif not self.ctx.is_last_stage:
            chosen = None
        return chosen

    def _batch(self, step, m, rows, start, stop, keys) -> Batch:
        n = stop - start
        if n not in self.views:
            self.views[n] = self.space.first_rows(n)
        results = self.results[m]
        results.clear_counts()
        return Batch(
            step, m, rows.start + start, n, rows.sequence[start:stop] - self.first_prompt,
            np.array(rows.position[start:stop]), keys, self.views[n], results,
        )  # fmt: skip

    def _layers(self, x, batch, last, start):
        """All layers of the stage on one microbatch, then on to the next stage or the head."""
        n_layers, n = len(self.part.layers), batch.n_rows
        for i in range(n_layers):
            if i == n_layers - 1 and self.to_next:
                out = self.to_next.buffer(n)
            else:
                out = self.hidden[i % 2][:n]
            self.layers.forward(i, x, out, batch)
            x = out
        if self.checked:
            batch.results.start(
                self.ctx, self.layers.exact, self._writer.held, self.layers.shared_at
            )
        if self.to_next:
            self.to_next.send(**self._expected_record(batch), fingerprint=batch.results.hidden[-1])
            return
        chosen = (last >= start) & (last < start + n)
        self.head_rows[chosen] = x[last[chosen] - start]
        if self.checked:
            self._at_rest_hidden(x, batch)

    def _expected_record(self, batch, next_stage=1) -> dict:
        """What the record of a hand-off of this microbatch says, seen from either end."""
        stages = self.ctx.grid.layer_sizes
        p = self.ctx.place.p + next_stage
        first = sum(stages[: p - 1])
        return {
            "sequence": self._sequence(batch), "step": batch.step, "microbatch": batch.microbatch,
            "first_layer": first, "last_layer": first + stages[p - 1] - 1,
            "first_row": batch.first_row, "n_rows": batch.n_rows,
            "n_cols": self.config.hidden_size, "itemsize": 4,
        }  # fmt: skip

    def _sequence(self, batch):
        run = self.schedule.sequence(batch.step, batch.microbatch)
        return self.repeat * self.schedule.per_link + run

    def _record(self, batches):
        """Events and golden shares of the step's microbatches."""
        if not self.checked:
            return
        for batch in batches:
            results = batch.results
            events = self._writer.write(
                results, batch.step, batch.microbatch, self.repeat, batch.n_rows
            )
            self.recorder.add(events, results.seconds)
            self._share_golden(batch)

    def _share_golden(self, batch):
        """XOR this rank's share of the layer tensors into the golden table."""
        results, layers = batch.results, self.ctx.layers
        first = 1 + layers.start * len(GOLDEN_LAYER)
        table = self.golden[batch.step, first : first + len(layers) * len(GOLDEN_LAYER)]
        table = table.reshape(len(layers), len(GOLDEN_LAYER))
        table[:, 0] ^= np.bitwise_xor.reduce(results.segments[:, self.layers.owned], axis=1)
        table[:, 1] ^= results.rest_expected[:, 2]
        table[:, 3] ^= results.rest_expected[:, 4]
        if self.ctx.place.t == 0:
            table[:, 2] ^= results.rest_expected[:, 3]
            table[:, 4] ^= results.hidden
            if self.ctx.is_first_stage:
                self.golden[batch.step, 0] ^= results.rest_expected[0, INPUT]

    # Embedding

    def _embed(self, ids, batch):
        """Rows of the embedding; split by vocabulary, they travel as bits (MPI_BOR)."""
        shard, tensor = self.part.shard.vocabulary(), self.ctx.tensor
        mine = (ids >= shard.start) & (ids < shard.stop)
        out = self.hidden[1][: ids.size]
        out[:] = 0
        out[mine] = float32(self.part.embed[ids[mine] - shard.start])
        keys = batch.keys[0]
        words = np.zeros(2, np.uint64)
        place = dict(step=batch.step, microbatch=batch.microbatch, bytes=out.nbytes)
        bits = out.view(np.uint32)
        width = self.config.hidden_size
        if tensor.size > 1:
            start = perf_counter()
            if self.checked:
                kernels.fingerprint_chosen_rows(bits, mine, keys, HIDDEN, batch.first_row, words, 0)
            if self.faults is not None and self.faults.drop("embed", -1, mine.any()):
                out[:] = 0
            tensor.Allreduce(MPI.IN_PLACE, bits, op=MPI.BOR)
        if self.faults is not None:
            self.faults.replica("embed", -1, out, batch.first_row)
        if not self.checked:
            return out
        kernels.fingerprint_block(bits, keys, HIDDEN, batch.first_row, 0, width, words, 1)
        batch.results.rest_expected[0, INPUT] = words[1]
        if tensor.size > 1:
            self._verify_assembled(
                "embed", Op.ALLREDUCE_BOR, words[0], words[1], start, repeat=self.repeat, **place
            )
        if self.faults is not None:
            self.faults.payload("embed", -1, out, batch.first_row)
        return out

    def _verify_assembled(self, tensor, op, share, result, start, **place):
        """A result put together from owners' shares: XOR of the shares == everybody's result."""
        records = empty_records(1)
        records["xor"], records["every"], records["none"] = share, result, ~result
        merged = self.ctx.records.merge(self.ctx.tensor, records)[0]
        wrong = merged["every"] != ~merged["none"] or merged["xor"] != merged["every"]
        peer = self._suspect(share, result, merged, xor=True) if wrong else -1
        self.recorder.one(
            tensor, op, Phase.TENSOR, MOVED | AGREED, result, merged["xor"], wrong,
            t_start=start, peer=peer, **place,
        )  # fmt: skip

    def _verify_agreement(self, tensor, word, start, **place):
        records = empty_records(1)
        records["every"], records["none"] = word, ~word
        merged = self.ctx.records.merge(self.ctx.tensor, records)[0]
        wrong = merged["every"] != ~merged["none"]
        peer = self._suspect(word, word, merged, xor=False) if wrong else -1
        self.recorder.one(
            tensor, Op.AGREEMENT, Phase.TENSOR, AGREED, word, merged["every"], wrong,
            t_start=start, peer=peer, **place,
        )  # fmt: skip

    def _suspect(self, share, result, merged, xor) -> int:
        """World rank that a failed check of the tensor group points at, or -1. Collective."""
        tensor = self.ctx.tensor
        words = np.empty((tensor.size, 2), np.uint64)
        tensor.Allgather(np.array([share, result], np.uint64), words)
        odd = minority(words[:, 1])
        if not odd and xor:
            # All agree on a wrong result: a share that is missing from it is what differs.
            missing = merged["xor"] ^ words[0, 1]
            odd = [int(t) for t in np.flatnonzero(words[:, 0] == missing)]
        if len(odd) != 1:
            return -1
        return self.ctx.grid.rank_of(self.ctx.place.d, self.ctx.place.p, odd[0])

    # Hand-offs

    def _receive(self, batch):
        """Take the microbatch that the previous stage sent, and check it."""
        x, record = self.from_previous.take()
        if not self.checked:
            return x
        start = perf_counter()
        expected = self._expected_record(batch, next_stage=0)
        words = np.zeros(1, np.uint64)
        kernels.fingerprint_block(
            x.view(np.uint32), batch.keys[0], HIDDEN, batch.first_row, 0, x.shape[1], words, 0
        )
        batch.results.rest_expected[0, INPUT] = words[0]
        self._handoff_event("hidden", words[0], record, expected, start, x.nbytes,
                            layer=expected["last_layer"], sender=self.ctx.place.p - 1)  # fmt: skip
        return x

    def _handoff_event(self, tensor, found, record, expected, start, n_bytes, layer, sender):
        place = self.ctx.place
        wrong = record["fingerprint"] != found or not same_place(record, expected)
        self.recorder.one(
            tensor, Op.HANDOFF, Phase.PIPELINE, MOVED, found, record["fingerprint"], wrong,
            t_start=start, step=expected["step"], microbatch=expected["microbatch"], layer=layer,
            bytes=n_bytes, sequence=expected["sequence"], repeat=self.repeat,
            peer=self.ctx.grid.rank_of(place.d, sender, place.t),
        )  # fmt: skip
        if wrong and not same_place(record, expected):
            self.recorder.note(
                expected["step"], expected["microbatch"], layer, describe_mismatch(record, expected)
            )

    def _sent_hidden(self, buffer, record):
        """The send has completed: the buffer must still hold what was handed over."""
        if self.checked:
            start = perf_counter()
            step = int(record["step"])
            keys = self.keys.of_step(step, self._total_rows(step))
            self._rest_event(buffer, keys[-1], record, start)

    def _at_rest_hidden(self, x, batch):
        start = perf_counter()
        record = {
            "step": batch.step, "microbatch": batch.microbatch, "first_row": batch.first_row,
            "fingerprint": batch.results.hidden[-1],
        }  # fmt: skip
        self._rest_event(x, batch.keys[-1], record, start)

    def _rest_event(self, x, keys, record, start):
        words = np.zeros(1, np.uint64)
        first_row = int(record["first_row"])
        kernels.fingerprint_block(
            x.view(np.uint32), keys, HIDDEN, first_row, 0, x.shape[1], words, 0
        )
        self.recorder.one(
            "hidden", Op.AT_REST, Phase.COMPUTE, MOVED, words[0], record["fingerprint"],
            words[0] != record["fingerprint"], t_start=start, step=int(record["step"]),
            microbatch=int(record["microbatch"]), layer=self.ctx.layers[-1], bytes=x.nbytes,
            repeat=self.repeat,
        )  # fmt: skip

    def _total_rows(self, step):
        return self.rows[0].total if step == 0 else len(self.lengths)

    # Head, sampling, closing hop

    def _sample(self, step, rows):
        """Logits of each prompt's last row, gathered over the vocabulary; greedy tokens.

        Ties go to the lowest id. Collective over ctx.tensor.
        """
        config, head, tensor = self.config, self.part.head, self.ctx.tensor
        kernels.rmsnorm(self.head_rows, self.part.norm, config.rms_norm_eps, self.normed)
        place = dict(step=step, repeat=self.repeat, bytes=self.logits.nbytes)
        if self.layers.exact:
            self._exact_logits(head, place)
        else:
            np.matmul(self.normed, head.values.T, out=self.logits)
        columns = self.part.shard.vocabulary()
        n_prompts = len(self.lengths)
        vocab = config.vocab_size
        key = Tag(self.ctx.seed, "logits", -1, step).key(CONTENT, (n_prompts, vocab), 4)
        keys = np.array([key], np.uint64)
        words = np.zeros(3, np.uint64)
        bits = self.logits.view(np.uint32)
        where = (self.first_prompt, columns.start, vocab)
        if self.checked:
            kernels.fingerprint_block(bits, keys, 0, *where, words, 0)
            self.golden[step, -2] ^= words[0]
        if self.faults is not None:
            self.faults.payload("logits", -1, self.logits, self.first_prompt)
        pieces = [self.logits]
        start = perf_counter()
        if tensor.size > 1:
            counts = [block.size for block in self.blocks_of_logits]
            tensor.Allgatherv(self.logits, blocks(self.gathered, counts))
            pieces = self.blocks_of_logits
        chosen = _argmax(pieces)
        if self.checked:
            if tensor.size > 1:
                self._check_gathered(pieces, keys, words[0], start, place)
            kernels.fingerprint_block(bits, keys, 0, *where, words, 2)
            self.recorder.one(
                "logits", Op.AT_REST, Phase.COMPUTE, MOVED, words[2], words[0],
                words[2] != words[0], t_start=start, **place,
            )  # fmt: skip
        return self._hand_on_tokens(step, chosen)

    def _exact_logits(self, head, place):
        exact.row_absmax(self.normed, self.maxima)
        bad_rows = exact.quantize_rows(
            self.normed, self.maxima, head.bits, self.scaled, self.exponents
        )
        exact.matmul(self.scaled, head.values, self.product, self.layers.scratch)
        if self.faults is not None:
            self.faults.miscompute("logits", -1, self.product, self.first_prompt)
        if self.checked:
            start = perf_counter()
            found, expected = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
            n_bad, _, n_wrong = exact.check_matmul(
                self.scaled, head.projection, self.product, head.r, found, expected, 0
            )
            self.recorder.one(
                "logits", Op.MATMUL, Phase.COMPUTE, COMPUTED, found[0], expected[0],
                n_bad + n_wrong + bad_rows > 0, t_start=start, nonfinite=bad_rows, **place,
            )  # fmt: skip
        exact.scale_back(self.product, self.exponents, head.exponents, head.bits, self.logits)

    def _check_gathered(self, pieces, keys, share, start, place):
        total = np.uint64(0)
        words = np.zeros(1, np.uint64)
        column = 0
        for block in pieces:
            kernels.fingerprint_block(
                block.view(np.uint32), keys, 0, self.first_prompt, column, self.config.vocab_size,
                words, 0,
            )  # fmt: skip
            total ^= words[0]
            column += block.shape[1]
        gathered = {**place, "bytes": self.gathered.nbytes}
        self._verify_assembled("logits", Op.ALLGATHER, share, total, start, **gathered)

    def _tokens_fingerprint(self, step, tokens) -> np.uint64:
        from spimpi.fingerprint import fingerprint
        from spimpi.partition import Slab

        where = Slab((len(self.lengths),), (self.first_prompt,))
        return np.uint64(fingerprint(tokens, Tag(self.ctx.seed, "tokens", -1, step), where))

    def _hand_on_tokens(self, step, chosen):
        """Agree on the tokens and send them round to the first stage (the ring's closing hop)."""
        place = dict(step=step, repeat=self.repeat, bytes=chosen.nbytes)
        if self.faults is not None:
            self.faults.replica("tokens", -1, chosen, self.first_prompt)
        word = np.uint64(0)
        if self.checked:
            start = perf_counter()
            word = self._tokens_fingerprint(step, chosen)
            if self.ctx.place.t == 0:
                self.golden[step, -1] ^= word
            if self.ctx.tensor.size > 1:
                self._verify_agreement("tokens", word, start, **place)
        held = self.to_first.buffer(self.n_prompts) if self.to_first else self.tokens
        held[:, 0] = chosen
        if self.faults is not None:
            self.faults.payload("tokens", -1, held, self.first_prompt)
        if self.to_first:
            self.to_first.send(**self._token_record(step), fingerprint=word)
            self.to_first.drain()
        elif self.checked:
            self._sent_tokens(held, {"step": step, "fingerprint": word})
        return held[:, 0]

    def _token_record(self, step) -> dict:
        n = self.config.n_layers
        return {
            "sequence": self.repeat * self.n_steps + step, "step": step, "microbatch": 0,
            "first_layer": 0, "last_layer": n - 1, "first_row": self.first_prompt,
            "n_rows": self.n_prompts, "n_cols": 1, "itemsize": 8,
        }  # fmt: skip

    def _sent_tokens(self, buffer, record):
        if not self.checked:
            return
        start = perf_counter()
        step = int(record["step"])
        word = self._tokens_fingerprint(step, buffer[:, 0])
        self.recorder.one(
            "tokens", Op.AT_REST, Phase.COMPUTE, MOVED, word, record["fingerprint"],
            word != record["fingerprint"], t_start=start, step=step, repeat=self.repeat,
            bytes=buffer.nbytes,
        )  # fmt: skip

    def _receive_tokens(self, step):
        self.from_last.post(self.n_prompts)
        tokens, record = self.from_last.take()
        if self.checked:
            start = perf_counter()
            word = self._tokens_fingerprint(step, tokens[:, 0])
            self._handoff_event("tokens", word, record, self._token_record(step), start,
                                tokens.nbytes, layer=-1, sender=self.ctx.grid.pp - 1)  # fmt: skip
        return tokens[:, 0]


def _argmax(blocks) -> np.ndarray:
    """Index of each row's largest logit over the vocabulary blocks; ties to the lowest id."""
    best = value = None
    first = 0
    for block in blocks:
        index = np.argmax(block, axis=1)
        largest = np.take_along_axis(block, index[:, None], axis=1)[:, 0]
        if best is None:
            best, value = index, largest
        else:
            better = largest > value
            best = np.where(better, index + first, best)
            value = np.where(better, largest, value)
        first += block.shape[1]
    return best.astype(np.int64)


assert set(GOLDEN_LAYER) <= set(PROGRAM)
