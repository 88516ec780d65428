import json
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from reference_models import make, random_tensors, tiny_config, write

from spimpi.errors import UsageError
from spimpi.fingerprint.tag import COLOUR, CONTENT, GOLDEN, MASK, Tag, mix
from spimpi.inference import checkpoint as module
from spimpi.inference.checkpoint import float32, open_checkpoint
from spimpi.inference.checkpoint_seeded import SeededCheckpoint
from spimpi.inference.config import EMBEDDED_MODEL, checkpoint_tensors, load_config, published

Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(params=["bfloat16", "float16", "float32", "sharded", "seeded"])
def source(request, tmp_path):
    """A checkpoint of each kind, with its whole tensors from another path than spimpi's."""
    if request.param == "seeded":
        config = tiny_config()
        checkpoint = SeededCheckpoint(config, seed=7)
        return checkpoint, {
            name: seeded_by_hand(7, name, r.shape) for name, r in checkpoint.tensors.items()
        }
    dtype = "bfloat16" if request.param == "sharded" else request.param
    config = tiny_config(dtype=dtype)
    tensors = random_tensors(config)
    write(tmp_path, config, tensors, n_files=3 if request.param == "sharded" else 1)
    return open_checkpoint(tmp_path, config), tensors


def seeded_by_hand(seed, name, shape):
    """design.md's formula in plain integers, float32 rounded where it says."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    key = Tag(seed, name).key(COLOUR, shape, 4)
    values = []
    for i in range(shape[0] * shape[1]):
        colour = mix((key + (i + 1) * GOLDEN) & MASK)
        unit = np.float32(2 * (colour >> 40) / 2**24 - 1)
        values.append(unit * np.float32((3 / shape[1]) ** 0.5))
    return np.array(values, np.float32).reshape(shape)


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def fingerprint(array, tag, shape, first=0) -> int:
    """XOR of element(i, v) over a flat run of 2- or 4-byte elements (docs/fingerprint.md)."""
    words = bits(array).ravel().astype(np.uint64)
    key = tag.key(CONTENT, shape, array.dtype.itemsize)
    index = np.arange(first + 1, first + len(words) + 1, dtype=np.uint64)
    z = (np.uint64(key) + index * np.uint64(GOLDEN)) ^ words
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return int(np.bitwise_xor.reduce(z ^ (z >> np.uint64(31))))


def test_every_slice_is_that_slice_of_the_whole_tensor(source):
    checkpoint, tensors = source
    rng = np.random.default_rng(0)
    assert list(checkpoint.tensors) == list(checkpoint_tensors(tiny_config()))
    for name, whole in tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == whole.dtype == np.dtype(checkpoint.tensors[name].dtype)
        assert np.array_equal(bits(found), bits(whole))
        for _ in range(8):
            cuts = [tuple(sorted(rng.integers(0, n + 1, 2))) for n in whole.shape]
            found = checkpoint.read(name, *cuts)
            assert found.flags.c_contiguous
            assert np.array_equal(bits(found), bits(whole[tuple(slice(*cut) for cut in cuts)]))


def test_a_slice_off_by_one_row_is_another(source):
    checkpoint, tensors = source
    assert not np.array_equal(checkpoint.read(Q, rows=(1, 3)), tensors[Q][2:4])


@pytest.mark.parametrize("n_parts", range(1, 8))
def test_pieces_cover_every_element_once(source, n_parts, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)  # several blocks even in a small model
    checkpoint, tensors = source
    tag = {name: Tag(1069, name) for name in tensors}
    seen = {name: np.zeros(whole.size, int) for name, whole in tensors.items()}
    xor = dict.fromkeys(tensors, 0)
    sizes = []
    for part in range(n_parts):
        sizes.append(0)
        for name, first, words in checkpoint.pieces(part, n_parts):
            record = checkpoint.tensors[name]
            assert words.dtype == np.dtype(f"u{record.itemsize}") and words.ndim == 1
            seen[name][first : first + len(words)] += 1
            xor[name] ^= fingerprint(words, tag[name], record.shape, first)
            sizes[-1] += words.nbytes
    assert all((count == 1).all() for count in seen.values())
    assert sum(sizes) == checkpoint.total_bytes == checkpoint.bytes_reread
    assert max(sizes) - min(sizes) <= 4
    for name, whole in tensors.items():
        assert xor[name] == fingerprint(whole, tag[name], whole.shape)


def test_a_changed_bit_in_the_file_shows_in_the_second_read(tmp_path):
    config = tiny_config()
    write(tmp_path, config, random_tensors(config))
    checkpoint = open_checkpoint(tmp_path, config)
    before = {(name, first): words for name, first, words in checkpoint.pieces(0, 1)}
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    changed = [
        (name, int((words != before[name, first]).sum()))
        for name, first, words in checkpoint.pieces(0, 1)
        if not np.array_equal(words, before[name, first])
    ]
    assert len(changed) == 1 and changed[0][1] == 1


def test_a_part_that_does_not_exist_is_refused(source):
    with pytest.raises(UsageError, match=r"0\.\.2, found 3"):
        list(source[0].pieces(3, 3))


@pytest.mark.parametrize(
    "cut", [((0, 99), None), ((2, 1), None), ((0, 1), (0, 99)), ((-1, 2), None)]
)
def test_a_slice_outside_the_tensor_is_refused(source, cut):
    with pytest.raises(UsageError, match="do not lie in tensor.*q_proj"):
        source[0].read(Q, *cut)
    with pytest.raises(UsageError, match="columns"):
        source[0].read(NORM, None, (0, 1))


def test_reading_a_quarter_reads_a_quarter():
    config = load_config(EMBEDDED_MODEL)
    checkpoint = open_checkpoint(EMBEDDED_MODEL, config)
    for name, record in checkpoint.tensors.items():
        if len(record.shape) == 2:
            checkpoint.read(name, rows=(0, record.shape[0] // 4))
    assert checkpoint.bytes_read <= checkpoint.total_bytes / 4
    sum(len(words) for _, _, words in checkpoint.pieces(1, 4))
    assert abs(checkpoint.bytes_reread - checkpoint.total_bytes / 4) <= 4


def test_the_embedded_model_reads_as_the_library_reads_it():
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    theirs = safetensors_numpy.load_file(EMBEDDED_MODEL / "model.safetensors")
    checkpoint = open_checkpoint(EMBEDDED_MODEL, load_config(EMBEDDED_MODEL))
    assert checkpoint.ignored == []
    for name, whole in theirs.items():
        assert np.array_equal(bits(checkpoint.read(name)), bits(whole))


def test_checkpoints_that_transformers_writes_open(tmp_path):
    torch = pytest.importorskip("torch", reason="torch writes the reference checkpoints")
    from safetensors.torch import load_file

    cases = [
        dict(dtype="bfloat16", max_shard_size="100KB"),
        dict(dtype="float16", tied=True),
        dict(dtype="float32"),
    ]
    for i, options in enumerate(cases):
        directory = make(tmp_path / str(i), **options)
        files = sorted(directory.glob("*.safetensors"))
        assert (len(files) > 1) == ("max_shard_size" in options)
        checkpoint = open_checkpoint(directory, load_config(directory))
        theirs = {name: t for file in files for name, t in load_file(file).items()}
        assert set(checkpoint.tensors) == set(theirs)
        assert ("lm_head.weight" in theirs) != options.get("tied", False)
        for name, whole in theirs.items():
            found = checkpoint.read(name)
            assert found.dtype.name == options["dtype"]
            assert np.array_equal(float32(found), whole.to(torch.float32).numpy())


def test_other_tensors_are_ignored_but_listed(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    extra = {"lm_head.bias": np.zeros((2, 2)), "rotary.inv_freq": np.zeros(3, np.int64)}
    write(tmp_path, config, random_tensors(config) | extra)
    checkpoint = open_checkpoint(tmp_path, config)
    assert checkpoint.ignored == ["lm_head.bias", "rotary.inv_freq"]
    assert checkpoint.not_read == ["tensors: lm_head.bias and 1 more, of no use to small"]


# what is wrong with a checkpoint is found when it is opened


def refusal(directory, config=None) -> str:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(directory, config or tiny_config())
    return str(caught.value)


@pytest.fixture
def single(tmp_path):
    config = tiny_config()
    return write(tmp_path, config, random_tensors(config)) / "model.safetensors"


@pytest.fixture
def sharded(tmp_path):
    config = tiny_config()
    return write(tmp_path, config, random_tensors(config), n_files=3)


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_file_cut_short_is_named_with_both_lengths(single, kept):
    whole = single.read_bytes()
    single.write_bytes(whole[:kept])
    message = refusal(single.parent)
    assert "cut short" in message and "model.safetensors" in message
    assert f"found {len(whole[:kept])}" in message
    if kept == -1:
        assert f"expected {len(whole)} bytes" in message


def test_a_shard_cut_short_is_named(sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert "model-00002-of-00003.safetensors is cut short" in refusal(sharded)


def test_a_file_that_is_too_long_is_named(single):
    single.write_bytes(single.read_bytes() + b"x")
    assert "longer than its header says" in refusal(single.parent)


def test_a_missing_tensor_is_named(single):
    config = tiny_config()
    tensors = random_tensors(config)
    del tensors[Q]
    write(single.parent, config, tensors)
    assert Q in refusal(single.parent) and "lacks 1 of the" in refusal(single.parent)


def test_a_missing_output_matrix_is_an_error_only_where_it_is_not_tied(tmp_path):
    tied = tiny_config(tie_word_embeddings=True)
    write(tmp_path, tied, random_tensors(tied))
    open_checkpoint(tmp_path, tied)
    assert "lm_head.weight" in refusal(tmp_path)


def test_another_shape_is_named(single):
    config = tiny_config()
    tensors = random_tensors(config)
    tensors[Q] = tensors[Q][:-1]
    write(single.parent, config, tensors)
    message = refusal(single.parent)
    assert Q in message and "shape [5, 6], expected [6, 6]" in message


def test_another_dtype_is_named(single):
    config = tiny_config()
    tensors = random_tensors(config)
    tensors[Q] = tensors[Q].astype(np.float64)
    write(single.parent, config, tensors)
    message = refusal(single.parent)
    assert Q in message and "F64" in message and "BF16, F16, F32" in message


def with_header(path, text: bytes):
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize("text", [b"{broken", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}'])
def test_a_broken_header_is_named(single, text):
    with_header(single, text)
    assert "broken safetensors header" in refusal(single.parent)


def test_an_entry_whose_bytes_do_not_fit_its_shape_is_named(single):
    data = single.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header[Q]["data_offsets"][0] += 4
    text = json.dumps(header).encode()
    single.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert "needs 144 bytes, its header entry gives 140" in refusal(single.parent)


def test_a_pointer_in_place_of_the_weights_is_named(single):
    single.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "Git LFS" in refusal(single.parent)


def test_a_file_of_another_format_is_named(single):
    single.write_bytes(b"PK\x03\x04 this is a pickle in a zip archive")
    assert "not a safetensors file" in refusal(single.parent)


def test_a_directory_without_weights_is_named(single):
    single.rename(single.parent / "pytorch_model.bin")
    message = refusal(single.parent)
    assert "model.safetensors.index.json" in message and "pytorch_model.bin" in message


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00003-of-00003.safetensors").unlink()
    assert "'model-00003-of-00003.safetensors'" in refusal(sharded)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(sharded)


def test_an_index_that_misplaces_a_tensor_is_named(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q] = next(f for f in files if f != index["weight_map"][Q])
    path.write_text(json.dumps(index))
    message = refusal(sharded)
    assert Q in message and "does not hold it" in message


def test_an_index_that_points_out_of_the_directory_is_refused(sharded):
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {Q: "../elsewhere.safetensors"}})
    )
    assert "'../elsewhere.safetensors', which is not in" in refusal(sharded)


@pytest.mark.parametrize("way", ["read", "pieces", "identity"])
def test_a_file_cut_after_it_was_opened_is_named(single, way):
    checkpoint = open_checkpoint(single.parent, tiny_config())
    ways = {
        "read": lambda: checkpoint.read(Q),
        "pieces": lambda: list(checkpoint.pieces(0, 1)),
        "identity": checkpoint.identity,
    }
    ways[way]()
    single.write_bytes(single.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"model\.safetensors has changed since it was opened"):
        ways[way]()
    single.unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors can no longer be read"):
        ways[way]()


# the name of a model


def test_identity_does_not_depend_on_the_directory_or_the_number_of_files(tmp_path):
    config = tiny_config()
    tensors = random_tensors(config)
    one = write(tmp_path / "one", config, tensors)
    three = write(tmp_path / "three", config, tensors, n_files=3)
    shutil.copytree(one, tmp_path / "copy")
    names = {open_checkpoint(d, load_config(d)).identity() for d in (one, three, tmp_path / "copy")}
    assert len(names) == 1
    assert len(names.pop()) == 16


def test_identity_tells_models_apart(tmp_path):
    half = tiny_config(dtype="float16")
    facts = [
        (tiny_config(), 1),
        (tiny_config(), 2),
        (tiny_config(rope_theta=5e5), 1),
        (half, 1),
    ]
    names = set()
    for i, (config, seed) in enumerate(facts):
        directory = write(tmp_path / str(i), config, random_tensors(config, seed))
        names.add(open_checkpoint(directory, config).identity())
    names |= {SeededCheckpoint(tiny_config(), seed).identity() for seed in (1, 2)}
    names.add(SeededCheckpoint(tiny_config(n_layers=1), 1).identity())
    assert len(names) == len(facts) + 3


# seeded weights


def test_seeded_weights_have_variance_one_over_fan_in():
    checkpoint = SeededCheckpoint(published("llama-3.2-1b", 1))
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        rows = checkpoint.read(name, rows=(100, 200))
        assert abs(rows.var() * rows.shape[1] - 1) < 0.02
        assert abs(rows.mean()) * rows.shape[1] ** 0.5 < 0.02
    assert "lm_head.weight" not in checkpoint.tensors


def test_a_slab_of_a_large_seeded_tensor_is_made_alone():
    checkpoint = SeededCheckpoint(published("llama-3.2-3b"))
    name = "model.embed_tokens.weight"
    slab = checkpoint.read(name, rows=(128_250, 128_256), cols=(3_000, 3_072))
    assert checkpoint.bytes_read == slab.nbytes == 6 * 72 * 4
    # the same elements from the second making, whose last part holds the tensor's end or later
    key = Tag(1069, name).key(COLOUR, (128_256, 3_072), 4)
    i = 128_255 * 3_072 + 3_071
    colour = mix((key + (i + 1) * GOLDEN) & MASK)
    wanted = np.float32(2 * (colour >> 40) / 2**24 - 1) * np.float32((3 / 3_072) ** 0.5)
    assert slab[-1, -1] == wanted


def test_another_seed_gives_other_weights():
    one, two = (SeededCheckpoint(tiny_config(), seed).read(Q) for seed in (1, 2))
    assert not np.array_equal(one, two)


# widening


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_widening_keeps_values_and_drops_the_sign_of_zero(dtype):
    values = np.array([0.0, -0.0, 1.5, -2.25, 6e-5, 2**-120, np.inf, -np.inf, np.nan]).astype(dtype)
    before = values.copy()
    wide = float32(values)
    assert wide.dtype == np.float32
    assert np.array_equal(wide, values.astype(np.float32), equal_nan=True)
    assert not np.signbit(wide[:2]).any()
    assert np.signbit(values[1]) and np.array_equal(bits(values), bits(before))


def test_every_bfloat16_widens_exactly():
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    assert np.array_equal(float32(values), values.astype(np.float32), equal_nan=True)
