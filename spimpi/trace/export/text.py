"""A trace as text: a line an event, by one template for all lines of a format.

``map`` over a template and columns keeps the loop over events within the interpreter's C.
"""

import json
from math import isfinite

from spimpi.trace.export import COLUMNS
from spimpi.trace.names import Names
from spimpi.trace.reading.base import Block
from spimpi.trace.schema import EVENT

LINES = 1 << 15  # made at a time
TEXT = "%s"
TIMES = ("t_start", "t_end")
PLACES = {
    **dict.fromkeys(COLUMNS, "%d"),
    **dict.fromkeys(TIMES, "%r"),
    **dict.fromkeys(("fingerprint", "expected"), "%016x"),
    **dict.fromkeys(
        ("host", "stage", "op", "tensor", "dtype", "shape", "verdict", "established"), TEXT
    ),
}
# A spreadsheet computes a field that begins so, or so after blanks; some in their full-width forms.
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
BLANKS = ("\t", "\r", "\n")


def write_csv(trace, file) -> int:
    """RFC 4180 but for the line's end, a line feed; the first line names the columns.

    A text that a spreadsheet would compute has an apostrophe before it.
    """
    file.write((",".join(COLUMNS) + "\n").encode())
    template = ",".join(PLACES[name] for name in COLUMNS) + "\n"
    return _write_lines(trace, file, template, COLUMNS, _in_csv)


def write_jsonl(trace, file) -> int:
    """An object a line; null for a time that is no number."""
    return _write_lines(trace, file, object_of(COLUMNS) + "\n", COLUMNS, json.dumps)


def _write_lines(trace, file, template: str, columns, escape) -> int:
    names, n_rows = Names(trace), 0
    written = {name: words.written(escape) for name, words in names.words.items()}
    for block in _pieces(trace):
        held = [values(block, c, names, written) for c in columns]
        if escape is json.dumps:
            for i in map(columns.index, TIMES):
                held[i] = numbers(held[i])
        file.write("".join(map(template.__mod__, zip(*held, strict=True))).encode())
        n_rows += len(block)
    return n_rows


class _Null:
    def __repr__(self):
        return "null"


def numbers(times: list[float]) -> list:
    """What JSON has a word for."""
    if all(map(isfinite, times)):
        return times
    return [time if isfinite(time) else _Null() for time in times]


def _pieces(trace):
    for block in trace.blocks(EVENT.names):
        for start in range(0, len(block), LINES):
            yield block.where(slice(start, start + LINES))


def values(block: Block, column: str, names: Names, written: dict) -> list:
    if column in written:
        return written[column][names.numbers(block, column)].tolist()
    return block[column].tolist()


def _in_csv(text: str) -> str:
    bare = text.lstrip("'")  # so that one apostrophe taken away gives back what was there
    if bare.startswith(BLANKS) or bare.lstrip().startswith(FORMULA):
        text = f"'{text}"
    if any(c in text for c in ',"\n\r'):
        return '"' + text.replace('"', '""') + '"'
    return text


def object_of(columns) -> str:
    """Template of a JSON object; fingerprints are text, for JSON's readers round large numbers."""
    places = {name: PLACES[name] for name in columns}
    for name in places:
        if places[name] == "%016x":
            places[name] = '"%016x"'
    return "{" + ",".join(f'"{name}":{place}' for name, place in places.items()) + "}"
