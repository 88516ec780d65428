"""What the parts of a stage (embedding, layers, links, head) know in common."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spimpi.fingerprint.tag import CONTENT, Tag
from spimpi.inference import kernels
from spimpi.topology.pipeline import Schedule
from spimpi.watchdog import Unwatched


@dataclass
class StageFacts:
    """One rank's view of a run: who it is, what it holds, where its checks go.

    first_prompt and n_prompts: the prompts whose next tokens this rank chooses, those of its data
    rank (where sequence ranks share these, a block of them); golden: this rank's shares of the golden
    table, uint64 [steps, columns]; repeat: the run's number in this job; watch: told where the
    rank is; ledger: where checks leave their words. recorder None: no checks.
    """

    ctx: object
    config: object
    part: object
    lengths: list[int]
    n_steps: int
    first_prompt: int
    n_prompts: int
    schedule: Schedule
    golden: np.ndarray
    recorder: object = None
    faults: object = None
    watch: object = Unwatched()
    repeat: int = 0
    ledger: object = None

    @property
    def checked(self) -> bool:
        return self.recorder is not None

    def n_rows(self, step: int) -> int:
        """Rows of a step over all data ranks."""
        return len(self.lengths) if step else sum(self.lengths)

    def world_rank(self, tensor_rank: int) -> int:
        """World rank of a rank of this tensor group; -1 stays -1."""
        if tensor_rank < 0:
            return -1
        return self.ctx.grid.rank_of(*self.ctx.place[:3], tensor_rank)

    @cached_property
    def end_keys(self) -> np.ndarray:
        """Stream keys of every step's logits and tokens, uint64 [steps, 2]."""
        n, vocabulary, seed = len(self.lengths), self.config.vocab_size, self.ctx.seed
        return np.array(
            [
                (
                    Tag(seed, "logits", -1, step).key(CONTENT, (n, vocabulary), 4),
                    Tag(seed, "tokens", -1, step).key(CONTENT, (n,), 8),
                )
                for step in range(self.n_steps)
            ],
            np.uint64,
        )

    @cached_property
    def token_keys(self) -> np.ndarray:
        return np.ascontiguousarray(self.end_keys[:, 1])

    def fingerprint_tokens(self, step: int, tokens, words, slot: int) -> None:
        """words[slot] = share of this rank's tokens (int64, adjacent) in a step's tokens."""
        kernels.fingerprint_tokens(tokens, self.token_keys, step, self.first_prompt, words, slot)
