"""``spimpi trace show``: a trace in short, also of a run that was killed."""

import json
import sys
import time
from dataclasses import asdict
from enum import Enum

from spimpi.cli.tables import Output
from spimpi.errors import SpimpiError, UsageError
from spimpi.printable import one_line
from spimpi.units import in_bytes

# Attributes that the header shows, and the label of each.
HEADER = (
    ("run_id", "run"),
    ("command", "command"),
    ("model", "model"),
    ("topology", "topology"),
    ("arithmetic", "arithmetic"),
    ("seed", "seed"),
    ("injected", "injected"),
    ("clipped", "clipped"),
    ("unchecked", "unchecked"),
)

GROUPS = 40  # rows of a table
WORST_FIRST = (4, 2, 1, 3, 0)  # exit statuses
BY = ("stage", "op", "layer", "tensor", "rank", "host")


def add_show(commands):
    """The parser of ``show`` among those of ``spimpi trace``."""
    text = "the run, its checks in groups, its verdict and first failures"
    show = commands.add_parser(
        "show",
        help=text,
        description=f"Print {text}, of each FILE. Exit status: 0 verified and intact; 1 a check "
        "failed; 3 the run did not end, or rows are missing or altered; 2 not a trace, or still "
        "written; of several files the first of 2, 1, 3 that one of them has.",
    )
    text = "a trace; of a killed run its journals are read"
    show.add_argument("files", nargs="+", metavar="FILE", help=text)
    show.add_argument(
        "--by", choices=BY, default="stage",
        help="what to group the checks by (default stage)",
    )  # fmt: skip
    show.add_argument(
        "--failures", type=int, default=10, metavar="N", help="failures to print (default 10)"
    )
    text = "of a job that is running: what it has flushed so far"
    show.add_argument("--live", action="store_true", help=text)
    show.set_defaults(run_trace=run_show)
    return show


def run_show(args) -> int:
    if args.failures < 0:
        msg = f"--failures must not be negative, found {args.failures}"
        raise UsageError(msg)
    from spimpi.trace.reading.check import refuse_running
    from spimpi.trace.reading.reader import open as open_trace
    from spimpi.trace.analysis.summary import summarise

    statuses, shown = [], []
    for file in args.files:
        try:
            with open_trace(file) as trace:
                if not args.live:
                    refuse_running(trace)
                summary = summarise(trace, args.failures, args.by)
                statuses.append(summary.exit_status)
                if not args.json:
                    if shown:
                        print()
                    _print(trace, summary, args.by)
                shown.append(as_json(trace, summary, args.by) if args.json else file)
        except SpimpiError as error:
            if len(args.files) == 1:
                raise
            # The others are shown all the same.
            print(one_line(f"spimpi: {error}"), file=sys.stderr)
            statuses.append(error.exit_status)
    if args.json:
        print(json.dumps(shown if len(args.files) > 1 else shown[0], indent=1))
    return next(status for status in WORST_FIRST if status in statuses)


def as_json(trace, summary, by: str = "stage") -> dict:
    """All that ``show`` prints; fingerprints as 16 hex digits ("": none), times in seconds."""
    return {
        "file": str(trace.path),
        "driver": trace.driver,
        "verdict": summary.verdict,
        "exit_status": summary.exit_status,
        "complete": trace.complete,
        "missing": trace.missing,
        "damage": trace.damage,
        "attributes": trace.attributes,
        "ranks": len(trace.ranks),
        "hosts": sorted({rank.host for rank in trace.ranks}),
        "events": summary.n_events,
        "failed": summary.n_failed,
        "stages": _groups("stage", summary.stages),
        "by": by,
        "groups": _groups(by, summary.groups),
        "failures": [asdict(failure) for failure in summary.failures],
    }


def _groups(by: str, groups: dict) -> list[dict]:
    return [
        {by: _label(label), **asdict(total), "established": _kinds(total.established)}
        for label, total in groups.items()
    ]


def _label(label):
    """A rank or a layer is a number, everything else a name."""
    from spimpi.trace.names import name_of

    return name_of(label) if isinstance(label, Enum) else label


def _kinds(established) -> list[str]:
    return [kind.name.lower() for kind in established]


def print_problems(out, trace, so: str) -> None:
    """What of a trace is missing or damaged, where something is; ``so``: what follows from it."""
    if trace.complete:
        return
    state = "DAMAGED" if trace.damage else "INCOMPLETE"
    out.line(f"{state}: {so}", "bold yellow")
    for problem in trace.problems:
        out.line(f"  {problem}", "yellow")
    out.line("")


def _print(trace, summary, by: str) -> None:
    out = Output()
    print_problems(out, trace, "what follows does not cover the whole run")
    out.table(None, _header(trace))
    out.line("")
    _print_groups(out, summary.groups, by)
    if summary.failures:
        _print_failures(out, summary)
    out.line("")
    out.line(*verdict_line(summary))


def _print_groups(out, groups: dict, by: str) -> None:
    """Where a table would be too long, the groups with most failures, then most time, stay."""
    columns = (by, "checks", "failed", "unknown", "bytes", "seconds", "established")
    shown = set(sorted(groups, key=lambda g: (-groups[g].failed, -groups[g].seconds))[:GROUPS])
    rows = [
        (
            "none" if (by, label) == ("layer", -1) else str(_label(label)),
            f"{s.events:,}",
            f"{s.failed:,}",
            f"{s.not_established:,}",
            in_bytes(s.bytes),
            f"{s.seconds:.3f}",
            ", ".join(_kinds(s.established)) or "nothing",
        )
        for label, s in groups.items()
        if label in shown
    ]
    out.table(columns, rows, right=range(1, 6))
    if len(groups) > len(shown):
        out.line(
            f"{len(shown)} of {len(groups):,}: those with most failures, then with most seconds "
            "(--json has all)"
        )


def _header(trace) -> list[tuple[str, str]]:
    hosts = sorted({rank.host for rank in trace.ranks})
    names = ", ".join(hosts[:4]) + (", …" if len(hosts) > 4 else "")
    rows = [("trace", f"{trace.path} ({trace.driver})")]
    if trace.ranks:
        began = _at(min(rank.started for rank in trace.ranks))
        rows += [("started", began)] if began else []
    rows.append(("ranks", f"{len(trace.ranks)} on {len(hosts)} host(s): {names}"))
    for name, label in HEADER:
        value = trace.attributes.get(name)
        if value not in (None, "", []):
            rows.append((label, value if isinstance(value, str) else json.dumps(value)))
    return rows


def _at(seconds: float) -> str:
    """A time of the clock in words; empty where no calendar has it."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return ""


def _print_failures(out, summary) -> None:
    out.line("")
    out.line(
        f"the first {len(summary.failures)} of {summary.n_failed:,} failed checks, "
        "in program order",
        "bold red",
    )
    for number, f in enumerate(summary.failures, 1):
        out.line(f"{number:3}. {in_words(f)}")


def in_words(f) -> str:
    """A failed check in one line."""
    fingerprints = f", expected {f.expected}, found {f.found}" if f.expected else ""
    return f"{place_of(f)}: {f.op} on rank {f.rank} ({f.host}){fingerprints}{_note(f)}"


def place_of(f) -> str:
    """Where in the program a check failed."""
    layer = f"layer {f.layer}, " if f.layer >= 0 else ""
    run = f" of run {f.repeat}" if f.repeat else ""
    return f"step {f.step}{run}, {layer}{f.tensor}"


def _note(failure) -> str:
    notes = []
    if failure.peer >= 0 and failure.peer != failure.rank:
        notes.append(f"peer {failure.peer}")
    if failure.microbatch > 0:
        notes.append(f"microbatch {failure.microbatch}")
    if failure.element >= 0:
        notes.append(f"element {failure.element}")
    if failure.nonfinite:
        notes.append(f"{failure.nonfinite} NaN or Inf")
    return "".join(f", {note}" for note in notes)


def verdict_line(summary) -> tuple[str, str]:
    if summary.verdict == "corrupted":
        found = f"{summary.n_failed:,} of {summary.n_checks:,} checks failed"
        if not summary.n_failed:
            found = "as the run said at its end; the rows of what failed are not here"
        return f"verdict    CORRUPTED: {found}", "bold red"
    if summary.verdict == "incomplete":
        held = f"no check failed among the {summary.n_checks:,} that are here"
        return f"verdict    INCOMPLETE: {held}", "bold yellow"
    return f"verdict    VERIFIED: {summary.n_checks:,} checks held", "bold green"
