"""Which ranks and hosts are at fault, and what the roots of failures have in common."""

from dataclasses import dataclass

import numpy as np

from spimpi.trace.analysis.order import INFERENCE
from spimpi.trace.analysis.reach import ENDS, Failures, Flow
from spimpi.trace.names import RankPlaces, member, name_of, tensor_name
from spimpi.trace.schema import Op, Stage

LOOKED_UP = 1000  # pairs of replicas for which the golden run is asked


@dataclass(frozen=True)
class Place:
    """A rank ("rank 3"), or all of a host's ("all of"), in numbers.

    ``roots`` that it is at fault for or suspected of, ``named`` failed checks that name it as the
    one at fault, ``recorded`` failed checks that it recorded.
    """

    name: str
    host: str
    roots: int
    named: int
    recorded: int


@dataclass(frozen=True)
class Shared:
    """What ``roots`` roots have in common: ``kind`` "rank", "host", "layer", "tensor", "op" or
    "element", and its ``value``."""

    kind: str
    value: str
    roots: int


def suspects_of(f: Failures, at: np.ndarray, flow: Flow, golden: set[int]) -> np.ndarray:
    """World ranks of which one is at fault, [roots × 2]; -1: none known. ``at``: the roots.

    Of two replicas that differ, the golden run (whose tensors ``golden`` are), which looks at the
    lower one, confirms one.
    """
    pairs = np.full((len(at), 2), -1)
    pairs[:, 0] = f.blamed[at]
    ends = np.isin(f["op"][at], ENDS)
    pairs[ends] = np.stack([f.rank[at], f["peer"][at]], axis=1)[ends]
    if flow.tp != 2:
        return pairs
    replicas = (f["op"][at] == Op.AGREEMENT) & (pairs[:, 0] < 0)
    lower = f.rank[at] // 2 * 2
    pairs[replicas] = np.stack([lower, lower + 1], axis=1)[replicas]
    told = replicas & np.isin(f["tensor"][at], list(golden)) & (f.phase[at] == INFERENCE)
    for i in np.flatnonzero(told)[:LOOKED_UP]:
        same = np.logical_and.reduce([f[c] == f[c][at[i]] for c in ("repeat", "step", "layer", "tensor")])
        confirmed = not (same & (f["stage"] == Stage.GOLDEN)).any()
        if confirmed or len(at) == 1:  # else what another root did may have failed there
            pairs[i] = lower[i] + confirmed, -1
    return pairs


def places_of(suspects, named, recorded, table) -> tuple[list[Place], list[Place]]:
    """Ranks, and hosts, that failures concern, those of most roots first.

    ``named``, ``recorded``: failed checks by row of the ``table`` of ranks.
    """
    suspects = RankPlaces(table).of(suspects)
    columns = (_counts(suspects, len(table)), named, recorded)
    names, at_host = _hosts(table)
    concerned = np.flatnonzero(np.logical_or.reduce([column > 0 for column in columns]))
    ranks = [
        Place(f"rank {table[row].rank}", table[row].host, *(int(column[row]) for column in columns))
        for row in concerned.tolist()
    ]
    totals = [np.zeros(len(names), np.int64) for _ in columns[1:]]
    here = at_host[:-1] >= 0
    for total, column in zip(totals, columns[1:]):
        np.add.at(total, at_host[:-1][here], column[here])
    by_host = (_counts(at_host[suspects], len(names)), *totals)
    whole = [
        Place("all of", name, *(int(column[i]) for column in by_host))
        for i, name in enumerate(names)
        if any(column[i] for column in by_host)
    ]

    def most_first(place):
        return -place.roots, -place.named, -place.recorded

    return sorted(ranks, key=most_first), sorted(whole, key=most_first)


def shared_by(f: Failures, at, suspects, table, tensors) -> list[Shared]:
    """What at least half of the roots, and two or more, have in common."""
    found: list[Shared] = []

    def note(kind, values, counts, text=str):
        for value, count in zip(values, counts):
            if count >= 2 and 2 * count >= len(at):
                found.append(Shared(kind, text(value), int(count)))

    suspects = RankPlaces(table).of(suspects)
    note("rank", [info.rank for info in table], _counts(suspects, len(table)))
    names, at_host = _hosts(table)
    if len(names) > 1:
        note("host", names, _counts(at_host[suspects], len(names)))
    texts = {"tensor": lambda row: tensor_name(tensors, row), "op": lambda op: name_of(member(Op, op))}
    for kind in ("layer", "tensor", "op", "element"):
        values, counts = np.unique(f[kind][at], return_counts=True)
        known = values >= 0
        note(kind, values[known].tolist(), counts[known], texts.get(kind, str))
    return found


def _hosts(table) -> tuple[list[str], np.ndarray]:
    """The hosts' names, and the position among them of each row's; -1 for row -1."""
    names = sorted({info.host for info in table})
    numbers = {name: i for i, name in enumerate(names)}
    return names, np.array([numbers[info.host] for info in table] + [-1])


def _counts(pairs: np.ndarray, n: int) -> np.ndarray:
    """How many rows have each number below ``n``; a row that has it twice counts once."""
    pairs = np.where((pairs[:, 1:] == pairs[:, :1]) & [False, True], -1, pairs)
    return np.bincount(pairs[(pairs >= 0) & (pairs < n)], minlength=n)
