"""Rectangles of a tensor: cut, intersected, joined, and put into words. No data, no MPI."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

WAYS = 16  # how many parts a rectangle is cut into at most


@dataclass(frozen=True)
class Box:
    """A rectangle of a global tensor, by its first index and its shape. () is a 0-d tensor's."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @cached_property
    def size(self) -> int:
        return prod(self.shape)

    @cached_property
    def stop(self) -> tuple[int, ...]:
        return tuple(a + n for a, n in zip(self.start, self.shape))

    def intersection(self, other: "Box") -> "Box":
        """The common part; it may be empty."""
        start = tuple(map(max, self.start, other.start))
        stop = map(min, self.stop, other.stop)
        return Box(start, tuple(max(0, b - a) for a, b in zip(start, stop)))

    def contains(self, other: "Box") -> bool:
        return self.intersection(other) == other

    def has(self, index) -> bool:
        return all(a <= i < b for a, i, b in zip(self.start, index, self.stop))

    def within(self, outer: "Box") -> tuple:
        """The index that cuts this box out of an array that holds ``outer``."""
        places = zip(self.start, self.shape, outer.start)
        # with the ellipsis an array stays an array where there are no axes
        return (..., *(slice(a - first, a - first + n) for a, n, first in places))

    def along(self, axis: int, first: int, last: int) -> "Box":
        """The entries ``first``..``last`` (global, excluded) of one axis, all of the others."""
        start, shape = list(self.start), list(self.shape)
        start[axis], shape[axis] = first, last - first
        return Box(tuple(start), tuple(shape))

    def moved(self, axis: int, by: int) -> "Box":
        start = list(self.start)
        start[axis] += by
        return Box(tuple(start), self.shape)

    def split(self, ways: int = WAYS) -> list["Box"]:
        """At most ``ways`` disjoint parts that cover the box, in row-major order of their starts.

        The longest axis is cut first; where it is so short that parts are left over, the next.
        """
        cuts = [[(0, n)] for n in self.shape]
        for axis in sorted(range(len(self.shape)), key=lambda a: -self.shape[a]):
            pieces = min(ways, self.shape[axis])
            if pieces > 1:
                cuts[axis] = pieces_of(self.shape[axis], pieces)
                ways //= pieces
        parts = [self]
        for axis, pieces in enumerate(cuts):
            first = self.start[axis]
            parts = [p.along(axis, first + a, first + b) for p in parts for a, b in pieces]
        return parts


def pieces_of(n: int, ways: int) -> list[tuple[int, int]]:
    """(first, last excluded) of at most ``ways`` balanced, not empty pieces of ``range(n)``."""
    ways = min(ways, n)
    at = [n * i // ways for i in range(ways + 1)] if ways else []
    return list(zip(at, at[1:]))


def bounding(boxes) -> Box:
    """The smallest box around some (at least one)."""
    start = tuple(map(min, zip(*(b.start for b in boxes))))
    stop = tuple(map(max, zip(*(b.stop for b in boxes))))
    return Box(start, tuple(b - a for a, b in zip(start, stop)))


def around(indices) -> Box:
    """The smallest box around some elements (at least one)."""
    return bounding([Box(tuple(index), (1,) * len(index)) for index in indices])


def joined(boxes) -> list[Box]:
    """Disjoint boxes, those that together are one box (one next to the other) made one."""
    done = []
    for box in sorted(boxes, key=lambda b: b.start):
        while done and (both := _joined_pair(done[-1], box)):
            done.pop()
            box = both
        done.append(box)
    return done


def _joined_pair(a: Box, b: Box) -> Box | None:
    both = bounding([a, b])
    return both if both.size == a.size + b.size else None


def flat_range(box: Box, first: int, last: int) -> list[Box]:
    """The elements ``first``..``last`` (excluded) of a box, counted in its row-major order.

    At most 2·axes - 1 boxes.
    """
    if first >= last:
        return []
    if last - first == box.size:
        return [box]
    # The first axis that is longer than 1 is cut in: a partial entry, full entries, a partial one.
    axis = next(a for a, n in enumerate(box.shape) if n > 1)
    row = box.size // box.shape[axis]
    low, high = -(-first // row), last // row
    origin = box.start[axis]

    def entry(i, a, b):
        return flat_range(box.along(axis, origin + i, origin + i + 1), a - i * row, b - i * row)

    if low > high:
        return entry(high, first, last)
    head = entry(low - 1, first, low * row) if first < low * row else []
    middle = [box.along(axis, origin + low, origin + high)] if low < high else []
    tail = entry(high, high * row, last) if high * row < last else []
    return head + middle + tail


def flat_index(index, box: Box) -> int:
    """The row-major number, in the box, of the element with this global index."""
    number = 0
    for i, first, n in zip(index, box.start, box.shape):
        number = number * n + i - first
    return number


def name_of(box: Box, shape) -> str:
    """A block in words: "rows 64..128", "elements 3..7" of a vector, else slices."""
    if not shape:
        return "the element"
    cut = [a for a, n in enumerate(shape) if box.shape[a] != n]
    if not cut:
        return "the whole tensor"
    if cut == [0]:
        one, many = ("element", "elements") if len(shape) == 1 else ("row", "rows")
        if box.shape[0] == 1:
            return f"{one} {box.start[0]}"
        return f"{many} {box.start[0]}..{box.stop[0]}"
    return f"block [{', '.join(f'{a}:{b}' for a, b in zip(box.start, box.stop))}]"
