"""The sound inputs that cases change: a small model, whole and in shards, its manifest and golden
file, traces of runs and of ranks that were killed. Made once, with the command line itself."""

import json
import struct
from pathlib import Path

import numpy as np
from running import run

FACTS = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24,
    "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 64, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "torch_dtype": "float32",
}  # fmt: skip
RUN = ("--prompt-ids", "1,2,3", "--prompt-ids", "4,5", "--tokens", "2")


def tensors() -> dict[str, np.ndarray]:
    """The model's weights, float32, random."""
    rng = np.random.default_rng(1069)
    h, f, v = FACTS["hidden_size"], FACTS["intermediate_size"], FACTS["vocab_size"]
    q = FACTS["num_attention_heads"] * FACTS["head_dim"]
    kv = FACTS["num_key_value_heads"] * FACTS["head_dim"]
    layer = {
        "input_layernorm": (h,), "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q), "post_attention_layernorm": (h,),
        "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
    }  # fmt: skip
    shapes = {"model.embed_tokens": (v, h), "model.norm": (h,), "lm_head": (v, h)}
    for i in range(FACTS["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {
        f"{name}.weight": (rng.standard_normal(shape) * 0.3).astype("<f4")
        for name, shape in shapes.items()
    }


def header_and_data(values) -> tuple[dict, bytes]:
    """A safetensors header as a tree, and what stands behind it."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, array in values.items():
        end = place + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [place, end]}
        place = end
    return header, b"".join(array.tobytes() for array in values.values())


def safetensors(header: str, data: bytes, length: int | None = None) -> bytes:
    """A file of a header's text; ``length``: said of it in place of its own."""
    text = header.encode(errors="surrogatepass")
    length = len(text) if length is None else length % 2**64
    return struct.pack("<Q", length) + text + data


def make(root: Path) -> None:
    """All sound inputs, below ``root``. RuntimeError where this spimpi refuses one of them."""
    values = tensors()
    model = root / "model"
    sharded = root / "sharded"
    for folder in (model, sharded):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(FACTS))
    header, data = header_and_data(values)
    (model / "model.safetensors").write_bytes(safetensors(json.dumps(header), data))
    names = sorted(values)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in shards.items():
        header, data = header_and_data({name: values[name] for name in own})
        (sharded / file).write_bytes(safetensors(json.dumps(header), data))
    where = {name: file for file, own in shards.items() for name in own}
    index = {"metadata": {"total_size": sum(a.nbytes for a in values.values())}, "weight_map": where}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for command in (
        ("verify", "--model", "sharded", *RUN, "--no-trace"),
        ("manifest", "make", "model", "-o", "manifest.json", "--derived"),
        ("golden", "--model", "model", *RUN, "-o", "golden.h5"),
        ("verify", "--model", "model", *RUN, "--trace", "run.h5", "--trace-driver", "gather", "--sketch"),
        ("verify", "--model", "model", *RUN, "--trace", "other.h5", "--trace-driver", "gather", "--seed", "7"),
        ("verify", "--model", "model", *RUN, "--trace", "parts.h5", "--trace-driver", "parts"),
    ):  # fmt: skip
        _done(run(command, root, seconds=300), 0)
    fault = ("--inject", "bitflip:rank=0,layer=1,tensor=hidden,element=3,bit=30")
    command = ("verify", "--model", "model", *RUN, "--trace", "failed.h5", "--trace-driver", "gather", *fault)
    _done(run(command, root, seconds=300), 1)


def _done(outcome, status) -> None:
    if outcome.status != status:
        msg = f"a sound command ended with {outcome.status}:\n{outcome.out}{outcome.err}"
        raise RuntimeError(msg)
