"""A trace as a table that other programs read: CSV, JSON lines, Parquet, Chrome's timeline."""

import gzip
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from spimpi.errors import MissingDependency, UsageError
from spimpi.trace.base import Block
from spimpi.trace.schema import ENUMERATIONS, Established, RankInfo

# Columns of a row: those of a trace, with its rank, its host and what /tensors says.
COLUMNS = (
    "rank", "host", "repeat", "step", "microbatch", "layer", "stage", "op", "tensor", "dtype",
    "shape", "verdict", "established", "nonfinite", "peer", "sequence", "element", "fingerprint",
    "expected", "bytes", "t_start", "t_end",
)  # fmt: skip
SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet", ".json": "chrome"}
FORMATS = tuple(SUFFIXES.values())


class Words:
    """Names that stand for a column's numbers: ``values`` without doubles, ``code`` of a number.

    ``values[code[number]]`` is the name of a number.
    """

    def __init__(self, names):
        # A name that UTF-8 cannot hold is written with escapes.
        names = [name.encode(errors="backslashreplace").decode() for name in names]
        places = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self.values = list(places)
        self.code = np.array([places[name] for name in names], np.int32)

    def name(self, number: int) -> str:
        return self.values[self.code[number]]

    def written(self, escape) -> np.ndarray:
        """The name of each number as text of a format, shape (numbers,), dtype object."""
        values = np.empty(len(self.values), object)
        values[:] = [escape(value) for value in self.values]
        return values[self.code]


@dataclass(frozen=True)
class Names:
    """The columns whose numbers have names; ``ranks`` the rank of each row of /ranks, sorted."""

    words: dict[str, Words]
    ranks: np.ndarray

    def numbers(self, block: Block, column: str) -> np.ndarray:
        """Numbers of a named column, within its words."""
        if column == "host":
            return self.row(block)
        numbers = block["tensor" if column in ("dtype", "shape") else column]
        return np.minimum(numbers, len(self.words[column].code) - 1)

    def row(self, block: Block) -> np.ndarray:
        """Position in ``ranks`` of each event."""
        return np.searchsorted(self.ranks, block["rank"])


def names_of(trace) -> Names:
    words = {name: Words(_names(name, kind)) for name, kind in ENUMERATIONS.items()}
    tensors = trace.tensors
    words["tensor"] = Words([t.name for t in tensors] + ["(not in /tensors)"])
    words["dtype"] = Words([t.dtype for t in tensors] + [""])
    words["shape"] = Words(["x".join(map(str, t.shape)) for t in tensors] + [""])
    ranks = sorted_ranks(trace)
    words["host"] = Words([rank.host for rank in ranks])
    return Names(words, np.array([rank.rank for rank in ranks], np.int64))


def sorted_ranks(trace) -> list[RankInfo]:
    return sorted(trace.ranks, key=lambda rank: rank.rank)


def _names(column: str, kind) -> list[str]:
    """A name for each of 256 numbers, as /events says; "op 37" for one that was added later."""
    if kind is Established:
        return ["+".join(bit.name for bit in kind if number & bit) for number in range(256)]
    names = [f"{column} {number}" for number in range(256)]
    for member in kind:
        names[member] = member.name
    return names


def format_of(output: str, named: str | None) -> tuple[str, bool]:
    """The format that was named or that the file's name tells; whether gzip compresses it."""
    known = ", ".join(f"{format} ({suffix})" for suffix, format in SUFFIXES.items())
    zipped = output.endswith(".gz")
    plain = output.removesuffix(".gz")
    format = named or next((f for s, f in SUFFIXES.items() if plain.endswith(s)), None)
    if format is None:
        msg = f"the name {output} tells no format: use --format, or a name that ends as in {known}"
        raise UsageError(msg)
    if format not in FORMATS:
        msg = f"there is no format {format!r}; there are {known}"
        raise UsageError(msg)
    if format == "parquet":
        if output == "-":
            msg = "parquet is no text for standard output; name a file (-o)"
            raise UsageError(msg)
        if zipped:
            msg = f"{output}: parquet is compressed within; leave .gz out"
            raise UsageError(msg)
        require_pyarrow()
    return format, zipped


def require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        msg = f"parquet needs pyarrow ({error}): pip install 'spimpi[trace]', or export csv"
        raise MissingDependency(msg) from None


def export(trace, file, format: str, zipped: bool = False) -> int:
    """Write all intact rows of a trace to a binary file; returns how many.

    Ranks whose rows are not intact are left out and then named in ``trace.problems``.
    """
    with ExitStack() as stack:
        if zipped:
            file = stack.enter_context(gzip.GzipFile("", "wb", 6, file, mtime=0))
        if format == "parquet":
            from spimpi.trace.export_parquet import write_parquet

            return write_parquet(trace, file)
        from spimpi.trace import export_text

        return getattr(export_text, f"write_{format}")(trace, file)
