"""The checks that are made once a step or a microbatch, outside the layers, as events.

Embedding (first stage), the stage's output, logits and tokens (last stage). What they found lies
in the ledger; what they compare over the tensor ranks has been reduced with it.
"""

from time import perf_counter

import numpy as np

from spimpi.checks.assembled import judge
from spimpi.inference.ledger import AGAIN, MADE
from spimpi.trace.schema import Established, Op, Stage, Status, blank_events, joined_events

MOVED, AGREED, COMPUTED = Established.MOVED, Established.AGREED, Established.COMPUTED


class StepEvents:
    """Makes the events of a group's steps. ``tensor_index``: name -> row of the trace's table."""

    def __init__(self, facts, tensor_index, exact: bool):
        self.facts, self.tensor_index, self.exact = facts, tensor_index, exact

    def write(self, ledger) -> np.ndarray:
        """The events of a group. Collective over ctx.tensor where a check failed."""
        ctx = self.facts.ctx
        embed, logits, tokens = self._compared(ledger)
        steps, microbatches, rows = ledger.places[: ledger.n_slots].T
        by_slot = {
            "step": steps, "microbatch": microbatches, "t_start": ledger.opened,
            "bytes": 4 * self.facts.config.hidden_size * rows,
        }  # fmt: skip
        made = []
        if embed:
            made.append(
                self._across("embed", Op.ALLREDUCE_BOR, MOVED | AGREED, embed, **by_slot)
            )
        if ctx.is_last_stage:
            last = ledger.results.hidden.reshape(ledger.n_slots, -1)[:, -1]
            found, layer = ledger.last_found[: ledger.n_slots], ctx.layers[-1]
            made.append(
                self._local("hidden", Op.AT_REST, MOVED, found, last, layer=layer, **by_slot)
            )
            made += self._sampled(ledger, logits, tokens)
        events = joined_events(made)
        events["repeat"], events["t_end"] = self.facts.repeat, ledger.closed
        return events

    def _sampled(self, ledger, logits, tokens) -> list[np.ndarray]:
        facts, n = self.facts, ledger.n_steps
        by_step = {
            "step": ledger.places[0, 0] + np.arange(n), "t_start": ledger.times[:n], "microbatch": 0
        }  # fmt: skip
        whole = 4 * facts.n_prompts * facts.config.vocab_size
        part = 4 * facts.n_prompts * facts.part.shard.vocabulary().size
        ids = 8 * facts.n_prompts
        made = [self._local(
            "last_rows", Op.AT_REST, MOVED, ledger.rows[:n, 1], ledger.rows[:n, MADE],
            bytes=4 * facts.n_prompts * facts.config.hidden_size, **by_step,
        )]  # fmt: skip
        if self.exact:
            bad_rows, nonfinite = ledger.product_bad[:, :n]
            found, expected = ledger.product_found[0, :n], ledger.product_expected[0, :n]
            made.append(self._local(
                "logits", Op.MATMUL, COMPUTED, found, expected, bytes=part,
                failed=bad_rows + nonfinite > 0, nonfinite=np.minimum(nonfinite, 0xFFFF), **by_step,
            ))  # fmt: skip
        for name, words, size in (("logits", ledger.logits, part), ("tokens", ledger.tokens, ids)):
            found, expected = words[:n, AGAIN], words[:n, MADE]
            made.append(
                self._local(name, Op.AT_REST, MOVED, found, expected, bytes=size, **by_step)
            )
        if logits:
            made.append(self._across(
                "logits", Op.ALLGATHER, MOVED | AGREED, logits, bytes=whole, **by_step
            ))  # fmt: skip
            made.append(self._across("tokens", Op.AGREEMENT, AGREED, tokens, bytes=ids, **by_step))
        return made

    def ids_used(self) -> np.ndarray:
        """The tokens of each step but the last, as the next step embedded them: events at its end.

        On the first stage, which has their words (StageFacts.chosen and used).
        """
        facts, n = self.facts, self.facts.n_steps - 1
        events = self._local(
            "tokens", Op.AT_REST, MOVED, facts.used[1:], facts.chosen[:n], step=np.arange(n),
            microbatch=0, bytes=8 * facts.n_prompts, repeat=facts.repeat, t_start=perf_counter(),
        )  # fmt: skip
        events["t_end"] = events["t_start"]
        return events

    def _compared(self, ledger):
        """(found, Comparison) of what the tensor ranks put together: embed, logits, tokens."""
        pairs = ledger.comparisons() if ledger.merged is not None else []
        tensor = self.facts.ctx.tensor
        judged = [
            (pair[1], judge(tensor, merged, *pair)) for merged, pair in zip(ledger.once, pairs)
        ]
        embed = ledger.n_slots if judged and self.facts.ctx.is_first_stage else 0
        logits = embed + ledger.n_steps
        return judged[:embed], judged[embed:logits], judged[logits:]

    def _across(self, tensor, op, established, judged, **columns) -> np.ndarray:
        """Events of comparisons over the tensor ranks."""
        found = np.array([word for word, _ in judged], np.uint64)
        expected = np.array([one.expected for _, one in judged], np.uint64)
        failed = np.array([one.wrong for _, one in judged])
        peers = [self.facts.world_rank(one.rank) for _, one in judged]
        return self._events(
            tensor, op, Stage.TENSOR, established, found, expected, failed, peer=peers, **columns
        )

    def _local(self, tensor, op, established, found, expected, failed=None, **columns):
        """Events of comparisons that this rank made alone: a failure is its own."""
        failed = found != expected if failed is None else failed
        peers = np.where(failed, self.facts.ctx.rank, -1)
        return self._events(
            tensor, op, Stage.COMPUTE, established, found, expected, failed, peer=peers, **columns
        )

    def _events(self, tensor, op, stage, established, found, expected, failed, **columns):
        events = blank_events(found.size)
        columns |= {
            "tensor": self.tensor_index[tensor], "op": op, "stage": stage,
            "established": established, "fingerprint": found, "expected": expected,
            "verdict": np.where(failed, Status.FAILED, Status.VERIFIED),
        }  # fmt: skip
        for name, values in columns.items():
            events[name] = values
        return events
