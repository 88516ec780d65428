"""Where a run first went wrong, what that can have caused, and what went wrong besides."""

import re
from dataclasses import dataclass

import numpy as np

from spimpi.trace.analysis.order import FABRIC, WEIGHTS, first_layered_tensor, program_order
from spimpi.trace.analysis.reach import (
    VALUE, Failures, Flow, blamed_ranks, classify, failures_of, incidents, reached_by,
)  # fmt: skip
from spimpi.trace.analysis.summary import Failure, in_words, verdict_of
from spimpi.trace.analysis.suspects import Place, Shared, places_of, shared_by, suspects_of
from spimpi.trace.names import RankPlaces
from spimpi.trace.reading.base import Block
from spimpi.trace.schema import EVENT, Op, Stage, Status

KEPT = 1 << 20  # the failures, earliest in program order, whose causes are looked for
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
class Located:
    """What ``locate`` found. Lists are the first ones, in program order; counts are of all.

    ``n_checks``: events that say whether something held. ``flow_known``: whether the topology is
    known, and with it what can reach what; else any later failure of a value counts as a
    consequence. ``at_fault``: every rank that a root names or suspects, the first root's first.
    ``unclassified``: failures beyond the KEPT earliest ones, which are neither among
    the roots nor among the consequences.
    """

    verdict: str
    exit_status: int
    topology: str
    flow_known: bool
    n_events: int
    n_checks: int
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
    at_fault: tuple[int, ...]


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
    suspects = suspects_of(failures, at, flow, read.golden if trace.complete else set())
    told = _Teller(trace, failures)
    verdict, exit_status = verdict_of(trace, read.n_failed, read.n_checks)
    ranks, hosts = places_of(suspects, read.named, read.recorded, trace.ranks)
    return Located(
        verdict=verdict,
        exit_status=exit_status,
        topology=str(trace.attributes.get("topology", "")),
        flow_known=flow.per_part is not None,
        n_events=read.n_events,
        n_checks=read.n_checks,
        n_failed=read.n_failed,
        first=told.failure(0) if len(failures) else None,
        n_roots=len(at),
        roots=[told.root(*one) for one in zip(at[:n], suspects[:n], seen[:n])],
        n_consequences=len(after),
        consequences=[told.failure(i) for i in after[:n]],
        unclassified=read.n_failed - len(failures),
        ranks=ranks[:n],
        hosts=hosts[:n],
        shared=shared_by(failures, at, suspects, trace.ranks, trace.tensors),
        at_fault=tuple(dict.fromkeys(suspects[suspects >= 0].tolist())),
    )


class _Teller:
    """Puts failures into words."""

    def __init__(self, trace, failures: Failures):
        self.failures, self.tensors = failures, trace.tensors
        self.infos = {info.rank: info for info in trace.ranks}
        self.hosts = {rank: info.host for rank, info in self.infos.items()}

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
            tuple(dict.fromkeys(self.hosts.get(rank, "") for rank in ranks)),
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


class _Read:
    """What one pass over a trace leaves: counts of all, and the earliest failures, sorted."""

    def __init__(self, trace):
        self.names = [t.name for t in trace.tensors]
        self.n_events = self.n_checks = self.n_failed = self.n_held = 0
        self.first_layered = len(trace.tensors)
        self.of_program = False
        self.golden: set[int] = set()  # tensors that were compared with a golden run
        self.ranks = RankPlaces(trace.ranks)
        self.recorded, self.named = np.zeros((2, len(self.ranks)), np.int64)
        self._held: list[Block] = []

    def take(self, block: Block) -> None:
        self.n_events += len(block)
        self.first_layered = min(self.first_layered, first_layered_tensor(block))
        known = block["verdict"] != Status.NOT_ESTABLISHED
        self.n_checks += int(known.sum())
        golden = (block["stage"] == Stage.GOLDEN) & known
        if golden.any():
            self.golden |= set(np.unique(block["tensor"][golden]).tolist())
        bad = block["verdict"] == Status.FAILED
        if not bad.any():
            return
        failed = block.where(bad)
        self.n_failed += len(failed)
        self.of_program |= bool((failed["stage"] == Stage.PROGRAM).any())
        self.recorded += np.bincount(self.ranks.of(failed.rank), minlength=len(self.ranks))
        named = self.ranks.of(blamed_ranks(failed, failed.rank))
        self.named += np.bincount(named[named >= 0], minlength=len(self.ranks))
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
