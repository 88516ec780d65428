"""Published models' shapes, which are used with seeded weights."""

from dataclasses import replace

from spimpi.errors import UsageError
from spimpi.inference.model_config import FULL, SLIDING, Llama3Scaling, ModelConfig, YarnScaling

_LLAMA_3_2 = ModelConfig(
    name="llama-3.2-1b",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    n_layers=16,
    n_heads=32,
    n_kv_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
    tie_word_embeddings=True,
    max_position_embeddings=131072,
    dtype="float32",  # these shapes are used with seeded weights, which are float32
)
_OLMO_2 = ModelConfig(
    name="olmo-2-1b",
    vocab_size=100352,
    hidden_size=2048,
    intermediate_size=8192,
    n_layers=16,
    n_heads=16,
    n_kv_heads=16,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=500000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
    dtype="float32",
    model_type="olmo2",
)
_OLMO_2_7B = replace(
    _OLMO_2, name="olmo-2-7b", hidden_size=4096, intermediate_size=11008, n_layers=32,
    n_heads=32, n_kv_heads=32,
)  # fmt: skip
PUBLISHED = {
    "llama-3.2-1b": _LLAMA_3_2,
    "llama-3.2-3b": replace(
        _LLAMA_3_2, name="llama-3.2-3b", hidden_size=3072, n_layers=28, n_heads=24, head_dim=128
    ),
    "olmo-2-1b": _OLMO_2,
    "olmo-2-7b": _OLMO_2_7B,
    "olmo-3-7b": replace(
        _OLMO_2_7B, name="olmo-3-7b", model_type="olmo3", vocab_size=100278,
        max_position_embeddings=65536, sliding_window=4096,
        layer_types=(SLIDING, SLIDING, SLIDING, FULL) * 8,
        rope_scaling=YarnScaling(8.0, 32.0, 1.0, 1.2079441541679836, 8192),
    ),  # fmt: skip
}


def published(name: str, layers: int | None = None) -> ModelConfig:
    """The published shapes of a model by name, with ``layers`` only its first so many layers."""
    if name not in PUBLISHED:
        msg = f"no published shapes named {name!r}: known are {', '.join(PUBLISHED)}"
        raise UsageError(msg)
    config = PUBLISHED[name]
    if layers is None:
        return config
    if not 1 <= layers <= config.n_layers:
        msg = f"{name} has {config.n_layers} layers: layers must be 1 to that, found {layers}"
        raise UsageError(msg)
    return replace(config, n_layers=layers, layer_types=config.layer_types[:layers])
