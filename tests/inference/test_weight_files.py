"""Which file a tensor is read from, what of a folder is not read, and files that are none."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from reference_models import logits, make, random_tensors, tiny_config, write

from spimpi.errors import UsageError
from spimpi.inference.checkpoint import open_checkpoint
from spimpi.inference.config import load_config

INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"
CONFIG = tiny_config()


@pytest.fixture
def tensors():
    return random_tensors(CONFIG)


@pytest.fixture
def sharded(tmp_path, tensors):
    return write(tmp_path / "sharded", CONFIG, tensors, n_files=3)


def refusal(directory, config=CONFIG) -> str:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(directory, config)
    message = str(caught.value)
    assert caught.value.exit_status == 2 and len(message) <= 500 and "\n" not in message
    return message


def index_of(directory) -> dict:
    return json.loads((directory / INDEX).read_text())


def home_and_other(directory, name):
    """The shard in which the index places a tensor, and another."""
    files = sorted(directory.glob("*.safetensors"))
    home = index_of(directory)["weight_map"][name]
    return directory / home, next(file for file in reversed(files) if file.name != home)


@pytest.mark.parametrize("name", [Q, "model.embed_tokens.weight", "lm_head.weight"])
def test_a_tensor_is_read_from_where_the_index_places_it(sharded, tensors, name):
    from safetensors.numpy import load_file, save_file

    home, other = home_and_other(sharded, name)
    save_file(load_file(other) | {name: -tensors[name]}, other)
    checkpoint = open_checkpoint(sharded, CONFIG)
    assert np.array_equal(checkpoint.read(name), tensors[name])
    again = {n: words for n, _, words in checkpoint.pieces(0, 1)}
    assert np.array_equal(again[name].view("<f4"), tensors[name].ravel())
    assert checkpoint.not_read == [
        f"copies: {name} in {other.name}, the index places it in {home.name}"
    ]


def test_a_tensor_that_the_index_does_not_name_is_read_where_it_is_in_one_file_alone(sharded):
    from safetensors.numpy import load_file, save_file

    index = index_of(sharded)
    home, other = home_and_other(sharded, Q)
    del index["weight_map"][Q]
    (sharded / INDEX).write_text(json.dumps(index))
    assert open_checkpoint(sharded, CONFIG).not_read == []
    save_file(load_file(other) | {Q: load_file(home)[Q]}, other)
    assert f"{Q} is in 2 files" in refusal(sharded)


def test_files_beside_those_that_are_read_are_named(sharded, tensors):
    beside = ["consolidated.00.pth", "ggml.gguf", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    for name in (*beside, "README.md", "tokenizer.model"):
        (sharded / name).write_text("")
    assert open_checkpoint(sharded, CONFIG).not_read == [f"files: {', '.join(beside)}"]
    single = {n: -tensor for n, tensor in tensors.items()}
    write(sharded, CONFIG, single)  # wins over the index, as in transformers
    checkpoint = open_checkpoint(sharded, CONFIG)
    assert np.array_equal(checkpoint.read(Q), single[Q])
    (line,) = checkpoint.not_read
    assert "model-00001-of-00003.safetensors" in line and INDEX in line
    assert "model.safetensors," not in line


def test_many_files_are_counted_and_no_name_steers_a_terminal(sharded):
    for i in range(30):
        (sharded / f"\x1b[31m{i:02}.bin").write_text("")
    (line,) = open_checkpoint(sharded, CONFIG).not_read
    assert "and 22 more" in line and "\x1b" not in line and len(line) <= 500


def test_an_adapter_is_refused(sharded):
    (sharded / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refusal(sharded) and "merge" in refusal(sharded)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_the_files_own_is_used_whatever_config_json_says(tmp_path, tensors, tied):
    config = tiny_config(tie_word_embeddings=tied)
    checkpoint = open_checkpoint(write(tmp_path, config, tensors), config)
    assert not checkpoint.config.tie_word_embeddings and "lm_head.weight" in checkpoint.tensors
    told = ["tie_word_embeddings: the files have a lm_head.weight of their own"]
    assert checkpoint.not_read == (told if tied else [])


def test_transformers_uses_a_head_of_the_files_own(tmp_path):
    pytest.importorskip("torch", reason="transformers is the reference")
    own = make(tmp_path / "own", layers=1)
    tied = shutil.copytree(own, tmp_path / "tied")
    values = json.loads((own / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    assert np.array_equal(logits(own, [1, 2, 3]), logits(tied, [1, 2, 3]))


def test_mistral_without_a_window_is_llama_in_transformers_too(tmp_path):
    pytest.importorskip("torch", reason="transformers is the reference")
    llama = make(tmp_path / "llama", layers=1)
    mistral = shutil.copytree(llama, tmp_path / "mistral")
    values = json.loads((llama / "config.json").read_text())
    values |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    (mistral / "config.json").write_text(json.dumps(values))
    assert np.array_equal(logits(llama, [1, 2, 3]), logits(mistral, [1, 2, 3]))
    llama, mistral = (open_checkpoint(d, load_config(d)) for d in (llama, mistral))
    assert llama.identity() == mistral.identity()


def test_more_layers_than_tensors_are_refused_before_they_are_counted_out(sharded):
    message = refusal(sharded, tiny_config(n_layers=100_000))
    assert "100000 layers" in message and "21 tensors in all" in message


# files that are none


@pytest.mark.parametrize("file", ["", ".", "..", "a\0b", "a" * 5000, "../x", "/etc/passwd", 7, None, ["a"]])
def test_an_index_names_files_of_its_own_folder(sharded, file):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {Q: file}}))
    assert INDEX in refusal(sharded)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", INDEX])
def test_a_fifo_is_not_waited_for(sharded, name):
    (sharded / name).unlink()
    os.mkfifo(sharded / name)
    assert name in refusal(sharded)


def test_an_index_of_a_million_names_is_read_in_a_moment(tmp_path):
    names = ",".join(f'"t{i}":"m.safetensors"' for i in range(1_000_000))
    (tmp_path / INDEX).write_text(f'{{"weight_map":{{{names}}}}}')
    assert "'m.safetensors', which is not in" in refusal(tmp_path)


def single_with(directory, change):
    """model.safetensors whose header is changed, or replaced where ``change`` is text."""
    write(directory, CONFIG, random_tensors(CONFIG))
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change if isinstance(change, bytes) else json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return directory


def entry(**fields):
    return lambda header: header[Q].update(fields)


HUGE = 2**62
HEADERS = {
    "offsets at the end of numbers": entry(data_offsets=[0, float("inf")]),
    "a shape without an end": entry(shape=[float("inf")]),
    "a shape that is no number": entry(shape=[float("nan"), 6]),
    "a shape of truths": entry(shape=[True, 36]),
    "a shape of text": entry(shape="66"),
    "a shape of 4,000 digits": entry(shape=[10**4000, 10**4000]),
    "a product of more than 63 bits": entry(shape=[HUGE, HUGE]),
    "a product of nothing and too much": entry(shape=[HUGE, HUGE, 0]),
    "sizes below nothing": entry(shape=[-6, -6]),
    "reversed offsets": lambda h: entry(data_offsets=h[Q]["data_offsets"][::-1])(h),
    "three offsets": entry(data_offsets=[0, 1, 2]),
    "negative offsets": entry(data_offsets=[-144, 0]),
    "offsets of text": entry(data_offsets=["0", "144"]),
    "offsets past the file": entry(data_offsets=[10**18, 10**18 + 144]),
    "an overlap": lambda h: entry(data_offsets=h["model.norm.weight"]["data_offsets"])(h),
    "an unknown dtype": entry(dtype="Q4"),
    "a dtype that is none": entry(dtype={"a": 1}),
    "an entry that is none": lambda h: h.update({Q: None}),
    "an entry of a list": lambda h: h.update({Q: [1]}),
    "half a character": lambda h: h.update({"\ud800": h[Q]}),
    "nested deeply": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a name twice": b'{"%s": {}, "%s": {}}' % (Q.encode(), Q.encode()),
    "broken text": b'{"\xff": 1}',
    "a number": b"7",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_none_is_refused_in_one_line(tmp_path, name):
    assert "model.safetensors" in refusal(single_with(tmp_path, HEADERS[name]))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10**8])
def test_a_header_s_length_is_bounded_before_it_is_read(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    assert "model.safetensors" in refusal(tmp_path)


def test_bytes_of_no_tensor_are_refused(tmp_path):
    write(tmp_path, CONFIG, random_tensors(CONFIG) | {"z": np.zeros(4, np.float32)})
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    start, stop = header["z"]["data_offsets"]
    header["z"] = {"dtype": "F32", "shape": [3], "data_offsets": [start + 4, stop]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert "a gap between tensors" in refusal(tmp_path)
