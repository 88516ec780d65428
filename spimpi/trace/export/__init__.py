"""A trace as a table that other programs read: CSV, JSON lines, Parquet, Chrome's timeline."""

import gzip
from contextlib import ExitStack

from spimpi.errors import MissingDependency, UsageError

# Columns of a row: those of a trace, with its rank, its host and what /tensors says.
COLUMNS = (
    "rank", "host", "repeat", "step", "microbatch", "layer", "stage", "op", "tensor", "dtype",
    "shape", "verdict", "established", "nonfinite", "peer", "sequence", "element", "fingerprint",
    "expected", "bytes", "t_start", "t_end",
)  # fmt: skip
SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet", ".json": "chrome"}
FORMATS = tuple(SUFFIXES.values())


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
            from spimpi.trace.export.parquet import write_parquet

            return write_parquet(trace, file)
        if format == "chrome":
            from spimpi.trace.export.chrome import write_chrome

            return write_chrome(trace, file)
        from spimpi.trace.export import text as export_text

        return getattr(export_text, f"write_{format}")(trace, file)
