"""How a sealed trace is cut for reading: many small ranks to a piece, a large rank in several."""

from collections.abc import Iterator
from typing import NamedTuple

from spimpi.trace.schema import RankInfo

ROWS = 1 << 19  # a piece; about 40 MB as columns


class Span(NamedTuple):
    """Some of a rank's rows: ``count`` of them from its own row ``first`` on."""

    info: RankInfo
    first: int
    count: int


def groups(ranks) -> Iterator[list[RankInfo]]:
    """Ranks whose rows lie one after the other and make at most ROWS; one rank may have more."""
    group, rows = [], 0
    for info in ranks:
        follows = group and info.offset == group[-1].offset + group[-1].count
        if group and (not follows or rows + info.count > ROWS):
            yield group
            group, rows = [], 0
        group.append(info)
        rows += info.count
    if group:
        yield group


def pieces(group: list[RankInfo]) -> Iterator[list[Span]]:
    """The pieces in which a group is read."""
    if len(group) > 1 or group[0].count <= ROWS:
        yield [Span(info, 0, info.count) for info in group]
        return
    (info,) = group
    for first in range(0, info.count, ROWS):
        yield [Span(info, first, min(ROWS, info.count - first))]
