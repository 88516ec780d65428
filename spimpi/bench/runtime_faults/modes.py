"""In which modes the program runs: models in memory, topologies, arithmetic."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from spimpi.fingerprint.tag import DEFAULT_SEED
from spimpi.inference.config import FULL, SLIDING, ModelConfig, YarnScaling
from spimpi.topology import grid as grids
from spimpi.topology.exo import parse_memory
from spimpi.verification.job import Job
from spimpi.verification.run import make_golden

# Query heads that share key/value heads, so that tensor ranks hold copies; cuts that are uneven.
LLAMA = ModelConfig(
    name="runtime-faults-llama", vocab_size=37, hidden_size=24, intermediate_size=22, n_layers=3,
    n_heads=6, n_kv_heads=2, head_dim=4, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
    tie_word_embeddings=False, max_position_embeddings=256, dtype="float32",
)  # fmt: skip
# OLMo 3: norms after the blocks and of queries and keys, windows shorter than the prompts.
OLMO = replace(
    LLAMA, name="runtime-faults-olmo", n_heads=8, model_type="olmo3",
    layer_types=(SLIDING, FULL, SLIDING), sliding_window=3,
    rope_scaling=YarnScaling(4.0, 8.0, 1.0, 1.25, 8),
)  # fmt: skip
MODELS = {"Llama": LLAMA, "OLMo": OLMO}
# Ids of every part of the vocabulary; two prompts of one length, so that they can be exchanged.
PROMPTS = ((3, 14, 1, 25, 9, 2, 31), (36, 5, 20, 11), (35, 8, 19, 7), (12, 24, 30, 3, 17))
N_TOKENS = 4


@dataclass(frozen=True)
class Mode:
    """One way to run: topology (and memory, of exo) on so many ranks, a model, an arithmetic."""

    topology: str
    n_ranks: int
    model: str = "Llama"
    exact: bool = True
    memory: str | None = None

    @property
    def name(self) -> str:
        kind = self.model if self.exact else f"{self.model}, blas"
        return f"{self.topology} ({kind})"

    @property
    def grid(self):
        return _grid(self)

    @property
    def olmo(self) -> bool:
        return self.model == "OLMo"


MODES = (
    Mode("tp=1", 1),
    Mode("tp=2", 2),
    Mode("tp=3", 3),
    Mode("pp=2", 2),
    Mode("dp=2", 2),
    Mode("sp=2", 2),
    Mode("exo", 3, memory="2,5,9"),
    Mode("tp=2,pp=2", 4),
    Mode("tp=1", 1, "OLMo"),
    Mode("tp=2", 2, "OLMo"),
    Mode("tp=3", 3, "OLMo"),
    Mode("sp=2", 2, "OLMo"),
    Mode("tp=2,sp=2", 4, "OLMo"),
    Mode("tp=2", 2, exact=False),
    Mode("pp=2", 2, exact=False),
)


@lru_cache(maxsize=None)
def _grid(mode):
    config = MODELS[mode.model]
    memory = parse_memory(mode.memory) if mode.memory else None
    return grids.parse(
        mode.topology, mode.n_ranks, config.n_heads, config.n_layers, memory, None
    )


def job_of(mode: Mode, golden=None) -> Job:
    """What a mode runs; new every time, since faults strike its arrays."""
    from spimpi.inference.checkpoint_seeded import SeededCheckpoint

    config = MODELS[mode.model]
    return Job(
        config=config, checkpoint=SeededCheckpoint(config), directory=None, grid=mode.grid,
        prompts=tuple(np.array(p, np.int64) for p in PROMPTS), texts=None, n_tokens=N_TOKENS,
        seed=DEFAULT_SEED, exact=mode.exact, golden=golden, golden_wanted=False, faults=(), repeat=1,
    )  # fmt: skip


@lru_cache(maxsize=None)
def golden_of(mode: Mode):
    """The golden run of a mode's model, made once; no fault strikes it. Local."""
    return make_golden(job_of(mode)) if mode.exact else None
