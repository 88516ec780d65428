"""Golden files: round trip, refusals, and the one that ships with the embedded model."""

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from spimpi.checks.recorder import Recorder
from spimpi.errors import UsageError
from spimpi.inference import golden
from spimpi.inference.config import EMBEDDED_MODEL
from spimpi.inference.tensors import PROGRAM
from spimpi.trace.schema import Stage, Status
from spimpi.manifest import make_manifest, read_manifest, write_manifest
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import make_golden, verify_distributed_inference


def small():
    return prepare(Request(prompts=("The file ", "If "), tokens=3), 1)


def test_the_shipped_golden_file_is_what_this_code_computes():
    shipped = golden.read(golden.EMBEDDED_GOLDEN)
    job = prepare(Request(tokens=5), 1)
    made = make_golden(replace(job, golden=None))
    assert golden.fits(shipped, job.workload)
    assert (made.table == shipped.table[:5]).all()
    assert (made.tokens == shipped.tokens[:, :5]).all()


def test_a_golden_file_reads_back_as_it_was_written(tmp_path):
    job = small()
    made = make_golden(job)
    golden.write(tmp_path / "g.h5", made)
    back = golden.read(tmp_path / "g.h5")
    assert (back.table == made.table).all() and (back.tokens == made.tokens).all()
    assert back.workload == made.workload
    golden.require_same(back, job.workload)
    before = (tmp_path / "g.h5").read_bytes()
    with pytest.raises(UsageError, match="exists.*--overwrite"):
        golden.write(tmp_path / "g.h5", made)
    assert (tmp_path / "g.h5").read_bytes() == before
    golden.write(tmp_path / "g.h5", replace(made, tokens=made.tokens + 1), overwrite=True)
    assert (golden.read(tmp_path / "g.h5").tokens == made.tokens + 1).all()
    assert [p.name for p in tmp_path.iterdir()] == ["g.h5"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(prompts=("Another ",)), "prompts"),
        (dict(seed=7), "seed"),
        (dict(tokens=4), "--tokens 3"),
    ],
)
def test_a_golden_run_of_something_else_is_refused(change, word, tmp_path):
    golden.write(tmp_path / "g.h5", make_golden(small()))
    asked = dict(prompts=("The file ", "If "), tokens=3) | change
    with pytest.raises(UsageError, match=word):
        prepare(Request(golden=str(tmp_path / "g.h5"), **asked), 1)


def test_every_changed_word_of_a_table_is_found():
    job = small()
    made = make_golden(job)

    class Events:
        failed = 0

        def one(self, *args, **kwargs):
            self.failed += args[6]

    for step, column in ((0, 0), (1, 20), (2, made.table.shape[1] - 1)):
        table = made.table.copy()
        table[step, column] ^= np.uint64(1)
        events = Events()
        assert golden.compare(table, made, events) == 1 == events.failed
    assert golden.compare(made.table, made, Events()) == 0


def test_a_table_is_recorded_at_its_places_and_is_no_check():
    table = np.arange(1, 1 + 3 * 13, dtype=np.uint64).reshape(3, 13)  # two layers
    recorder = Recorder({name: 10 + i for i, name in enumerate(PROGRAM)})
    kept = []
    recorder.journal = SimpleNamespace(append=kept.append, flush=lambda: None)
    golden.record(table, 2, recorder, repeat=4)
    recorder.write_down()
    (events,) = kept
    found = {(e["step"], e["layer"], PROGRAM[e["tensor"] - 10]): e["fingerprint"] for e in events}
    assert len(found) == 39 and set(events["repeat"]) == {4}
    assert found[0, -1, "embed"] == 1 and found[1, 1, "qkv"] == 13 + 7
    assert found[2, 1, "hidden"] == 2 * 13 + 11 and found[2, -1, "tokens"] == 39
    assert (events["verdict"] == Status.NOT_ESTABLISHED).all() and not events["expected"].any()
    assert recorder.n_events == recorder.totals[Stage.GOLDEN].checks == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "g.h5"
    golden.write(path, make_golden(small()))
    return path


def edited(made, tmp_path, edit):
    """A copy of a golden file, edited."""
    path = shutil.copy(made, tmp_path / "e.h5")
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def of_before(edit):
    """The edit of a file of before, which had no digest of what it says."""
    return lambda file: (file.attrs.__delitem__("digest"), edit(file))


def refusal(path) -> str:
    with pytest.raises(UsageError) as caught:
        golden.read(path)
    message = str(caught.value)
    assert len(message) <= 500 and "\n" not in message
    return message


@pytest.mark.parametrize(
    "origin",
    [
        5, [], None, "x", {"x": 1}, {"model": 5}, {"model": ["a"]}, {"config": ["a"]},
        {"config": "olmo-2-1b", "layers": "x"}, {"layers": 1.5}, {"layers": True},
        {"faults": ["bitflip:rank=0,layer=3,tensor=hidden"]}, {"repeat": 3}, {"arith": "blas"},
        {"sketch": True}, {"topology": "tp=1"}, {"memory": "1"}, {"prompts": ["x"]}, {"tokens": 1},
        {"seed": 3}, {"manifest": "m.json"}, {"golden": "g.h5"}, {"model": "a" * 10_000},
    ],
)  # fmt: skip
def test_an_origin_says_where_the_model_is_from_and_nothing_else(made, tmp_path, origin):
    def edit(file):
        file.attrs["origin"] = json.dumps(origin)

    assert "origin may have model (str), config (str), layers (int)" in refusal(
        edited(made, tmp_path, edit)
    )


def attribute(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def dataset(name, *args, **more):
    def edit(file):
        if name in file:
            del file[name]
        file.create_dataset(name, *args, **more)

    return edit


def linked(link):
    def edit(file):
        file["elsewhere"] = file["tokens"][:]
        del file["tokens"]
        file["tokens"] = link

    return edit


COLUMNS = 43
EDITS = {
    "ten million layers": attribute("n_layers", 10**7),
    "layers without an end": attribute("n_layers", float("inf")),
    "layers of text": attribute("n_layers", "8"),
    "layers below nothing": attribute("n_layers", -1),
    "an array of layers": attribute("n_layers", [8, 8]),
    "a seed without an end": attribute("seed", float("inf")),
    "a seed below nothing": attribute("seed", -1),
    "a model of numbers": attribute("model", 5),
    "a model of many characters": attribute("model", "a" * 50_000),
    "an identity of bytes": attribute("identity", np.bytes_(b"\xff")),
    "an arithmetic of lists": attribute("arithmetic", ["exact-1"]),
    "prompts nested deeply": attribute("prompts", "[" * 60_000),
    "prompts of text": attribute("prompts", '[["a"]]'),
    "prompts below nothing": attribute("prompts", "[[-1]]"),
    "prompts of truths": attribute("prompts", "[[true]]"),
    "prompts of many digits": attribute("prompts", f"[[{'9' * 5000}]]"),
    "one prompt less": attribute("prompts", "[[1]]"),
    "an empty prompt": attribute("prompts", "[[1], []]"),
    "an origin nested deeply": attribute("origin", "[" * 60_000),
    "rows never written": dataset(
        "fingerprints", (10**10, COLUMNS), "<u8", chunks=(1000, COLUMNS), compression="gzip"
    ),
    "a table of floats": dataset("fingerprints", (3, COLUMNS), "<f8"),
    "a table of one axis": dataset("fingerprints", data=np.zeros(COLUMNS, "<u8")),
    "a table without axes": dataset("fingerprints", data=np.uint64(1)),
    "tokens of texts": dataset("tokens", (2, 3), h5py.string_dtype()),
    "tokens of floats": dataset("tokens", data=np.zeros((2, 3))),
    "tokens of other prompts": dataset("tokens", data=np.zeros((3, 3), np.int64)),
    "texts of 2 GB": dataset("tokens", (2, 3), "S2000000000", chunks=(1, 1), compression="gzip"),
    "weights of floats": dataset("weights", data=np.zeros(75)),
    "no tokens": lambda file: file.__delitem__("tokens"),
    "no prompts": lambda file: file.attrs.__delitem__("prompts"),
    "a group of tokens": lambda file: (file.__delitem__("tokens"), file.create_group("tokens")),
    "a soft link": linked(h5py.SoftLink("/elsewhere")),
    "an external link": linked(h5py.ExternalLink("/etc/passwd", "/tokens")),
    "external storage": dataset("tokens", (2, 3), "i8", external=[("/etc/passwd", 0, 48)]),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_field_of_another_kind_or_size_is_refused_in_one_line(made, tmp_path, name):
    assert "e.h5 is no readable golden file" in refusal(edited(made, tmp_path, EDITS[name]))


def test_a_virtual_dataset_is_refused(made, tmp_path):
    def edit(file):
        layout = h5py.VirtualLayout((2, 3), "i8")
        layout[:] = h5py.VirtualSource("/etc/passwd", "tokens", (2, 3), "i8")
        del file["tokens"]
        file.create_virtual_dataset("tokens", layout)

    assert "virtual dataset" in refusal(edited(made, tmp_path, edit))


def places(path) -> dict[str, int]:
    """Where in a golden file its facts lie, by name: a byte of each."""
    data = path.read_bytes()
    with h5py.File(path) as file:
        found = {"tokens": file["tokens"].id.get_offset()}
        texts = {name: v.encode() for name, v in file.attrs.items() if isinstance(v, str)}
        texts["seed"] = struct.pack("<Q", int(file.attrs["seed"]))
    for name in ("prompts", "identity", "arithmetic", "digest", "seed"):
        assert data.count(texts[name]) == 1
        found[name] = data.index(texts[name]) + (3 if name == "prompts" else 0)
    return found


@pytest.mark.parametrize("name", ["tokens", "prompts", "identity", "arithmetic", "digest", "seed"])
def test_a_flipped_bit_in_a_golden_file_is_damage_of_the_file_and_no_corruption(
    made, tmp_path, name
):
    data = bytearray(made.read_bytes())
    data[places(made)[name]] ^= 1
    (tmp_path / "g.h5").write_bytes(data)
    assert "golden file is damaged" in refusal(tmp_path / "g.h5")


def test_a_golden_file_without_a_digest_is_one_of_before_and_reads(made, tmp_path):
    def edit(file):
        file["tokens"][0, 0] += 1

    back = golden.read(edited(made, tmp_path, of_before(edit)))
    assert (back.tokens != golden.read(made).tokens).sum() == 1


# Of a process of its own: what the tests before have taken is no golden file's.
MEMORY = """
import resource, sys
from contextlib import suppress
from spimpi.errors import UsageError
from spimpi.inference import golden
for path in sys.argv[1:]:
    with suppress(UsageError):
        golden.read(path)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_a_text_that_says_it_is_gigabytes_long_takes_no_memory(made, tmp_path):
    """A text's length stands before it in the file, and HDF5 believes it."""
    data, text = made.read_bytes(), json.dumps(golden.read(made).workload.prompts).encode()
    length = struct.pack("<I", len(text))
    places = [i for i in range(len(data)) if data.startswith(length, i)]
    assert places
    paths = [tmp_path / f"{place}.h5" for place in places]
    for path, place in zip(paths, places):
        path.write_bytes(data[:place] + struct.pack("<I", 2**32 - 16) + data[place + 4 :])
    command = [sys.executable, "-c", MEMORY, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1 << 20  # KiB


def test_special_files_and_impossible_names_are_no_golden_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "no ordinary file" in refusal(tmp_path / "pipe")
    for path in ("a" * 5000, "/dev/zero", tmp_path, "a\0b"):
        refusal(path)


# the weights that a golden run was made of


def test_a_golden_file_has_the_fingerprint_of_every_weight(made):
    back = golden.read(made)
    expected = read_manifest(EMBEDDED_MODEL / "manifest.json").tensors
    found = dict(zip(small().checkpoint.tensors, back.weights))
    assert found == {name: facts.fingerprint for name, facts in expected.items()}


@pytest.fixture
def copied(tmp_path):
    """A copy of the embedded model, which is then any model."""
    return shutil.copytree(EMBEDDED_MODEL, tmp_path / "copy")


def run_of(**asked):
    asked = dict(prompts=("The file ",), tokens=2) | asked
    return verify_distributed_inference(MPI.COMM_SELF, prepare(Request(**asked), 1))


def flip(folder, name, byte):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    offset = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[8 + length + offset + byte] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("byte", [0, 1001, -2])
@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_flipped_bit_anywhere_in_the_weights_fails_against_a_golden_file(
    copied, tmp_path, name, byte
):
    job = prepare(Request(model=str(copied), prompts=("The file ",), tokens=2), 1)
    golden.write(tmp_path / "g.h5", make_golden(job))
    good = run_of(golden=str(tmp_path / "g.h5"))
    assert good.exit_status == 0
    length = job.checkpoint.tensors[name].n_bytes
    flip(copied, name, byte % length)
    outcome = run_of(golden=str(tmp_path / "g.h5"))
    assert outcome.exit_status == 1 and outcome.verdict.where.tensor == name


def test_a_golden_file_of_before_still_reads_and_says_what_it_does_not_know(
    copied, tmp_path, capsys
):
    from spimpi.cli import main

    job = prepare(Request(model=str(copied), prompts=("The file ",), tokens=2), 1)
    golden.write(tmp_path / "old.h5", replace(make_golden(job), weights=None))
    command = ["verify", "--no-trace", "--golden", str(tmp_path / "old.h5")]
    assert main(command) == 0
    assert "weights    not compared with the golden file" in capsys.readouterr().out
    golden.write(tmp_path / "new.h5", make_golden(job))
    assert main([*command[:-1], str(tmp_path / "new.h5")]) == 0
    said = capsys.readouterr().out
    assert "not compared" not in said and "weights    expected: they equal" in said


def test_a_golden_file_and_a_manifest_of_other_weights_are_refused(copied, tmp_path):
    job = prepare(Request(model=str(copied), prompts=("The file ",), tokens=2), 1)
    golden.write(tmp_path / "g.h5", make_golden(job))
    flip(copied, "model.layers.3.mlp.down_proj.weight", 1001)
    write_manifest(tmp_path / "m.json", make_manifest(copied))
    with pytest.raises(UsageError, match="other weights: model.layers.3.mlp.down_proj.weight"):
        run_of(golden=str(tmp_path / "g.h5"), manifest=str(tmp_path / "m.json"))


def test_a_golden_file_with_another_number_of_weights_is_refused(made, tmp_path):
    path = edited(made, tmp_path, of_before(dataset("weights", data=np.zeros(74, np.uint64))))
    with pytest.raises(UsageError, match="fingerprints of 74 weights"):
        prepare(Request(golden=str(path)), 1)


def test_what_is_no_golden_file_is_refused(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"no HDF5")
    for name in ("x.h5", "missing.h5"):
        with pytest.raises(UsageError, match=name):
            golden.read(tmp_path / name)
