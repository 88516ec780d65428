"""What the numbers of a trace are called."""

from dataclasses import dataclass

import numpy as np

from spimpi.trace.schema import ENUMERATIONS, EVENT, Established

NUMBERED_BY = {"host": "rank", "dtype": "tensor", "shape": "tensor"}  # else by the column itself


def places(names) -> tuple[list[str], np.ndarray]:
    """The different names in their order, and the place among them of each of ``names``.

    A name that UTF-8 cannot hold is written with escapes.
    """
    names = [name.encode(errors="backslashreplace").decode() for name in names]
    different = list(dict.fromkeys(names))
    place = {name: i for i, name in enumerate(different)}
    return different, np.array([place[name] for name in names], np.int64)


def host_places(trace) -> tuple[list[str], np.ndarray]:
    """The hosts of a trace, and the place among them of each rank's, by the rank's number."""
    hosts, place = places(info.host for info in trace.ranks)
    ranks = [info.rank for info in trace.ranks]
    of_rank = np.zeros(max(ranks, default=-1) + 1, np.int64)
    of_rank[ranks] = place
    return hosts, of_rank


@dataclass(frozen=True)
class Words:
    """Names that stand for a column's numbers: ``values[code[number]]`` is that of a number.

    ``values`` without doubles; the first ``n_known`` of them are names that the trace or the schema
    gives, the others stand for numbers that these do not know ("op 37").
    """

    values: list[str]
    code: np.ndarray
    n_known: int

    def name(self, number: int) -> str:
        return self.values[self.code[number]]

    def written(self, escape) -> np.ndarray:
        """The name of each number as text of a format, shape (numbers,), dtype object."""
        values = np.empty(len(self.values), object)
        values[:] = [escape(value) for value in self.values]
        return values[self.code]


class Names:
    """The columns of a trace whose numbers have names, ``words`` by column; ``host`` by rank."""

    def __init__(self, trace):
        tensors = trace.tensors
        self.words = {
            name: _words(_members(kind), name, 1 + np.iinfo(EVENT[name]).max)
            for name, kind in ENUMERATIONS.items()
        }
        self.words["tensor"] = _words(
            [t.name for t in tensors], "tensor", 1 + np.iinfo(EVENT["tensor"]).max
        )
        self.words["dtype"] = _words([t.dtype for t in tensors] + [""])
        self.words["shape"] = _words(["x".join(map(str, t.shape)) for t in tensors] + [""])
        hosts, code = host_places(trace)
        self.words["host"] = Words(hosts, code, len(hosts))

    def numbers(self, block, column: str) -> np.ndarray:
        """Numbers of a named column, within its words."""
        numbers = block[NUMBERED_BY.get(column, column)]
        return np.minimum(numbers, len(self.words[column].code) - 1)

    def codes(self, block, column: str) -> np.ndarray:
        """Places among the column's values."""
        return self.words[column].code[self.numbers(block, column)]


def _words(names: list[str], column: str = "", n_numbers: int = 0) -> Words:
    unknown = [f"{column} {number}" for number in range(len(names), n_numbers)]
    values, code = places(names + unknown)
    return Words(values, code, 1 + int(code[: len(names)].max(initial=-1)))


def _members(kind) -> list[str]:
    """A name for each number that an enumeration has, as /events says."""
    if kind is Established:
        return ["+".join(bit.name for bit in kind if number & bit) for number in range(256)]
    return [kind(number).name for number in range(len(kind))]


def member(kind, number):
    """The enumeration's member, or the plain number where a later spimpi has added one."""
    try:
        return kind(int(number))
    except ValueError:
        return int(number)


def name_of(member) -> str:
    return getattr(member, "name", str(member)).lower().replace("_", " ")


def tensor_name(tensors, row: int) -> str:
    return tensors[row].name if row < len(tensors) else f"tensor {row}"
