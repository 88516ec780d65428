"""The head of the last stage: logits over a split vocabulary, gathered; greedy tokens."""

from time import perf_counter

import numpy as np

from spimpi.checks.assembled import Comparisons, nothing
from spimpi.fingerprint.tag import CONTENT, Tag
from spimpi.inference import exact, kernels
from spimpi.reduction import blocks
from spimpi.trace.schema import Established, Op, Stage

MOVED, AGREED, COMPUTED = Established.MOVED, Established.AGREED, Established.COMPUTED


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
        self._under_way = None
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

        ``last``: which rows of the step those are; ``start``: the microbatch's first row.
        """
        chosen = (last >= start) & (last < start + x.shape[0])
        self.rows[chosen] = x[last[chosen] - start]

    def sample(self, step: int):
        """(tokens int64 [prompts], their fingerprint). Collective over ctx.tensor.

        What compares ranks is under way when this returns; ``finish`` completes it.
        """
        facts, tensor = self.facts, self.facts.ctx.tensor
        eps, faults = facts.config.rms_norm_eps, facts.faults
        kernels.rmsnorm(self.rows, facts.part.norm, eps, self.normed)
        place = dict(step=step, repeat=facts.repeat, bytes=self.logits.nbytes)
        if self.exact:
            self._exact_logits(place)
        else:
            np.matmul(self.normed, facts.part.head.values.T, out=self.logits)
        keys = self._keys(step)
        made = self._fingerprint(self.logits, keys, self.columns.start)
        if facts.checked:
            facts.golden[step, -2] ^= made
        if faults is not None:
            faults.payload("logits", -1, self.logits, facts.first_prompt)
        start = perf_counter()
        if tensor.size > 1:
            facts.watch.enter("allgather", "logits", step, -1)
            tensor.Allgatherv(self.logits, blocks(self.gathered, self.counts))
        chosen = argmax(self.pieces)
        word = self._token_word(step, chosen)
        if facts.checked:
            if tensor.size > 1:
                self._start_comparing(keys, made, word, start, place)
            again = self._fingerprint(self.logits, keys, self.columns.start)
            facts.recorder.one(
                "logits", Op.AT_REST, Stage.COMPUTE, MOVED, again, made, again != made,
                t_start=start, **place,
            )  # fmt: skip
        return chosen, word

    def _exact_logits(self, place) -> None:
        facts, head = self.facts, self.facts.part.head
        exact.row_absmax(self.normed, self.maxima)
        bad_rows = exact.quantize_rows(
            self.normed, self.maxima, head.bits, self.scaled, self.exponents
        )
        exact.matmul(self.scaled, head.values, self.product, self.scratch)
        if facts.faults is not None:
            facts.faults.miscompute("logits", -1, self.product, facts.first_prompt)
        if facts.checked:
            start = perf_counter()
            found, expected = np.zeros((2, 1), np.uint64)
            n_bad, _, _ = exact.check_matmul(
                self.scaled, head.projection, self.product, head.r, found, expected, 0
            )
            facts.recorder.one(
                "logits", Op.MATMUL, Stage.COMPUTE, COMPUTED, found[0], expected[0],
                n_bad + bad_rows > 0, t_start=start, nonfinite=bad_rows, **place,
            )  # fmt: skip
        exact.scale_back(self.product, self.exponents, head.exponents, head.bits, self.logits)

    def _keys(self, step) -> np.ndarray:
        shape = (len(self.facts.lengths), self.facts.config.vocab_size)
        key = Tag(self.facts.ctx.seed, "logits", -1, step).key(CONTENT, shape, 4)
        return np.array([key], np.uint64)

    def _fingerprint(self, block, keys, first_column) -> np.uint64:
        words = np.zeros(1, np.uint64)
        if self.facts.checked:
            kernels.fingerprint_block(
                block.view(np.uint32), keys, 0, self.facts.first_prompt, first_column,
                self.facts.config.vocab_size, words, 0,
            )  # fmt: skip
        return words[0]

    def _start_comparing(self, keys, share, word, start, place) -> None:
        """The gathered logits against their shards, and everybody's tokens: one reduction."""
        total = np.uint64(0)
        for piece, first in zip(self.pieces, self.columns.starts):
            total ^= self._fingerprint(piece, keys, first)
        pairs = [(share, total, nothing), (None, word, nothing)]
        facts = self.facts
        self._under_way = Comparisons(facts.ctx.records, facts.ctx.tensor, pairs), start, place

    def finish(self) -> None:
        """Complete what ``sample`` began, and record it. Collective over ctx.tensor."""
        if self._under_way is None:
            return
        comparisons, start, place = self._under_way
        self._under_way = None
        facts = self.facts
        logits, tokens = comparisons.finish()
        for name, op, found, word, established, n_bytes in (
            ("logits", Op.ALLGATHER, logits, comparisons.pairs[0][1], MOVED | AGREED,
             self.gathered.nbytes),
            ("tokens", Op.AGREEMENT, tokens, comparisons.pairs[1][1], AGREED, 8 * facts.n_prompts),
        ):  # fmt: skip
            facts.recorder.one(
                name, op, Stage.TENSOR, established, word, found.expected, found.wrong,
                t_start=start, peer=facts.world_rank(found.rank), **{**place, "bytes": n_bytes},
            )  # fmt: skip

    def _token_word(self, step, chosen) -> np.uint64:
        """The chosen tokens' fingerprint."""
        facts = self.facts
        if facts.faults is not None:
            facts.faults.replica("tokens", -1, chosen, facts.first_prompt)
        if not facts.checked:
            return np.uint64(0)
        word = facts.tokens_fingerprint(step, chosen)
        if facts.ctx.place.t == 0:
            facts.golden[step, -1] ^= word
        return word


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
