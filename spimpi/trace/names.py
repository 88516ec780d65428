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


class RankPlaces:
    """Where world ranks stand in the table of ranks. Found by search: a file may say any number."""

    def __init__(self, ranks):
        self.ranks = np.array([info.rank for info in ranks], np.int64)
        self._order = np.argsort(self.ranks, kind="stable")
        self._sorted = self.ranks[self._order]
        self._dense = np.array_equal(self.ranks, np.arange(len(self.ranks)))

    def __len__(self) -> int:
        return len(self.ranks)

    def of(self, ranks) -> np.ndarray:
        """Row of the table of each of ``ranks``, int64; -1 where it has none."""
        ranks = np.asarray(ranks).astype(np.int64)
        if not len(self):
            return np.full(ranks.shape, -1)
        if self._dense:
            return np.where((ranks >= 0) & (ranks < len(self)), ranks, -1)
        at = np.minimum(np.searchsorted(self._sorted, ranks), len(self) - 1)
        return np.where(self._sorted[at] == ranks, self._order[at], -1)


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
    """The columns of a trace whose numbers have names, ``words`` by column; ``host`` by the row
    of the table of ranks."""

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
        hosts, code = places(info.host for info in trace.ranks)
        self.rank_places = RankPlaces(trace.ranks)
        self.words["host"] = Words(hosts, code, len(hosts))

    def numbers(self, block, column: str) -> np.ndarray:
        """Numbers of a named column, within its words."""
        numbers = block[NUMBERED_BY.get(column, column)]
        if column == "host":
            return self.rank_places.of(numbers)
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
