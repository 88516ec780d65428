"""What a failed check can be a consequence of: data flow (docs/trace-locate.md).

``classify`` tells roots from consequences; ``reached_by`` says what one failure can have caused.
"""

from dataclasses import dataclass

import numpy as np

from spimpi.trace.analysis.order import (
    AFTER_LAYERS, FABRIC, INFERENCE, WEIGHTS, only_met, program_keys,
)  # fmt: skip
from spimpi.trace.schema import Op, Stage

# What a check compares. LOCAL: data of one rank with themselves, or a product with its actual
# inputs: never a consequence of other data. MOVED: what was sent with what arrived: a consequence
# only of a fault in that very data. VALUE: data with what they should have been.
LOCAL, MOVED, VALUE = range(3)
_KINDS = {Op.MATMUL: LOCAL, Op.AT_REST: LOCAL, Op.AGREEMENT: VALUE, Op.NONFINITE: VALUE}
ENDS = (Op.HANDOFF, Op.MESSAGE, Op.RING)  # ``peer`` is the sender, either end may be at fault
# Tensors that are made of another one's data, without a matmul or a norm between.
SAME_DATA = {
    "qk_max": "qkv", "qk_sum": "qkv", "qk_normed": "qkv", "kv": "qkv", "attn_max": "attn",
    "ffn_max": "ffn",
}  # fmt: skip
OF_ALL = (Stage.FABRIC, Stage.DATA, Stage.GOLDEN, Stage.PROGRAM)  # concern all data ranks
EVERY = -1  # of parts: all data ranks; of microbatches: all rows of the step


@dataclass(frozen=True)
class Flow:
    """What is known of a run's data flow.

    ``per_part``: ranks of one data-parallel part, which shares no data with the others; None where
    the topology is not known: any rank may then depend on any. ``tp``: tensor ranks, 0 unknown.
    """

    names: list[str]
    first_layered: int
    per_part: int | None = None
    tp: int = 0


@dataclass(frozen=True)
class Failures:
    """Failed checks in program order; all arrays have one entry a failure.

    ``code`` numbers the distinct places (repetition, phase, step, layer, tensor, op) in program
    order, ``datum`` the data that were checked; where they themselves are wrong, the failure is
    ``evident`` for later checks that they moved. ``blamed``: world rank at fault, -1 unknown.
    """

    columns: dict[str, np.ndarray]
    rank: np.ndarray
    phase: np.ndarray
    layer: np.ndarray
    code: np.ndarray
    datum: np.ndarray
    kind: np.ndarray
    evident: np.ndarray
    part: np.ndarray
    microbatch: np.ndarray
    blamed: np.ndarray

    def __len__(self) -> int:
        return len(self.rank)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]


def failures_of(columns: dict[str, np.ndarray], rank: np.ndarray, flow: Flow) -> Failures:
    """What data flow says of failed checks. ``columns``, ``rank``: sorted by ``program_order``."""
    keys = program_keys(columns, flow.first_layered, flow.names)
    repeat, phase, step, layer, tensor, _ = keys
    kind, part = _kinds(columns, phase), _parts(columns, rank, phase, flow.per_part)
    microbatch = _microbatches(columns, phase, layer)
    source, tokens = _sources(flow.names)
    own = columns["stage"] == Stage.PROGRAM  # whose tensors' names mean nothing here
    # Weights stay in memory: what is wrong with them is one thing for the whole run.
    weights = phase == WEIGHTS
    # Rows of the embedding are put together rightly only where all ranks look up the same tokens.
    looked_up = (phase == INFERENCE) & (columns["op"] == Op.ALLREDUCE_BOR) & ~own & (tokens >= 0)
    source = np.where(own, tensor, source[tensor])
    datum = (
        np.where(weights, 0, repeat), phase, np.where(weights, 0, step - looked_up),
        np.where(looked_up, AFTER_LAYERS, layer), np.where(looked_up, tokens, source),
        part, np.where(looked_up, EVERY, microbatch),
    )  # fmt: skip
    return Failures(
        columns, rank, phase, layer, _numbered(keys), _numbered(datum), kind,
        (kind != VALUE) | (~own & (tensor == tokens)), part, microbatch, blamed_ranks(columns, rank),
    )  # fmt: skip


def classify(failures: Failures) -> np.ndarray:
    """bool, one a failure: whether it is a root, which no earlier failure can have caused."""
    f, root = failures, np.zeros(len(failures), bool)
    root[f.kind == LOCAL] = True
    first = np.full(f.datum.max(initial=-1) + 1, len(f))
    np.minimum.at(first, f.datum[f.evident], f.code[f.evident])
    moved = f.kind == MOVED
    root[moved] = f.code[moved] <= first[f.datum[moved]]
    value = np.flatnonzero(f.kind == VALUE)
    root[value] = _earliest_that_reaches(f, tells(f))[value] >= f.code[value]
    return root


def tells(failures: Failures) -> np.ndarray:
    """bool, one a failure: whether later failures may be its consequence. A golden comparison is of
    all data ranks together: one that an earlier failure explains tells nothing of the others."""
    f, telling = failures, failures["stage"] != Stage.GOLDEN
    unexplained = _earliest_that_reaches(f, telling) >= f.code
    return telling | unexplained


def incidents(failures: Failures, root: np.ndarray) -> np.ndarray:
    """Numbers of what went wrong, one a root (in program order): checks of one tensor that blame
    the same rank saw the same."""
    f = failures
    keys = (f["repeat"], f.phase, f["step"], f.layer, f["tensor"], f.part, f.microbatch, f.blamed)
    numbers = _numbered([key[root] for key in keys])
    # Numbered by first appearance, which is program order also between tensors before and after.
    _, first, number = np.unique(numbers, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def reached_by(failures: Failures, at: int) -> np.ndarray:
    """bool, one a failure: whether failure ``at``, which ``tells``, can have caused it by data
    flow."""
    f = failures
    later = f.code > f.code[at]
    same_data = (f.kind == MOVED) & (f.datum == f.datum[at]) & f.evident[at]
    if f.phase[at] == FABRIC:
        return later & same_data
    meet = _meet(f.part[at], f.part)
    if f.phase[at] == WEIGHTS:
        return later & (same_data | ((f.kind == VALUE) & meet))
    meet &= f["repeat"] == f["repeat"][at]
    mine, theirs = f.microbatch[at], f.microbatch
    if f["step"][at] == 0:
        rows = (f["step"] > 0) | (theirs >= mine)
    else:
        rows = theirs == mine
    rows |= (theirs == EVERY) | (mine == EVERY)
    return later & (same_data | ((f.kind == VALUE) & meet & rows))


def _earliest_that_reaches(f: Failures, source: np.ndarray) -> np.ndarray:
    """Of each VALUE failure, the lowest code of those sources whose data can reach it (itself
    included)."""
    none = len(f)
    inference = source & (f.phase == INFERENCE)
    # A repetition and a part share no data with others, but for what concerns all parts.
    runs, run = np.unique(f["repeat"], return_inverse=True)
    parts, part = np.unique(np.append(EVERY, f.part), return_inverse=True)
    marks, mark = np.unique(np.append(EVERY, f.microbatch), return_inverse=True)
    part, mark = part[1:], mark[1:]
    prefill = np.full((len(runs), len(parts), len(marks)), none)
    later = prefill.copy()
    for table, chosen in (
        (prefill, inference & (f["step"] == 0)),
        (later, inference & (f["step"] > 0)),
    ):
        np.minimum.at(table, (run[chosen], part[chosen], mark[chosen]), f.code[chosen])
    weights = np.full(len(parts), none)
    chosen = f.phase == WEIGHTS
    np.minimum.at(weights, part[chosen], f.code[chosen])
    for table in (prefill, later):  # 0 is EVERY: it reaches all parts, and all reach it
        everywhere = table[:, :1].copy()
        table[:, 0] = table.min(axis=1)
        np.minimum(table, everywhere, out=table)
    weights = np.minimum(weights, weights[0])
    weights[0] = weights.min()
    any_prefill = prefill.min(axis=2)
    of_step_0 = np.minimum.accumulate(prefill, axis=2)  # of earlier rows, EVERY first
    of_later = np.minimum(later, np.minimum(any_prefill, later[:, :, 0])[:, :, None])
    of_every = np.minimum(any_prefill, later.min(axis=2))
    at = (run, part, mark)
    lowest = np.where(f["step"] == 0, of_step_0[at], of_later[at])
    lowest = np.where(f.microbatch == EVERY, of_every[run, part], lowest)
    return np.minimum(lowest, weights[part])


def _meet(one, other):
    return (one == other) | (one == EVERY) | (other == EVERY)


def _kinds(columns, phase) -> np.ndarray:
    kinds = np.array([_KINDS.get(op, MOVED) for op in Op] + [MOVED])
    kind = kinds[np.minimum(columns["op"], len(Op))]
    kind[columns["stage"] == Stage.GOLDEN] = VALUE
    kind[only_met(columns)] = VALUE
    # Before the inference no data flow from one tensor to another.
    kind[(phase != INFERENCE) & (kind == VALUE)] = MOVED
    return kind


def _parts(columns, rank, phase, per_part) -> np.ndarray:
    """The data rank whose prompts a check concerns."""
    if per_part is None:
        return np.full(len(rank), EVERY)
    of_all = np.isin(columns["stage"], OF_ALL)
    return np.where(of_all, EVERY, rank // per_part)


def _microbatches(columns, phase, layer) -> np.ndarray:
    """Whose rows a check concerns; tensors after the layers have a row a prompt, of all."""
    whole = (phase != INFERENCE) | (layer == AFTER_LAYERS)
    whole |= np.isin(columns["stage"], OF_ALL)
    return np.where(whole, EVERY, columns["microbatch"].astype(np.int64))


def blamed_ranks(columns, rank) -> np.ndarray:
    """World rank that a failure names as the one at fault, -1 where it names none."""
    local = np.isin(columns["op"], [op for op, kind in _KINDS.items() if kind == LOCAL])
    ends = np.isin(columns["op"], ENDS)
    return np.where(local, rank, np.where(ends, -1, columns["peer"])).astype(np.int64)


def _sources(names) -> tuple[np.ndarray, int]:
    """Row of /tensors whose data each row's are, by row; the row of the tokens, -1 if none."""
    rows = {name: row for row, name in enumerate(names)}
    sources = [rows.get(SAME_DATA.get(n, n.split(" ")[0]), row) for row, n in enumerate(names)]
    return np.array(sources + [len(names)] * (2**16 - len(names))), rows.get("tokens", -1)


def _numbered(keys) -> np.ndarray:
    """Numbers of the distinct rows of columns, in their order (the weightiest column first)."""
    if not len(keys[0]):
        return np.zeros(0, np.int64)
    order = np.lexsort(keys[::-1])
    new = np.zeros(len(order), bool)
    for key in keys:
        key = key[order]
        new[1:] |= key[1:] != key[:-1]
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(new)
    return numbers
