"""Which elements are wrong, on which rank: bisection with fingerprints over a communicator.

docs/localisation.md has the rounds, their bounds and why they end. Nothing that grows with the
tensor is sent. All ranks derive the same questions from the same answers, so each loop here runs
equally often on every rank.
"""

from collections import Counter
from itertools import chain, zip_longest

import numpy as np
from mpi4py import MPI

from spimpi.checks.localisation.borders import borders
from spimpi.checks.localisation.boxes import WAYS, around, joined, pieces_of
from spimpi.checks.localisation.describe import describe
from spimpi.checks.localisation.findings import BlockFacts, CaseFacts, Findings
from spimpi.checks.localisation.patterns import add_patterns
from spimpi.checks.localisation.questions import Case, Part, Question, Sources
from spimpi.checks.verdict import ElementError
from spimpi.partition import Slab

MAX_PARTS = 64  # parts of different owners that stay apart while elements are looked for


def localise(comm, contributed, held, tag, *, history=None, limit: int = 16) -> Findings:
    """Which elements that ranks hold differ from those that their owners contributed.

    ``contributed``, ``held``: lists of (numpy array, Slab) of one tensor, this rank's; over all
    ranks each element is contributed exactly once. ``history``: (earlier Tag, Slab) -> the
    fingerprint recorded then, tried on wrong blocks at that slab. At most ``limit`` elements are
    named. Collective over ``comm`` (collectives only); the result is the same on every rank.
    Raises UsageError on every rank where dtypes, shapes, tags or limits differ between ranks, or
    where owners overlap or do not cover what is held. Method: docs/localisation.md.
    """
    sources = Sources(comm, contributed, held, tag, limit, history)
    if not sources.holders:
        return Findings(text="nothing was compared: no rank holds an element")
    cases = _wrong_slabs(sources)
    if not cases:
        return Findings()
    parts, gone = _wrong_parts(sources, cases[:limit])
    leaves, cut, lost = _wrong_elements(sources, parts)
    elements, changed = _fetch(sources, leaves)
    gone |= lost | changed
    boxes = borders(sources, [part for part in parts if part.case in cut])
    for part in parts:
        inside = [e.index for c, e in elements if c == part.case and part.box.has(e.index)]
        if inside and part not in boxes:
            boxes[part] = around(inside)
    facts = [
        CaseFacts(
            ranks=case.ranks,
            target=case.target,
            elements=tuple(error for c, error in elements if c == case),
            complete=i < limit and case not in cut,
            blocks=tuple(
                BlockFacts(part.box, boxes[part], part.owner)
                for part in parts
                if part.case == case and part in boxes
            ),
            gone=case in gone,
            refined=i < limit,
        )
        for i, case in enumerate(cases)
    ]
    facts = add_patterns(sources, cases, facts)
    return _findings(sources, facts)


def _wrong_slabs(sources: Sources) -> list[Case]:
    """One case for all ranks that hold the same wrong data at the same place."""
    asked = [Case(box, rank, number) for rank, number, box in sources.holders]
    words = sources.ask([Question(case, (case.target,)) for case in asked])
    groups: dict = {}
    for case, word in zip(asked, words):
        if word:
            groups.setdefault((case.target, word), []).append(case)
    cases = []
    for (target, _), group in groups.items():
        ranks = tuple(sorted({case.rank for case in group}))
        first = min(group, key=lambda case: (case.rank, case.number))
        cases.append(Case(target, first.rank, first.number, ranks))
    return sorted(cases, key=lambda case: (case.rank, case.number))


def _wrong_parts(sources: Sources, cases) -> tuple[list[Part], set[Case]]:
    """The parts of the cases, by owner, that are wrong; and the cases whose difference is gone."""
    gone = set()
    groups = []
    for case in cases:
        common = ((case.target.intersection(box), rank) for rank, _, box in sources.places)
        groups.append((case, [(box, rank) for box, rank in common if box.size]))
    while any(len(pieces) > 1 for _, pieces in groups):
        smaller = [
            [(case, pieces[a:b]) for a, b in pieces_of(len(pieces), WAYS)]
            for case, pieces in groups
        ]
        asked = [
            Question(case, tuple(box for box, _ in pieces))
            for group in smaller
            if len(group) > 1
            for case, pieces in group
        ]
        words = iter(sources.ask(asked))
        kept = []
        for group in smaller:
            wrong = group if len(group) == 1 else [one for one in group if next(words)]
            kept += wrong
            if not wrong:
                gone.add(group[0][0])
        groups = _fewer(kept, max(MAX_PARTS, sources.limit))
    return [Part(case, *pieces[0]) for case, pieces in groups], gone


def _fewer(groups, most: int):
    """Groups of parts; where they are too many, cases with many become one part, their target."""
    count = Counter(case for case, _ in groups)
    while count.total() > most:
        case, n = count.most_common(1)[0]
        if n == 1:
            break
        count[case] = 1
        at = next(i for i, (one, _) in enumerate(groups) if one == case)
        groups[at] = (case, [(case.target, None)])
        groups = [g for i, g in enumerate(groups) if g[0] != case or i == at]
    return groups


def _wrong_elements(sources: Sources, parts):
    """(part, element) of wrong elements, at most ``limit``; the cases that have more; and those
    where a difference was gone."""
    cut, gone = set(), set()
    nodes = [(part, part.box) for part in parts]
    while True:
        nodes, dropped = _in_turn(nodes, sources.limit)
        cut |= {part.case for part, _ in dropped}
        if all(box.size == 1 for _, box in nodes):
            return nodes, cut, gone
        smaller = [(part, box.split()) for part, box in nodes]
        asked = [
            Question(part.case, (box,))
            for part, boxes in smaller
            if len(boxes) > 1
            for box in boxes
        ]
        words = iter(sources.ask(asked))
        nodes = []
        for part, boxes in smaller:
            wrong = boxes if len(boxes) == 1 else [box for box in boxes if next(words)]
            nodes += [(part, box) for box in wrong]
            if not wrong:
                gone.add(part.case)


def _in_turn(nodes, limit: int):
    """The first ``limit`` nodes, taken from the parts in turn, and the others; order is kept."""
    if len(nodes) <= limit:
        return nodes, []
    queues: dict = {}
    for node in nodes:
        queues.setdefault(node[0], []).append(node)
    turns = chain.from_iterable(zip_longest(*queues.values()))
    chosen = set([node for node in turns if node is not None][:limit])
    return [n for n in nodes if n in chosen], [n for n in nodes if n not in chosen]


def _fetch(sources: Sources, leaves):
    """(case, ElementError) of each leaf; and the cases where an element is right after all."""
    itemsize = sources.dtype.itemsize
    table = np.zeros((len(leaves), 2, itemsize), np.uint8)
    for row, (part, box) in zip(table, leaves):
        for array, _ in sources.true_arrays(box):
            row[0] = np.frombuffer(np.asarray(array).tobytes(), np.uint8)
        if part.case.rank == sources.rank:
            found = np.asarray(sources.found_array(part.case, box))
            row[1] = np.frombuffer(found.tobytes(), np.uint8)
    sources.reduce(table, MPI.BOR)
    elements, gone = [], set()
    for (part, box), (expected, found) in zip(leaves, table):
        if (expected == found).all():
            gone.add(part.case)
            continue
        error = ElementError(box.start, expected.tobytes(), found.tobytes(), part.case.rank)
        elements.append((part.case, error))
    return sorted(elements, key=lambda one: (one[1].rank, one[1].index)), gone


def _findings(sources: Sources, facts) -> Findings:
    counts = [case.n_wrong for case in facts]
    n_wrong = None if None in counts else sum(counts)
    blocks = []
    if not all(case.complete for case in facts):
        for case in facts:
            boxes = joined([b.box for b in case.blocks]) if case.refined else [case.target]
            blocks += [(case.ranks[0], Slab(sources.shape, b.start), b.shape) for b in boxes]
    return Findings(
        elements=tuple(e for case in facts for e in case.elements),
        n_wrong=n_wrong,
        blocks=tuple(blocks),
        ranks=tuple(sorted({rank for case in facts for rank in case.ranks})),
        text=describe(facts, sources.tag, sources.shape, sources.dtype),
        alike=tuple(case.ranks for case in facts),
    )
