"""What a run says of itself, read from a file: of the kinds that spimpi writes, or it is damage.

Digests find faults, not forgers: a file whose digest is right may still say that it has 10^30 ranks.
Who reads a trace can rely on what has passed here.
"""

from dataclasses import fields
from math import isfinite

from spimpi.trace.schema import MOST_RANKS, RankInfo, TensorInfo

LATEST = 253_402_300_800  # seconds since the epoch: the year 10000
END_STATES = ("verified", "failed", "incomplete", "error")
INT64, UINT64 = range(-(2**63), 2**63), range(2**64)
DIMENSIONS = 64  # numpy's most


def _is_int(value, among=INT64) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in among


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_finite(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return _is_int(value) if isinstance(value, int) else isfinite(value)


def _list_of(of):
    return lambda value: isinstance(value, list) and all(map(of, value))


def _mapping_to(of):
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _is_count(value) -> bool:
    return _is_int(value, range(2**63))


# What spimpi writes of a run, and reads again; of other names anything may be there.
KNOWN = {
    "run_id": _is_text, "spimpi": _is_text, "command": _is_text, "model": _is_text,
    "identity": _is_text, "arithmetic": _is_text, "exo_rule": _is_text, "verdict": _is_text,
    "prompts_digest": _is_text, "expected_from": _is_text,
    "world": lambda value: _is_int(value, range(1, MOST_RANKS + 1)),
    "topology": lambda value: _is_text(value) or _mapping_to(_is_count)(value),
    "layer_sizes": _list_of(_is_count), "seed": lambda value: _is_int(value, UINT64),
    "prompts": _is_count, "prompt_tokens": _is_count, "new_tokens": _is_count, "runs": _is_count,
    "injected": _list_of(_is_text), "established": _list_of(_is_text),
    "clipped": _list_of(_is_text), "missing": _list_of(_is_text),
    "unchecked": _mapping_to(_is_count),
    "end_state": END_STATES.__contains__, "recovered": lambda value: isinstance(value, bool),
    "seconds": _mapping_to(_is_finite), "checking_seconds": _mapping_to(_is_finite),
    "sketches": lambda value: isinstance(value, bool) or _is_fingerprinted(value),
}  # fmt: skip


def _is_fingerprinted(value) -> bool:
    known = isinstance(value, dict) and set(value) == {"rows", "fingerprint"}
    return known and _is_count(value["rows"]) and _is_text(value["fingerprint"])


def sound_facts(facts: dict) -> tuple[dict, list[str]]:
    """The facts of a run that are of their kinds, and the names of the others."""
    others = [name for name, value in facts.items() if name in KNOWN and not _holds(name, value)]
    return {name: value for name, value in facts.items() if name not in others}, others


def _holds(name: str, value) -> bool:
    try:
        return KNOWN[name](value)
    except TypeError:  # such as a list among words
        return False


def is_rank(info: RankInfo) -> bool:
    """Whether a rank can be so: its fields of their kinds and within their limits."""
    for field in fields(RankInfo):
        kind = {int: _is_int, float: _is_finite, str: _is_text}[field.type]
        if field.name != "fingerprint" and not kind(getattr(info, field.name)):
            return False
    there = _is_int(info.fingerprint, UINT64) and 0 <= info.rank < MOST_RANKS
    return there and 0 <= info.started < LATEST and min(info.offset, info.count) >= 0


def tensor_of(row) -> TensorInfo:
    """A row of the table of tensors. ValueError where it is none."""
    if isinstance(row, list) and len(row) == 3:
        name, shape, dtype = row
        sizes = isinstance(shape, list) and len(shape) <= DIMENSIONS and all(map(_is_int, shape))
        if sizes and _is_text(name) and _is_text(dtype):
            return TensorInfo(name, shape, dtype)
    msg = "a row of the table of tensors is none"
    raise ValueError(msg)
