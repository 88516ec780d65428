"""The head of the last stage: logits over a split vocabulary, gathered; greedy tokens."""

from time import perf_counter

import numpy as np

from spimpi.inference import exact, kernels, product
from spimpi.inference.ledger import MADE
from spimpi.inference.tensors import HIDDEN
from spimpi.inference.product import NO_WORDS, NOT_HELD
from spimpi.reduction import blocks

NO_WEIGHTS = np.empty(0, np.uint32)
USED = 1  # of ledger.rows, after MADE

class Head:
    """Takes each prompt's last row and chooses the next token. Ties go to the lowest id."""

    def __init__(self, facts, exact_arithmetic: bool, scratch=None):
        self.facts, self.exact, self.scratch = facts, exact_arithmetic, scratch
        n, width = facts.n_prompts, facts.part.head.values.shape[0]
        self.rows = np.empty((n, facts.config.hidden_size), np.float32)
        self.normed = np.empty_like(self.rows)
        self.logits = np.empty((n, width), np.float32)
        self.columns = facts.part.shard.vocabulary()
        self.pieces = [self.logits]
        self.gathered = np.empty(0, np.float32)
        self.starts = np.array(self.columns.starts, np.int64)
        self.segments = np.array([(0, self.columns.start, width)], np.int64)
        self.own = np.empty(n, np.int64)  # the tokens as the check chooses them
        if facts.ctx.tensor.size > 1:
            self.counts = [n * size for size in self.columns.all_sizes]
            self.gathered = np.empty(sum(self.counts), np.float32)
            cuts = np.cumsum(self.counts)[:-1]
            split = np.split(self.gathered, cuts)
            self.pieces = [a.reshape(n, -1) for a in split]
        if exact_arithmetic:
            self.scaled, self.product = np.empty(self.rows.shape), np.empty(self.logits.shape)
            self.maxima, self.exponents = np.empty(n, np.uint32), np.empty(n, np.int32)

    def take(self, x, last: np.ndarray, batch) -> None:
        """Keep those rows of a microbatch that are the last of their prompt.

        ``last``: which global rows of the step those are.
        """
        start, ledger = batch.first_row, self.facts.ledger
        chosen = (last >= start) & (last < start + x.shape[0])
        self.rows[chosen] = x[last[chosen] - start]
        if self.facts.checked:
            words = ledger.rows[ledger.now]
            if batch.microbatch == 0:
                words[MADE] = 0
            kernels.fingerprint_some_rows(
                x.view(np.uint32), last, start, batch.keys[-1], HIDDEN, words, MADE
            )

    def sample(self, step: int, last: np.ndarray, keys: np.ndarray):
        """(tokens int64 [prompts], their fingerprint). Collective over ctx.tensor.

        ``last``: which global rows the step's are; ``keys``: Keys.of_step. What compares ranks is
        left in the ledger.
        """
        facts, tensor, ledger = self.facts, self.facts.ctx.tensor, self.facts.ledger
        eps, faults = facts.config.rms_norm_eps, facts.faults
        kernels.rmsnorm(self.rows, facts.part.norm, eps, self.normed)
        words = ledger.logits[ledger.now]
        if self.exact:
            self._exact_logits(step)
        else:
            np.matmul(self.normed, facts.part.head.values.T, out=self.logits)
        if facts.checked:
            start = perf_counter()
            kernels.fingerprint_rows(
                self.rows.view(np.uint32), last, keys[-1], HIDDEN, ledger.rows[ledger.now], USED
            )
            if not self.exact:
                kernels.fingerprint_block(
                    self.logits.view(np.uint32), facts.end_keys[step], 0, facts.first_prompt,
                    self.columns.start, facts.config.vocab_size, words, MADE,
                )  # fmt: skip
            ledger.seconds += perf_counter() - start
        if faults is not None:
            faults.payload("logits", -1, self.logits, facts.first_prompt)
        if tensor.size > 1:
            facts.watch.enter("allgather", "logits", step, -1)
            tensor.Allgatherv(self.logits, blocks(self.gathered, self.counts))
        chosen = argmax(self.pieces)
        if faults is not None:
            faults.replica("tokens", -1, chosen, facts.first_prompt)
        tokens = ledger.tokens[ledger.now]
        if facts.checked:
            start = perf_counter()
            kernels.check_sampled(
                self.logits, self.gathered, self.starts, self.own, facts.end_keys, step,
                facts.first_prompt, tensor.rank, words, tokens,
            )  # fmt: skip
            ledger.times[ledger.now] = start
            ledger.seconds += perf_counter() - start
            facts.chosen[step] = tokens[MADE]
        return chosen, tokens[MADE]

    def _exact_logits(self, step: int) -> None:
        facts, head, ledger = self.facts, self.facts.part.head, self.facts.ledger
        now = ledger.now
        exact.row_absmax(self.normed, self.maxima)
        bad_rows = exact.quantize_rows(
            self.normed, self.maxima, head.bits, self.scaled, self.exponents
        )
        exact.matmul(self.scaled, head.values, self.product, self.scratch)
        if facts.faults is not None:
            facts.faults.miscompute("logits", -1, self.product, facts.first_prompt)
        product.finish_projection(
            self.rows, facts.part.norm, facts.config.rms_norm_eps, head.projection, self.product,
            head.r, self.exponents, head.exponents, head.bits, self.logits, facts.checked, 0, now,
            ledger.product_found, ledger.product_expected, ledger.product_bad,
            facts.logits_keys[step : step + 2], facts.first_prompt, self.segments,
            facts.config.vocab_size, ledger.logits[now : now + 1], NO_WEIGHTS, NO_WORDS, NOT_HELD,
        )  # fmt: skip
        ledger.product_bad[1, now] = bad_rows


def argmax(pieces) -> np.ndarray:
    """Index (int64) of each row's largest logit over vocabulary blocks; ties to the lowest id."""
    best = value = None
    first = 0
    for block in pieces:
        index = np.argmax(block, axis=1)
        largest = np.take_along_axis(block, index[:, None], axis=1)[:, 0]
        if best is None:
            best, value = index, largest
        else:
            better = (largest > value) | (np.isnan(largest) & ~np.isnan(value))  # as in a block
            best = np.where(better, index + first, best)
            value = np.where(better, largest, value)
        first += block.shape[1]
    return best.astype(np.int64)
