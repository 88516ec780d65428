"""Manifests of files: right for every dtype, whatever the files, and every planted fault found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_samples import (
    MIXED, WORDS, brute_word, flip, random_bytes, tensors, write_file, write_shards,
)  # fmt: skip

from spimpi.errors import UsageError
from spimpi.fingerprint.tag import Tag
from spimpi.inference import safetensors_header
from spimpi.manifest import check_files, make_manifest, read, source

CONTENT = tensors(MIXED)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_file(folder / "model.safetensors", CONTENT)
    return folder


def words(manifest):
    return {name: facts.fingerprint for name, facts in manifest.tensors.items()}


def brute(content, seed=1069):
    return {name: brute_word(name, *facts, seed) for name, facts in content.items()}


def test_fingerprints_are_those_of_the_algebra(model):
    made = make_manifest(model)
    assert words(made) == brute(CONTENT)
    assert {n: (f.dtype, f.shape) for n, f in made.tensors.items()} == MIXED
    assert words(make_manifest(model, seed=7)) == brute(CONTENT, 7)


@pytest.mark.parametrize("dtype", sorted(WORDS))
def test_every_dtype_of_safetensors_has_one(tmp_path, dtype):
    content = tensors({"w": (dtype, (5, 3)), "scalar": (dtype, ()), "empty": (dtype, (2, 0))})
    write_file(tmp_path / "x.safetensors", content)
    assert words(make_manifest(tmp_path)) == brute(content)


@pytest.mark.parametrize("pad", range(1, 8))
def test_data_may_lie_at_any_alignment(tmp_path, pad):
    write_file(tmp_path / "x.safetensors", CONTENT, pad=pad)
    assert words(make_manifest(tmp_path)) == brute(CONTENT)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 7), st.integers(1, 4), st.sampled_from([8, 24, 64, 1 << 20]), st.data()
)  # fmt: skip
def test_any_cut_into_ranges_blocks_and_threads_gives_the_same(n_parts, threads, block, data):
    """Ranges of processes, blocks of threads: the shares XOR to the fingerprints."""
    import tempfile

    spec = data.draw(st.dictionaries(
        st.text("abc.", min_size=1, max_size=4),
        st.tuples(st.sampled_from(sorted(WORDS)), st.lists(st.integers(0, 6), max_size=3)),
        min_size=1, max_size=4,
    ))  # fmt: skip
    content = tensors(spec)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "BLOCK_BYTES", block)
        write_file(Path(folder) / "model.safetensors", content)
        found = source.survey(folder)
        total = dict.fromkeys(content, 0)
        for part in range(n_parts):
            shares = read.fingerprint_shares(
                found, 3, part=part, n_parts=n_parts, threads=threads
            )
            total = {name: total[name] ^ shares[name] for name in content}
    assert total == brute(content, 3)


def test_the_safetensors_library_reads_the_same_bits(tmp_path):
    """An independent reader, and spimpi.fingerprint on its arrays."""
    from safetensors.numpy import load_file, save_file

    from spimpi.fingerprint import fingerprint

    rng = np.random.default_rng(3)
    save_file(
        {f"w{i}": rng.standard_normal((50, 17 + i)).astype(t) for i, t in enumerate("efd")},
        tmp_path / "model.safetensors",
    )
    made = make_manifest(tmp_path, threads=2)
    arrays = load_file(tmp_path / "model.safetensors")
    assert words(made) == {name: fingerprint(x, made.tag(name)) for name, x in arrays.items()}


def test_the_words_are_those_of_spimpi_verify_s_weights_check():
    """So that a manifest can stand for its second read of the checkpoint."""
    from spimpi.fingerprint import fingerprint
    from spimpi.inference.checkpoint import open_checkpoint
    from spimpi.inference.config import EMBEDDED_MODEL, load_config

    checkpoint = open_checkpoint(EMBEDDED_MODEL, load_config(EMBEDDED_MODEL))
    made = make_manifest(EMBEDDED_MODEL, seed=11)
    assert set(checkpoint.tensors) <= set(made.tensors)
    for name in checkpoint.tensors:
        word = fingerprint(checkpoint.read(name), Tag(11, name))
        assert made.tensors[name].fingerprint == word


def test_a_manifest_is_of_tensors_whatever_their_files(model, tmp_path):
    made = make_manifest(model)
    for n in (1, 2, 4):
        folder = tmp_path / f"shards{n}"
        folder.mkdir()
        write_shards(folder, CONTENT, n)
        assert words(make_manifest(folder)) == words(made)
        assert check_files(made, folder).exit_status == 0


def test_model_may_be_named_in_five_ways(tmp_path):
    expected = brute(CONTENT)
    write_shards(tmp_path, CONTENT, 3)
    assert words(make_manifest(tmp_path)) == expected
    assert words(make_manifest(tmp_path / "model.safetensors.index.json")) == expected
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "unet.safetensors.index.json")
    assert words(make_manifest(tmp_path)) == expected
    (tmp_path / "unet.safetensors.index.json").unlink()
    assert words(make_manifest(tmp_path)) == expected
    one = write_file(tmp_path / "model.safetensors", CONTENT)
    assert words(make_manifest(one)) == expected
    assert source.survey(tmp_path).files == ("model.safetensors",)
    assert len(source.left_out(tmp_path)) == 3 and not source.left_out(one)


def test_the_order_is_that_of_the_files(model):
    assert list(make_manifest(model).tensors) == list(MIXED)


def test_progress_counts_every_byte_once(model):
    seen = []
    made = make_manifest(model, threads=2, progress=lambda *at: seen.append(at))
    total = sum(len(data) for _, _, data in CONTENT.values())
    assert made.n_bytes == total and {all_ for _, all_ in seen} == {total}
    assert sorted(seen)[-1] == (total, total)


def test_every_flipped_bit_is_found_and_named(model):
    """Each byte of the data: the tensor that it belongs to is named, and no other."""
    made, file = make_manifest(model), model / "model.safetensors"
    size = sum(len(data) for _, _, data in CONTENT.values())
    owners = [name for name, (_, _, data) in CONTENT.items() for _ in data]
    for i in range(0, size, 7):
        flip(file, i - size, i % 8)
        found = check_files(made, model, threads=1)
        flip(file, i - size, i % 8)
        assert found.exit_status == 1 and [m.tensor for m in found.corrupted] == [owners[i]]
        (one,) = found.corrupted
        assert one.expected == brute_word(one.tensor, *CONTENT[one.tensor]) != one.found
        assert one.file == "model.safetensors"
    assert check_files(made, model).exit_status == 0


def test_two_swapped_tensors_of_one_shape_are_found(tmp_path):
    content = tensors({"a": ("F32", (4, 4)), "b": ("F32", (4, 4))})
    made = make_manifest(write_file(tmp_path / "x.safetensors", content))
    content["a"], content["b"] = content["b"], content["a"]
    found = check_files(made, write_file(tmp_path / "y.safetensors", content))
    assert [m.tensor for m in found.corrupted] == ["a", "b"]


def test_a_file_cut_short_is_corruption_and_the_others_are_checked(tmp_path):
    weight_map = write_shards(tmp_path, CONTENT, 3)
    made = make_manifest(tmp_path)
    cut = tmp_path / "model-00001-of-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    other = "model-00003-of-00003.safetensors"
    flip(tmp_path / other, -1)
    found = check_files(made, tmp_path)
    assert found.exit_status == 1 and list(found.broken) == [cut.name]
    assert "is cut short: expected" in found.broken[cut.name]
    assert [m.file for m in found.corrupted] == [other]
    assert set(found.missing) == {name for name, file in weight_map.items() if file == cut.name}
    with pytest.raises(UsageError, match="is cut short"):
        make_manifest(tmp_path)


def test_a_missing_file_is_incomplete_and_the_others_are_checked(tmp_path):
    weight_map = write_shards(tmp_path, CONTENT, 3)
    made = make_manifest(tmp_path)
    gone = "model-00002-of-00003.safetensors"
    (tmp_path / gone).unlink()
    found = check_files(made, tmp_path)
    assert found.exit_status == 3 and list(found.absent) == [gone]
    lost = {name for name, file in weight_map.items() if file == gone}
    assert set(found.missing) == lost and found.checked == len(CONTENT) - len(lost)
    assert all(gone in why and "not there" in why for why in found.missing.values())
    with pytest.raises(UsageError, match=f"names the file '{gone}', which is not in"):
        make_manifest(tmp_path)


def test_tensors_missing_and_extra_are_incomplete(model, tmp_path):
    made = make_manifest(model)
    content = {n: v for n, v in CONTENT.items() if n != "blocks.0.w"}
    content["blocks.9.w"] = ("F32", (1,), b"abcd")
    found = check_files(made, write_file(tmp_path / "x.safetensors", content))
    assert found.exit_status == 3
    assert list(found.missing) == ["blocks.0.w"] and found.extra == ("blocks.9.w",)
    assert found.checked == len(CONTENT) - 1


def test_an_index_that_names_a_tensor_that_is_not_there_is_incomplete(tmp_path):
    write_shards(tmp_path, CONTENT, 2)
    made = make_manifest(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(values))
    found = check_files(made, tmp_path)
    assert found.exit_status == 3 and "does not hold it" in found.missing["ghost"]
    with pytest.raises(UsageError, match="tensor ghost is placed by .* does not hold it"):
        make_manifest(tmp_path)


def test_a_name_in_two_files_is_refused(tmp_path):
    for file in ("a.safetensors", "b.safetensors"):
        write_file(tmp_path / file, CONTENT)
    words = r"tensor embed\.weight is in 2 files of .*: a\.safetensors, b\.safetensors"
    with pytest.raises(UsageError, match=words):
        make_manifest(tmp_path)


def test_the_index_decides_which_copy_is_read(tmp_path):
    made = make_manifest(write_file(tmp_path / "good.safetensors", CONTENT))
    folder = tmp_path / "model"
    folder.mkdir()
    write_shards(folder, CONTENT, 3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name, files = next(iter(index)), sorted(set(index.values()))
    other = files[-1] if index[name] != files[-1] else files[0]
    dtype, shape, data = CONTENT[name]
    stale = {n: CONTENT[n] for n in index if index[n] == other}
    write_file(folder / other, stale | {name: (dtype, shape, bytes(b ^ 1 for b in data))})
    assert words(make_manifest(folder)) == words(made)
    assert check_files(made, folder).exit_status == 0
    assert source.unread(folder) == [
        f"copies: {name} in {other}, the index places it in {index[name]}"
    ]


def test_what_may_not_be_read_is_no_corruption(model, monkeypatch):
    made = make_manifest(model)

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(safetensors_header, "open_regular", denied)
    with pytest.raises(UsageError, match="Permission denied"):
        check_files(made, model)
    monkeypatch.undo()
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match="git lfs pull"):
        check_files(made, model)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "Q4_K", 7, None])
def test_items_of_less_than_a_byte_and_unknown_ones_are_refused_by_name(tmp_path, dtype):
    def edit(header):
        header["w"]["dtype"] = dtype

    write_file(tmp_path / "model.safetensors", tensors({"w": ("U8", (4,))}), edit=edit)
    with pytest.raises(UsageError, match=rf"model\.safetensors: tensor w: no .* dtype {dtype}:"):
        make_manifest(tmp_path)


def _shape(shape):
    return lambda header: header["b"].update(shape=shape)


def _offsets(name, offsets):
    return lambda header: header[name].update(data_offsets=offsets)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_shape([5]), "needs 20 bytes, its header entry gives 16"),
        (_shape([-4]), "broken safetensors header, tensor b"),
        (_shape([4.0]), "broken safetensors header, tensor b"),
        (_shape("4"), "broken safetensors header, tensor b"),
        (_offsets("b", [0, 16]), "an overlap between tensors at byte 0"),
        (lambda header: [header.pop(n) for n in "bc"], "longer than its header says"),
        (_offsets("b", [32, 48]), "cut short"),
        (lambda header: header.pop("a"), "a gap between tensors at byte 0"),
        (lambda header: header["b"].pop("data_offsets"), "broken safetensors header"),
        (lambda header: header.update({"\ud800": header.pop("b")}), "not valid Unicode"),
    ],
)
def test_a_broken_header_is_refused_and_is_corruption_for_a_check(tmp_path, edit, words):
    content = tensors({"a": ("F32", (4,)), "b": ("F32", (4,)), "c": ("F32", (0,))})
    good = write_file(tmp_path / "good.safetensors", content)
    made = make_manifest(good)
    bad = write_file(tmp_path / "bad.safetensors", content, edit=edit)
    with pytest.raises(UsageError, match=words):
        make_manifest(bad)
    found = check_files(made, bad)
    assert found.exit_status == 1 and words in found.broken["bad.safetensors"]


def test_another_model_is_refused_before_anything_is_read(model, tmp_path, monkeypatch):
    made = make_manifest(model)
    monkeypatch.setattr(read._Files, "read", None)
    content = dict(CONTENT)
    content["norm.weight"] = ("F16", (8,), random_bytes("F16", (8,)))
    words = r"another model than the manifest's: norm\.weight: expected BF16 \[8\], found F16 \[8\]"
    with pytest.raises(UsageError, match=words):
        check_files(made, write_file(tmp_path / "cast.safetensors", content))
    stranger = write_file(tmp_path / "other.safetensors", tensors({"x": ("F32", (2,))}))
    with pytest.raises(UsageError, match="none of its 1 tensors"):
        check_files(made, stranger)


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ((), "no weights in .* found nothing"),
        (("pytorch_model.bin", "config.json"), "found config.json, pytorch_model.bin"),
        (("a.safetensors.index.json", "b.safetensors.index.json"), "several indexes"),
    ],
)
def test_a_directory_without_safetensors_is_refused(tmp_path, there, words):
    for name in there:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=words):
        make_manifest(tmp_path)


def test_no_directory_and_other_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no model in"):
        make_manifest(tmp_path / "nosuch")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="not a checkpoint"):
        make_manifest(tmp_path / "model.gguf")
    lfs = tmp_path / "model.safetensors"
    lfs.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match="git lfs pull"):
        make_manifest(tmp_path)


def test_an_index_may_not_lead_out_of_its_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_file(tmp_path / "x.safetensors", CONTENT)
    index = {"weight_map": dict.fromkeys(CONTENT, "../x.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="names the file '../x.safetensors'"):
        make_manifest(folder)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(model):
    found = source.survey(model)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UsageError, match="has changed since its header was read"):
        read.fingerprint_shares(found, 1, threads=2)
    file.unlink()
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read.fingerprint_shares(found, 1)


def test_an_error_of_one_thread_ends_the_others(model, monkeypatch):
    """They stop after their block: nobody wants to wait for a terabyte to be read in vain."""
    from time import sleep

    monkeypatch.setattr(read, "BLOCK_BYTES", 8)
    found, calls = source.survey(model), []

    def broken(self, block):
        calls.append(block)
        if block.first == 0 and block.name == "embed.weight":
            raise UsageError("a disk is gone")
        sleep(0.01)
        return np.zeros(block.count, f"u{block.wordsize}")

    monkeypatch.setattr(read._Files, "read", broken)
    with pytest.raises(UsageError, match="a disk is gone"):
        read.fingerprint_shares(found, 1, threads=3)
    assert len(calls) < found.n_bytes // 8 // 4


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Half a gigabyte of zeros in a sparse file, read in a process that may have 96 MiB more."""
    import subprocess
    import sys

    n = 1 << 29
    header = {"w": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + n)
    code = (
        "import resource, sys\n"
        "from spimpi.fingerprint import cpu\n"
        "from spimpi.manifest import make_manifest\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); make_manifest(sys.argv[1], threads=2); print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 96 << 10
    shutil.rmtree(tmp_path)
