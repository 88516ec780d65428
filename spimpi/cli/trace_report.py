"""``spimpi trace report``: runs as one HTML page."""

import json
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.printable import printable


def add_report(commands) -> None:
    """The command's arguments."""
    report = commands.add_parser(
        "report",
        help="a page that shows a run, or compares several",
        description="Write one HTML file that needs nothing else: the verdict, where the run first "
        "went wrong, and pictures of it; of several runs also how they differ from the first. Exit "
        "status, the page is written in all these cases: 0 all verified and equal; 1 a failure or "
        "a difference was found; 3 something is missing or altered. 2: not a trace, still "
        "written, or the page cannot be written.",
    )
    text = "traces; of a killed run its journals are read"
    report.add_argument("files", nargs="+", metavar="FILE", help=text)
    text = "the page (default: FILE.html of the first FILE, without its .h5)"
    report.add_argument("-o", "--output", metavar="HTML", help=text)
    report.add_argument("--overwrite", action="store_true", help="replace an existing page")
    report.add_argument("--json", action="store_true", help="print what was written as JSON")
    report.set_defaults(run_trace=run_report)


def run_report(args) -> int:
    from spimpi.trace.report import report

    output = default_output(args.files[0]) if args.output is None else args.output
    found = report(args.files, output, args.overwrite)
    if args.json:
        print(json.dumps(_as_json(found), indent=1))
        return found.exit_status
    for run in found.runs:
        print(printable(f"{run.path}: {run.located.verdict.upper()}"))
    print(printable(f"report     {found.output}"))
    return found.exit_status


def default_output(file: str) -> Path:
    path = Path(file.rstrip("/"))
    if not path.name:  # "/", ".": with no name to make another of
        msg = f"there is no trace {Path(file)}, it is a directory"
        raise UsageError(msg)
    name = path.name.removesuffix(".journal").removesuffix(".h5")
    return path.with_name(f"{name}.html")


def _as_json(found) -> dict:
    return {
        "output": str(found.output),
        "exit_status": found.exit_status,
        "runs": [
            {
                "file": str(run.path), "verdict": run.located.verdict,
                "failed": run.located.n_failed, "missing": list(run.missing),
                "damage": list(run.damage),
            }
            for run in found.runs
        ],
    }  # fmt: skip
