"""config.json of a Hugging Face directory: read as transformers 5 reads it, or refused by name."""

from dataclasses import dataclass
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.inference.model_config import (
    FULL, MOST_LAYERS, SLIDING, Llama3Scaling, ModelConfig, YarnScaling,
)  # fmt: skip
from spimpi.inference.rope import yarn_attention_factor
from spimpi.printable import one_line

# config.json's model_type -> its architecture, and the rope types that are supported there.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",  # Llama, where no window masks anything
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
}
ROPE_TYPES = {"llama": ("default", "llama3"), "olmo2": ("default",), "olmo3": ("default", "yarn")}
DTYPES = ("bfloat16", "float16", "float32")
MOST = 2**31 - 1  # of a size
LARGEST = 1e30  # of a number: float32 must hold it and what is made of it
SHOWN = 120  # characters of a value in an error
# Fields that change what transformers computes with any model; other values are refused.
WITHOUT = {
    "is_causal": (True,), "per_layer_config": (None, {}), "text_config": (None,),
    "transformers_weights": (None,), "quantization_config": (None,), "compression_config": (None,),
    "attention_bias": (False, None), "mlp_bias": (False, None),
}  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """What a family's class in transformers takes where config.json has no such field."""

    vocab_size: int = 32000
    intermediate_size: int = 11008
    num_key_value_heads: int | None = None  # None: as many as heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


_OLMO_2 = Defaults(vocab_size=50304, rms_norm_eps=1e-5)
DEFAULTS = {
    "llama": Defaults(),
    "mistral": Defaults(
        intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=4096 * 32
    ),
    "olmo2": _OLMO_2,
    "olmo3": Defaults(vocab_size=50304, rms_norm_eps=1e-5, rope_theta=500000.0),
}


def shown(value) -> str:
    """A value of the file, as errors show it."""
    return one_line(repr(value), SHOWN)


@dataclass(frozen=True)
class Fields:
    """The values of one config.json, read with the file and the field named in every error."""

    path: Path
    values: dict

    def refuse(self, what: str):
        msg = f"{one_line(self.path, 200)}: {what}"
        raise UsageError(msg)

    def get(self, field: str, default, values: dict | None = None):
        """The field's value, or the default; null means missing, as in transformers."""
        found = (self.values if values is None else values).get(field)
        return default if found is None else found

    def size(self, field: str, default, values: dict | None = None, most: int = MOST) -> int:
        found = self.get(field, default, values)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            self.refuse(f"{field} must be a positive whole number, found {shown(found)}")
        if found > most:
            self.refuse(f"{field} must be at most {most}, found {shown(found)}")
        return found

    def number(self, field: str, default, values: dict | None = None, least: float = 0.0) -> float:
        """A number above 0, and at least ``least``."""
        found = self.get(field, default, values)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if not is_number or not 0 < found < float("inf"):
            self.refuse(f"{field} must be a positive number, found {shown(found)}")
        if not least <= found <= LARGEST:
            self.refuse(f"{field} must be from {least:g} to {LARGEST:g}, found {shown(found)}")
        return float(found)

    def flag(self, field: str, default: bool) -> bool:
        found = self.get(field, default)
        if not isinstance(found, bool):
            self.refuse(f"{field} must be true or false, found {shown(found)}")
        return found

    def model(self, name: str) -> ModelConfig:
        family = self.family()
        self.check_supported()
        defaults = DEFAULTS[family]
        hidden = self.size("hidden_size", 4096)
        n_heads = self.size("num_attention_heads", 32)
        n_layers = self.size("num_hidden_layers", 32, most=MOST_LAYERS)
        if self.get("head_dim", None) is None and hidden % n_heads:
            self.refuse(
                f"without head_dim, hidden_size must be a multiple of num_attention_heads, "
                f"found {hidden} and {n_heads}"
            )
        max_positions = self.size("max_position_embeddings", defaults.max_position_embeddings)
        layer_types, window = self.attention(n_layers) if family == "olmo3" else ((), None)
        if family == "mistral":
            self.require_no_window(max_positions)
        # null means as many as heads also where the class has a default of its own
        kv_default = n_heads if "num_key_value_heads" in self.values else defaults.num_key_value_heads
        model_type = "llama" if family == "mistral" else family
        rope_theta, rope_scaling = self.rope(model_type, max_positions, defaults.rope_theta)
        return ModelConfig(
            name=name,
            vocab_size=self.size("vocab_size", defaults.vocab_size),
            hidden_size=hidden,
            intermediate_size=self.size("intermediate_size", defaults.intermediate_size),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=self.size("num_key_value_heads", kv_default or n_heads),
            head_dim=self.size("head_dim", hidden // n_heads),
            rms_norm_eps=self.number("rms_norm_eps", defaults.rms_norm_eps),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=self.flag("tie_word_embeddings", False),
            max_position_embeddings=max_positions,
            dtype=self.dtype(),
            model_type=model_type,
            layer_types=layer_types,
            sliding_window=window,
        )

    def family(self) -> str:
        """The architecture, by its key in ARCHITECTURES.

        transformers' AutoModel goes by ``model_type``, its other readers by ``architectures``:
        where both are there, they must say the same.
        """
        architectures = self.get("architectures", None)
        by_type = self.get("model_type", None)
        known = isinstance(by_type, str) and by_type in ARCHITECTURES
        if architectures is None and known:
            return by_type
        for model_type, architecture in ARCHITECTURES.items():
            if architectures == [architecture] and by_type in (None, model_type):
                return model_type
            if architectures == [architecture]:
                self.refuse(
                    f"architectures names {architecture}, but model_type is {shown(by_type)}, not "
                    f"{model_type!r}: readers would differ in what they compute"
                )
        listed = architectures if isinstance(architectures, list) else [architectures]
        found = one_line(", ".join(str(name) for name in listed), SHOWN)
        if architectures is None:
            found = f"none, with model_type {shown(by_type)}"
        self.refuse(
            f"architecture {found} is not supported: supported are "
            f"{', '.join(ARCHITECTURES.values())}"
        )

    def check_supported(self):
        for field, allowed in WITHOUT.items():
            found = self.values.get(field, allowed[0])
            if any(found is value or (value == {} and found == {}) for value in allowed):
                continue
            if field == "quantization_config":
                method = found.get("quant_method") if isinstance(found, dict) else None
                self.refuse(
                    f"quantization_config is present (quant_method {shown(method)}): quantised "
                    f"weights are not supported, take the checkpoint in {', '.join(DTYPES)}"
                )
            self.refuse(
                f"{field} is {shown(found)}, which changes what the model computes: only models "
                "without are supported"
            )
        found = self.get("hidden_act", "silu")
        if found not in ("silu", "swish"):  # two names of one function
            self.refuse(f"hidden_act {shown(found)} is not supported: supported is 'silu'")

    def require_no_window(self, max_positions: int) -> None:
        """Mistral with a window that masks nothing is Llama; the default is for a missing field."""
        window = self.values.get("sliding_window", 4096)
        if window is not None and self.size("sliding_window", 4096) < max_positions:
            self.refuse(
                f"sliding_window {window} of MistralForCausalLM is not supported where it is below "
                f"max_position_embeddings, here {max_positions}: only null, or at least that"
            )

    def attention(self, n_layers: int) -> tuple[tuple[str, ...], int]:
        """OLMo 3's layer types (by default every fourth is full) and its sliding window."""
        default = [FULL if (i + 1) % 4 == 0 else SLIDING for i in range(n_layers)]
        found = self.get("layer_types", default)
        if not isinstance(found, list) or len(found) != n_layers:
            self.refuse(f"layer_types must list one type for each of {n_layers} layers, found {shown(found)}")
        unknown = [kind for kind in found if kind not in (SLIDING, FULL)]
        if unknown:
            self.refuse(
                f"layer type {shown(unknown[0])} is not supported: supported are {SLIDING!r}, {FULL!r}"
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
            self.refuse(f"dtype {shown(found)} is not supported: supported are {', '.join(DTYPES)}")
        return name

    def rope(self, model_type: str, max_positions: int, default_theta: float):
        """(theta, scaling), from transformers 5's rope_parameters or 4's two fields.

        The order of precedence is that of transformers' convert_rope_params_to_dict: rope_scaling
        where it is present and not empty, then rope_parameters.
        """
        field = "rope_scaling" if self.get("rope_scaling", None) else "rope_parameters"
        parameters = self.get(field, {})
        if not isinstance(parameters, dict):
            self.refuse(f"{field} must be an object, found {shown(parameters)}")
        default_theta = self.number("rope_theta", default_theta, least=1)
        if any(isinstance(value, dict) for value in parameters.values()):
            if model_type != "olmo3":
                self.refuse(f"{field} by layer type is not supported: found {shown(sorted(parameters))}")
            parameters = self.by_layer_type(field, parameters, default_theta)
        theta = self.number("rope_theta", default_theta, parameters, least=1)
        partial = self.get("partial_rotary_factor", None, parameters)
        partial = self.get("partial_rotary_factor", 1.0) if partial is None else partial
        if partial != 1:
            self.refuse(f"partial_rotary_factor {shown(partial)} is not supported: supported is 1")
        kind = self.get("rope_type", self.get("type", "default", parameters), parameters)
        if not isinstance(kind, str) or kind not in ROPE_TYPES[model_type]:
            known = ", ".join(repr(name) for name in ROPE_TYPES[model_type])
            self.refuse(
                f"rope type {shown(kind)} is not supported with {ARCHITECTURES[model_type]}: "
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
            self.refuse(f"{field} by layer type must name {SLIDING}, {FULL}, found {shown(unknown)}")
        full, sliding = (self.get(kind, {}, parameters) for kind in (FULL, SLIDING))
        if not isinstance(full, dict) or not isinstance(sliding, dict):
            self.refuse(f"{field} must be an object for each layer type, found {shown(parameters)}")
        kind = self.get("rope_type", self.get("type", "default", sliding), sliding)
        if kind != "default":
            self.refuse(f"rope type {shown(kind)} of {SLIDING} is not supported: supported is 'default'")
        thetas = [self.number("rope_theta", default_theta, p, least=1) for p in (full, sliding)]
        if thetas[0] != thetas[1]:
            self.refuse(f"rope_theta must be the same for {FULL} and {SLIDING}, found {thetas}")
        return full

    def llama3(self, parameters: dict, max_positions: int) -> Llama3Scaling:
        scaling = Llama3Scaling(
            factor=self.number("factor", None, parameters, least=1),
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
        factor = self.number("factor", None, parameters, least=1)
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
