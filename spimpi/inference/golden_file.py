"""The facts in a golden file, each looked at: its kind, its size, what it says of the others."""

import json
import os
from pathlib import Path

import numpy as np

from spimpi.errors import UsageError
from spimpi.hdf5_guard import open_hdf5, own_attribute, own_numbers
from spimpi.in_child import in_child
from spimpi.inference.model_config import MOST_LAYERS
from spimpi.inference.tensors import golden_columns
from spimpi.json_file import is_size, parse_json
from spimpi.printable import one_line
from spimpi.trace.checksum import text_digest

SCHEMA = "spimpi-golden-1"
# What reading a file may take: HDF5 crashes on some damaged files, and believes what others say.
MEMORY = 1 << 28  # bytes, beside 8 times the file's
SECONDS, SPEED = 10, 1 << 24  # of processor time; bytes a second beyond
LONGEST_TEXT = 4096  # characters of a name
# What an origin may say, and of what kind.
ORIGIN = {"model": str, "config": str, "layers": int}


def digest(facts: dict) -> str:
    """Of all that ``read_facts`` gives: a file with a flipped bit must not read as another run."""
    facts = dict(facts)
    arrays = [facts.pop(name) for name in ("table", "tokens", "weights")]
    text = [json.dumps(facts, sort_keys=True).encode()]
    for array in arrays:
        if array is not None:
            text += str(array.shape).encode(), array.astype("<u8").tobytes()
    return text_digest(b"\n".join(text))


def read_facts(path, shipped: bool = False) -> dict:
    """What a golden file says: model, identity, arithmetic, seed, n_layers, origin, prompts, table,
    tokens and weights (None in files of before). UsageError where it is none, or damaged. Local.

    Files of before have no digest; the one that is ``shipped`` with this package must.
    """
    advice = "install spimpi again" if shipped else "make one with `spimpi golden`"
    path = Path(path)
    name = one_line(path, 250)
    try:
        found = "a directory" if path.is_dir() else "" if path.exists() else "nothing"
    except (OSError, ValueError) as error:
        msg = f"no golden file {name}: {getattr(error, 'strerror', None) or error}"
        raise UsageError(msg) from None
    if found:
        msg = f"no golden file {name}, found {found} there: {advice}"
        raise UsageError(msg)
    try:
        size = os.path.getsize(path)
        import h5py  # noqa: F401  once, not in each child

        memory, seconds = MEMORY + 8 * size, SECONDS + size // SPEED
        return in_child(lambda: _read(path, name, shipped, advice), memory, seconds)
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        why = one_line(getattr(error, "strerror", None) or error, 150)
        msg = f"{name} is no readable golden file ({why}): {advice}"
        raise UsageError(msg) from None


def _read(path: Path, name: str, shipped: bool, advice: str) -> dict:
    with open_hdf5(path) as file:
        schema = _text(file, "schema") if "schema" in file.attrs else "none"
        if schema != SCHEMA:
            msg = (
                f"{name} is not a golden file: expected schema {SCHEMA}, found "
                f"{one_line(schema, 60)}"
            )
            raise UsageError(msg)
        facts = _facts(file)
        if shipped or "digest" in file.attrs:
            found, expected = _text(file, "digest"), digest(facts)
            if found != expected:
                msg = (
                    f"{name}: this golden file is damaged: its digest is {one_line(found, 60)}, "
                    f"that of its content is {expected}: {advice}"
                )
                raise UsageError(msg)
        return facts


def _facts(file) -> dict:
    facts = {field: _text(file, field) for field in ("model", "identity", "arithmetic")}
    facts["seed"] = _whole(file, "seed", 2**64 - 1)
    n_layers = facts["n_layers"] = _whole(file, "n_layers", MOST_LAYERS)
    facts["origin"] = _origin(_json(file, "origin"))
    prompts = facts["prompts"] = _prompts(_json(file, "prompts"))
    table, tokens = own_numbers(file, "fingerprints"), own_numbers(file, "tokens")
    columns = len(golden_columns(n_layers)) if n_layers <= table.shape[-1] else 0
    if table.dtype != np.uint64 or table.ndim != 2 or table.shape[1] != columns:
        msg = (
            f"expected {columns or 'more'} fingerprints a step for its {n_layers} layers, found "
            f"{table.dtype} {list(table.shape)}"
        )
        raise ValueError(msg)
    if tokens.dtype.kind not in "iu" or tokens.shape != (len(prompts), len(table)):
        msg = (
            f"expected tokens of {len(prompts)} prompts and {len(table)} steps, found "
            f"{tokens.dtype} {list(tokens.shape)}"
        )
        raise ValueError(msg)
    facts["table"], facts["tokens"], facts["weights"] = table[:], tokens[:], _weights(file)
    return facts


def _weights(file):
    if "weights" not in file:
        return None
    words = own_numbers(file, "weights")
    if words.dtype != np.uint64 or words.ndim != 1:
        msg = f"expected a fingerprint for each weight, found {words.dtype} {list(words.shape)}"
        raise ValueError(msg)
    return words[:]


def _text(file, field: str) -> str:
    found = own_attribute(file, field)
    if not isinstance(found, str) or len(found) > LONGEST_TEXT:
        msg = f"{field} must be a short text, found {one_line(repr(found), 60)}"
        raise ValueError(msg)
    return found


def _whole(file, field: str, most: int) -> int:
    """A whole number from 0 on."""
    found = own_attribute(file, field)
    if not isinstance(found, np.integer) or not 0 <= int(found) <= most:
        msg = f"{field} must be a whole number from 0 to {most}, found {one_line(repr(found), 60)}"
        raise ValueError(msg)
    return int(found)


def _json(file, field: str):
    found = own_attribute(file, field)
    if not isinstance(found, str):
        msg = f"{field} must be text, found {one_line(repr(found), 60)}"
        raise ValueError(msg)
    return parse_json(found)


def _origin(value) -> dict:
    """Where the model is from: those three fields, of their kinds, and nothing else."""
    fits = isinstance(value, dict) and all(
        type(found) is ORIGIN.get(field) for field, found in value.items()
    )
    fits = fits and all(len(v) <= LONGEST_TEXT for v in value.values() if isinstance(v, str))
    if not fits:
        kinds = ", ".join(f"{field} ({kind.__name__})" for field, kind in ORIGIN.items())
        msg = f"origin may have {kinds}, found {one_line(json.dumps(value), 60)}"
        raise ValueError(msg)
    return value


def _prompts(value) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not all(
        isinstance(prompt, list) and prompt and all(map(is_size, prompt)) for prompt in value
    ):
        msg = f"prompts must be lists of token ids, found {one_line(json.dumps(value), 60)}"
        raise ValueError(msg)
    return tuple(map(tuple, value))
