"""The global fingerprints that a trace holds: of whole tensors, whatever the topology.

Of ``spimpi verify``: those of its tensors (Stage.GOLDEN) and of its weights. Of a program: those
of checks whose fingerprint is a whole tensor's (``PROGRAM_OPS``). docs/trace-diff.md.
"""

from dataclasses import dataclass

import numpy as np

from spimpi.trace.analysis.order import first_layered_tensor, program_order
from spimpi.trace.analysis.summary import Failure, Failures
from spimpi.trace.analysis.unfinished import Shares
from spimpi.trace.journals.growing import OTHERS
from spimpi.trace.schema import Op, Stage, Status, blank_events

# A message's, a buffer's at rest and a matmul's fingerprint are of what one rank holds.
PROGRAM_OPS = (
    Op.ALLGATHER, Op.ALLREDUCE_SUM, Op.ALLREDUCE_MAX, Op.ALLREDUCE_MIN, Op.ALLREDUCE_BOR,
    Op.ALLREDUCE_BXOR, Op.BROADCAST, Op.AGREEMENT, Op.CONTENT, Op.GATHER, Op.SCATTER, Op.ALLTOALL,
    Op.RING, Op.REDUCE_SCATTER, Op.COLOURS,
)  # fmt: skip
CONTENT = np.dtype(
    [
        ("repeat", "<u2"),
        ("stage", "u1"),
        ("step", "<i4"),
        ("layer", "<i2"),
        ("tensor", "<u2"),
        ("op", "u1"),
        ("occurrence", "<u4"),
        ("changed", "?"),  # a check at rest found that it was no longer as it was made
        ("fingerprint", "<u8"),
    ]
)
PLACE = CONTENT.names[:-2]
MOST_VALUES = 64  # of one tensor; distinct ones come of groups of ranks that hold different data
SETTLE = 1 << 20  # rows that wait until they are put together


@dataclass(frozen=True)
class Contents:
    """``found``: global fingerprints in program order, dtype CONTENT; failed checks: how many, and
    the first in program order."""

    found: np.ndarray
    n_failed: int
    failure: Failure | None


def contents(trace) -> Contents:
    """The global fingerprints in a trace, and its own failures.

    Reads the trace once. A tensor of verify has the fingerprint that it was made with; where a
    check at rest failed, what changed in it since is in its fingerprint too. A program's tensor
    of which ranks recorded several values (one a group) has the XOR of the distinct ones, of the
    smallest MOST_VALUES.
    """
    made, changes, failed = _Distinct(), _Distinct(), Failures(trace, 1)
    occurrences, shares = _Occurrences(), Shares(trace, _packed)
    first_layered = len(trace.tensors)
    known = np.array([tensor != OTHERS for tensor in trace.tensors] + [False])
    for block in trace.blocks():
        first_layered = min(first_layered, first_layered_tensor(block))
        failed.add(block)
        changes.add(_changes(block))
        shares.add(block)
        wanted = _wanted(block)
        wanted &= known[np.minimum(block["tensor"], len(known) - 1)]
        block = block.where(wanted)
        if len(block):
            words = _packed(block)
            words["place"] |= occurrences.of(block, words)
            made.add(words)
    found = _with(made.by_place(), shares.whole(_unpacked))
    changed = changes.by_place()
    at, of = paired(found, changed)
    found["fingerprint"][at] ^= changed["fingerprint"][of]
    found["changed"][at] = True
    order = _order_of(found, first_layered)
    return Contents(found[order], failed.n_failed, next(iter(failed.first()), None))


# Two words that are a tensor's place, and its fingerprint. From the highest bit, ``run``: stage
# (8 bits), repeat (16), step (32); ``place``: layer + 1 (16), tensor (16), op (8), occurrence (24).
_WORDS = np.dtype([("run", "<u8"), ("place", "<u8"), ("fingerprint", "<u8")])
_MOST_OCCURRENCES = (1 << 24) - 1


_ODD = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)


def _empty() -> np.ndarray:
    return np.zeros(0, _WORDS)


def _wanted(block) -> np.ndarray:
    stage, op = block["stage"], block["op"]
    wanted = (stage == Stage.GOLDEN) & (op == Op.CONTENT)
    wanted |= (stage == Stage.WEIGHTS) & (op == Op.CONTENT)
    program = stage == Stage.PROGRAM
    if program.any():
        told = (block["fingerprint"] != 0) | (block["expected"] != 0)
        wanted |= program & np.isin(op, np.array(PROGRAM_OPS, op.dtype)) & told
    return wanted


def _packed(block) -> np.ndarray:
    def column(name, bits, shift, plus=0):
        values = block[name].astype(np.int64) + plus
        return (values.astype(np.uint64) & np.uint64((1 << bits) - 1)) << np.uint64(shift)

    words = np.empty(len(block), _WORDS)
    words["run"] = column("stage", 8, 48) | column("repeat", 16, 32) | column("step", 32, 0)
    words["place"] = column("layer", 16, 48, plus=1) | column("tensor", 16, 32) | column("op", 8, 24)
    words["fingerprint"] = block["fingerprint"]
    return words


def _changes(block) -> np.ndarray:
    """What changed in memory by checks at rest that failed, at the places of the whole tensors."""
    failed = (block["verdict"] == Status.FAILED) & (block["op"] == Op.AT_REST)
    block = block.where(failed & (block["stage"] == Stage.COMPUTE))
    block["stage"][:], block["op"][:] = Stage.GOLDEN, Op.CONTENT
    words = _packed(block)
    words["fingerprint"] ^= block["expected"]
    return words


class _Occurrences:
    """Counts a rank's checks of one tensor and op at one step: a program may make several."""

    def __init__(self):
        self.rank, self.seen = -1, _empty()

    def of(self, block, words) -> np.ndarray:
        """The number of each row, from 0; rows of verify have none."""
        numbers = np.zeros(len(words), np.uint64)
        program = np.flatnonzero(block["stage"] == Stage.PROGRAM)
        if not program.size:
            return numbers
        ranks = block["rank"][program]
        starts = np.flatnonzero(np.r_[True, ranks[1:] != ranks[:-1]])
        for start, stop in zip(starts, np.r_[starts[1:], len(ranks)]):
            if ranks[start] != self.rank:
                self.rank, self.seen = ranks[start], _empty()
            own = program[start:stop]
            numbers[own] = np.minimum(self._of_rank(words[own]), _MOST_OCCURRENCES)
        return numbers

    def _of_rank(self, words) -> np.ndarray:
        # ``seen`` has a row a place; in place of the fingerprint, how many there were.
        both = np.concatenate([self.seen, words])
        order = np.lexsort((both["place"], both["run"]))  # stable: what was seen comes first
        starts = _starts(both[order])
        lengths = np.diff(np.r_[starts, len(both)])
        is_seen = order[starts] < len(self.seen)
        before = np.zeros(len(starts), np.int64)
        before[is_seen] = self.seen["fingerprint"][order[starts[is_seen]]]
        numbers = np.empty(len(both), np.int64)
        numbers[order] = np.arange(len(both)) - np.repeat(starts + is_seen - before, lengths)
        result = numbers[len(self.seen) :]
        self.seen = both[order][starts]
        self.seen["fingerprint"] = before + lengths - is_seen
        return result


def _starts(words) -> np.ndarray:
    """Where a new place begins in sorted rows."""
    new = np.ones(len(words), bool)
    new[1:] = words["run"][1:] != words["run"][:-1]
    new[1:] |= words["place"][1:] != words["place"][:-1]
    return np.flatnonzero(new)


class _Distinct:
    """Rows, equal ones once; they are put together when many wait."""

    def __init__(self):
        self.rows, self.waiting, self.n_waiting = _empty(), [], 0

    def add(self, words) -> None:
        self.waiting.append(words)
        self.n_waiting += len(words)
        if self.n_waiting > SETTLE:
            self._settle()

    def _settle(self) -> None:
        rows = _once(np.concatenate([self.rows, *self.waiting]))
        self.rows, self.waiting, self.n_waiting = rows, [], 0
        if len(rows) > SETTLE:
            self.rows = _sorted(rows)

    def by_place(self) -> np.ndarray:
        """dtype CONTENT: one row a place, the XOR of its fingerprints."""
        self._settle()
        rows = _sorted(self.rows)
        starts = _starts(rows)
        if not starts.size:
            return np.zeros(0, CONTENT)
        words = np.bitwise_xor.reduceat(rows["fingerprint"], starts)
        return _unpacked(rows[starts], words)


def _once(words) -> np.ndarray:
    """Equal rows once, in some order. One sort of hashes: most ranks have the same rows."""
    hashes = words["run"] * _ODD[0] ^ words["place"] * _ODD[1] ^ words["fingerprint"] * _ODD[2]
    words = words[np.argsort(hashes)]
    return words[_differs_from_last(words)]


def _differs_from_last(words) -> np.ndarray:
    new = np.ones(len(words), bool)
    for name in _WORDS.names:
        new[1:] &= words[name][1:] == words[name][:-1]
    new[1:] = ~new[1:]
    return new


def _sorted(words) -> np.ndarray:
    """The rows sorted, equal ones once, at most the MOST_VALUES smallest values of a place."""
    words = words[np.lexsort((words["fingerprint"], words["place"], words["run"]))]
    if not len(words):
        return words
    words = words[_differs_from_last(words)]
    starts = _starts(words)
    position = np.arange(len(words)) - np.repeat(starts, np.diff(np.r_[starts, len(words)]))
    return words[position < MOST_VALUES]


def _unpacked(words, fingerprints) -> np.ndarray:
    """dtype CONTENT, of the places of ``words`` and these fingerprints."""
    found = np.zeros(len(words), CONTENT)
    run, place = words["run"], words["place"]
    for name, word, bits, shift in (
        ("stage", run, 8, 48), ("repeat", run, 16, 32), ("tensor", place, 16, 32),
        ("op", place, 8, 24), ("occurrence", place, 24, 0),
    ):  # fmt: skip
        found[name] = word >> np.uint64(shift) & np.uint64((1 << bits) - 1)
    found["step"] = run.astype(np.uint32).view(np.int32)
    found["layer"] = (place >> np.uint64(48)).astype(np.int64) - 1
    found["fingerprint"] = fingerprints
    return found


def _with(found, others) -> np.ndarray:
    """Both, the first where they have the same."""
    _, there = paired(found, others)
    return np.concatenate([found, np.delete(others, there)])


def _order_of(found, first_layered: int) -> np.ndarray:
    """Positions that sort rows of dtype CONTENT in program order."""
    events = blank_events(len(found))
    for name in ("repeat", "stage", "step", "layer", "tensor", "op"):
        events[name] = found[name]
    return program_order(events, found["occurrence"], first_layered)


def paired(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in ``a`` and in ``b`` of what both have; rows of any dtype with CONTENT's place
    columns (those that are there), each place once. In the order of ``a``."""
    names = [n for n in PLACE if n in a.dtype.names]
    keys = [np.concatenate([a[n], b[n]]) for n in names]
    of_b = np.r_[np.zeros(len(a), bool), np.ones(len(b), bool)]
    order = np.lexsort((of_b, *keys))
    same = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        same &= key[order][1:] == key[order][:-1]
    at = np.flatnonzero(same)
    mine, theirs = order[at], order[at + 1] - len(a)
    back = np.argsort(mine)
    return mine[back], theirs[back]
