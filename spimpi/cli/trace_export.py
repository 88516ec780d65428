"""``spimpi trace export``: a trace as a table or a timeline for other programs."""

import json
import sys
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.printable import one_line, printable
from spimpi.units import in_bytes


def add_export(commands):
    export = commands.add_parser(
        "export",
        help="write a trace as CSV, JSON lines, Parquet or Chrome's timeline",
        description="Write the checks of a trace for other programs to read, one row each. "
        "Exit status: 0 written, whatever the checks found; 3 written without what is missing or "
        "altered, which is named; 2 not a trace, still written, or OUT cannot be written.",
    )
    export.add_argument("file", metavar="FILE", help="the trace; of a killed run its journals")
    text = "file to write, - for standard output; ends in .csv, .jsonl, .parquet or .json (Chrome)"
    export.add_argument("-o", "--output", required=True, metavar="OUT", help=f"{text}, also .gz")
    text = "csv, jsonl, parquet or chrome (default: by the name of OUT)"
    export.add_argument("--format", metavar="NAME", help=text)
    export.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    export.add_argument("--json", action="store_true", help="print what was written as JSON")
    export.set_defaults(run_trace=run_export)


def run_export(args) -> int:
    from spimpi.trace.reading.check import refuse_running, refuse_to_replace
    from spimpi.trace.export import export, format_of
    from spimpi.trace.reading.reader import open as open_trace
    from spimpi.whole_file import check_can_write, whole_file

    to_stdout = args.output == "-"
    if to_stdout and args.json:
        msg = "--json prints to standard output, where -o - writes the trace: leave one out"
        raise UsageError(msg)
    format, zipped = format_of(args.output, args.format)
    if not to_stdout:
        check_can_write(args.output, args.overwrite)
    with open_trace(args.file) as trace:
        refuse_running(trace)
        if to_stdout:
            try:
                n_rows = export(trace, _standard_output(), format)
                sys.stdout.buffer.flush()
            except OSError as error:
                sys.stdout.error = error  # said at the end, as of every command
                return 0
        else:
            refuse_to_replace(trace, args.output)
            with whole_file(args.output, args.overwrite) as file:
                n_rows = export(trace, file, format, zipped)
        status = 3 if trace.problems else 0
        if args.json:
            _print_json(trace, args.output, format, n_rows, status)
        elif not to_stdout:
            _print(args.output, format, n_rows)
        for problem in trace.problems:
            print(one_line(f"spimpi: left out: {problem}"), file=sys.stderr)
    return status


def _standard_output():
    """Where -o - writes; on a terminal what would steer it is made printable."""
    return _Terminal(sys.stdout.buffer) if sys.stdout.isatty() else sys.stdout.buffer


class _Terminal:
    """Takes whole lines of text, as bytes."""

    def __init__(self, file):
        self._file = file

    def write(self, lines: bytes) -> None:
        self._file.write(printable(lines.decode(), keep="\n").encode())


def _print(output: str, format: str, n_rows: int) -> None:
    print(printable(f"{output}: {n_rows:,} events, {format}, {in_bytes(_size(output))}"))


def _print_json(trace, output: str, format: str, n_rows: int, status: int) -> None:
    facts = {
        "file": str(trace.path), "output": output, "format": format, "events": n_rows,
        "bytes": _size(output), "missing": trace.missing, "damage": trace.damage,
        "exit_status": status,
    }  # fmt: skip
    print(json.dumps(facts, indent=1))


def _size(output: str) -> int:
    return Path(output).stat().st_size
