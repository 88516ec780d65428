"""Seeded random Llama and OLMo checkpoints, and Hugging Face transformers' own logits for them."""

import json
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np

from spimpi.inference.config import (
    ARCHITECTURES, FULL, SLIDING, Llama3Scaling, ModelConfig, YarnScaling, checkpoint_tensors,
)  # fmt: skip

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 64,
    },
}


def make(
    directory,
    *,
    model_type="llama",
    seed=1,
    dtype="float32",
    hidden=96,
    ffn=160,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=None,
    vocab=256,
    tied=False,
    rope=None,
    max_positions=256,
    max_shard_size="1GB",
    **facts,
) -> Path:
    """Write a random model with save_pretrained; the same for the same arguments.

    model_type: as in config.json; facts: more of its fields. rope: a rope_parameters dict
    (LLAMA3_ROPE, for one); max_shard_size: "50KB" gives several shards and an index. Needs
    torch and transformers.
    """
    import torch

    make_config, make_model = classes(model_type)
    # OLMo's head size is that of its width and heads, unless the configuration has one.
    facts |= {"head_dim": head_dim} if head_dim or model_type == "llama" else {}
    if rope is None:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        rope = {SLIDING: dict(rope), FULL: dict(rope)} if model_type == "olmo3" else rope
    config = make_config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        attn_implementation="eager",
        pad_token_id=None,
        **facts,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make_model(config)
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                # variance 1 / fan_in: activations of order 1, logits of some units
                weight.normal_(std=weight.shape[-1] ** -0.5)
        model = model.to(getattr(torch, dtype))
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)


def logits(directory, ids) -> np.ndarray:
    """transformers' logits in float32 after every position, float32 [len(ids), vocab]."""
    import torch

    with torch.no_grad():
        out = _model(directory)(torch.tensor([[int(token) for token in ids]]))
    return out.logits[0].numpy()


def greedy(directory, ids, n: int) -> list[int]:
    """The n ids with which transformers' float32 logits continue the prompt greedily."""
    import torch

    model = _model(directory)
    sequence = [int(token) for token in ids]
    with torch.no_grad():
        for _ in range(n):
            last = model(torch.tensor([sequence])).logits[0, -1].numpy()
            sequence.append(int(np.argmax(last)))  # the lowest id among equals
    return sequence[len(ids) :]


def classes(model_type):
    """transformers' configuration and model."""
    import transformers

    architecture = ARCHITECTURES[model_type]
    config = architecture.replace("ForCausalLM", "Config")
    return getattr(transformers, config), getattr(transformers, architecture)


def _model(directory):
    import torch

    torch.set_num_threads(1)
    model_type = json.loads((Path(directory) / "config.json").read_text())["model_type"]
    return classes(model_type)[1].from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def tiny_config(**changes) -> ModelConfig:
    """A model of two layers whose tensors take a few kilobytes."""
    facts = dict(
        name="small",
        vocab_size=11,
        hidden_size=6,
        intermediate_size=10,
        n_layers=2,
        n_heads=3,
        n_kv_heads=1,
        head_dim=2,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        dtype="float32",
    )
    return ModelConfig(**(facts | changes))


ROPE_TYPE = {Llama3Scaling: "llama3", YarnScaling: "yarn"}


def config_json(config: ModelConfig) -> dict:
    """What transformers 5 would write as config.json for these facts."""
    plain = {"rope_type": "default", "rope_theta": config.rope_theta}
    rope = dict(plain)
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {"rope_type": ROPE_TYPE[type(scaling)], **asdict(scaling)}
    more = {}
    if config.model_type == "olmo3":
        rope = {SLIDING: plain, FULL: rope}
        types = list(config.layer_types) or [FULL] * config.n_layers
        more = {"layer_types": types, "sliding_window": config.sliding_window}
    return more | {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "dtype": config.dtype,
    }


def random_tensors(config: ModelConfig, seed=1) -> dict[str, np.ndarray]:
    """Random weights for a configuration, in its dtype."""
    rng = np.random.default_rng(seed)
    dtype = ml_dtypes.bfloat16 if config.dtype == "bfloat16" else config.dtype
    return {
        name: rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        for name, shape in checkpoint_tensors(config).items()
    }


def write(directory, config: ModelConfig, tensors: dict[str, np.ndarray], n_files=1) -> Path:
    """Write a model directory without torch: config.json and one or several safetensors files."""
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(config)))
    if n_files == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for i in range(n_files):
        file = f"model-{i + 1:05}-of-{n_files:05}.safetensors"
        names = list(tensors)[i::n_files]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
