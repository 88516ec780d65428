"""JSON files of others: ordinary files, no longer than they may be, each name once in an object."""

import json
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.printable import one_line
from spimpi.regular_file import read_at_most

LONGEST = 256 << 20  # bytes of a file
MOST = 2**63 - 1


def parse_json(text: bytes | str):
    """The value of a JSON text in UTF-8. ValueError, with what is wrong, for anything else.

    Names that are twice in an object are refused: of two values Python would take the last, other
    readers another.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        msg = "it is nested too deeply"
        raise ValueError(msg) from None


def read_json_object(path: Path, missing: str) -> dict:
    """The JSON object in a file. UsageError: the text ``missing``, or what is wrong with it."""
    try:
        values = parse_json(read_at_most(path, LONGEST))
    except FileNotFoundError:
        raise UsageError(missing) from None
    except OSError as error:
        msg = f"{one_line(path)} cannot be read: {error.strerror}"
        raise UsageError(msg) from None
    except ValueError as error:  # broken JSON, broken UTF-8, or no name of a file
        msg = one_line(f"{path} is not valid JSON: {error}")
        raise UsageError(msg) from None
    if not isinstance(values, dict):
        msg = f"{one_line(path)} must hold a JSON object, found a {type(values).__name__}"
        raise UsageError(msg)
    return values


def _unique(pairs) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        msg = f"the name {one_line(repr(twice), 100)} twice in one object"
        raise ValueError(msg)
    return values


def is_size(value) -> bool:
    """Whether a JSON value is a whole number that 63 bits hold, from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def is_shape(value, product: bool = True) -> bool:
    """Whether a JSON value is a list of sizes, and (``product``) one of so many elements that 63
    bits hold the number, of the sizes above 0 too."""
    if not isinstance(value, list) or not all(is_size(n) for n in value):
        return False
    elements = 1
    for n in value if product else ():
        elements *= max(n, 1)
        if elements > MOST:
            return False
    return True
