"""Which ranks share a row of a picture: each its own, or ranges of them where there are many."""

from dataclasses import dataclass

import numpy as np

MOST_ROWS = 128  # up to so many ranks, each has its own
BLOCKS = 64  # beyond, about so many ranges
MOST_ALONE = 32  # ranks at fault that have a row of their own among the ranges


@dataclass(frozen=True)
class Row:
    """Neighbouring items ``start`` … ``stop`` - 1, by position; ``label`` says their names."""

    start: int
    stop: int
    label: str

    @property
    def alone(self) -> bool:
        return self.stop - self.start == 1


def rows(names, alone=(), most: int = MOST_ROWS) -> list[Row]:
    """The rows of items called ``names``; those at the positions ``alone`` on their own."""
    n = len(names)
    if n <= most:
        return [Row(i, i + 1, str(names[i])) for i in range(n)]
    own = sorted(set(alone))[:MOST_ALONE]
    size = -(-n // min(BLOCKS, most))
    cuts = {0, n, *range(0, n, size), *own, *(i + 1 for i in own)}
    cuts = sorted(cuts)
    return [Row(a, b, _label(names, a, b)) for a, b in zip(cuts, cuts[1:])]


def row_of(found: list[Row]) -> np.ndarray:
    """The row of each item, by position."""
    return np.repeat(np.arange(len(found)), [row.stop - row.start for row in found])


def labelled(found: list[Row], height: float, marked=()) -> list[int]:
    """Which rows have room for a label, at ``height`` a row: the marked ones before others."""
    apart = 12.0 / height
    chosen: list[int] = []
    for number in [*marked, *range(len(found))]:
        if all(number == other or abs(number - other) >= apart for other in chosen):
            chosen.append(number)
    return sorted(set(chosen))


def _label(names, start: int, stop: int) -> str:
    if stop - start == 1:
        return str(names[start])
    return f"{names[start]}\N{EN DASH}{names[stop - 1]}"
