"""What a model is: the shapes and constants of a decoder of the Llama or the OLMo family."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.inference.rope import yarn_attention_factor

# config.json's model_type -> its architecture, and the rope types that are supported there.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
}
ROPE_TYPES = {"llama": ("default", "llama3"), "olmo2": ("default",), "olmo3": ("default", "yarn")}
SLIDING, FULL = "sliding_attention", "full_attention"
DTYPES = ("bfloat16", "float16", "float32")
EMBEDDED_MODEL = Path(__file__).parent.parent / "models" / "tiny"


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


def load_config(directory) -> ModelConfig:
    """The model of a Hugging Face directory, from its config.json.

    Reads what transformers 4 and 5 write; what is missing has the defaults of Hugging Face's
    LlamaConfig, Olmo2Config or Olmo3Config. Raises UsageError for anything that this inference
    would compute wrongly.
    """
    directory = Path(directory)
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        msg = (
            f"no model directory {directory}: expected a Hugging Face directory with config.json "
            f"and *.safetensors, found {found} there"
        )
        raise UsageError(msg)
    values = read_json_object(
        directory / "config.json",
        f"model directory {directory} has no config.json: expected a Hugging Face directory",
    )
    return _Fields(directory / "config.json", values).model(directory.resolve().name)


def read_json_object(path: Path, missing: str) -> dict:
    """The JSON object in a file. UsageError: the text ``missing``, or what is wrong with it."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(missing) from None
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise UsageError(msg) from None
    except ValueError as error:  # broken JSON or broken UTF-8
        msg = f"{path} is not valid JSON: {error}"
        raise UsageError(msg) from None
    if not isinstance(values, dict):
        msg = f"{path} must hold a JSON object, found a {type(values).__name__}"
        raise UsageError(msg)
    return values


@dataclass(frozen=True)
class _Fields:
    """The values of one config.json, read with the file and the field named in every error."""

    path: Path
    values: dict

    def refuse(self, what: str):
        msg = f"{self.path}: {what}"
        raise UsageError(msg)

    def get(self, field: str, default, values: dict | None = None):
        """The field's value, or the default; null means missing, as in transformers."""
        found = (self.values if values is None else values).get(field)
        return default if found is None else found

    def size(self, field: str, default: int, values: dict | None = None) -> int:
        found = self.get(field, default, values)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            self.refuse(f"{field} must be a positive whole number, found {found!r}")
        return found

    def number(self, field: str, default: float | None, values: dict | None = None) -> float:
        found = self.get(field, default, values)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if not is_number or not 0 < found < float("inf"):
            self.refuse(f"{field} must be a positive number, found {found!r}")
        return float(found)

    def model(self, name: str) -> ModelConfig:
        model_type = self.model_type()
        self.check_supported()
        olmo = model_type != "llama"
        hidden = self.size("hidden_size", 4096)
        n_heads = self.size("num_attention_heads", 32)
        n_layers = self.size("num_hidden_layers", 32)
        if self.get("head_dim", None) is None and hidden % n_heads:
            self.refuse(
                f"without head_dim, hidden_size must be a multiple of num_attention_heads, "
                f"found {hidden} and {n_heads}"
            )
        max_positions = self.size("max_position_embeddings", 2048)
        layer_types, window = self.attention(n_layers) if model_type == "olmo3" else ((), None)
        rope_theta, rope_scaling = self.rope(model_type, max_positions)
        return ModelConfig(
            name=name,
            vocab_size=self.size("vocab_size", 50304 if olmo else 32000),
            hidden_size=hidden,
            intermediate_size=self.size("intermediate_size", 11008),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=self.size("num_key_value_heads", n_heads),
            head_dim=self.size("head_dim", hidden // n_heads),
            rms_norm_eps=self.number("rms_norm_eps", 1e-5 if olmo else 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=bool(self.get("tie_word_embeddings", False)),
            max_position_embeddings=max_positions,
            dtype=self.dtype(),
            model_type=model_type,
            layer_types=layer_types,
            sliding_window=window,
        )

    def model_type(self) -> str:
        """The model's type, by its architecture; by ``model_type`` where that is missing."""
        architectures = self.get("architectures", None)
        by_type = self.get("model_type", None)
        if architectures is None and by_type in ARCHITECTURES:
            return by_type
        for model_type, architecture in ARCHITECTURES.items():
            if architectures == [architecture]:
                return model_type
        listed = architectures if isinstance(architectures, list) else [architectures]
        found = ", ".join(str(name) for name in listed)
        if architectures is None:
            found = f"none, with model_type {by_type!r}"
        self.refuse(
            f"architecture {found} is not supported: supported are "
            f"{', '.join(ARCHITECTURES.values())}"
        )

    def check_supported(self):
        for field in ("attention_bias", "mlp_bias"):
            if self.get(field, False):
                self.refuse(f"{field} is {self.values[field]!r}: only models without are supported")
        if self.get("hidden_act", "silu") != "silu":
            found = self.values["hidden_act"]
            self.refuse(f"hidden_act {found!r} is not supported: supported is 'silu'")
        quantization = self.get("quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            self.refuse(
                f"quantization_config is present (quant_method {method!r}): quantised weights are "
                f"not supported, take the checkpoint in {', '.join(DTYPES)}"
            )

    def attention(self, n_layers: int) -> tuple[tuple[str, ...], int]:
        """OLMo 3's layer types (by default every fourth is full) and its sliding window."""
        default = [FULL if (i + 1) % 4 == 0 else SLIDING for i in range(n_layers)]
        found = self.get("layer_types", default)
        if not isinstance(found, list) or len(found) != n_layers:
            self.refuse(f"layer_types must list one type for each of {n_layers} layers, {found!r}")
        unknown = [kind for kind in found if kind not in (SLIDING, FULL)]
        if unknown:
            self.refuse(
                f"layer type {unknown[0]!r} is not supported: supported are {SLIDING!r}, {FULL!r}"
            )
        # the default is for a missing field: null says that there is no window
        window = self.values.get("sliding_window", 4096)
        if SLIDING not in found:
            return tuple(found), None
        if window is None:
            self.refuse(f"sliding_window is null, but layer_types has {SLIDING!r}")
        return tuple(found), self.size("sliding_window", 4096)

    def dtype(self) -> str:
        # transformers 5 writes "dtype", 4 "torch_dtype"
        found = self.get("dtype", self.get("torch_dtype", "float32"))
        name = str(found).removeprefix("torch.")
        if name not in DTYPES:
            self.refuse(f"dtype {found!r} is not supported: supported are {', '.join(DTYPES)}")
        return name

    def rope(self, model_type: str, max_positions: int):
        """(theta, scaling), from transformers 5's rope_parameters or 4's two fields.

        The order of precedence is that of transformers' convert_rope_params_to_dict: rope_scaling
        where it is present and not empty, then rope_parameters.
        """
        field = "rope_scaling" if self.get("rope_scaling", None) else "rope_parameters"
        parameters = self.get(field, {})
        if not isinstance(parameters, dict):
            self.refuse(f"{field} must be an object, found {parameters!r}")
        default_theta = self.number("rope_theta", 500000.0 if model_type == "olmo3" else 10000.0)
        if any(isinstance(value, dict) for value in parameters.values()):
            if model_type != "olmo3":
                self.refuse(f"{field} by layer type is not supported: found {sorted(parameters)}")
            parameters = self.by_layer_type(field, parameters, default_theta)
        theta = self.number("rope_theta", default_theta, parameters)
        partial = self.get("partial_rotary_factor", None, parameters)
        partial = self.get("partial_rotary_factor", 1.0) if partial is None else partial
        if partial != 1:
            self.refuse(f"partial_rotary_factor {partial!r} is not supported: supported is 1")
        kind = self.get("rope_type", self.get("type", "default", parameters), parameters)
        if kind not in ROPE_TYPES[model_type]:
            known = ", ".join(repr(name) for name in ROPE_TYPES[model_type])
            self.refuse(
                f"rope type {kind!r} is not supported with {ARCHITECTURES[model_type]}: "
                f"supported are {known}"
            )
        if kind == "default":
            return theta, None
        read = self.llama3 if kind == "llama3" else self.yarn
        return theta, read(parameters, max_positions)

    def by_layer_type(self, field, parameters, default_theta) -> dict:
        """The full layers' rope parameters, after a look at the sliding layers'.

        Sliding layers that are scaled, or have a theta of their own, are refused.
        """
        unknown = sorted(set(parameters) - {SLIDING, FULL})
        if unknown:
            self.refuse(f"{field} by layer type must name {SLIDING}, {FULL}, found {unknown}")
        full, sliding = (self.get(kind, {}, parameters) for kind in (FULL, SLIDING))
        kind = self.get("rope_type", self.get("type", "default", sliding), sliding)
        if kind != "default":
            self.refuse(f"rope type {kind!r} of {SLIDING} is not supported: supported is 'default'")
        thetas = [self.number("rope_theta", default_theta, each) for each in (full, sliding)]
        if thetas[0] != thetas[1]:
            self.refuse(f"rope_theta must be the same for {FULL} and {SLIDING}, found {thetas}")
        return full

    def llama3(self, parameters: dict, max_positions: int) -> Llama3Scaling:
        scaling = Llama3Scaling(
            factor=self.number("factor", None, parameters),
            low_freq_factor=self.number("low_freq_factor", None, parameters),
            high_freq_factor=self.number("high_freq_factor", None, parameters),
            original_max_position_embeddings=self.size(
                "original_max_position_embeddings", max_positions, parameters
            ),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            self.refuse(
                f"high_freq_factor must be above low_freq_factor, found "
                f"{scaling.high_freq_factor} and {scaling.low_freq_factor}"
            )
        return scaling

    def yarn(self, parameters: dict, max_positions: int) -> YarnScaling:
        for field in ("mscale", "mscale_all_dim"):
            if self.get(field, None, parameters) is not None:
                self.refuse(f"{field} of rope type 'yarn' is not supported")
        if self.get("truncate", True, parameters) is not True:
            self.refuse("truncate of rope type 'yarn' is not supported: supported is true")
        factor = self.number("factor", None, parameters)
        if factor < 1:
            self.refuse(f"factor of rope type 'yarn' must be at least 1, found {factor}")
        scaling = YarnScaling(
            factor=factor,
            beta_fast=self.number("beta_fast", 32.0, parameters),
            beta_slow=self.number("beta_slow", 1.0, parameters),
            attention_factor=self.number(
                "attention_factor", yarn_attention_factor(factor), parameters
            ),
            original_max_position_embeddings=self.size(
                "original_max_position_embeddings", max_positions, parameters
            ),
        )
        if scaling.beta_fast < scaling.beta_slow:
            self.refuse(
                f"beta_fast must not be below beta_slow, found {scaling.beta_fast} and "
                f"{scaling.beta_slow}"
            )
        return scaling


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
