"""Checkpoints: config.json, headers of safetensors, the index of shards, manifests."""

import hashlib
import json

import damage
from cases import Case, fresh, kind, link
from hostile import Again, Edit, Raw, draw_edits, dumps, edited, loads_or_none, value
from sound import RUN, header_and_data, safetensors, tensors

VERIFY = ("verify", "--model", "model", *RUN, "--no-trace")


def _command(rng, model="model"):
    """One of the commands that read a checkpoint."""
    return rng.choices(
        (
            ("verify", "--model", model, *RUN, "--no-trace"),
            ("manifest", "make", model, "-o", "made.json"),
            ("manifest", "check", "manifest.json", model),
            ("golden", "--model", model, *RUN, "-o", "made.h5"),
            ("verify", "--model", model, *RUN, "--no-trace", "--manifest", "manifest.json"),
        ),
        (8, 2, 2, 1, 1),
    )[0]


def _knows(argv) -> bool:
    """Whether the command compares with fingerprints that were taken of the sound files."""
    return "manifest.json" in argv


@kind(18)
def config(rng, sound):
    tree = json.loads((sound / "model/config.json").read_text())
    if rng.random() < 0.3:  # fields that a sound one may have
        tree["rope_parameters"] = rng.choice((
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 8.0,
             "beta_slow": 1.0, "original_max_position_embeddings": 64},
        ))  # fmt: skip
        tree["sliding_window"] = None
        tree["layer_types"] = ["full_attention"] * 2

    def write(folder, changes):
        link(sound, folder, "model", "manifest.json")
        fresh(folder / "model/config.json", dumps(edited(tree, changes)))

    return Case("config", _command(rng), tuple(draw_edits(rng, tree)), write)


@kind(12)
def header(rng, sound):
    tree, data = header_and_data(tensors())
    argv = _command(rng)
    changes = tuple(draw_edits(rng, tree))
    length = value(rng, 1) if rng.random() < 0.1 else None
    length = length if type(length) is int else None

    def write(folder, changes):
        link(sound, folder, "model", "manifest.json")
        text = dumps(edited(tree, changes))
        fresh(folder / "model/model.safetensors", safetensors(text, data, length))

    return Case("header", argv, changes, write, _knows(argv))


@kind(8)
def index(rng, sound):
    tree = json.loads((sound / "sharded/model.safetensors.index.json").read_text())
    argv = _command(rng, "sharded")

    def write(folder, changes):
        link(sound, folder, "sharded", "manifest.json")
        fresh(folder / "sharded/model.safetensors.index.json", dumps(edited(tree, changes)))

    return Case("index", argv, tuple(draw_edits(rng, tree)), write, _knows(argv))


@kind(12)
def manifest(rng, sound):
    tree = json.loads((sound / "manifest.json").read_text())
    argv = rng.choice(
        (("manifest", "check", "manifest.json", "model"), (*VERIFY, "--manifest", "manifest.json"))
    )

    def write(folder, changes):
        link(sound, folder, "model")
        changed = edited(tree, changes)
        text = dumps(changed)
        values = loads_or_none(text)
        if isinstance(values, dict) and not any(_of_checksum(edit) for edit in changes):
            values.pop("checksum", None)
            # As docs/manifest.md says: SHA-256 of the JSON without it, keys sorted.
            changed["checksum"] = _checksum(values)
            text = dumps(changed)
        fresh(folder / "manifest.json", text)

    return Case("manifest", argv, tuple(draw_edits(rng, tree)), write, True)


def _of_checksum(edit) -> bool:
    return isinstance(edit, Edit) and edit.path[0] == "checksum"


def _checksum(values) -> str:
    try:
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return "0" * 64
    return hashlib.sha256(text.encode()).hexdigest()


@kind(6)
def many_names(rng, sound):
    """Tables of many entries, some of them doubled."""
    many = rng.choice((1000, 10_000, 30_000))
    what = rng.choice(("header", "index", "manifest"))
    names = [f"model.layers.{i}.x" for i in range(many)]
    doubled = rng.random() < 0.5
    entry = {
        "header": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        "index": "model.safetensors",
        "manifest": ["F32", [1], "0" * 16],
    }[what]
    table = {Again(name): entry for name in names}
    if doubled:
        table[Again(names[0])] = entry
    change = f"{many} names in the {what}{', one of them twice' if doubled else ''}"
    argv = VERIFY if what != "manifest" else ("manifest", "check", "manifest.json", "model")
    if what != "manifest" and rng.random() < 0.5:
        argv = ("manifest", "make", "model", "-o", "made.json")

    def write(folder, changes):
        link(sound, folder, "model", "manifest.json")
        if not changes:
            return
        model = folder / "model"
        if what == "header":
            fresh(model / "model.safetensors", safetensors(dumps(table), b""))
        elif what == "index":
            fresh(model / "model.safetensors.index.json", dumps({"weight_map": table}))
            (model / "model.safetensors").unlink()
        else:
            facts = {"spimpi_manifest": 1, "fingerprint": 1, "seed": 1069, "tensors": table}
            facts["checksum"] = _checksum(loads_or_none(dumps(facts)))
            fresh(folder / "manifest.json", dumps(facts))

    return Case("many_names", argv, (change,), write, what == "manifest")


@kind(8)
def checkpoint_files(rng, sound):
    """A file of a checkpoint, damaged as a whole."""
    files = {
        "model": ("model/config.json", "model/model.safetensors", "manifest.json"),
        "sharded": (
            "sharded/config.json", "sharded/model.safetensors.index.json",
            "sharded/model-00001-of-00002.safetensors", "manifest.json",
        ),
    }  # fmt: skip
    model = rng.choice(tuple(files))
    argv = _command(rng, model)
    file, how = rng.choice(files[model]), damage.draw(rng)

    def write(folder, changes):
        link(sound, folder, model, "manifest.json")
        for name, done in changes:
            damage.apply(folder / name, done)

    # Bytes of weights that differ are corruption where a manifest knows them.
    return Case("checkpoint_files", argv, ((file, how),), write, _knows(argv))


RAW_JSON = (Raw("["), Raw("[" * 100_000), Raw("{" * 5), Raw('"'), Raw("\x00"), Raw("\ufeff{}"), Raw("5"), Raw("[]"), Raw("null"))


@kind(3)
def whole_json(rng, sound):
    """In the place of a JSON file: something else altogether."""
    file = rng.choice(("model/config.json", "manifest.json"))
    argv = _command(rng) if file != "manifest.json" else ("manifest", "check", "manifest.json", "model")
    text = rng.choice(RAW_JSON)

    def write(folder, changes):
        link(sound, folder, "model", "manifest.json")
        for one in changes:
            fresh(folder / file, str.__str__(one))

    return Case("whole_json", argv, (text,), write, _knows(argv))
