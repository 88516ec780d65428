"""The embedded model's own files: whatever is asked for, they are those of the package."""

import json
import shutil
import struct

import h5py
import pytest

from spimpi.errors import CorruptionError, UsageError
from spimpi.inference import golden
from spimpi.inference.config import EMBEDDED_MODEL
from spimpi.manifest import check_files, make_manifest, read_manifest
from spimpi.verification import embedded, job
from spimpi.verification.job import Request, prepare

DOWN = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the embedded model that takes its place."""
    folder = shutil.copytree(EMBEDDED_MODEL, tmp_path / "tiny")
    monkeypatch.setattr(job, "EMBEDDED_MODEL", folder)
    monkeypatch.setattr(embedded, "EMBEDDED_MODEL", folder)
    monkeypatch.setattr(golden, "EMBEDDED_GOLDEN", folder / "golden.h5")
    return folder


def flip(folder, name, at):
    """Change a byte of a tensor, ``at`` a share of it."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + start + int((stop - start - 1) * at)] ^= 0x40
    path.write_bytes(data)


ASKED = [
    {}, {"prompts": ("hello",), "tokens": 2}, {"seed": 5}, {"arith": "blas"}, {"tokens": 100},
    {"topology": "pp=2", "world": 2},
]  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("at", [0, 0.3, 0.5, 1])
def test_damage_of_a_matrix_is_corruption_whatever_is_asked_for(package, asked, at):
    world = asked.get("world", 1)
    request = Request(**{k: v for k, v in asked.items() if k != "world"})
    assert prepare(request, world)
    flip(package, DOWN, at)
    with pytest.raises(CorruptionError, match=f"{DOWN}.*install spimpi again") as caught:
        prepare(request, world)
    where = caught.value.verdict.where
    assert where.tensor == DOWN and where.expected != where.found
    assert caught.value.exit_status == 1


def test_it_is_the_embedded_model_by_any_path(package, tmp_path, monkeypatch):
    flip(package, DOWN, 0.3)
    (tmp_path / "link").symlink_to(package)
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "./tiny/../tiny", "link", str(package)):
        with pytest.raises(CorruptionError, match=DOWN):
            prepare(Request(model=name), 1)
    assert prepare(Request(model=str(shutil.copytree(package, tmp_path / "mine"))), 1)


def test_another_config_json_is_corruption_of_the_package(package):
    values = json.loads((package / "config.json").read_text())
    (package / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-4}))
    with pytest.raises(CorruptionError, match="tensor config.json"):
        prepare(Request(), 1)


@pytest.mark.parametrize("name", ["manifest.json", "golden.h5"])
def test_a_package_that_lacks_what_it_knows_is_refused(package, name):
    (package / name).unlink()
    with pytest.raises(UsageError, match=name) as caught:
        prepare(Request(), 1)
    assert name != "golden.h5" or "install spimpi again" in str(caught.value)


@pytest.mark.parametrize("asked", [{}, {"prompts": ("hello",)}, {"prompt_ids": ("1",)}])
def test_a_tokenizer_that_was_put_beside_the_embedded_model_is_refused(package, asked):
    (package / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="tokenizer.json.*not of this package: remove it"):
        prepare(Request(**asked), 1)


def test_the_package_s_golden_file_is_never_one_of_before(package):
    with h5py.File(package / "golden.h5", "r+") as file:
        del file.attrs["digest"]
    with pytest.raises(UsageError, match="golden.h5.*digest.*install spimpi again"):
        prepare(Request(), 1)


def test_a_package_whose_weights_are_cut_short_is_refused(package):
    path = package / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="cut short"):
        prepare(Request(), 1)


def test_the_command_line_says_it_and_ends_with_1(package, capsys):
    from spimpi.cli import main

    flip(package, DOWN, 0.3)
    for command in (["verify", "--no-trace"], ["golden", "-o", str(package.parent / "g.h5")]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert DOWN in said and said.count("\n") == 1
    assert not (package.parent / "g.h5").exists()


def test_what_is_shipped_fits_together():
    made = make_manifest(EMBEDDED_MODEL)
    assert read_manifest(EMBEDDED_MODEL / "manifest.json") == made
    assert check_files(made, EMBEDDED_MODEL).exit_status == 0
    words = list(golden.read(golden.EMBEDDED_GOLDEN).weights)
    checkpoint = prepare(Request(), 1).checkpoint
    assert words == [made.tensors[name].fingerprint for name in checkpoint.tensors]
