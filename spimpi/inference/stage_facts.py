"""What the parts of a stage (embedding, layers, links, head) know in common."""

from dataclasses import dataclass

import numpy as np

from spimpi.fingerprint import xor_flat
from spimpi.fingerprint.tag import CONTENT, Tag
from spimpi.topology.pipeline import Schedule
from spimpi.watchdog import Unwatched


@dataclass
class StageFacts:
    """One rank's view of a run: who it is, what it holds, where its checks go.

    first_prompt and n_prompts: this data rank's prompts; golden: this rank's shares of the golden
    table, uint64 [steps, columns]; repeat: the run's number in this job; watch: told where the
    rank is. recorder None: no checks.
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
        return self.ctx.grid.rank_of(self.ctx.place.d, self.ctx.place.p, tensor_rank)

    def tokens_fingerprint(self, step: int, tokens) -> np.uint64:
        """Share of this data rank's tokens in the fingerprint of a step's tokens."""
        key = Tag(self.ctx.seed, "tokens", -1, step).key(CONTENT, (len(self.lengths),), 8)
        words = np.ascontiguousarray(tokens).view(np.uint64)
        return np.uint64(xor_flat(words, key, self.first_prompt))
