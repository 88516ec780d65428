"""The head of the last stage: logits over a split vocabulary, gathered; greedy tokens."""

from time import perf_counter

import numpy as np

from spimpi.inference import exact, kernels, product
from spimpi.inference.ledger import MADE
from spimpi.inference.product import NO_KEYS, NO_SEGMENTS, NO_WORDS
from spimpi.reduction import blocks


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
        if facts.ctx.tensor.size > 1:
            self.counts = [n * size for size in self.columns.all_sizes]
            self.gathered = np.empty(sum(self.counts), np.float32)
            cuts = np.cumsum(self.counts)[:-1]
            split = np.split(self.gathered, cuts)
            self.pieces = [a.reshape(n, -1) for a in split]
        if exact_arithmetic:
            self.scaled, self.product = np.empty(self.rows.shape), np.empty(self.logits.shape)
            self.maxima, self.exponents = np.empty(n, np.uint32), np.empty(n, np.int32)

    def take(self, x, last: np.ndarray, start: int) -> None:
        """Keep those rows of a microbatch that are the last of their prompt.

        ``last``: which global rows of the step those are; ``start``: the microbatch's first row.
        """
        chosen = (last >= start) & (last < start + x.shape[0])
        self.rows[chosen] = x[last[chosen] - start]

    def sample(self, step: int):
        """(tokens int64 [prompts], their fingerprint). Collective over ctx.tensor.

        What compares ranks is left in the ledger.
        """
        facts, tensor, ledger = self.facts, self.facts.ctx.tensor, self.facts.ledger
        eps, faults = facts.config.rms_norm_eps, facts.faults
        kernels.rmsnorm(self.rows, facts.part.norm, eps, self.normed)
        if self.exact:
            self._exact_logits()
        else:
            np.matmul(self.normed, facts.part.head.values.T, out=self.logits)
        words = ledger.logits[ledger.now]
        if facts.checked:
            start = perf_counter()
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
                self.logits.view(np.uint32), self.gathered.view(np.uint32), self.starts, chosen,
                facts.end_keys, step, facts.first_prompt, tensor.rank, words, tokens,
            )  # fmt: skip
            ledger.times[ledger.now] = start
            ledger.seconds += perf_counter() - start
        return chosen, tokens[MADE]

    def _exact_logits(self) -> None:
        facts, head, ledger = self.facts, self.facts.part.head, self.facts.ledger
        exact.row_absmax(self.normed, self.maxima)
        bad_rows = exact.quantize_rows(
            self.normed, self.maxima, head.bits, self.scaled, self.exponents
        )
        exact.matmul(self.scaled, head.values, self.product, self.scratch)
        if facts.faults is not None:
            facts.faults.miscompute("logits", -1, self.product, facts.first_prompt)
        product.finish_projection(
            self.scaled, head.projection, self.product, head.r, self.exponents, head.exponents,
            head.bits, self.logits, facts.checked, 0, ledger.now, ledger.product_found,
            ledger.product_expected, ledger.product_bad, NO_KEYS, 0, NO_SEGMENTS, 0, NO_WORDS,
        )  # fmt: skip
        ledger.product_bad[1, ledger.now] = bad_rows


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
            better = largest > value
            best = np.where(better, index + first, best)
            value = np.where(better, largest, value)
        first += block.shape[1]
    return best.astype(np.int64)
