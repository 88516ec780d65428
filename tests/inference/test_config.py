import json
import math

import numpy as np
import pytest
from reference_models import config_json, tiny_config

from spimpi.errors import UsageError
from spimpi.inference.config import (
    EMBEDDED_MODEL,
    Llama3Scaling,
    checkpoint_tensors,
    load_config,
    published,
)
from spimpi.inference.rope import rope_factor, rope_inverse_frequencies, yarn_attention_factor

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def directory_with(tmp_path, **changes):
    """A directory whose config.json is the small model's with changes; ... removes a field."""
    values = config_json(tiny_config()) | changes
    values = {field: value for field, value in values.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def refusal(path) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_the_embedded_model_is_the_one_that_its_origin_describes():
    config = load_config(EMBEDDED_MODEL)
    assert (config.name, config.vocab_size, config.hidden_size) == ("tiny", 256, 128)
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim) == (8, 8, 4, 16)
    assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-5)
    assert (config.dtype, config.tie_word_embeddings) == ("bfloat16", False)


def test_transformers_4_and_5_styles_describe_the_same_model(tmp_path):
    five = load_config(
        directory_with(
            tmp_path,
            rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
            dtype="float16",
        )
    )
    four = load_config(
        directory_with(
            tmp_path,
            rope_parameters=...,
            rope_theta=500000.0,
            rope_scaling={"type": "llama3", **LLAMA3},
            dtype=...,
            torch_dtype="float16",
        )
    )
    assert four == five
    assert five.rope_scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert (five.rope_theta, five.dtype) == (500000.0, "float16")


def test_missing_values_have_the_defaults_of_hugging_face(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "num_key_value_heads": null, "rope_scaling": null}'
    )
    config = load_config(tmp_path)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 4096, 11008)
    assert (config.n_layers, config.n_heads, config.n_kv_heads) == (32, 32, 32)
    assert config.head_dim == 128
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (2048, False)


def test_the_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    theirs = transformers.LlamaConfig()
    assert (theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size) == (32000, 4096, 11008)
    assert (theirs.num_hidden_layers, theirs.num_attention_heads) == (32, 32)
    assert (theirs.rms_norm_eps, theirs.max_position_embeddings) == (1e-6, 2048)
    assert theirs.rope_parameters["rope_theta"] == 10000.0


def test_head_dim_need_not_be_hidden_over_heads(tmp_path):
    assert load_config(directory_with(tmp_path, head_dim=8)).head_dim == 8
    assert load_config(directory_with(tmp_path, head_dim=None)).head_dim == 2


def test_a_missing_directory_is_named(tmp_path):
    assert "no model directory" in refusal(tmp_path / "nowhere")
    assert "nowhere" in refusal(tmp_path / "nowhere")


def test_a_file_in_place_of_the_directory_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    assert "found a file" in refusal(tmp_path / "model.safetensors")


def test_a_missing_config_is_named(tmp_path):
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{broken", "[1]", b"\xff\xfe"])
def test_a_config_that_is_no_json_object_is_named(tmp_path, text):
    text = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "config.json").write_bytes(text)
    assert "JSON" in refusal(tmp_path)
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, ["Qwen3ForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": ..., "model_type": "mamba"}, ["mamba", "LlamaForCausalLM"]),
        ({"attention_bias": True}, ["attention_bias", "True"]),
        ({"mlp_bias": True}, ["mlp_bias", "True"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, ["yarn", "default", "llama3"]),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2}}, ["linear"]),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, ["layer type"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, ["low_freq_factor", "None"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"dtype": "float64"}, ["float64", "bfloat16"]),
        ({"hidden_size": "large"}, ["hidden_size", "large"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps", "-1"]),
        ({"head_dim": 3}, ["needs even head_dim", "3"]),
        ({"num_key_value_heads": 2}, ["multiple", "3 and 2"]),
        ({"hidden_size": 7, "head_dim": None}, ["multiple", "7 and 3"]),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(tmp_path, changes, words):
    message = refusal(directory_with(tmp_path, **changes))
    assert [word for word in words if word not in message] == []


def test_published_shapes_have_the_published_number_of_parameters():
    # 1,235,814,400 and 3,212,749,824: the totals on the models' pages (1.24 and 3.21 billion)
    totals = {"llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824}
    for name, total in totals.items():
        assert sum(map(math.prod, checkpoint_tensors(published(name)).values())) == total


def test_layers_limits_a_published_model():
    assert published("llama-3.2-1b", 4).n_layers == 4
    with pytest.raises(UsageError, match="16 layers.*found 17"):
        published("llama-3.2-1b", 17)


def test_an_unknown_published_name_gets_the_list():
    with pytest.raises(UsageError, match="llama-9.*llama-3.2-1b, llama-3.2-3b"):
        published("llama-9")


def test_the_tensors_are_those_that_transformers_makes():
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    for tied in (False, True):
        config = tiny_config(tie_word_embeddings=tied, head_dim=4)
        values = config_json(config)
        values.pop("architectures")
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
        theirs = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        assert checkpoint_tensors(config) == theirs


def test_tensors_come_in_program_order():
    names = list(checkpoint_tensors(tiny_config()))
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert names[1:10] == [
        f"model.layers.0.{name}.weight"
        for name in (
            "input_layernorm",
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            "post_attention_layernorm",
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    ]


def ulps(a, b):
    return np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)).max()


@pytest.mark.parametrize("head_dim", [2, 16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_frequencies_are_the_formula_rounded_once(head_dim, theta):
    config = tiny_config(head_dim=head_dim, rope_theta=theta)
    found = rope_inverse_frequencies(config)
    wanted = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    assert found.dtype == np.float32
    # float64's own pow is good to 1e-15: the same float32 but for the rare tie
    assert ulps(found, wanted.astype(np.float32)) <= 1
    assert np.abs(found / wanted - 1).max() < 2**-24 * 1.0001


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b"])
def test_rotary_frequencies_agree_with_transformers(name):
    pytest.importorskip("transformers", reason="transformers is the reference")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = published(name)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config_json(config))).inv_freq.numpy()
    found = rope_inverse_frequencies(config)
    # how often each wave turns within the 8192 positions, before it is stretched
    i = np.arange(config.head_dim // 2)
    turns = 8192 * 500000.0 ** (-2 * i / config.head_dim) / (2 * np.pi)
    middle = (turns >= 1) & (turns <= 4)
    assert ulps(found[~middle], theirs[~middle]) <= 1
    # theirs is a chain of float32 operations here, whose differences lose bits; ours rounds once
    assert middle.any()
    assert ulps(found[middle], theirs[middle]) <= 6


def test_llama3_stretches_long_waves_only():
    plain = rope_inverse_frequencies(tiny_config(head_dim=64, rope_theta=500000.0))
    scaling = Llama3Scaling(32.0, 1.0, 4.0, 8192)
    found = rope_inverse_frequencies(
        tiny_config(head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    )
    # the rule in float64, as transformers writes it, from the unrounded frequencies
    exact = 500000.0 ** (-np.arange(32) / 32)
    wavelength = 2 * np.pi / exact
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    wanted = np.where(wavelength > 8192, exact / 32, exact)
    middle = (wavelength <= 8192) & (wavelength >= 2048)
    wanted = np.where(middle, (1 - smooth) * exact / 32 + smooth * exact, wanted)
    assert ulps(found, wanted.astype(np.float32)) <= 1
    assert (found[wavelength < 2048] == plain[wavelength < 2048]).all()
    assert middle.any() and (found[-1] != plain[-1])
