"""The fingerprint algebra in plain Python integers: slow, readable, the oracle for every kernel.

Nothing here knows numpy. Elements come as (index, bits) or (index, value) pairs of plain ints,
where ``index`` counts the GLOBAL tensor in row-major order from 0; formulas: docs/fingerprint.md.
"""

from collections.abc import Iterable, Iterator
from itertools import product

from spimpi.fingerprint.tag import COLOUR, CONTENT, GOLDEN, LINEAR, MASK, PAINT, Tag, mix


def element_key(key: int, index: int) -> int:
    return (key + (index + 1) * GOLDEN) & MASK


def element(key: int, index: int, bits: int, itemsize: int) -> int:
    """One element's share of the XOR fingerprint; 8-byte items are mixed twice."""
    own = element_key(key, index)
    if itemsize == 8:
        return mix(mix(own ^ bits) ^ own)
    return mix(own ^ bits)


def colour(key: int, index: int) -> int:
    """Colour word of an element: output ``index`` of SplitMix64 seeded with the colour key."""
    return mix(element_key(key, index))


def fingerprint(tag: Tag, shape, itemsize: int, elements: Iterable[tuple[int, int]]) -> int:
    """XOR fingerprint of (global index, bits) pairs of a tensor of this global shape."""
    key = tag.key(CONTENT, shape, itemsize)
    total = 0
    for index, bits in elements:
        total ^= element(key, index, bits, itemsize)
    return total


def linear_fingerprint(tag: Tag, shape, itemsize: int, elements: Iterable[tuple[int, int]]) -> int:
    """Linear fingerprint, modulo 2**64, of (global index, integer value) pairs."""
    key = tag.key(LINEAR, shape, itemsize)
    return sum((colour(key, index) | 1) * value for index, value in elements) & MASK


def colour_field_fingerprint(tag: Tag, shape, itemsize: int, indices: Iterable[int]) -> int:
    """XOR of the colour words at these global indices; over all of them: the expected one."""
    key = tag.key(COLOUR, shape, itemsize)
    total = 0
    for index in indices:
        total ^= colour(key, index)
    return total


def slab_indices(local_shape, global_shape, offset) -> Iterator[int]:
    """Global indices of a block's elements, in the block's own row-major order."""
    for place in product(*(range(n) for n in local_shape)):
        index = 0
        for position, start, total in zip(place, offset, global_shape):
            index = index * total + start + position
        yield index


def paint_colour(key: int, index: int, hi: int, itemsize: int, n_bits: int) -> int:
    """The low bits that painting gives an element whose upper bits are ``hi``."""
    return element(key, index, hi, itemsize) & ((1 << n_bits) - 1)


def painted(
    tag: Tag, shape, itemsize: int, n_bits: int, elements: Iterable[tuple[int, int]]
) -> Iterator[int]:
    """The painted bits of (global index, bits) pairs."""
    key = tag.key(PAINT, shape, itemsize)
    for index, bits in elements:
        hi = bits >> n_bits << n_bits
        yield hi | paint_colour(key, index, hi, itemsize, n_bits)


def residues(
    tag: Tag, shape, itemsize: int, n_bits: int, elements: Iterable[tuple[int, int]]
) -> Iterator[int]:
    """The residues of (global index, bits) pairs: 0 where the colour belongs to the upper bits."""
    key = tag.key(PAINT, shape, itemsize)
    for index, bits in elements:
        hi = bits >> n_bits << n_bits
        yield bits ^ hi ^ paint_colour(key, index, hi, itemsize, n_bits)


def colour_fingerprint(
    tag: Tag, shape, itemsize: int, n_bits: int, elements: Iterable[tuple[int, int]]
) -> int:
    """XOR of the colour words, each with its element's residue mixed in."""
    elements = list(elements)
    key = tag.key(COLOUR, shape, itemsize)
    total = 0
    for (index, _), residue in zip(elements, residues(tag, shape, itemsize, n_bits, elements)):
        total ^= mix(element_key(key, index) ^ residue)
    return total
