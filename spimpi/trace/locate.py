"""Where a run first went wrong, what that can have caused, and what went wrong besides."""

import re
from dataclasses import dataclass

import numpy as np

from spimpi.trace.base import Block
from spimpi.trace.order import FABRIC, INFERENCE, WEIGHTS, first_layered_tensor, program_order
from spimpi.trace.reach import (
    ENDS, VALUE, Failures, Flow, blamed_ranks, classify, failures_of, incidents, reached_by,
)  # fmt: skip
from spimpi.trace.schema import EVENT, Op, Stage, Status
from spimpi.trace.summary import Failure, in_words, name_of, verdict_of

KEPT = 1 << 20  # the failures, earliest in program order, whose causes are looked for
LOOKED_UP = 1000  # pairs of replicas for which the golden run is asked
COLUMNS = (
    "repeat", "stage", "step", "layer", "tensor", "op", "microbatch", "peer", "verdict", "element",
    "nonfinite", "fingerprint", "expected",
)  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """Later failures that one root can have caused: how many, and where. Ranges are inclusive."""

    failures: int
    steps: tuple[int, int] | None
    layers: tuple[int, int] | None
    ranks: int  # how many ranks recorded them


@dataclass(frozen=True)
class Root:
    """One thing that went wrong and that no earlier failure can have caused.

    ``failure``: the first check that saw it. ``at_fault``: the world rank that the checks name,
    -1 where they name none. ``suspects``: the ranks of which one is at fault, where that much is
    known (the two ends of a hand-off, two replicas that differ); ``hosts`` theirs. ``why``: what
    makes it a root, in words. ``seen``: failed checks that saw the same.
    """

    failure: Failure
    at_fault: int
    suspects: tuple[int, ...]
    hosts: tuple[str, ...]
    why: str
    seen: int
    reached: Reached


@dataclass(frozen=True)
class Place:
    """A rank or a host in numbers: ``roots`` that it is at fault for or suspected of, ``named``
    failed checks that name it as the one at fault, ``recorded`` failed checks that it recorded."""

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


@dataclass(frozen=True)
class Located:
    """What ``locate`` found. Lists are the first ones, in program order; counts are of all.

    ``flow_known``: whether the topology is known, and with it what can reach what; else any later
    failure of a value counts as a consequence. ``unclassified``: failures beyond the KEPT earliest
    ones, which are neither among the roots nor among the consequences.
    """

    verdict: str
    exit_status: int
    topology: str
    flow_known: bool
    n_events: int
    n_failed: int
    first: Failure | None
    n_roots: int
    roots: list[Root]
    n_consequences: int
    consequences: list[Failure]
    unclassified: int
    ranks: list[Place]
    hosts: list[Place]
    shared: list[Shared]


def locate(trace, n: int = 10) -> Located:
    """Read a whole trace once and order its failures by cause; ``n`` entries in each list.

    Ranks whose rows are not intact are left out, and then named in ``trace.problems``.
    """
    read = _read(trace)
    flow = _flow(trace, read)
    failures = failures_of(*read.sorted(), flow)
    is_root = classify(failures)
    at_root, after = np.flatnonzero(is_root), np.flatnonzero(~is_root)
    numbers = incidents(failures, is_root)
    _, first, seen = np.unique(numbers, return_index=True, return_counts=True)
    at = at_root[first]
    suspects = _suspects(failures, at, flow, read.golden if trace.complete else set())
    told = _Teller(trace, failures)
    verdict, exit_status = verdict_of(trace, read.n_failed)
    ranks, hosts = _places(read, suspects, told)
    return Located(
        verdict=verdict,
        exit_status=exit_status,
        topology=str(trace.attributes.get("topology", "")),
        flow_known=flow.per_part is not None,
        n_events=read.n_events,
        n_failed=read.n_failed,
        first=told.failure(0) if len(failures) else None,
        n_roots=len(at),
        roots=[told.root(*one) for one in zip(at[:n], suspects[:n], seen[:n])],
        n_consequences=len(after),
        consequences=[told.failure(i) for i in after[:n]],
        unclassified=read.n_failed - len(failures),
        ranks=ranks[:n],
        hosts=hosts[:n],
        shared=_shared(failures, at, suspects, told),
    )


class _Teller:
    """Puts failures into words."""

    def __init__(self, trace, failures: Failures):
        self.failures, self.tensors = failures, trace.tensors
        self.infos = {info.rank: info for info in trace.ranks}

    def host_of(self, rank: int) -> str:
        return self.infos[rank].host if rank in self.infos else ""

    def failure(self, i: int) -> Failure:
        f = self.failures
        event = {name: f[name][i] for name in COLUMNS}
        return in_words(event, self.infos[int(f.rank[i])], self.tensors)

    def root(self, i: int, suspects, seen: int) -> Root:
        f, ranks = self.failures, tuple(int(rank) for rank in suspects if rank >= 0)
        reached = reached_by(f, i)
        layers = f["layer"][reached & (f["layer"] >= 0)]
        return Root(
            self.failure(i),
            ranks[0] if len(ranks) == 1 else -1,
            ranks,
            tuple(dict.fromkeys(self.host_of(rank) for rank in ranks)),
            self._why(i),
            int(seen),
            Reached(
                int(reached.sum()),
                _range(f["step"][reached]),
                _range(layers),
                len(np.unique(f.rank[reached])),
            ),
        )

    def _why(self, i: int) -> str:
        f, op = self.failures, self.failures["op"][i]
        if f.phase[i] == FABRIC:
            return "found before the inference, with data made for it"
        if f.phase[i] == WEIGHTS:
            return "weights in memory, before any inference with them"
        if f.kind[i] == VALUE:
            return "no earlier failure reaches these data"
        if op == Op.MATMUL:
            return "a product is checked with the inputs that it had"
        if op == Op.AT_REST:
            return "data in one rank's memory changed between two readings"
        return "what arrived, or was reduced, is not what was given"


def _range(values) -> tuple[int, int] | None:
    return (int(values.min()), int(values.max())) if len(values) else None


def _places(read: "_Read", suspects, told) -> tuple[list[Place], list[Place]]:
    """Ranks and hosts that failures concern, those of most roots first."""
    numbers = (_counts(suspects, len(read.named)), read.named, read.recorded)
    ranks, hosts = [], {}
    for rank in np.flatnonzero(np.logical_or.reduce([n > 0 for n in numbers])):
        host = told.host_of(int(rank))
        ranks.append(Place(f"rank {rank}", host, *(int(n[rank]) for n in numbers)))
    by_host = {place.host for place in ranks}
    index = {host: i for i, host in enumerate(sorted(by_host))}
    at_host = np.full(len(read.named) + 1, -1)  # the last for -1, no rank
    for rank in range(len(read.named)):
        at_host[rank] = index.get(told.host_of(rank), -1)
    roots = _counts(at_host[suspects], len(index))
    for place in ranks:
        total = hosts.setdefault(place.host, [0, 0])
        total[0] += place.named
        total[1] += place.recorded
    hosts = [Place(host, host, int(roots[index[host]]), *total) for host, total in hosts.items()]

    def most_first(place):
        return -place.roots, -place.named, -place.recorded

    return sorted(ranks, key=most_first), sorted(hosts, key=most_first)


def _counts(pairs: np.ndarray, n: int) -> np.ndarray:
    """How many rows have each number below ``n``; a row that has it twice counts once."""
    pairs = np.where((pairs[:, 1:] == pairs[:, :1]) & [False, True], -1, pairs)
    return np.bincount(pairs[(pairs >= 0) & (pairs < n)], minlength=n)


def _shared(f: Failures, at, suspects, told) -> list[Shared]:
    """What at least half of the roots, and two or more, have in common."""
    n, found = len(at), []
    if n < 2:
        return found

    def note(kind, values, counts, name):
        for value, count in zip(values, counts):
            if count >= 2 and 2 * count >= n:
                found.append(Shared(kind, name(int(value)), int(count)))

    world = int(max(suspects.max(), 0)) + 1
    counts = _counts(suspects, world)
    note("rank", range(world), counts, str)
    hosts = sorted({told.host_of(rank) for rank in np.flatnonzero(counts).tolist()})
    if len({info.host for info in told.infos.values()}) > 1:
        index = np.array([hosts.index(h) if h in hosts else -1 for h in map(told.host_of, range(world))] + [-1])
        note("host", range(len(hosts)), _counts(index[suspects], len(hosts)), hosts.__getitem__)
    names = {"tensor": lambda row: told.tensors[row].name, "op": lambda op: name_of(Op(op))}
    for kind in ("layer", "tensor", "op", "element"):
        values, counts = np.unique(f[kind][at], return_counts=True)
        known = values >= 0
        note(kind, values[known], counts[known], names.get(kind, str))
    return found


class _Read:
    """What one pass over a trace leaves: counts of all, and the earliest failures, sorted."""

    def __init__(self, trace):
        self.names = [t.name for t in trace.tensors]
        self.n_events = self.n_failed = self.n_held = 0
        self.first_layered = len(trace.tensors)
        self.of_program = False
        self.golden: set[int] = set()  # tensors that were compared with a golden run
        world = 1 + max((info.rank for info in trace.ranks), default=-1)
        self.recorded, self.named = np.zeros(world, np.int64), np.zeros(world, np.int64)
        self._held: list[Block] = []

    def take(self, block: Block) -> None:
        self.n_events += len(block)
        self.first_layered = min(self.first_layered, first_layered_tensor(block))
        golden = block["stage"] == Stage.GOLDEN
        if golden.any():
            self.golden |= set(np.unique(block["tensor"][golden]).tolist())
        bad = block["verdict"] == Status.FAILED
        if not bad.any():
            return
        failed = block.where(bad)
        self.n_failed += len(failed)
        self.of_program |= bool((failed["stage"] == Stage.PROGRAM).any())
        self.recorded += np.bincount(failed.rank, minlength=len(self.recorded))
        blamed = blamed_ranks(failed, failed.rank)
        here = (blamed >= 0) & (blamed < len(self.named))
        self.named += np.bincount(blamed[here], minlength=len(self.named))
        self._held.append(failed)
        self.n_held += len(failed)
        if self.n_held > 2 * KEPT:
            self.sort()

    def sort(self) -> None:
        """Bring what is held into program order and let go of all but the earliest."""
        columns = {name: np.concatenate([b[name] for b in self._held]) for name in COLUMNS}
        rank = np.concatenate([b.rank for b in self._held])
        order = program_order(columns, rank, self.first_layered, self.names)[:KEPT]
        self._held = [Block(rank, columns).where(order)]
        self.n_held = len(order)

    def sorted(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(columns, rank) of the earliest failures, in program order."""
        if not self._held:
            return {name: np.zeros(0, EVENT[name]) for name in COLUMNS}, np.zeros(0, np.int64)
        self.sort()
        (block,) = self._held
        return block.columns, block.rank.astype(np.int64)


def _read(trace) -> _Read:
    read = _Read(trace)
    for block in trace.blocks(COLUMNS):
        read.take(block)
    return read


def _flow(trace, read: _Read) -> Flow:
    """The run's data flow, from its attribute ``topology``: ``tp=2,sp=2,pp=2,dp=2``."""
    text, world = trace.attributes.get("topology"), trace.attributes.get("world")
    known = re.fullmatch(r"tp=(\d+)(?:,sp=(\d+))?,pp=(\d+),dp=(\d+)", str(text))
    if known is None or read.of_program:
        return Flow(read.names, read.first_layered)
    tp, sp, pp, dp = (int(size or 1) for size in known.groups())
    if tp * sp * pp * dp != world or not world:
        return Flow(read.names, read.first_layered)
    return Flow(read.names, read.first_layered, tp * sp * pp, tp)


def _suspects(f: Failures, at: np.ndarray, flow: Flow, golden: set[int]) -> np.ndarray:
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
