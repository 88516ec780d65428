"""The confusion matrix as a file, and as the tables of docs/what-pass-means.md.

A row is (route, check, fault, dtype, ranks, missed, tried); of the fault "nothing" missed counts
false alarms. The file has a line for each route, check and fault, and a column for each dtype and
number of ranks: the number of trials, after "missed/" where some were missed.
"""

import csv
from collections import defaultdict
from math import sqrt
from pathlib import Path

from spimpi.bench.cases import (
    BOUND, COMPUTED, CONTENT, DTYPES, FLOATS, IN_ONE_PROCESS, ON_RANKS, PAINTED, PAINTING, SHARDS,
)  # fmt: skip
from spimpi.bench.planted import CONTRIBUTION, MOVEMENT, REPLICA, ROUNDING
from spimpi.bench.scenes import CLEAN, RECORD, SEQUENCE
from spimpi.fingerprint.arrays import dtype_of
from spimpi.fingerprint.painting import coloured_bits
from spimpi.whole_file import whole_csv

ONE_PROCESS, ON_MPI = "one process", "MPI ranks"
OTHERS = ("torch.hash_tensor", "XOR of words", "sum of words")
UPPER_BITS = "bits above the colour of one element"
# One wrong element, by its distance over the size that the verdict states.
SIZES = tuple(
    (limit, f"one element off by {words} the stated size")
    for limit, words in (
        (1 / 16, "at most 1/16 of"), (1 / 4, "1/16 to 1/4 of"), (1 / 2, "1/4 to 1/2 of"),
        (1, "1/2 to 1 of"), (float("inf"), "more than"),
    )
)  # fmt: skip
ONE_ELEMENT = tuple(f for f in MOVEMENT if "bit" in f and f.endswith("of one element"))
_COLUMNS = [(dtype, n) for dtype in DTYPES for n in SHARDS]


def write(path, rows) -> None:
    """The whole matrix, as CSV."""
    cells = {
        tuple(key): f"{missed}/{tried}" if missed else f"{tried}" for *key, missed, tried in rows
    }
    lines = dict.fromkeys(key[:3] for key in cells)
    with whole_csv(path) as out:
        out.writerow(["route", "check", "fault", *(f"{dtype} on {n}" for dtype, n in _COLUMNS)])
        out.writerows([*line, *(cells.get((*line, *c), "") for c in _COLUMNS)] for line in lines)


def read(path) -> list:
    """The rows in a file that ``write`` made."""
    with Path(path).open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    return [
        (*line[:3], *column, *map(int, cell.split("/") if "/" in cell else (0, cell)))
        for line in lines for column, cell in zip(_COLUMNS, line[3:]) if cell
    ]  # fmt: skip


class _Sums:
    """Cells added up: ``sums(check=…, fault=…)`` gives [missed, tried] of the rows that fit."""

    _PLACES = {"route": 0, "check": 1, "fault": 2, "dtype": 3, "ranks": 4}

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, route=ONE_PROCESS, **wanted) -> tuple[int, int]:
        wanted = {self._PLACES[k]: v if isinstance(v, tuple) else (v,) for k, v in wanted.items()}
        fit = [r for r in self.rows if r[0] == route and all(r[i] in v for i, v in wanted.items())]
        return sum(r[5] for r in fit), sum(r[6] for r in fit)


def tables(rows) -> dict:
    """{title: Markdown}."""
    sums = _Sums(rows)
    return {
        "By check": _by_check(sums),
        "Moved data by fault": _by_fault(sums),
        "Moved data by dtype and ranks": _by_dtype(sums),
        "Painted data": _painted(sums),
        "Painting's rate": _rates(sums),
        "Computed data": _computed(sums),
        "Sums of floats by the size of the error": _sizes(sums),
    }


def names(cases) -> tuple[str, ...]:
    return tuple(case.name for case in cases)


def faults_of(cases) -> tuple[str, ...]:
    """All faults but the two measurements that are tables of their own."""
    return tuple(dict.fromkeys(f for case in cases for f in case.faults))


def _cell(missed: int, tried: int) -> str:
    return f"{missed:,} / {tried:,}" if tried else ""


def markdown(head, lines) -> str:
    return "\n".join(
        f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)
    )


def _by_check(sums) -> str:
    head = ["check", "missed", "false alarms", "missed, on MPI ranks", "false alarms, on MPI ranks"]
    lines, totals = [], defaultdict(lambda: (0, 0))
    for name in dict.fromkeys(names((*IN_ONE_PROCESS, *ON_RANKS))):
        case = next(c for c in (*IN_ONE_PROCESS, *ON_RANKS) if c.name == name)
        cells = [
            sums(route, check=name, fault=faults)
            for route in (ONE_PROCESS, ON_MPI) for faults in (case.faults, CLEAN)
        ]  # fmt: skip
        if not any(tried for _, tried in cells):
            continue
        lines.append([f"`{name}`" if name.isidentifier() else name, *(_cell(*c) for c in cells)])
        for i, cell in enumerate(cells):
            totals[name in names(CONTENT), i] = _plus(totals[name in names(CONTENT), i], cell)
    content = ["**content fingerprints**", *(_cell(*totals[True, i]) for i in range(4))]
    both = [_plus(totals[True, i], totals[False, i]) for i in range(4)]
    everything = ["**all**", "", _cell(*both[1]), "", _cell(*both[3])]
    return markdown(head, [*lines, content, everything])


def _plus(a, b):
    return a[0] + b[0], a[1] + b[1]


def _fault_lines(faults):
    """(title, faults): the eight numbers of flipped bits in one line."""
    yield "1 to 8 bits of one element", ONE_ELEMENT
    for fault in faults:
        if fault not in ONE_ELEMENT:
            yield fault, fault
    yield "nothing: false alarms", CLEAN


def _by_fault(sums) -> str:
    others = [name for name in OTHERS if sums(check=name)[1]]
    lines = []
    for title, fault in _fault_lines((*MOVEMENT, *REPLICA, RECORD, *SEQUENCE)):
        cells = [sums(check=names(CONTENT), fault=fault)]
        cells += [sums(check=name, fault=fault) for name in others]
        lines.append([title, *(_cell(*c) for c in cells)])
    return markdown(["fault", "content fingerprints", *others], lines)


def _by_dtype(sums) -> str:
    lines = [
        [dtype, *(_cell(*sums(check=names(CONTENT), fault=faults_of(CONTENT), dtype=dtype, ranks=n))
                  for n in SHARDS)]
        for dtype in DTYPES
    ]  # fmt: skip
    return markdown(["dtype", *(f"{n} ranks" for n in SHARDS)], lines)


def _painted(sums) -> str:
    lines = [
        [title, *(_cell(*sums(check=PAINTING.name, fault=fault, dtype=d)) for d in PAINTED)]
        for title, fault in _fault_lines(tuple(MOVEMENT))
    ]
    return markdown(["fault", *PAINTED], lines)


def _rates(sums) -> str:
    lines = []
    for dtype in PAINTED:
        m = coloured_bits(dtype_of(dtype))
        missed, tried = sums(check=PAINTING.name, fault=UPPER_BITS, dtype=dtype)
        p = 2.0**-m
        expected, error = tried * p, sqrt(tried * p * (1 - p))
        off = (missed - expected) / error if tried else 0.0
        lines.append([
            dtype, f"{m}", _cell(missed, tried), f"{missed / max(tried, 1):.4g}", f"{p:.4g}",
            f"{expected:,.0f} ± {error:,.0f}", f"{off:+.1f}",
        ])  # fmt: skip
    head = ["dtype", "m", "missed", "rate", "2^-m", "expected missed", "off by (standard errors)"]
    return markdown(head, lines)


def _computed(sums) -> str:
    checks = names(COMPUTED)
    lines = [
        [title, *(_cell(*sums(check=name, fault=fault)) for name in checks)]
        for title, fault in _fault_lines((*MOVEMENT, *REPLICA, *CONTRIBUTION, *ROUNDING))
    ]
    return markdown(["fault", *checks], lines)


def _sizes(sums) -> str:
    lines = [
        [name, *(_cell(*sums(check=BOUND.name, fault=name, dtype=d)) for d in FLOATS)]
        for _, name in SIZES
    ]
    return markdown(["error", *FLOATS], lines)
