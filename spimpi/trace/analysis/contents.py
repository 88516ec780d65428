"""The fingerprints that a trace holds of the data of its run, by place in the program.

Of ``spimpi verify``: those of its whole tensors (Stage.GOLDEN) and of its weights. Of a program:
those that its checks left (docs/trace-diff.md). analysis/comparable.py says which of two runs can
be compared.
"""

from dataclasses import dataclass

import numpy as np

from spimpi.trace.analysis.order import first_layered_tensor, program_order
from spimpi.trace.analysis.places import (
    WORDS, Distinct, Gathered, Occurrences, mixed, packed, starts_of, unpack,
)  # fmt: skip
from spimpi.trace.analysis.summary import Failure, Failures
from spimpi.trace.analysis.unfinished import Shares
from spimpi.trace.journals.growing import OTHERS
from spimpi.trace.schema import HELD_BY_ONE, Op, Stage, Status, blank_events

# Where such a check of a program holds, each rank's fingerprint is its share of the whole tensor's.
SHARED = (Op.GATHER, Op.SCATTER, Op.ALLTOALL, Op.RING, Op.REDUCE_SCATTER)
TOKENS = "tokens"  # of verify; compared whichever check recorded them
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
        ("fingerprint", "<u8"),  # the XOR of the distinct ones, which ``values`` counts
        ("values", "<u4"),
        ("groups", "<u4"),  # of ranks that made the check; 0: not known
        ("ordered", "<u8"),  # a word of the distinct fingerprints in the order of their ranks
        ("assigned", "<u8"),  # a word of which rank (of shares: which group) has which
        ("rows", "<u4"),  # how many rows there are, of all ranks
    ]
)
PLACE = CONTENT.names[:7]
_TALLY = np.dtype([(n, "<u8") for n in ("run", "place", "rows", "groups", "assigned", "bytes")])
_RUN = ("run", "place")


@dataclass(frozen=True)
class Contents:
    """``found``: fingerprints in program order, dtype CONTENT; a program's checks without any have
    ``values`` 0. ``n_beyond``: checks of tensors that the table had no room for. Failed checks:
    how many, and the first in program order."""

    found: np.ndarray
    n_beyond: int
    n_failed: int
    failure: Failure | None


def contents(trace) -> Contents:
    """The fingerprints of a run's data in its trace, and its own failures.

    Reads the trace once. A tensor of verify has the fingerprint that it was made with; where a
    check at rest failed, what changed in it since is in its fingerprint too. A program's tensor
    of which ranks recorded several values (one a group) has the XOR of the distinct ones, of the
    smallest MOST_VALUES.
    """
    changes, failed, program = Distinct(), Failures(trace, 1), _Program()
    made, whole = Distinct(), Shares(trace, packed)
    first_layered, n_beyond = len(trace.tensors), 0
    names = [tensor.name for tensor in trace.tensors]
    known = np.array([name != OTHERS for name in names] + [False])
    tokens = np.array([name == TOKENS for name in names] + [False])
    for block in trace.blocks():
        first_layered = min(first_layered, first_layered_tensor(block))
        failed.add(block)
        changes.add(_changes(block))
        whole.add(block)
        tensor = np.minimum(block["tensor"], len(known) - 1)
        of_program = block["stage"] == Stage.PROGRAM
        n_beyond += int((of_program & ~known[tensor]).sum())
        made.add(packed(block.where(_of_verify(block, tokens[tensor]) & known[tensor])))
        program.add(block.where(of_program & known[tensor]))
    found = np.concatenate([_with_values(made.result()), program.result()])
    found = _with(found, whole.whole(_one_value))
    changed = _with_values(changes.result())
    at, of = paired(found, changed)
    found["fingerprint"][at] ^= changed["fingerprint"][of]
    found["changed"][at] = True
    order = _order_of(found, first_layered)
    first = next(iter(failed.first()), None)
    return Contents(found[order], n_beyond, failed.n_failed, first)


def _of_verify(block, is_tokens) -> np.ndarray:
    stage, op = block["stage"], block["op"]
    whole = np.isin(stage, (Stage.GOLDEN, Stage.WEIGHTS)) & (op == Op.CONTENT)
    final = is_tokens & (stage == Stage.DATA) & ~np.isin(op, HELD_BY_ONE)
    return whole | (final & (block["fingerprint"] != 0))


def _changes(block) -> np.ndarray:
    """What changed in memory by checks at rest that failed, at the places of the whole tensors."""
    failed = (block["verdict"] == Status.FAILED) & (block["op"] == Op.AT_REST)
    block = block.where(failed & (block["stage"] == Stage.COMPUTE))
    block["stage"][:], block["op"][:] = Stage.GOLDEN, Op.CONTENT
    words = packed(block)
    words["fingerprint"] ^= block["expected"]
    return words


class _Program:
    """The checks of a program, block by block."""

    def __init__(self):
        self.occurrences, self.made = Occurrences(), Distinct()
        self.tally = Gathered(_TALLY, _RUN, {n: np.add for n in _TALLY.names[2:]})
        self.shares = Gathered(
            WORDS, (*_RUN, "group"), {"fingerprint": np.bitwise_xor, "rank": np.minimum}
        )

    def add(self, block) -> None:
        words, local = packed(block), np.isin(block["op"], HELD_BY_ONE)
        # Of a collective: which ranks made it, by the lowest of them. Else: the rank at the other
        # end, with whose messages those of others do not come in one order.
        words["group"] = np.where(local, block["peer"].astype(np.int64) + 1, block["sequence"])
        messages = block["op"] == Op.MESSAGE
        words["place"] |= np.where(messages, np.uint64(0), self.occurrences.of(words))
        told = (block["fingerprint"] != 0) | (block["expected"] != 0)
        share = np.isin(block["op"], SHARED) & (block["verdict"] != Status.FAILED)
        tally = np.zeros(len(block), _TALLY)
        for name in _RUN:
            tally[name] = words[name]
        tally["rows"], tally["bytes"] = 1, block["bytes"]
        lowest = np.maximum(words["group"].astype(np.int64), 1) - 1
        tally["groups"] = ~local & (words["rank"] == lowest)
        assigned = mixed(words["fingerprint"], words["rank"])
        assigned = np.where(local, mixed(assigned, words["group"]), assigned)
        tally["assigned"] = np.where(told & ~share, assigned, np.uint64(0))
        self.tally.add(tally)
        self.made.add(words[told & ~share])
        self.shares.add(words[told & share])

    def result(self) -> np.ndarray:
        """dtype CONTENT: one row a place."""
        tally, shares = self.tally.result(), self.shares.result()
        self.made.add(shares)
        found = _with_values(self.made.result())
        base = np.zeros(len(tally), CONTENT)
        unpack(tally, base)
        there, of = paired(base, found)
        base[there] = found[of]
        base["rows"], base["groups"] = tally["rows"], tally["groups"]
        base["assigned"] = tally["assigned"]
        starts = starts_of(shares)
        if starts.size:
            whole = np.zeros(len(starts), CONTENT)
            unpack(shares[starts], whole)
            words = mixed(shares["fingerprint"], shares["group"])
            whole["assigned"] = np.add.reduceat(words, starts)
            there, of = paired(base, whole)
            base["assigned"][there] += whole["assigned"][of]
        # A check of nothing (an empty tensor, the end of a chain) leaves nothing to compare.
        return base[(base["values"] > 0) | (tally["bytes"] > 0)]


def _with_values(rows) -> np.ndarray:
    """dtype CONTENT: one row a place, the XOR of its distinct fingerprints; ``rows`` sorted."""
    starts = starts_of(rows)
    found = np.zeros(len(starts), CONTENT)
    if not starts.size:
        return found
    unpack(rows[starts], found)
    lengths = np.diff(np.r_[starts, len(rows)])
    found["fingerprint"] = np.bitwise_xor.reduceat(rows["fingerprint"], starts)
    found["values"], found["groups"] = lengths, 1
    by_rank = rows[np.lexsort([rows[n] for n in ("rank", "place", "run")])]
    position = np.arange(len(rows)) - np.repeat(starts, lengths)
    found["ordered"] = np.add.reduceat(mixed(by_rank["fingerprint"], position), starts)
    return found


def _one_value(rows, words) -> np.ndarray:
    """dtype CONTENT, of the places of ``rows`` and these fingerprints."""
    found = np.zeros(len(rows), CONTENT)
    unpack(rows, found)
    found["fingerprint"], found["values"], found["groups"] = words, 1, 1
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
