"""Which tensor a fingerprint speaks of: the tag, and the keys of its five streams."""

from dataclasses import dataclass
from functools import lru_cache
from operator import index

from spimpi.errors import ArgumentKindError, UsageError

GOLDEN = 0x9E3779B97F4A7C15
VERSION = 0x5350492D56310000
MASK = (1 << 64) - 1
DEFAULT_SEED = 1069

CONTENT, PAINT, LINEAR, SKETCH, COLOUR = range(5)


def mix(z: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on a plain integer."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def absorb(key: int, word: int) -> int:
    return mix(((key ^ (word & MASK)) + GOLDEN) & MASK)


@dataclass(frozen=True)
class Tag:
    """The canonical name of a tensor: seed, name, layer (-1: none) and step.

    A tensor has one tag however it is split or processed; together with its global shape and
    item size it selects the streams of fingerprint words (docs/fingerprint.md). UsageError where a
    field is of another kind.
    """

    seed: int = DEFAULT_SEED
    name: str = ""
    layer: int = -1
    step: int = 0

    def __post_init__(self):
        _require_name(self.name)
        # numpy's integers would wrap, or refuse to, in the key's 64-bit arithmetic
        for field in ("seed", "layer", "step"):
            object.__setattr__(self, field, _whole(field, getattr(self, field)))
        if not 0 <= self.seed <= MASK:
            msg = f"a seed is an unsigned 64-bit number, found {self.seed}"
            raise UsageError(msg)

    def key(self, domain: int, shape, itemsize: int) -> int:
        """Key of the tensor's stream in a domain, for its GLOBAL shape and item size (bytes)."""
        return _stream_key(self, domain, tuple(shape), itemsize)


def _require_name(name) -> None:
    if not isinstance(name, str):
        msg = f"a tag's name is text, found {type(name).__name__} {name!r}"
        raise ArgumentKindError(msg)
    try:
        name.encode()
    except UnicodeEncodeError:
        msg = f"a tag's name is text that UTF-8 can hold, found {name!r}"
        raise UsageError(msg) from None


def _whole(field: str, value) -> int:
    try:
        return index(value)
    except TypeError:
        msg = f"a tag's {field} is a whole number, found {type(value).__name__} {value!r}"
        raise ArgumentKindError(msg) from None


@lru_cache(maxsize=65536)
def _stream_key(tag: Tag, domain: int, shape: tuple[int, ...], itemsize: int) -> int:
    name = tag.name.encode()
    words = [VERSION, domain, len(name)]
    words += [int.from_bytes(name[i : i + 8], "little") for i in range(0, len(name), 8)]
    words += [tag.layer, tag.step, *map(int, (itemsize, len(shape), *shape))]
    key = mix((tag.seed + GOLDEN) & MASK)
    for word in words:
        key = absorb(key, word)
    return key
