"""The tokens that a run hands out, checked on their way from the choice.

What was chosen has a word a step (inference/token_words.py), of which every rank has its prompts'
part. The prompts' ids, the tokens as each rank kept them, as they were gathered, and at last as rank
0 hands them out must have these words.
"""

from time import perf_counter

import numpy as np

from spimpi.checks.assembled import compare_assembled
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import Tag
from spimpi.inference.token_words import folded, token_keys, token_words
from spimpi.partition import Slab
from spimpi.reduction import blocks, reduce_fingerprints
from spimpi.topology.data import rows_of
from spimpi.topology.sequence import prompts_of, split_rows
from spimpi.trace.schema import Established, Op, Status, blank_events
from spimpi.trace.schema import Stage as Phase
from spimpi.verification.conclude import any_failed

MOVED = Established.MOVED


class Answer:
    """The tokens of one run; ``words``: each step's, of all prompts, once they are handed out.

    ``culprit``: the world rank to name where rank 0's last look fails, -1: none, None: not known yet.
    """

    def __init__(self, ctx, job, stage, recorder, repeat):
        self.ctx, self.job, self.stage, self.recorder = ctx, job, stage, recorder
        self.repeat, self.words, self.share, self.culprit = repeat, None, None, None
        self.keys = token_keys(ctx.seed, len(job.prompts), job.n_tokens)

    def handed_out(self, tokens) -> np.ndarray | None:
        """Everybody's tokens [prompts, steps] on rank 0 (and the other ranks of the first stage).

        ``tokens``: this rank's, on the first and the last stage. Collective over the world.
        """
        ctx = self.ctx
        if ctx.is_first_stage:
            self._prompts()
            tokens = self.gathered(tokens)
        shares = self.stage.golden[:, -1]
        self.words = np.array(reduce_fingerprints(ctx.world, shares.tolist()), np.uint64)
        failed = any_failed(ctx, self.recorder)
        if self.culprit is None:  # what failed before tells more
            self.culprit = -1 if failed else ctx.rank
        if ctx.rank == 0:
            self._last_look(tokens)
        return tokens if ctx.is_first_stage else None

    def _prompts(self) -> None:
        """The ids that the prefill embedded are those of the job's prompts."""
        ctx, job, start = self.ctx, self.job, perf_counter()
        ids = np.concatenate([np.asarray(p, np.int64) for p in job.prompts])
        word = 0
        for first, stop in split_rows(job.lengths, ctx.grid, ctx.place.d).own(ctx.place.s):
            place = Slab((ids.size,), (first,))
            word ^= fingerprint(ids[first:stop], Tag(ctx.seed, "prompts"), place)
        found = self.stage.facts.used[0]
        self.recorder.one(
            "prompts", Op.AT_REST, Phase.COMPUTE, MOVED, found, word, found != np.uint64(word),
            t_start=start, repeat=self.repeat, bytes=ids.nbytes,
        )  # fmt: skip

    def gathered(self, tokens) -> np.ndarray:
        """Everybody's tokens, by checked allgathers over sequence, then data. Collective over both."""
        ctx, job = self.ctx, self.job
        place = ctx.place
        blocks_of = [rows_of(job.lengths, ctx.grid.dp, d, step=1) for d in range(ctx.grid.dp)]
        pieces = prompts_of(blocks_of[place.d].size, ctx.grid.sp)
        start, self.share = blocks_of[place.d].start, folded(self.stage.chosen)
        if ctx.sequence.size > 1:
            counts = [stop - first for first, stop in pieces]
            ranks = [ctx.grid.rank_of(place.d, 0, s, place.t) for s in range(ctx.grid.sp)]
            begin = start + pieces[place.s][0]
            tokens = self._over(ctx.sequence, Phase.SEQUENCE, tokens, begin, start, counts, ranks)
        if ctx.data.size > 1:
            counts = [block.size for block in blocks_of]
            ranks = [ctx.grid.rank_of(d, 0, place.s, place.t) for d in range(ctx.grid.dp)]
            tokens = self._over(ctx.data, Phase.DATA, tokens, start, 0, counts, ranks)
        return tokens

    def _over(self, comm, phase, tokens, begin, first, counts, ranks):
        """The tokens [prompts, steps] of all ranks of ``comm``, gathered and checked.

        begin, first: the first prompt of this rank's, and of the result; counts: each rank's
        prompts; ranks: their world ranks. ``share``, the word of this rank's tokens as they were
        chosen, becomes that of all. Collective over ``comm``.
        """
        ctx, job, share, start = self.ctx, self.job, self.share, perf_counter()
        gathered = np.empty((sum(counts), job.n_tokens), np.int64)
        sizes = [n * job.n_tokens for n in counts]
        sent = np.ascontiguousarray(tokens)
        comm.Allgatherv(sent, blocks(gathered, sizes))
        result = folded(token_words(gathered, self.keys, first))
        found = compare_assembled(ctx.records, comm, share, result)
        rank, culprit = found.rank, -1
        if found.wrong:
            differs = bool(folded(token_words(sent, self.keys, begin)) != share)
            told = comm.allgather((differs, self.culprit))
            if rank < 0:  # all have the same wrong ones: whose are not what it chose?
                odd = [r for r, (differs, _) in enumerate(told) if differs]
                rank = odd[0] if len(odd) == 1 else -1
            if rank >= 0:  # or whoever spoilt what that rank was given before
                before = told[rank][1]
                culprit = ranks[rank] if before in (None, -1) else before
            self.culprit = culprit
        self.recorder.one(
            "tokens", Op.ALLGATHER, phase, MOVED | Established.AGREED, result, found.expected,
            found.wrong, t_start=start, repeat=self.repeat, bytes=gathered.nbytes,
            step=job.n_tokens - 1, peer=culprit,
        )  # fmt: skip
        self.share = found.expected
        return gathered

    def _last_look(self, tokens) -> None:
        """Rank 0's tokens of all prompts are those that were chosen: an event a step."""
        start, found = perf_counter(), token_words(tokens, self.keys)
        events = blank_events(found.size)
        wrong = found != self.words
        for name, values in {
            "step": np.arange(found.size), "microbatch": 0, "repeat": self.repeat,
            "stage": Phase.COMPUTE, "op": Op.AT_REST, "established": MOVED,
            "tensor": self.recorder.tensor_index["tokens"], "fingerprint": found,
            "expected": self.words, "bytes": 8 * len(tokens), "t_start": start,
            "t_end": perf_counter(), "peer": np.where(wrong, self.culprit, -1),
            "verdict": np.where(wrong, Status.FAILED, Status.VERIFIED),
        }.items():  # fmt: skip
            events[name] = values
        self.recorder.add(events, {})
