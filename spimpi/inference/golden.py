"""Golden tables: the fingerprint of every checked tensor of every step, and their files.

A table is uint64 [steps, columns]; tensors.golden_columns names the columns. It is the same for
every topology, so one written on one rank is what any other run must reproduce.
"""

import io
import json
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from time import perf_counter

import numpy as np

from spimpi.errors import IncompleteError, UsageError
from spimpi.inference.exact import ARITHMETIC
from spimpi.inference.golden_file import SCHEMA, digest, read_facts
from spimpi.inference.tensors import golden_columns
from spimpi.printable import one_line
from spimpi.reduction import reduce_fingerprints
from spimpi.trace.schema import Established, Op, Stage, Status, blank_events
from spimpi.whole_file import whole_file

EMBEDDED_GOLDEN = Path(__file__).parent.parent / "models" / "tiny" / "golden.h5"


@dataclass(frozen=True)
class Workload:
    """What determines a golden table: the model, the seed, the prompts and the step count."""

    model: str
    identity: str
    seed: int
    n_steps: int
    prompts: tuple[tuple[int, ...], ...]
    arithmetic: str = ARITHMETIC

    @classmethod
    def of(cls, config, checkpoint, seed, n_steps, prompts):
        ids = tuple(tuple(int(i) for i in p) for p in prompts)
        return cls(config.name, checkpoint.identity(), seed, n_steps, ids)


@dataclass(frozen=True)
class Golden:
    """A golden run: its workload, table, and the tokens that it chose [prompts, steps].

    origin: where the model came from, {"model": directory}, {"config": name, "layers": n}, or {}
    for the embedded one: a run that names only the golden file takes it from there.
    weights: the fingerprint of every tensor of the checkpoint in its order, uint64, by which a run
    knows every byte of the weights; None in files of before, whose ``identity`` alone names them.
    """

    workload: Workload
    n_layers: int
    table: np.ndarray
    tokens: np.ndarray
    source: str
    origin: dict = field(default_factory=dict)
    weights: np.ndarray | None = None


def write(path, golden: Golden, overwrite: bool = False) -> None:
    """Write a golden file, as a whole or not at all; UsageError where it exists (unless
    ``overwrite``) or cannot be written. Local."""
    import h5py

    w, made = golden.workload, io.BytesIO()
    with h5py.File(made, "w") as file:
        file.attrs["schema"] = SCHEMA
        file.attrs["model"], file.attrs["identity"] = w.model, w.identity
        file.attrs["seed"], file.attrs["arithmetic"] = np.uint64(w.seed), w.arithmetic
        file.attrs["n_layers"] = golden.n_layers
        file.attrs["origin"] = json.dumps(golden.origin)
        file.attrs["prompts"] = json.dumps(w.prompts)
        columns = [f"{name}:{layer}" for name, layer in golden_columns(golden.n_layers)]
        file.attrs["columns"] = json.dumps(columns)
        file.attrs["digest"] = digest(_facts(golden))
        # HDF5's own checksum beside it: other programs that read the file see damage too.
        file.create_dataset("fingerprints", data=golden.table, fletcher32=True)
        file["tokens"] = golden.tokens
        if golden.weights is not None:
            file.create_dataset("weights", data=golden.weights, fletcher32=True)
    with whole_file(path, overwrite) as file:
        file.write(made.getbuffer())


def _facts(golden: Golden) -> dict:
    """What ``read_facts`` will find in its file."""
    w = golden.workload
    return {
        "model": w.model, "identity": w.identity, "arithmetic": w.arithmetic, "seed": int(w.seed),
        "n_layers": golden.n_layers, "origin": golden.origin, "prompts": w.prompts,
        "table": golden.table, "tokens": golden.tokens, "weights": golden.weights,
    }  # fmt: skip


def read(path, shipped: bool = False) -> Golden:
    """Read a golden file. UsageError where it is none, or damaged; ``shipped``: it is this
    package's own, which has a digest. Local."""
    facts = read_facts(path, shipped)
    workload = Workload(
        facts["model"], facts["identity"], facts["seed"], len(facts["table"]), facts["prompts"],
        facts["arithmetic"],
    )  # fmt: skip
    return Golden(
        workload, facts["n_layers"], facts["table"], facts["tokens"], one_line(path, 200),
        facts["origin"], facts["weights"],
    )  # fmt: skip


def require_same(golden: Golden, workload: Workload) -> None:
    """Raise UsageError unless the golden run was of this workload; more steps there are fine."""
    ours, theirs = workload, golden.workload
    for what, found, expected, advice in (
        ("arithmetic", ours.arithmetic, theirs.arithmetic, "make a new one with `spimpi golden`"),
        # Seeded weights are of a seed, so a seed is looked at before a model.
        ("seed", ours.seed, theirs.seed, f"run with --seed {theirs.seed}"),
        ("model", f"{ours.model} ({ours.identity})", f"{theirs.model} ({theirs.identity})",
         "give that model (--model, --config), or make a new one where its files were changed"),
    ):  # fmt: skip
        differs = ours.identity != theirs.identity if what == "model" else found != expected
        if differs:
            msg = f"{golden.source} was made with {what} {expected}, this run has {found}: {advice}"
            raise UsageError(msg)
    if ours.prompts != theirs.prompts:
        pairs = enumerate(zip_longest(theirs.prompts, ours.prompts))
        first, (expected, found) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        msg = (
            f"{golden.source} was made with other prompts: {len(theirs.prompts)} there, "
            f"{len(ours.prompts)} in this run, prompt {first} is {_ids(expected)} there and "
            f"{_ids(found)} here; run with those, or make a golden file for these"
        )
        raise UsageError(msg)
    if ours.n_steps > theirs.n_steps:
        msg = (
            f"{golden.source} has {theirs.n_steps} tokens a prompt, this run asks for "
            f"{ours.n_steps}: use --tokens {theirs.n_steps} or make a longer golden run"
        )
        raise UsageError(msg)


def _ids(prompt) -> str:
    if prompt is None:
        return "missing"
    more = ",…" if len(prompt) > 16 else ""
    return f"{','.join(map(str, prompt[:16]))}{more} ({len(prompt)} ids)"


def fits(golden: Golden, workload: Workload) -> bool:
    """Whether ``require_same`` would accept it."""
    try:
        require_same(golden, workload)
    except UsageError:
        return False
    return True


def global_table(comm, table: np.ndarray) -> np.ndarray:
    """The run's golden table, from every rank's shares. Collective."""
    flat = reduce_fingerprints(comm, [int(w) for w in table.ravel()])
    return np.array(flat, np.uint64).reshape(table.shape)


def record(table, n_layers: int, recorder, repeat=0) -> None:
    """Note a run's global table where there is nothing to compare it with, an event a tensor.

    Such events are no checks: they establish nothing, and serve to compare two traces. Local.
    """
    columns = golden_columns(n_layers)
    names, layers = zip(*columns)
    events = blank_events(table.size)
    events["step"] = np.repeat(np.arange(len(table)), len(columns))
    events["layer"] = np.tile(layers, len(table))
    events["tensor"] = np.tile([recorder.tensor_index[name] for name in names], len(table))
    events["fingerprint"] = table.ravel()
    for name, value in (
        ("repeat", repeat), ("microbatch", 0), ("stage", Stage.GOLDEN), ("op", Op.CONTENT),
        ("verdict", Status.NOT_ESTABLISHED), ("t_start", perf_counter()), ("t_end", perf_counter()),
    ):  # fmt: skip
        events[name] = value
    recorder.add(events, {})


def compare(table, golden: Golden, recorder, repeat=0, tokens=None) -> int:
    """Compare a run's global table with the golden one, an event a tensor; returns mismatches.

    ``tokens`` [prompts, steps]: the run's, compared with the golden run's beside their words.
    Local: rank 0 does it. Every fingerprint is compared, none is sampled.
    """
    if table.shape[1] != golden.table.shape[1]:
        msg = f"{golden.source} has {golden.table.shape[1]} tensors a step, found {table.shape[1]}"
        raise IncompleteError(msg)
    columns = golden_columns(golden.n_layers)
    wrong = 0
    for step in range(table.shape[0]):
        for column, (tensor, layer) in enumerate(columns):
            found, expected = table[step, column], golden.table[step, column]
            differs = bool(found != expected)
            if tensor == "tokens" and tokens is not None and not differs:
                differs = not np.array_equal(tokens[:, step], golden.tokens[:, step])
                if differs:
                    recorder.note(step, 0, -1, "the tokens differ from the golden run's own")
            wrong += differs
            recorder.one(
                tensor, Op.CONTENT, Stage.GOLDEN, Established.EXPECTED, found, expected, differs,
                t_start=perf_counter(), step=step, layer=layer, repeat=repeat, bytes=8,
            )  # fmt: skip
    return wrong
