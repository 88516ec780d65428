"""What the parts of a stage (embedding, layers, links, head) know in common."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spimpi.fingerprint.tag import CONTENT, Tag
from spimpi.inference import kernels
from spimpi.inference.tensors import QKV
from spimpi.inference.token_words import token_keys
from spimpi.topology.pipeline import Schedule
from spimpi.watchdog import Unwatched


@dataclass
class StageFacts:
    """One rank's view of a run: who it is, what it holds, where its checks go.

    first_prompt and n_prompts: the prompts whose next tokens this rank chooses, those of its data
    rank (where sequence ranks share these, a block of them); golden: this rank's shares of the golden
    table, uint64 [steps, columns]; repeat: the run's number in this job; watch: told where the
    rank is; ledger: where checks leave their words. recorder None: no checks. chosen: each step's
    word of the tokens of n_prompts, as they were chosen (last stage) or came round (first); used: of
    the ids that it embedded: prompts', later the tokens of the step before (first stage).
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
    chosen: np.ndarray = None
    used: np.ndarray = None

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
        shape, seed = (len(self.lengths), self.config.vocab_size), self.ctx.seed
        tags = (Tag(seed, "logits", -1, step) for step in range(self.n_steps))
        logits = np.array([tag.key(CONTENT, shape, 4) for tag in tags], np.uint64)
        return np.stack([logits, token_keys(seed, shape[0], self.n_steps)], axis=1)

    @cached_property
    def id_keys(self) -> np.ndarray:
        """Stream keys of the ids that each step embeds, one a row: the prompts', then tokens."""
        shape = (self.n_rows(0),)
        prompts = Tag(self.ctx.seed, "prompts").key(CONTENT, shape, 8)
        return np.append(np.uint64(prompts), self.end_keys[:-1, 1])

    def use_ids(self, step: int, ids, first_row: int) -> None:
        """The ids of a microbatch are embedded: their share of the step's word."""
        word = np.zeros(1, np.uint64)
        kernels.fingerprint_tokens(ids, self.id_keys, step, first_row, word, 0)
        self.used[step] ^= word[0]

    @cached_property
    def logits_keys(self) -> np.ndarray:
        """Stream keys as product.finish_projection takes them: of a step's logits in row step + 1
        for its tensor QKV."""
        keys = np.zeros((self.n_steps + 1, QKV + 1), np.uint64)
        keys[1:, QKV] = self.end_keys[:, 0]
        return keys

    @cached_property
    def token_keys(self) -> np.ndarray:
        return np.ascontiguousarray(self.end_keys[:, 1])

    def fingerprint_tokens(self, step: int, tokens, words, slot: int) -> None:
        """words[slot] = share of this rank's tokens (int64, adjacent) in a step's tokens."""
        kernels.fingerprint_tokens(tokens, self.token_keys, step, self.first_prompt, words, slot)
