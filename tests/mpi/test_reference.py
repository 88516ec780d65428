"""Logits and greedy text are those of Hugging Face transformers, an implementation of its own.

Every test runs at each number of ranks up to four, which all models here can be split over; of more
ranks the first four. transformers and torch are loaded on rank 0 alone.
"""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import reference_models
from mpi_helpers import quick_fabric

from spimpi.context import DistributedContext
from spimpi.inference.checkpoint_seeded import SeededCheckpoint
from spimpi.inference.config import EMBEDDED_MODEL, FULL, SLIDING, published
from spimpi.inference.model import Stage
from spimpi.inference.weights import Loader
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import verify_distributed_inference

pytestmark = [
    pytest.mark.mpi,
    # Asked on every rank, so that all of them skip; imported on rank 0 only, for it is slow.
    pytest.mark.skipif(
        not (find_spec("torch") and find_spec("transformers")),
        reason="torch and transformers are the independent reference: `spimpi[reference]`",
    ),
]

LIMIT = 1e-4  # largest absolute difference of a logit
N_STEPS = 5
MOST_RANKS = 4
MODELS = {
    "grouped-query": {},
    "multi-head": dict(heads=4, kv_heads=4, layers=4),
    "one key head": dict(heads=4, kv_heads=1),
    "tied": dict(tied=True),
    "llama3 rope": dict(rope=reference_models.LLAMA3_ROPE),
    "odd sizes": dict(hidden=75, ffn=101, heads=5, kv_heads=5, head_dim=14, vocab=131),
    "wide heads": dict(hidden=64, heads=4, kv_heads=2, head_dim=48),
    "bfloat16": dict(dtype="bfloat16"),
    "float16": dict(dtype="float16", tied=True),
    "sharded": dict(max_shard_size="50KB", dtype="bfloat16"),
    "olmo 2": dict(model_type="olmo2", heads=6, kv_heads=6),
    "olmo 2 grouped": dict(model_type="olmo2", hidden=64, heads=8, kv_heads=2, layers=4, tied=True),
    "olmo 3": dict(model_type="olmo3", layers=4, sliding_window=9),
    "olmo 3 yarn": dict(
        model_type="olmo3", hidden=128, heads=4, kv_heads=4, layers=4, sliding_window=33,
        layer_types=[SLIDING, FULL, SLIDING, FULL], rope=reference_models.YARN_ROPE,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def comm(comm):
    """The first MOST_RANKS ranks; the others skip."""
    inside = comm.rank < MOST_RANKS
    part = comm.Split(0 if inside else 1, comm.rank)
    if not inside:
        pytest.skip(f"the models here are split over at most {MOST_RANKS} ranks")
    return part


@pytest.fixture(scope="module")
def on_root(comm):
    """``on_root(work)``: the result of a function that rank 0 alone runs, or its error, on all."""

    def run(work):
        result = error = None
        if comm.rank == 0:
            try:
                result = work()
            except Exception as caught:
                error = caught
        result, said = comm.bcast((result, repr(error) if error else None))
        assert said is None, f"rank 0: {said}"
        return result

    return run


@pytest.fixture(scope="module")
def checkpoint(on_root, tmp_path_factory):
    """``checkpoint(name)``: the directory of one of MODELS, made once, the same on all ranks."""
    made = {}

    def directory(name):
        if name not in made:
            make = lambda: reference_models.make(  # noqa: E731
                tmp_path_factory.mktemp("model"), **MODELS[name]
            )
            made[name] = on_root(make)
        return made[name]

    return directory


def prompts_of(vocab):
    """Four prompts of known ids, the longest beyond where Llama 3's rope begins to stretch."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocab, n) for n in (1, 13, 70, 6)]


def forced_of(vocab):
    """The tokens that follow each prompt, whatever the model would choose: [prompts, steps]."""
    return np.random.default_rng(8).integers(0, vocab, (4, N_STEPS))


def logits_of(comm, job, forced):
    """Each step's logits over the whole vocabulary, [steps, prompts, vocab], on rank 0.

    ``forced`` [prompts, steps] are fed in place of the tokens that the model chooses.
    """
    with DistributedContext(comm, job.grid, job.seed) as ctx:
        part = Loader(ctx, job.config, job.checkpoint, job.exact).load()
        n = forced.shape[1]
        stage = Stage(ctx, job.config, part, job.lengths, n, job.exact, None)
        first = stage.facts.first_prompt
        own = slice(first, first + stage.facts.n_prompts)
        tokens = np.concatenate(job.prompts[own])
        rows = []
        for step in range(n):
            stage.step(step, tokens)
            tokens = np.ascontiguousarray(forced[own, step])
            if ctx.is_last_stage:
                rows.append(np.hstack(stage.head.pieces))
        shares = comm.gather((own, np.stack(rows)) if ctx.is_last_stage else None)
    if comm.rank != 0:
        return None
    logits = np.full((n, len(job.prompts), job.config.vocab_size), np.nan, np.float32)
    for own, share in filter(None, shares):
        # tensor ranks hold the same logits, to the last bit
        assert np.isnan(logits[:, own]).all() or np.array_equal(logits[:, own], share)
        logits[:, own] = share
    return logits


def reference_of(full_logits, prompts, forced):
    """The same rows out of ``full_logits(ids)``, which gives those after every position."""
    rows = []
    for prompt, more in zip(prompts, forced):
        every = full_logits(np.concatenate([prompt, more[:-1]]))
        rows.append(every[len(prompt) - 1 :])
    return np.stack(rows, axis=1)


def difference_from_transformers(comm, on_root, directory, arith="exact", topology=None):
    vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
    prompts, forced = prompts_of(vocab), forced_of(vocab)
    request = Request(
        model=str(directory), topology=topology, arith=arith, tokens=N_STEPS,
        prompt_ids=tuple(",".join(map(str, ids)) for ids in prompts),
    )  # fmt: skip
    found = logits_of(comm, prepare(request, comm.size), forced)

    def compare():
        expected = reference_of(
            lambda ids: reference_models.logits(directory, ids), prompts, forced
        )
        assert np.abs(expected).max() > 1, "logits of no size prove nothing"
        return float(np.abs(found - expected).max())

    return on_root(compare)


def topologies(size):
    """One for each axis that can take all ranks, and the mixed ones of four."""
    axes = ["tp={n}", "pp={n}", "dp={n}"] if size > 1 else ["tp={n}"]
    mixed = ["tp=2,pp=2", "pp=2,dp=2", "tp=2,dp=2"] if size == 4 else []
    return [text.format(n=size) for text in axes] + mixed


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(comm, on_root, checkpoint, name):
    found = difference_from_transformers(comm, on_root, checkpoint(name))
    assert found <= LIMIT


@pytest.mark.parametrize("family", ["llama", "olmo 2", "olmo 3"])
def test_logits_are_those_of_transformers_in_every_topology(comm, on_root, checkpoint, family):
    llama = "multi-head" if comm.size == 4 else "grouped-query"
    olmo = "olmo 2 grouped" if comm.size == 4 else "olmo 2"
    directory = checkpoint({"llama": llama, "olmo 2": olmo}.get(family, family))
    sizes = {t: difference_from_transformers(comm, on_root, directory, topology=t)
             for t in topologies(comm.size)}  # fmt: skip
    assert all(found <= LIMIT for found in sizes.values()), sizes
    assert len(set(sizes.values())) == 1, f"not the same bits: {sizes}"


BLAS_TOO = ["grouped-query", "tied", "llama3 rope", "odd sizes", "bfloat16", "olmo 2 grouped",
            "olmo 3 yarn"]  # fmt: skip


@pytest.mark.parametrize("name", BLAS_TOO)
def test_plain_float32_blas_has_transformers_logits_too(comm, on_root, checkpoint, name):
    found = difference_from_transformers(comm, on_root, checkpoint(name), arith="blas")
    assert found <= LIMIT


def test_one_changed_weight_is_beyond_the_limit(comm, on_root, checkpoint, tmp_path_factory):
    """The comparison can fail: one matrix of another checkpoint moves the logits far away."""
    original = checkpoint("grouped-query")

    def change():
        from safetensors.numpy import load_file, save_file

        directory = tmp_path_factory.mktemp("changed")
        tensors = load_file(original / "model.safetensors")
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] += 1
        save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_bytes((original / "config.json").read_bytes())
        return directory

    changed = on_root(change)
    config = json.loads((original / "config.json").read_text())
    prompts, forced = prompts_of(config["vocab_size"]), forced_of(config["vocab_size"])
    request = Request(
        model=str(changed), tokens=N_STEPS,
        prompt_ids=tuple(",".join(map(str, ids)) for ids in prompts),
    )  # fmt: skip
    found = logits_of(comm, prepare(request, comm.size), forced)

    def compare():
        expected = reference_of(lambda ids: reference_models.logits(original, ids), prompts, forced)
        return float(np.abs(found - expected).max())

    assert on_root(compare) > 10 * LIMIT


@pytest.mark.parametrize("arith", ["exact", "blas"])
def test_the_embedded_model_continues_as_transformers_does(comm, arith, monkeypatch):
    """greedy.json holds 64 bytes a prompt, which transformers chose."""
    quick_fabric(monkeypatch)
    known = json.loads((EMBEDDED_MODEL / "greedy.json").read_text())
    request = Request(prompts=tuple(known), tokens=64, arith=arith)
    outcome = verify_distributed_inference(comm, prepare(request, comm.size))
    wrong = {}
    if comm.rank == 0:
        pairs = zip(known.items(), outcome.tokens.tolist())
        wrong = {text: bytes(found) for (text, expected), found in pairs if found != expected}
    assert outcome.verdict, str(outcome.verdict)
    assert not comm.bcast(wrong)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "olmo-2-1b"])
def test_seeded_published_shapes_have_transformers_logits(comm, on_root, name):
    """One layer at its real width and vocabulary: about 310 and 480 M weights."""
    config = published(name, 1)
    if comm.size != 2:
        pytest.skip("takes seconds and 4 GB: once is enough, at 2 ranks")
    prompts, forced = [np.array([1, config.vocab_size - 1, 77, 4096, 9])], np.array([[60000, 3]])
    ids = ",".join(map(str, prompts[0]))
    request = Request(config=name, layers=1, tokens=2, prompt_ids=(ids,))
    found = logits_of(comm, prepare(request, comm.size), forced)

    def compare():
        model = transformers_of(SeededCheckpoint(config))
        expected = reference_of(model, prompts, forced)
        assert np.abs(expected).max() > 1
        return float(np.abs(found - expected).max())

    difference = on_root(compare)
    assert difference <= LIMIT


def transformers_of(checkpoint):
    """transformers' model with the weights of a checkpoint; a function of ids to logits."""
    import torch

    c = checkpoint.config
    facts = reference_models.config_json(c)
    facts.pop("dtype")
    make_config, make_model = reference_models.classes(c.model_type)
    config = make_config(**facts, attn_implementation="eager")
    torch.set_num_threads(1)
    with torch.device("meta"):  # no weights of its own
        model = make_model(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    weights = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensors}
    if c.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)

    def logits(ids):
        with torch.no_grad():
            return model.eval()(torch.tensor([ids.tolist()])).logits[0].numpy()

    return logits
