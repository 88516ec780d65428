"""Two runs side by side: the first tensor that differs, and how the difference grows.

docs/trace-diff.md says what is compared and what is claimed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spimpi.distance import ERROR, distances, relative_distances
from spimpi.errors import IncompleteError, UsageError
from spimpi.trace.analysis.comparable import (
    NOTHING, OTHER, SUMS, compared, dtypes_of, remarks, rounds, runs_of, told, told_dtypes,
)  # fmt: skip
from spimpi.trace.analysis.contents import CONTENT, PLACE, TOKENS, Contents, contents, paired
from spimpi.trace.analysis.rounding import Judgement, first_jump, judge
from spimpi.trace.analysis.summary import Failure
from spimpi.trace.journals.growing import merged
from spimpi.trace.schema import Stage

SKETCHED = ("repeat", "step", "layer", "tensor")  # the place of a sketch

# A row of ``Difference.table``: one tensor of one step, in both runs. ``tensor``: an index into
# ``Difference.names``; ``a``, ``b``: the global fingerprints; ``relative``: ‖a - b‖ / ‖a‖ by the
# sketches, ``error`` its standard error, NaN where there are no sketches, infinite where NaN or
# Inf are in one of them and not in the other. ``changed_a``: A's check at rest found it changed in
# memory after it was made.
COMPARED = np.dtype(
    [(name, CONTENT[name]) for name in PLACE]
    + [("a", "<u8"), ("b", "<u8"), ("changed_a", "?"), ("changed_b", "?"), ("differs", "?")]
    + [("relative", "<f8"), ("error", "<f8")]
)


@dataclass(frozen=True)
class Side:
    """One of the runs. ``problems``: what its trace lacks; ``failure``: its first own failure."""

    path: Path
    attributes: dict
    ranks: int
    problems: tuple[str, ...]
    n_failed: int
    failure: Failure | None


@dataclass(frozen=True)
class Difference:
    """What a comparison of two runs found.

    ``table``: every tensor that both have, dtype COMPARED, in program order; ``first``: row of the
    first that differs, -1: none; ``judgement``: what kind of difference that is; ``jump``: first
    row at which the relative difference is more than JUMP times all before it, -1: none;
    ``diverged``: row of the first tokens that differ: later steps have other inputs; -1: none;
    ``notes``: what was not compared, and why; ``missing``: what should have been and could not be.
    Where there is either, nothing is called the same. ``remarks``: what equal fingerprints of the
    checks that were compared do not say.
    """

    a: Side
    b: Side
    names: tuple[str, ...]
    table: np.ndarray
    first: int
    judgement: Judgement
    jump: int
    diverged: int
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def n_differ(self) -> int:
        return int(self.table["differs"].sum())

    def by_layer(self) -> list[dict]:
        """How many tensors differ, by run, step and layer, in program order.

        Keys: ``repeat``, ``step``, ``layer``, ``part`` ("weights", "before", "layer", "after" the
        layers), ``compared``, ``differ``, ``relative`` (the largest known, else NaN).
        """
        table = self.table
        new = np.ones(len(table), bool)
        weights = table["stage"] == Stage.WEIGHTS
        layer = np.where(weights, -1, table["layer"])
        for column in (table["repeat"], table["step"], layer, weights):
            new[1:] &= column[1:] == column[:-1]
        new[1:] = ~new[1:]
        starts = np.flatnonzero(new)
        if not starts.size:
            return []
        differ = np.add.reduceat(table["differs"].astype(np.int64), starts)
        with np.errstate(invalid="ignore"):
            largest = np.fmax.reduceat(table["relative"], starts)
        lengths = np.diff(np.r_[starts, len(table)])
        parts, layered = [], set()
        for i in starts:
            step = table["repeat"][i], table["step"][i]
            part = "layer" if layer[i] >= 0 else "after" if step in layered else "before"
            parts.append("weights" if weights[i] else part)
            if part == "layer" and not weights[i]:
                layered.add(step)
        return [
            {"repeat": int(table["repeat"][i]), "step": int(table["step"][i]),
             "layer": int(layer[i]), "part": part, "compared": int(n), "differ": int(d),
             "relative": float(r)}
            for i, part, n, d, r in zip(starts, parts, lengths, differ, largest)
        ]  # fmt: skip

    @property
    def exit_status(self) -> int:
        if self.first >= 0:
            return 1
        return 3 if self.missing or self.notes else 0


def diff(a, b) -> Difference:
    """Compare two open traces (spimpi.trace.open), each read once. Local.

    UsageError where they are not of the same model, seed and prompts.
    """
    require_comparable(a, b)
    held_a, side_a = _side(a)
    held_b, side_b = _side(b)
    union, (_, numbers) = merged([a.tensors, b.tensors])  # A's first, in their order
    names = tuple(tensor.name for tensor in union)
    held_b.found["tensor"] = numbers[held_b.found["tensor"]]
    table, notes, alone = _paired(held_a, held_b, union, runs_of(a, b))
    dtypes = dtypes_of(a, b, names)[table["tensor"]]
    table["differs"] |= (table["stage"] == Stage.PROGRAM) & (dtypes == OTHER)
    notes += told_dtypes(table, dtypes)
    missing = [f"A: {line}" for line in a.problems] + [f"B: {line}" for line in b.problems]
    missing += _measure(table, a, b, numbers)
    more, lacking = _lonely(alone, (held_a.found, held_b.found), _is_program(a))
    notes += [line for name, trace in (("A", a), ("B", b)) for line in _unchecked(name, trace)]
    notes += more
    missing += lacking
    if not len(table):
        missing.append("no tensor of both traces could be compared")
    differing = np.flatnonzero(table["differs"])
    first = int(differing[0]) if differing.size else -1
    diverged, judgement, jump = -1, Judgement("same bits", None, None, None, ""), -1
    if first >= 0:
        is_tokens = np.array([name == TOKENS for name in names])[table["tensor"]]
        tokens = np.flatnonzero(is_tokens & (table["stage"] == Stage.GOLDEN) & table["differs"])
        diverged = int(tokens[0]) if tokens.size else -1
        judgement = _judged(table[first], union, a, b, dtypes[first] == OTHER)
        jump = first_jump(table["relative"][: diverged + 1 if diverged >= 0 else None])
    return Difference(
        side_a, side_b, names, table, first, judgement, jump, diverged, tuple(notes),
        tuple(missing), tuple(remarks(table, dtypes)),
    )  # fmt: skip


def _paired(held_a: Contents, held_b: Contents, tensors, runs):
    """(the table of what can be compared, what can't, in words, rows that each has alone)."""
    at, of = paired(held_a.found, held_b.found)
    alone = np.delete(held_a.found, at), np.delete(held_b.found, of)
    found_a, found_b = held_a.found[at], held_b.found[of]
    differs, why = compared(found_a, found_b, tensors, runs)
    notes = told(found_a, why)
    n_beyond = max(held_a.n_beyond, held_b.n_beyond)
    if n_beyond:
        notes.append(f"{n_beyond:,} not compared: checks of tensors beyond the trace's table")
    table = np.zeros(int((why == NOTHING).sum()), COMPARED)
    for name in PLACE:
        table[name] = found_a[name][why == NOTHING]
    for side, found in (("a", found_a[why == NOTHING]), ("b", found_b[why == NOTHING])):
        table[side], table[f"changed_{side}"] = found["fingerprint"], found["changed"]
    table["differs"] = differs[why == NOTHING]
    table["relative"] = table["error"] = np.nan
    return table, notes, alone


def _judged(row, tensors, a, b, other_dtype: bool) -> Judgement:
    """What the first difference is."""
    if row["stage"] == Stage.PROGRAM and other_dtype:
        name = tensors[row["tensor"]].name
        dtypes = [next(t.dtype for t in trace.tensors if t.name == name) for trace in (a, b)]
        reason = f"its dtype is {dtypes[0]} in A, {dtypes[1]} in B"
        return Judgement("different", None, None, None, reason)
    if row["stage"] == Stage.PROGRAM and row["a"] == row["b"]:
        reason = "both runs have the same fingerprints, on other ranks: their data were exchanged"
        return Judgement("different", None, None, 0.0, reason)
    tensor, widths = tensors[row["tensor"]], {t.name: t.shape[-1] for t in a.tensors if t.shape}
    if row["stage"] == Stage.PROGRAM and row["op"] in SUMS and rounds(tensor.dtype):
        reason = "a sum of floats: its last bits depend on the order of the addends"
        return Judgement("", None, None, None, reason)
    changed = [which for which in "AB" if row[f"changed_{which.lower()}"]]
    return judge(
        tensor.name, float(row["relative"]), float(row["error"]), a.attributes, b.attributes,
        widths, changed, row["stage"] == Stage.WEIGHTS,
    )  # fmt: skip


def _is_program(trace) -> bool:
    return "model" not in trace.attributes


def require_comparable(a, b) -> None:
    """UsageError unless the runs are of the same model, seed and prompts. Unknown is equal."""
    told = all(trace.attributes for trace in (a, b))  # journals without a header tell nothing
    if told and _is_program(a) != _is_program(b):
        kinds = ["a program" if _is_program(t) else "spimpi verify" for t in (a, b)]
        msg = f"{a.path} is the trace of {kinds[0]}, {b.path} of {kinds[1]}: nothing is in both"
        raise UsageError(msg)
    ours, theirs = a.attributes, b.attributes
    for what, names in (
        ("seed", ("seed",)),  # it is in every fingerprint
        ("model", ("identity", "model")),
        ("prompts", ("prompts_digest", "prompts", "prompt_tokens")),
    ):
        for name in names:
            x, y = ours.get(name), theirs.get(name)
            if x in (None, "") or y in (None, "") or x == y:
                continue
            if name == "model" and ours.get("identity") and theirs.get("identity"):
                continue  # the name is the directory's
            told = [_told(what, t.attributes, name) for t in (a, b)]
            msg = f"{a.path} is of {what} {told[0]}, {b.path} of {told[1]}: they cannot be compared"
            raise UsageError(msg)


def _told(what: str, attributes: dict, name: str) -> str:
    if what == "model":
        return f"{attributes.get('model')} ({attributes.get('identity')})"
    if name == "prompts_digest":
        return f"{attributes[name]} ({attributes.get('prompts')} prompts)"
    unit = {"prompts": " prompts", "prompt_tokens": " prompt tokens"}.get(name, "")
    return f"{attributes[name]}{unit}"


def _side(trace) -> tuple[Contents, Side]:
    held = contents(trace)
    side = Side(
        trace.path, trace.attributes, len(trace.ranks), tuple(trace.problems), held.n_failed,
        held.failure,
    )  # fmt: skip
    return held, side


def _measure(table, a, b, numbers) -> list[str]:
    """Relative differences by the sketches of both, where there are; what was wrong with them."""
    try:
        ours, theirs = a.sketches(), b.sketches().copy()
    except IncompleteError as error:
        return [str(error)]
    if not len(ours) or not len(theirs):
        return []
    theirs["tensor"] = numbers[theirs["tensor"]]
    mine, others = paired(ours, theirs)
    ours, theirs = ours[mine], theirs[others]
    golden = np.flatnonzero(table["stage"] == Stage.GOLDEN)
    rows, at = paired(table[golden][list(SKETCHED)], ours[list(SKETCHED)])
    rows, ours, theirs = golden[rows], ours[at], theirs[at]
    found = relative_distances(
        distances(ours["projections"], theirs["projections"]), np.sqrt(ours["sumsq"])
    )
    found[ours["nonfinite"] != theirs["nonfinite"]] = np.inf
    found[~table["differs"][rows]] = 0.0
    table["relative"][rows], table["error"][rows] = found, found * ERROR
    return []


def _lonely(alone, found, program: bool) -> tuple[list[str], list[str]]:
    """(notes, missing): tensors that one of the traces has alone."""
    notes, missing = [], []
    runs = [_runs(rows) for rows in found]
    if bool(runs[0].size) != bool(runs[1].size):
        lacks = "A" if not runs[0].size else "B"
        missing.append(
            f"{lacks} has no intact fingerprints of whole tensors of the inference: rank 0 writes "
            "them when it ends"
        )
    elif not np.array_equal(*runs):
        both = len(np.intersect1d(*runs))
        notes.append(
            f"A has {len(runs[0])} steps, B {len(runs[1])}: the {both} that both have are compared"
        )
    for name, rows, others in zip("AB", alone, reversed(runs)):
        of_weights = rows["stage"] == Stage.WEIGHTS
        common = np.isin(_keys(rows), others) & _of_inference(rows)
        if of_weights.any():
            notes.append(f"{int(of_weights.sum())} weights are in {name} alone")
        if common.any():
            kept = notes if program else missing
            kept.append(f"{int(common.sum())} tensors of common steps are in {name} alone")
    return notes, missing


def _unchecked(name: str, trace) -> list[str]:
    """What a program did that its trace has no fingerprints of."""
    if not _is_program(trace):
        return []
    lines = []
    if calls := trace.attributes.get("unchecked"):
        told = ", ".join(f"{call} ({n:,})" for call, n in calls.items())
        lines.append(f"calls of {name} that no check looked at: {told}")
    if trace.attributes.get("recovered"):  # its end, at which they are counted, was not reached
        lines.append(f"which calls of {name} no check looked at is not known: it was recovered")
    return lines


def _of_inference(rows) -> np.ndarray:
    """Tensors that any topology has; verify's own checks of tokens depend on it."""
    return np.isin(rows["stage"], (Stage.GOLDEN, Stage.PROGRAM))


def _keys(rows) -> np.ndarray:
    return rows["repeat"].astype(np.int64) << 32 | rows["step"]


def _runs(rows) -> np.ndarray:
    return np.unique(_keys(rows[_of_inference(rows)]))
