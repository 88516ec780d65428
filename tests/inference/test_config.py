import hashlib
import json
import math
import os
from dataclasses import asdict

import pytest
from reference_models import classes, config_json, tiny_config

from spimpi.errors import UsageError
from spimpi.inference.checkpoint import config_digest
from spimpi.inference.config import (
    EMBEDDED_MODEL,
    FULL,
    SLIDING,
    Llama3Scaling,
    YarnScaling,
    checkpoint_tensors,
    load_config,
    published,
)

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
        ({"architectures": ["OlmoForCausalLM"]}, ["OlmoForCausalLM", "Olmo2ForCausalLM"]),
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
        # what transformers 5 computes otherwise, or reads from elsewhere
        ({"is_causal": False}, ["is_causal", "False"]),
        ({"is_causal": None}, ["is_causal", "None"]),
        ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, ["per_layer_config"]),
        ({"text_config": {"hidden_act": "gelu"}}, ["text_config"]),
        ({"transformers_weights": "other.safetensors"}, ["transformers_weights"]),
        ({"model_type": "mistral"}, ["LlamaForCausalLM", "'mistral'", "'llama'"]),
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "'llama'"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings", "true or false"]),
        ({"attention_bias": "no"}, ["attention_bias", "no"]),
        # values that no model has
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "1e+30"]),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps", "inf"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"rope_parameters": ..., "rope_theta": 10**400}, ["rope_theta"]),
        ({"rope_parameters": ..., "rope_theta": 0.5}, ["rope_theta", "from 1"]),
        ({"num_hidden_layers": 10**7}, ["num_hidden_layers", "at most 100000"]),
        ({"num_hidden_layers": 2**62}, ["num_hidden_layers", "at most"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ({"num_hidden_layers": 2.0}, ["num_hidden_layers", "2.0"]),
        ({"vocab_size": 10**18}, ["vocab_size", "at most"]),
        ({"vocab_size": -3}, ["vocab_size", "-3"]),
        ({"architectures": ..., "model_type": {"a": 1}}, ["{'a': 1}"]),
        ({"architectures": ..., "model_type": ["llama"]}, ["['llama']"]),
        ({"architectures": "LlamaForCausalLM" * 900}, ["is not supported"]),
        ({"hidden_act": ["silu"] * 900}, ["hidden_act"]),
        ({"rope_parameters": [1]}, ["rope_parameters", "an object"]),
        ({"rope_parameters": {"rope_type": ["default"]}}, ["rope type", "default"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 0.5}}, ["factor", "from 1"]),
        ({"dtype": {"a": 1}}, ["dtype"]),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(tmp_path, changes, words):
    message = refusal(directory_with(tmp_path, **changes))
    assert [word for word in words if word not in message] == []
    assert len(message) <= 500 and "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"vocab_size": 11, "vocab_size": 12}', "'vocab_size' twice"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"vocab_size": "\xff"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"null", "JSON object"),
    ],
)
def test_hostile_json_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "config.json").write_bytes(text)
    message = refusal(tmp_path)
    assert words in message and len(message) <= 500 and "\n" not in message


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert "no ordinary file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "\x1b[31m"])
def test_a_name_that_no_directory_has_is_refused(name):
    message = refusal(name)
    assert "no model directory" in message and len(message) <= 500 and "\x1b" not in message


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


@pytest.mark.parametrize("window", [None, 64, 1000])
def test_mistral_whose_window_masks_nothing_is_llama(tmp_path, window):
    llama = load_config(directory_with(tmp_path))
    assert load_config(directory_with(tmp_path, **MISTRAL, sliding_window=window)) == llama


@pytest.mark.parametrize("window", [..., 63, 1, 0, "none"])
def test_mistral_with_a_window_is_refused(tmp_path, window):
    changes = MISTRAL | {"sliding_window": window, "max_position_embeddings": 8192}
    assert "sliding_window" in refusal(directory_with(tmp_path, **changes))


def test_the_defaults_of_mistral_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    theirs = transformers.MistralConfig(sliding_window=None)
    (tmp_path / "config.json").write_text(json.dumps({**MISTRAL, "sliding_window": None}))
    ours = load_config(tmp_path)
    assert (ours.vocab_size, ours.intermediate_size) == (theirs.vocab_size, theirs.intermediate_size)
    assert (ours.n_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


def test_silu_has_two_names(tmp_path):
    assert load_config(directory_with(tmp_path, hidden_act="swish"))


def test_published_shapes_have_the_published_number_of_parameters():
    # 1,235,814,400 and 3,212,749,824: the totals on the models' pages (1.24 and 3.21 billion)
    totals = {"llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824}
    # safetensors' totals there: 1.48, 7.30 and 7.30 billion
    totals |= {"olmo-2-1b": 1_484_916_736, "olmo-2-7b": 7_298_617_344, "olmo-3-7b": 7_298_011_136}
    for name, total in totals.items():
        assert sum(map(math.prod, checkpoint_tensors(published(name)).values())) == total


def test_layers_limits_a_published_model():
    assert published("llama-3.2-1b", 4).n_layers == 4
    with pytest.raises(UsageError, match="16 layers.*found 17"):
        published("llama-3.2-1b", 17)


def test_an_unknown_published_name_gets_the_list():
    with pytest.raises(UsageError, match="llama-9.*llama-3.2-1b, llama-3.2-3b"):
        published("llama-9")


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "olmo3"])
def test_the_tensors_are_those_that_transformers_makes(model_type):
    pytest.importorskip("transformers", reason="transformers is the reference")
    make_config, make_model = classes(model_type)
    for tied in (False, True):
        config = tiny_config(tie_word_embeddings=tied, head_dim=4, model_type=model_type)
        values = config_json(config)
        values.pop("architectures")
        model = make_model(make_config(**values, pad_token_id=None))
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


def test_olmo_s_tensors_come_in_program_order():
    names = list(checkpoint_tensors(tiny_config(model_type="olmo2")))
    assert names[1:12] == [
        f"model.layers.0.{name}.weight"
        for name in (
            *(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")),
            "self_attn.o_proj", "post_attention_layernorm",
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")), "post_feedforward_layernorm",
        )
    ]  # fmt: skip


YARN = {
    "rope_type": "yarn",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.2079441541679836,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}


def olmo3_with(tmp_path, **changes):
    """A directory with a small OLMo 3 of four layers, its window 5, and changes."""
    facts = dict(n_layers=4, model_type="olmo3", sliding_window=5, rope_theta=500000.0)
    values = config_json(tiny_config(**facts, layer_types=(SLIDING, SLIDING, SLIDING, FULL)))
    values = {k: v for k, v in (values | changes).items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_olmo_shapes_are_those_of_the_published_configurations():
    two, three = published("olmo-2-7b"), published("olmo-3-7b")
    for config in (two, three):
        assert (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim) == (
            32, 32, 32, 128
        )  # fmt: skip
        assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 500000.0)
    assert (two.model_type, two.rope_scaling, two.max_position_embeddings) == ("olmo2", None, 4096)
    assert not any(map(two.is_sliding, range(32)))
    assert three.rope_scaling == YarnScaling(8.0, 32.0, 1.0, 1.2079441541679836, 8192)
    assert (three.sliding_window, three.max_position_embeddings) == (4096, 65536)
    assert [i for i in range(32) if not three.is_sliding(i)] == list(range(3, 32, 4))
    assert published("olmo-3-7b", 5).layer_types == three.layer_types[:5]


def test_three_ways_to_write_olmo_3_s_rope_describe_the_same_model(tmp_path):
    by_layer = olmo3_with(tmp_path, rope_parameters={FULL: YARN, SLIDING: PLAIN})
    found = load_config(by_layer)
    assert found.rope_scaling == YarnScaling(8.0, 32.0, 1.0, 1.2079441541679836, 8192)
    assert found.layer_types == (SLIDING, SLIDING, SLIDING, FULL) and found.sliding_window == 5
    four = {field: value for field, value in YARN.items() if field != "rope_theta"}
    for changes in (
        dict(rope_parameters=..., rope_theta=500000, rope_scaling=four),  # transformers 4.57
        dict(rope_parameters=YARN),  # transformers 5.0
        dict(rope_parameters=YARN, layer_types=...),  # every fourth is full
        dict(rope_parameters={FULL: YARN | {"attention_factor": None}, SLIDING: PLAIN}),
    ):
        assert load_config(olmo3_with(tmp_path, **changes)) == found


def test_missing_values_of_olmo_have_the_defaults_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    for model_type, theirs in (
        ("olmo2", transformers.Olmo2Config()), ("olmo3", transformers.Olmo3Config()),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        config = load_config(tmp_path)
        assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (
            theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size
        )  # fmt: skip
        assert (config.n_layers, config.n_heads) == (
            theirs.num_hidden_layers, theirs.num_attention_heads
        )  # fmt: skip
        assert config.n_kv_heads == theirs.num_key_value_heads
        assert config.rms_norm_eps == theirs.rms_norm_eps
        assert config.max_position_embeddings == theirs.max_position_embeddings
        rope = theirs.rope_parameters
        assert config.rope_theta == rope.get(FULL, rope)["rope_theta"]
        if model_type == "olmo3":
            assert list(config.layer_types) == theirs.layer_types
            assert config.sliding_window == theirs.sliding_window
        else:
            assert (config.layer_types, config.sliding_window) == ((), None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": [FULL]}, ["layer_types", "4 layers"]),
        ({"layer_types": [FULL] * 3 + ["linear_attention"]}, ["linear_attention", SLIDING]),
        ({"sliding_window": None}, ["sliding_window", "null"]),
        ({"sliding_window": 0}, ["sliding_window", "0"]),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3}}, ["llama3", "Olmo3", "yarn"]),
        ({"rope_parameters": {SLIDING: YARN, FULL: YARN}}, ["yarn", SLIDING]),
        ({"rope_parameters": {SLIDING: PLAIN | {"rope_theta": 1e4}, FULL: PLAIN}}, ["rope_theta"]),
        ({"rope_parameters": {"chunked_attention": PLAIN}}, ["chunked_attention"]),
        ({"rope_parameters": YARN | {"truncate": False}}, ["truncate", "yarn"]),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, ["mscale"]),
        ({"rope_parameters": YARN | {"factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_parameters": YARN | {"factor": None}}, ["factor", "None"]),
        ({"rope_parameters": YARN | {"beta_fast": 0.5}}, ["beta_fast", "0.5"]),
        ({"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}, ["by layer type"]),
        ({"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "rope_parameters": YARN},
         ["yarn", "Olmo2ForCausalLM"]),
        ({"attention_bias": True}, ["attention_bias"]),
    ],
)  # fmt: skip
def test_what_would_be_computed_wrongly_of_olmo_is_refused_by_name(tmp_path, changes, words):
    message = refusal(olmo3_with(tmp_path, **changes))
    assert [word for word in words if word not in message] == []


def test_windows_matter_only_where_a_layer_slides(tmp_path):
    config = load_config(olmo3_with(tmp_path, layer_types=[FULL] * 4, sliding_window=None))
    assert config.sliding_window is None and not config.is_sliding(0)


def test_what_only_olmo_has_does_not_rename_a_llama():
    """Golden files name their model by a digest: the shipped one is from before there was OLMo."""
    llama = tiny_config()
    assert config_digest(llama).hexdigest() == config_digest(tiny_config(name="x")).hexdigest()
    facts = asdict(llama)
    for field in ("name", "model_type", "layer_types", "sliding_window"):
        del facts[field]
    before = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    assert config_digest(llama).hexdigest() == before.hexdigest()
    digests = {
        config_digest(tiny_config(**facts)).hexdigest()
        for facts in (
            {}, {"model_type": "olmo2"}, {"model_type": "olmo3"},
            {"model_type": "olmo3", "sliding_window": 3},
        )
    }  # fmt: skip
    assert len(digests) == 4
