"""Where the wrong part of a block begins and ends, in rounds of 16 questions an end."""

from spimpi.checks.localisation.boxes import WAYS, Box, pieces_of
from spimpi.checks.localisation.questions import Case, Part, Question, Sources

Search = tuple[Case, Box, int, bool]


def ends(sources: Sources, searches: list[Search]) -> list[int]:
    """The first (or last) entry with a wrong element of each (case, box, axis, last?). Collective.

    ⌈log16⌉ rounds of the longest of the axes, at most 16 words a search and round.
    """
    spans = [(box.start[axis], box.stop[axis]) for _, box, axis, _ in searches]
    while any(stop - start > 1 for start, stop in spans):
        options = [
            [(start + a, start + b) for a, b in pieces_of(stop - start, WAYS)]
            for start, stop in spans
        ]
        asked = [
            Question(case, (box.along(axis, *span),))
            for (case, box, axis, _), pieces in zip(searches, options)
            if len(pieces) > 1
            for span in pieces
        ]
        words = iter(sources.ask(asked))
        for i, pieces in enumerate(options):
            if len(pieces) > 1:
                wrong = [span for span in pieces if next(words)]
                # None is wrong only where the data changed since: then all of it stays suspect.
                last = searches[i][3]
                spans[i] = (wrong or pieces)[-1 if last else 0]
    return [start for start, _ in spans]


def borders(sources: Sources, parts: list[Part]) -> dict[Part, Box]:
    """The smallest box around the wrong elements of each part. Collective."""
    searches = [
        (part.case, part.box, axis, last)
        for part in parts
        for axis in range(len(part.box.shape))
        for last in (False, True)
    ]
    found = iter(ends(sources, searches))
    boxes = {}
    for part in parts:
        box = part.box
        for axis in range(len(box.shape)):
            first, last = next(found), next(found)
            box = box.along(axis, first, max(first, last) + 1)
        boxes[part] = box
    return boxes


def first_elements(sources: Sources, regions: list[tuple[Case, Box]]) -> list[tuple[int, ...]]:
    """The first wrong element, in row-major order, of each region. Collective."""
    rest = [box for _, box in regions]
    for axis in range(len(sources.shape)):
        searches = [(case, box, axis, False) for (case, _), box in zip(regions, rest)]
        firsts = ends(sources, searches)
        rest = [box.along(axis, first, first + 1) for box, first in zip(rest, firsts)]
    return [box.start for box in rest]
