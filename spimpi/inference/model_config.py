"""The facts of a decoder of the Llama or the OLMo family, and which tensors it has."""

from dataclasses import dataclass

from spimpi.errors import UsageError

SLIDING, FULL = "sliding_attention", "full_attention"
MOST_LAYERS = 100_000


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretching of the rotary embedding's long wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN's stretching of the long wavelengths (Peng et al. 2023, section 3).

    attention_factor: by which cosines and sines are multiplied.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    attention_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The facts of a model that its shapes and its arithmetic depend on.

    model_type: "llama" (norms before each block), or "olmo2" and "olmo3" (norms after each block
    and of all queries and of all keys before the rotary embedding). layer_types: SLIDING or FULL
    for each layer; empty: all full. sliding_window: positions that a sliding layer sees, the
    row's own included. rope_scaling holds for full layers alone.

    ``dtype`` is what the configuration says that the weights are stored in; what a checkpoint
    really holds is in its tensor records (spimpi.inference.checkpoint).
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | YarnScaling | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    model_type: str = "llama"
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised, and the norms stand after the blocks (OLMo)."""
        return self.model_type != "llama"

    def is_sliding(self, layer: int) -> bool:
        """Whether a layer sees no more than ``sliding_window`` positions."""
        return bool(self.layer_types) and self.layer_types[layer] == SLIDING

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            msg = (
                f"model {self.name}: num_attention_heads must be a multiple of "
                f"num_key_value_heads, found {self.n_heads} and {self.n_kv_heads}"
            )
            raise UsageError(msg)
        if self.head_dim % 2:
            msg = f"model {self.name}: rotary embedding needs even head_dim, found {self.head_dim}"
            raise UsageError(msg)


def checkpoint_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint by Hugging Face's names, in the order in which they are used.

    Matrices are [features out, features in]; the embedding is [vocab_size, hidden_size].
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_rows = config.n_heads * config.head_dim
    kv_rows = config.n_kv_heads * config.head_dim
    tensors = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    attention = {
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
    }
    mlp = {
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    output = {"self_attn.o_proj": (hidden, q_rows)}
    before_ffn = {"post_attention_layernorm": (hidden,)}  # in OLMo it ends the attention block
    if config.qk_norm:
        qk_norms = {"self_attn.q_norm": (q_rows,), "self_attn.k_norm": (kv_rows,)}
        of_layer = attention | qk_norms | output | before_ffn | mlp
        of_layer |= {"post_feedforward_layernorm": (hidden,)}
    else:
        of_layer = {"input_layernorm": (hidden,)} | attention | output | before_ffn | mlp
    for layer in range(config.n_layers):
        for name, shape in of_layer.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = shape
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors
