"""What a model is: the shapes and constants of a decoder of the Llama family."""

import decimal
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spimpi.errors import UsageError

ARCHITECTURE = "LlamaForCausalLM"
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
class ModelConfig:
    """The facts of a Llama model that its shapes and its arithmetic depend on.

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
    rope_scaling: Llama3Scaling | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str

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
PUBLISHED = {
    "llama-3.2-1b": _LLAMA_3_2,
    "llama-3.2-3b": replace(
        _LLAMA_3_2, name="llama-3.2-3b", hidden_size=3072, n_layers=28, n_heads=24, head_dim=128
    ),
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
    return replace(config, n_layers=layers)


def load_config(directory) -> ModelConfig:
    """The model of a Hugging Face directory, from its config.json.

    Reads what transformers 4 and 5 write; what is missing has the defaults of Hugging Face's
    LlamaConfig. Raises UsageError for anything that this inference would compute wrongly.
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
        self.check_supported()
        hidden = self.size("hidden_size", 4096)
        n_heads = self.size("num_attention_heads", 32)
        if self.get("head_dim", None) is None and hidden % n_heads:
            self.refuse(
                f"without head_dim, hidden_size must be a multiple of num_attention_heads, "
                f"found {hidden} and {n_heads}"
            )
        max_positions = self.size("max_position_embeddings", 2048)
        rope_theta, rope_scaling = self.rope(max_positions)
        return ModelConfig(
            name=name,
            vocab_size=self.size("vocab_size", 32000),
            hidden_size=hidden,
            intermediate_size=self.size("intermediate_size", 11008),
            n_layers=self.size("num_hidden_layers", 32),
            n_heads=n_heads,
            n_kv_heads=self.size("num_key_value_heads", n_heads),
            head_dim=self.size("head_dim", hidden // n_heads),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=bool(self.get("tie_word_embeddings", False)),
            max_position_embeddings=max_positions,
            dtype=self.dtype(),
        )

    def check_supported(self):
        architectures = self.get("architectures", None)
        if architectures is None and self.get("model_type", None) == "llama":
            architectures = [ARCHITECTURE]
        if architectures != [ARCHITECTURE]:
            listed = architectures if isinstance(architectures, list) else [architectures]
            found = ", ".join(str(name) for name in listed)
            if architectures is None:
                found = f"none, with model_type {self.get('model_type', None)!r}"
            self.refuse(f"architecture {found} is not supported: supported is {ARCHITECTURE}")
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

    def dtype(self) -> str:
        # transformers 5 writes "dtype", 4 "torch_dtype"
        found = self.get("dtype", self.get("torch_dtype", "float32"))
        name = str(found).removeprefix("torch.")
        if name not in DTYPES:
            self.refuse(f"dtype {found!r} is not supported: supported are {', '.join(DTYPES)}")
        return name

    def rope(self, max_positions: int) -> tuple[float, Llama3Scaling | None]:
        """theta and scaling, from transformers 5's rope_parameters or 4's two fields.

        The order of precedence is that of transformers' convert_rope_params_to_dict: rope_scaling
        where it is present and not empty, then rope_parameters.
        """
        field = "rope_scaling" if self.get("rope_scaling", None) else "rope_parameters"
        parameters = self.get(field, {})
        if not isinstance(parameters, dict):
            self.refuse(f"{field} must be an object, found {parameters!r}")
        if any(isinstance(value, dict) for value in parameters.values()):
            self.refuse(f"{field} by layer type is not supported: found {sorted(parameters)}")
        theta = self.number("rope_theta", self.number("rope_theta", 10000.0), parameters)
        partial = self.get("partial_rotary_factor", None, parameters)
        partial = self.get("partial_rotary_factor", 1.0) if partial is None else partial
        if partial != 1:
            self.refuse(f"partial_rotary_factor {partial!r} is not supported: supported is 1")
        kind = self.get("rope_type", self.get("type", "default", parameters), parameters)
        if kind == "default":
            return theta, None
        if kind != "llama3":
            self.refuse(f"rope type {kind!r} is not supported: supported are 'default', 'llama3'")
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
        return theta, scaling


def checkpoint_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint by Hugging Face's names, in the order in which they are used.

    Matrices are [features out, features in]; the embedding is [vocab_size, hidden_size].
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_rows = config.n_heads * config.head_dim
    kv_rows = config.n_kv_heads * config.head_dim
    tensors = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.n_layers):
        of_layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q_rows, hidden),
            "self_attn.k_proj": (kv_rows, hidden),
            "self_attn.v_proj": (kv_rows, hidden),
            "self_attn.o_proj": (hidden, q_rows),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for name, shape in of_layer.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = shape
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


_PI = decimal.Decimal("3.14159265358979323846264338327950288419716939937510")


def rope_inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """The rotary embedding's inverse frequencies, float32 [head_dim / 2], in radians a position.

    theta ** (-2i / head_dim), stretched by Llama 3's rule where the model has it (formula:
    transformers, modeling_rope_utils._compute_llama3_parameters). Computed in 50 decimal digits
    and rounded once, because pow and float32 chains differ by machine and golden files must not.
    """
    with decimal.localcontext(decimal.Context(prec=50)):
        theta = decimal.Decimal(config.rope_theta)
        exponents = (decimal.Decimal(-2 * i) / config.head_dim for i in range(config.head_dim // 2))
        frequencies = [theta**exponent for exponent in exponents]
        if config.rope_scaling is not None:
            frequencies = [_llama3(f, config.rope_scaling) for f in frequencies]
        return np.array([float(f) for f in frequencies], dtype=np.float32)


def _llama3(frequency: decimal.Decimal, scaling: Llama3Scaling) -> decimal.Decimal:
    factor = decimal.Decimal(scaling.factor)
    low = decimal.Decimal(scaling.low_freq_factor)
    high = decimal.Decimal(scaling.high_freq_factor)
    # how often the wave turns within the context of the pre-training
    turns = scaling.original_max_position_embeddings * frequency / (2 * _PI)
    if turns > high:
        return frequency
    if turns < low:
        return frequency / factor
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency
