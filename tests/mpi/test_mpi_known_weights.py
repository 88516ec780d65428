"""``verify --manifest``: the slices that ranks read, and what they derive, are the manifest's."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mpi_helpers import (
    GROUPED, IDS, OLMO, both_families, first_ranks, named, on_rank_0, quick_fabric, topologies,
    verify,
)  # fmt: skip

from spimpi.errors import UsageError
from spimpi.inference.derived import derived_names
from spimpi.inference.derived_check import multiplied
from spimpi.inference.weights import Loader
from spimpi.manifest import make_manifest, write_manifest
from spimpi.topology.tensor import TensorShard
from spimpi.trace.schema import Established, Op
from spimpi.trace.schema import Stage as Phase
from spimpi.verification import run
from spimpi.verification.job import Request, prepare

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]

TIED = GROUPED | {"tie_word_embeddings": True}
LAYER = "model.layers.1."


@pytest.fixture
def manifest(comm, shared_folder):
    """``manifest(model, derived=True, seed=1069)``: the file of a model's manifest."""

    def make(model, derived=True, seed=1069):
        path = shared_folder / f"{Path(model).name}-{derived}-{seed}.spi.json"

        def write():
            if not path.exists():
                write_manifest(path, make_manifest(model, derived=derived, seed=seed))

        on_rank_0(comm, write)
        return str(path)

    return make


@pytest.fixture
def events(monkeypatch):
    """(tensor, op, step, kinds) of this rank's checks of weights, as they are recorded."""
    from spimpi.checks.recorder import Recorder

    seen, one = [], Recorder.one

    def noted(self, tensor, op, stage, established, *words, **more):
        if stage == Phase.WEIGHTS:
            seen.append((tensor, op, more.get("step", 0), established))
        one(self, tensor, op, stage, established, *words, **more)

    monkeypatch.setattr(Recorder, "one", noted)
    return seen


def wishes(model, file, tokens=2):
    return dict(model=str(model), prompt_ids=IDS, tokens=tokens, manifest=file)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)


@both_families
def test_any_split_equals_the_manifest_without_a_second_read(
    comm, model, manifest, facts, monkeypatch
):
    monkeypatch.setattr(run, "second_read", None)
    path = named(model, facts)
    files = [manifest(path, derived) for derived in (True, False)]
    heads = facts["n_heads"]
    for n in range(1, comm.size + 1):
        with first_ranks(comm, n) as part:
            for split in topologies(n, heads, 3, 8) if part else ():
                for file in files:
                    assert verify(part, **wishes(path, file), **split).verdict, split
    with first_ranks(comm, min(2, comm.size)) as part:
        if part and part.size == 2:
            assert verify(part, topology="sp=2", **wishes(path, files[0])).verdict


def test_a_tied_head_is_derived_from_the_embedding(comm, model, manifest):
    path = str(model("tied_derived", **TIED))
    file = manifest(path)
    for n in range(1, comm.size + 1):
        with first_ranks(comm, n) as part:
            for split in topologies(n, 6, 3, 8) if part else ():
                assert verify(part, **wishes(path, file), **split).verdict, split


def test_every_tensor_that_a_rank_holds_is_expected_twice(comm, model, manifest, events):
    """Slices once; integers and exponents after loading and after the last step."""
    path = named(model, GROUPED)
    file = manifest(path)
    outcome = verify(comm, topology=f"tp={comm.size}", **wishes(path, file))
    assert outcome.verdict and outcome.exit_status == 0
    content = [(tensor, step) for tensor, op, step, kinds in events if op == Op.CONTENT]
    assert all(k & Established.EXPECTED for _, op, _, k in events if op == Op.CONTENT)
    config = prepare(Request(**wishes(path, file)), comm.size).config
    derived = [n for name in multiplied(config) for n in derived_names(name)]
    assert len(derived) == 2 * (3 * 7 + 1)
    assert sorted(c for c in content if "exact-1" in c[0]) == sorted(
        (name, step) for name in derived for step in (0, 1)
    )
    assert {step for tensor, step in content if "exact-1" not in tensor} == {0}
    assert "expected" not in outcome.verdict.kinds  # of the run's tensors: no golden run


def test_blas_derives_nothing(comm, model, manifest, events):
    path = named(model, GROUPED)
    assert verify(comm, arith="blas", **wishes(path, manifest(path))).verdict
    assert events and not any("exact-1" in tensor for tensor, *_ in events)


# Corruption


def split_of(comm):
    return f"tp={comm.size}" if comm.size != 4 else "tp=2,pp=2"


@pytest.fixture
def damaged(comm, model, shared_folder):
    """A copy of a model with one flipped byte in a tensor; its directory."""

    def make(facts, name):
        folder = shared_folder / "damaged"

        def copy():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(original, folder)
            _flip_byte(folder / "model.safetensors", name)

        original = named(model, facts)
        on_rank_0(comm, copy)
        return original, str(folder)

    return make


def _flip_byte(path, name):
    import json
    import struct

    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + (start + stop) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("derived", [True, False])
@pytest.mark.parametrize(
    "name",
    [LAYER + "mlp.down_proj.weight", LAYER + "self_attn.k_proj.weight", "model.norm.weight",
     "model.embed_tokens.weight", "lm_head.weight"],
)  # fmt: skip
def test_a_flipped_byte_of_the_file_is_found(comm, damaged, manifest, name, derived, monkeypatch):
    good, bad = damaged(GROUPED, name)
    file = manifest(good, derived)
    for golden_bytes in (0, 1 << 20):  # a golden run of the same files reproduces the fault
        monkeypatch.setattr(run, "GOLDEN_BYTES", golden_bytes)
        outcome = verify(comm, topology=split_of(comm), **wishes(bad, file))
        where = outcome.verdict.where
        assert (outcome.exit_status, where.tensor, where.rank) == (1, name, None)
        assert where.check == "content" and "the same once more" in where.detail
        assert not outcome.verdict.kinds


def test_without_a_manifest_both_reads_agree_on_a_damaged_file(comm, damaged):
    _, bad = damaged(GROUPED, "lm_head.weight")
    assert verify(comm, topology=split_of(comm), **wishes(bad, None)).verdict


@pytest.mark.parametrize("kind", ["bitflip", "misplace"])
@pytest.mark.parametrize("short", ["q_proj", "down_proj"])
def test_a_slice_that_was_misread_names_its_rank(comm, model, manifest, kind, short):
    if comm.size == 1 and kind == "misplace":
        pytest.skip("a rank that reads the whole reads nothing else")
    path, rank = named(model, GROUPED), comm.size - 1
    fault = f"{kind}:rank={rank},layer=1,tensor={short}"
    block = "mlp" if short == "down_proj" else "self_attn"
    outcome = verify(
        comm, topology=f"tp={comm.size}", faults=(fault,), **wishes(path, manifest(path))
    )
    where = outcome.verdict.where
    expected = (1, f"{LAYER}{block}.{short}.weight", rank)
    assert (outcome.exit_status, where.tensor, where.rank) == expected


# What is derived, changed in memory

MATRICES = {
    "self_attn.q_proj": ("qkv", "first"), "self_attn.v_proj": ("qkv", "last"),
    "self_attn.o_proj": ("o", "last"), "mlp.gate_proj": ("gate_up", "first"),
    "mlp.up_proj": ("gate_up", "last"), "mlp.down_proj": ("down", "first"),
}  # fmt: skip


def _corrupt(part, layer, attribute, end, array):
    """One bit of the first or last integer or exponent of a matrix."""
    matrix = getattr(part.layers[layer], attribute)
    flat = getattr(matrix, array).reshape(-1)
    flat.view(np.uint32)[0 if end == "first" else -1] ^= 1 << 14


@both_families
@pytest.mark.parametrize("array", ["values", "exponents"])
@pytest.mark.parametrize("name", MATRICES)
def test_a_flip_after_loading_names_tensor_and_rank(
    comm, model, manifest, monkeypatch, facts, name, array
):
    """On the first and on the last rank, whose key/value heads and exponents are copies."""
    path, load = named(model, facts), Loader.load
    file, (attribute, end) = manifest(path), MATRICES[name]
    for culprit in {0, comm.size - 1}:

        def flipped(self, progress=None, culprit=culprit):
            part = load(self, progress)
            if self.ctx.rank == culprit:
                _corrupt(part, 1, attribute, end, array)
            return part

        monkeypatch.setattr(Loader, "load", flipped)
        outcome = verify(comm, topology=f"tp={comm.size}", **wishes(path, file))
        where = outcome.verdict.where
        wanted = derived_names(f"{LAYER}{name}.weight")[array == "exponents"]
        assert (outcome.exit_status, where.tensor, where.rank) == (1, wanted, culprit)
        assert (where.step, where.layer) == (0, 1)


def test_a_flip_on_any_stage_names_its_rank(comm, model, manifest, monkeypatch):
    path, load = named(model, GROUPED), Loader.load
    file = manifest(path)
    for n in range(1, min(comm.size, 3) + 1):
        with first_ranks(comm, n) as part:
            for culprit in range(n) if part else ():

                def flipped(self, progress=None, culprit=culprit):
                    made = load(self, progress)
                    if self.ctx.rank == culprit:
                        _corrupt(made, 0, "down", "first", "values")
                    return made

                monkeypatch.setattr(Loader, "load", flipped)
                outcome = verify(part, topology=f"pp={n}", **wishes(path, file))
                where = outcome.verdict.where
                layer = int(where.tensor.split(".")[2])
                assert (outcome.exit_status, where.rank, where.layer) == (1, culprit, layer)
                assert where.tensor.endswith("down_proj.weight exact-1 integers")


def test_a_changed_copy_of_a_shared_head_is_seen(comm, model, manifest, monkeypatch, events):
    """A copy that does not count in the fingerprint: only the agreement sees it."""
    path, load = named(model, GROUPED), Loader.load
    file = manifest(path)
    shards = [TensorShard(t, comm.size, 6, 2, 22, 37) for t in range(comm.size)]
    copies = [t for t, s in enumerate(shards) if s.kv_heads[0] not in s.owned_kv_heads]
    if not copies:
        pytest.skip("no head is shared")
    culprit = copies[-1]

    def flipped(self, progress=None):
        part = load(self, progress)
        if self.ctx.rank == culprit:
            queries = shards[culprit].q(4).size
            part.layers[1].qkv.values[queries, 0] += 1  # the first row of its keys
        return part

    monkeypatch.setattr(Loader, "load", flipped)
    outcome = verify(comm, topology=f"tp={comm.size}", **wishes(path, file))
    where = outcome.verdict.where
    assert (outcome.exit_status, where.check, where.rank) == (1, "agreement", culprit)
    assert where.tensor == f"{LAYER}self_attn.k_proj.weight exact-1 integers"


def test_a_flip_while_the_run_goes_on_is_found_after_the_last_step(
    comm, model, manifest, monkeypatch
):
    """An exponent, which no check of the run looks at."""
    path, inference = named(model, GROUPED), run._Run._inference
    file, culprit = manifest(path), comm.size - 1

    def flipped(self, part):
        result = inference(self, part)
        if self.ctx.rank == culprit:
            part.layers[1].gate_up.exponents[-1] += 1
        return result

    monkeypatch.setattr(run._Run, "_inference", flipped)
    outcome = verify(comm, topology=f"tp={comm.size}", **wishes(path, file, tokens=3))
    where = outcome.verdict.where
    assert (outcome.exit_status, outcome.n_failed) == (1, comm.size)
    assert (where.step, where.rank) == (2, culprit)
    assert where.tensor == f"{LAYER}mlp.up_proj.weight exact-1 exponents"


# Refused before anything is loaded


def refused(comm, words, **given):
    with pytest.raises(UsageError, match=words):
        prepare(Request(**given), comm.size, comm.rank)
    comm.Barrier()  # the files may be taken away after the last test


def test_another_model_seed_or_arithmetic_is_refused(comm, model, manifest, shared_folder):
    path, olmo = named(model, GROUPED), named(model, OLMO)
    wider = str(model("wider", **(GROUPED | {"intermediate_size": 23})))
    shallow = str(model("shallow", **(GROUPED | {"n_layers": 2})))
    stored = str(model("bf16", **(GROUPED | {"dtype": "bfloat16"})))
    file = manifest(path)
    refused(comm, r"of another model: it lacks .*q_norm.* and 6 more of the 36", **wishes(olmo, file))
    refused(
        comm, r"of another model: .*\[22, 24\] there and .*\[23, 24\] in the checkpoint and 8 more",
        **wishes(wider, file),
    )  # fmt: skip
    refused(comm, r"another model: the checkpoint lacks .* and 6 more", **wishes(shallow, file))
    refused(comm, r"another model: .*bfloat16.*and float32|float32.*bfloat16", **wishes(stored, file))
    refused(comm, "has the seed 1069, the run 7", seed=7, **wishes(path, file))
    seven = manifest(path, seed=7)
    assert prepare(Request(**wishes(path, seven)), comm.size).seed == 7
    refused(comm, "has the seed 7, the run 1069", seed=1069, **wishes(path, seven))
    changed = shared_folder / "changed.spi.json"

    def write(change):
        made = make_manifest(path, derived=True)
        write_manifest(changed, replace(made, derived=change(made.derived)), overwrite=True)

    on_rank_0(comm, lambda: write(lambda d: replace(d, arithmetic="exact-0")))
    refused(comm, "arithmetic exact-0, this spimpi computes in exact-1", **wishes(path, changed))
    prepare(Request(arith="blas", **wishes(path, changed)), comm.size)  # it compares none of them
    comm.Barrier()
    on_rank_0(comm, lambda: write(lambda d: replace(d, tensors={})))
    refused(comm, "must have the derived tensor 'model.layers.0.self_attn.q_proj.weight exact-1",
            **wishes(path, changed))  # fmt: skip


def test_tensors_that_the_model_does_not_use_may_be_in_the_manifest(comm, model, shared_folder):
    """A file that holds a buffer more, as some do."""
    from safetensors.numpy import load_file, save_file

    path, more = named(model, GROUPED), shared_folder / "more"

    def write():
        shutil.copytree(path, more)
        tensors = load_file(Path(path) / "model.safetensors")
        tensors["rotary.inv_freq"] = np.ones(3, np.float32)
        save_file(tensors, more / "model.safetensors")
        write_manifest(more / "m.json", make_manifest(more))

    on_rank_0(comm, write)
    assert verify(comm, **wishes(more, str(more / "m.json"))).verdict
    refused(comm, r"the checkpoint lacks rotary.inv_freq of its", **wishes(path, more / "m.json"))
