"""A stage's links: hidden rows to the next stage, tokens from the last one back to the first."""

from time import perf_counter

import numpy as np

from spimpi.checks.handoff import IN_FLIGHT, Receiver, Sender, describe_mismatch, same_place
from spimpi.inference import kernels
from spimpi.inference.ledger import AGAIN, INPUT
from spimpi.inference.tensors import HIDDEN
from spimpi.launch import usable_cores
from spimpi.trace.schema import Established, Op, Stage

MOVED = Established.MOVED


class Links:
    """Hand-offs of one rank, checked at both ends; those that do not exist are None."""

    def __init__(self, facts, most_rows: int, keys):
        self.facts, self.keys = facts, keys
        ctx, p = facts.ctx, facts.ctx.place.p
        polite = ctx.node.size > usable_cores()
        hidden = (most_rows, facts.config.hidden_size, np.float32)
        tokens = (facts.n_prompts, 1, np.int64)
        last = ctx.grid.pp - 1
        self.to_next = self.from_previous = self.to_first = self.from_last = None
        if not ctx.is_last_stage:
            self.to_next = Sender(ctx.pipeline, p + 1, *hidden, self._sent_hidden, polite)
        if not ctx.is_first_stage:
            self.from_previous = Receiver(ctx.pipeline, p - 1, *hidden, polite)
        if last and ctx.is_last_stage:
            self.to_first = Sender(ctx.pipeline, 0, *tokens, self._sent_tokens, polite)
        if last and ctx.is_first_stage:
            self.from_last = Receiver(ctx.pipeline, last, *tokens, polite)

    # Hidden rows

    def begin_step(self, cuts) -> None:
        """Post the first receives of a step; ``cuts`` are its microbatches' (start, stop)."""
        if self.from_previous:
            for start, stop in cuts[:IN_FLIGHT]:
                self.from_previous.post(stop - start)

    def done_with(self, m: int, cuts) -> None:
        """Microbatch m has been worked on: only now is its buffer free for one that is to come."""
        if self.from_previous and m + IN_FLIGHT < len(cuts):
            start, stop = cuts[m + IN_FLIGHT]
            self.from_previous.post(stop - start)

    def send(self, batch) -> None:
        """Hand on what the last layer wrote into ``to_next.buffer``."""
        self.to_next.send(**self._record(batch, 1), fingerprint=batch.results.hidden[-1])

    def receive(self, batch) -> np.ndarray:
        """Take the microbatch that the previous stage sent, and check it."""
        self.facts.watch.enter("hand-off", "hidden", batch.step, self._record(batch, 0)["last_layer"])
        x, record = self.from_previous.take()
        if not self.facts.checked:
            return x
        start = perf_counter()
        expected = self._record(batch, 0)
        found = self._fingerprint(x, batch.keys[0], batch.first_row)
        batch.results.rest_expected[0, INPUT] = found
        self._handoff("hidden", found, record, expected, start, x.nbytes,
                      layer=expected["last_layer"], sender=self.facts.ctx.place.p - 1)  # fmt: skip
        return x

    def end_step(self, step: int) -> None:
        """Wait for this step's sends."""
        if self.to_next:
            self.facts.watch.enter("sends", "hidden", step, self.facts.ctx.layers[-1])
            self.to_next.drain()

    def _record(self, batch, ahead: int) -> dict:
        """What a hand-off's record says; ``ahead`` 1: of the link out, 0: of the link in."""
        facts = self.facts
        sizes, p = facts.ctx.grid.layer_sizes, facts.ctx.place.p + ahead
        first, schedule = sum(sizes[: p - 1]), facts.schedule
        sequence = schedule.sequence(batch.step, batch.microbatch)
        return {
            "sequence": facts.repeat * schedule.per_link + sequence, "step": batch.step,
            "microbatch": batch.microbatch, "first_layer": first,
            "last_layer": first + sizes[p - 1] - 1, "first_row": batch.first_row,
            "n_rows": batch.n_rows, "n_cols": facts.config.hidden_size, "itemsize": 4,
        }  # fmt: skip

    def _fingerprint(self, x, keys, first_row) -> np.uint64:
        words = np.zeros(1, np.uint64)
        kernels.fingerprint_block(
            x.view(np.uint32), keys, HIDDEN, first_row, 0, x.shape[1], words, 0
        )
        return words[0]

    def _sent_hidden(self, buffer, record) -> None:
        """The send has completed: the buffer must still hold what was handed over."""
        if self.facts.checked:
            step = int(record["step"])
            keys = self.keys.of_step(step, self.facts.n_rows(step))
            self._at_rest(buffer, keys[-1], record)

    def check_last(self, x, batch) -> None:
        """The last stage's output, after the head has taken its rows."""
        if self.facts.checked:
            ledger = self.facts.ledger
            kernels.fingerprint_block(
                x.view(np.uint32), batch.keys[-1], HIDDEN, batch.first_row, 0, x.shape[1],
                ledger.last_found, ledger.slot_of(batch.microbatch),
            )  # fmt: skip

    def _at_rest(self, x, keys, record) -> None:
        start = perf_counter()
        found = self._fingerprint(x, keys, int(record["first_row"]))
        self.facts.recorder.one(
            "hidden", Op.AT_REST, Stage.COMPUTE, MOVED, found, record["fingerprint"],
            found != record["fingerprint"], t_start=start, step=int(record["step"]),
            microbatch=int(record["microbatch"]), layer=self.facts.ctx.layers[-1],
            bytes=x.nbytes, repeat=self.facts.repeat,
        )  # fmt: skip

    def _handoff(self, tensor, found, record, expected, start, n_bytes, layer, sender) -> None:
        facts, place = self.facts, self.facts.ctx.place
        in_order = same_place(record, expected)
        facts.recorder.one(
            tensor, Op.HANDOFF, Stage.PIPELINE, MOVED, found, record["fingerprint"],
            record["fingerprint"] != found or not in_order, t_start=start, step=expected["step"],
            microbatch=expected["microbatch"], layer=layer, bytes=n_bytes,
            sequence=expected["sequence"], repeat=facts.repeat,
            peer=facts.ctx.grid.rank_of(place.d, sender, place.s, place.t),
        )  # fmt: skip
        if not in_order:
            text = describe_mismatch(record, expected)
            facts.recorder.note(expected["step"], expected["microbatch"], layer, text)

    # Tokens

    def hand_on_tokens(self, step, chosen, word) -> np.ndarray:
        """Send the chosen tokens round to the first stage; returns them as they went.

        word: their fingerprint when they were chosen.
        """
        facts = self.facts
        if self.to_first:
            held = self.to_first.buffer(facts.n_prompts)
        else:
            held = np.empty((facts.n_prompts, 1), np.int64)
        held[:, 0] = chosen
        if facts.faults is not None:
            facts.faults.payload("tokens", -1, held, facts.first_prompt)
        if self.to_first:
            self.to_first.send(**self._token_record(step), fingerprint=word)
            self.to_first.drain()
        else:
            self._sent_tokens(held, {"step": step})
        return held[:, 0]

    def receive_tokens(self, step) -> np.ndarray:
        """On the first stage: the tokens that the last one chose, checked."""
        self.facts.watch.enter("hand-off", "tokens", step, -1)
        self.from_last.post(self.facts.n_prompts)
        tokens, record = self.from_last.take()
        if self.facts.checked:
            start = perf_counter()
            words = np.zeros(1, np.uint64)
            self.facts.fingerprint_tokens(step, tokens.ravel(), words, 0)
            self._handoff("tokens", words[0], record, self._token_record(step), start, tokens.nbytes,
                          layer=-1, sender=self.facts.ctx.grid.pp - 1)  # fmt: skip
            self.facts.chosen[step] = words[0]  # whether they arrived right is told already
        return tokens[:, 0]

    def _token_record(self, step) -> dict:
        facts = self.facts
        return {
            "sequence": facts.repeat * facts.n_steps + step, "step": step, "microbatch": 0,
            "first_layer": 0, "last_layer": facts.config.n_layers - 1,
            "first_row": facts.first_prompt, "n_rows": facts.n_prompts, "n_cols": 1, "itemsize": 8,
        }  # fmt: skip

    def _sent_tokens(self, buffer, record) -> None:
        if self.facts.checked:
            ledger = self.facts.ledger
            words = ledger.tokens[ledger.now]
            self.facts.fingerprint_tokens(int(record["step"]), buffer.ravel(), words, AGAIN)
