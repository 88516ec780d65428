"""Checkpoints written byte by byte, and their fingerprints in plain integers.

Neither the safetensors library nor spimpi's reader is used to write, so that both can be tested.
"""

import json
import struct
from math import prod
from pathlib import Path

import numpy as np

from spimpi.fingerprint import reference
from spimpi.fingerprint.tag import Tag

# bytes a word, words an element
WORDS = {
    "BOOL": (1, 1), "U8": (1, 1), "I8": (1, 1), "F8_E4M3": (1, 1), "F8_E5M2": (1, 1),
    "F8_E8M0": (1, 1), "F8_E4M3FNUZ": (1, 1), "F8_E5M2FNUZ": (1, 1), "U16": (2, 1),
    "I16": (2, 1), "F16": (2, 1), "BF16": (2, 1), "U32": (4, 1), "I32": (4, 1), "F32": (4, 1),
    "U64": (8, 1), "I64": (8, 1), "F64": (8, 1), "C64": (4, 2),
}  # fmt: skip


def random_bytes(dtype, shape, seed=1) -> bytes:
    wordsize, words = WORDS[dtype]
    n = prod(shape) * words * wordsize
    top = 2 if dtype == "BOOL" else 256
    return np.random.default_rng(seed).integers(0, top, n, np.uint8).tobytes()


def tensors(spec, seed=1) -> dict:
    """{name: (dtype, shape, bytes)} for {name: (dtype, shape)}."""
    return {
        name: (dtype, tuple(shape), random_bytes(dtype, shape, seed + i))
        for i, (name, (dtype, shape)) in enumerate(spec.items())
    }


def finite(content) -> dict:
    """The same tensors without NaN and Inf: the highest exponent bit of each float is cleared."""
    made = {}
    for name, (dtype, shape, data) in content.items():
        data = bytearray(data)
        if dtype in ("BF16", "F16", "F32"):
            step = WORDS[dtype][0]
            data[step - 1 :: step] = bytes(b & 0xBF for b in data[step - 1 :: step])
        made[name] = dtype, shape, bytes(data)
    return made


def write_file(path, content, pad=0, edit=None) -> Path:
    """A safetensors file; ``pad`` spaces after the header put its data at any alignment."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in content.items():
        header[name] = {
            "dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]
        }  # fmt: skip
        at += len(data)
    if edit:
        edit(header)
    text = json.dumps(header).encode() + b" " * pad
    data = b"".join(data for _, _, data in content.values())
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return Path(path)


def write_shards(folder, content, n, index="model.safetensors.index.json") -> dict:
    """The tensors spread over n files, and an index. Returns its weight_map."""
    files = [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    weight_map = {name: files[i % n] for i, name in enumerate(content)}
    for file in files:
        write_file(folder / file, {k: v for k, v in content.items() if weight_map[k] == file})
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def brute_word(name, dtype, shape, data, seed=1069) -> int:
    """A tensor's fingerprint, in plain integers from its bytes."""
    wordsize, words = WORDS[dtype]
    shape = (*shape, words) if words > 1 else shape
    pieces = (data[i : i + wordsize] for i in range(0, len(data), wordsize))
    bits = ((i, int.from_bytes(piece, "little")) for i, piece in enumerate(pieces))
    return reference.fingerprint(Tag(seed, name), shape, wordsize, bits)


def flip(path, byte, bit=0) -> None:
    """One bit of a file; a negative byte counts from its end."""
    data = bytearray(Path(path).read_bytes())
    data[byte] ^= 1 << bit
    Path(path).write_bytes(bytes(data))


MIXED = {
    "embed.weight": ("BF16", (37, 8)),
    "blocks.0.w": ("F32", (12, 10)),
    "blocks.0.scale": ("F8_E4M3", (13,)),
    "blocks.1.w": ("F16", (3, 4, 5)),
    "rope.freqs": ("C64", (6, 2)),
    "position_ids": ("I64", (1, 9)),
    "step": ("F64", ()),
    "nothing": ("F32", (0, 4)),
    "norm.weight": ("BF16", (8,)),
}
