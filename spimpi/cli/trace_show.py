"""``spimpi trace show``: a trace in short, also of a run that was killed."""

import json
import time
from dataclasses import asdict

from spimpi.cli.tables import Output
from spimpi.cli.units import in_bytes
from spimpi.errors import UsageError

# Attributes that the header shows, and the label of each.
HEADER = (
    ("run_id", "run"),
    ("command", "command"),
    ("model", "model"),
    ("topology", "topology"),
    ("arithmetic", "arithmetic"),
    ("seed", "seed"),
    ("injected", "injected"),
)


def run_show(args) -> int:
    if args.failures < 0:
        msg = f"--failures must not be negative, found {args.failures}"
        raise UsageError(msg)
    from spimpi.trace.check import refuse_running
    from spimpi.trace.reader import open as open_trace
    from spimpi.trace.summary import summarise

    with open_trace(args.file) as trace:
        if not args.live:
            refuse_running(trace)
        summary = summarise(trace, args.failures)
        if args.json:
            print(json.dumps(as_json(trace, summary), indent=1))
        else:
            _print(trace, summary)
    return summary.exit_status


def as_json(trace, summary) -> dict:
    """All that ``show`` prints; fingerprints as 16 hex digits, times in seconds."""
    from spimpi.trace.summary import name_of

    stages = [
        {"stage": name_of(stage), **asdict(totals), "established": _kinds(totals.established)}
        for stage, totals in sorted(summary.stages.items())
    ]
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
        "stages": stages,
        "failures": [asdict(failure) for failure in summary.failures],
    }


def _kinds(established) -> list[str]:
    return [kind.name.lower() for kind in established]


def _print(trace, summary) -> None:
    from spimpi.trace.summary import name_of

    out = Output()
    if not trace.complete:
        state = "DAMAGED" if trace.damage else "INCOMPLETE"
        out.line(f"{state}: what follows does not cover the whole run", "bold yellow")
        for problem in trace.problems:
            out.line(f"  {problem}", "yellow")
        out.line("")
    out.table(None, _header(trace))
    out.line("")
    columns = ("stage", "checks", "failed", "unknown", "bytes", "seconds", "established")
    rows = [
        (
            name_of(stage),
            f"{s.events:,}",
            f"{s.failed:,}",
            f"{s.not_established:,}",
            in_bytes(s.bytes),
            f"{s.seconds:.3f}",
            ", ".join(_kinds(s.established)) or "nothing",
        )
        for stage, s in sorted(summary.stages.items())
    ]
    out.table(columns, rows, right=range(1, 6))
    if summary.failures:
        _print_failures(out, summary)
    out.line("")
    out.line(*verdict_line(summary))


def _header(trace) -> list[tuple[str, str]]:
    hosts = sorted({rank.host for rank in trace.ranks})
    names = ", ".join(hosts[:4]) + (", …" if len(hosts) > 4 else "")
    rows = [("trace", f"{trace.path} ({trace.driver})")]
    if trace.ranks:
        began = min(rank.started for rank in trace.ranks)
        rows.append(("started", time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(began))))
    rows.append(("ranks", f"{len(trace.ranks)} on {len(hosts)} host(s): {names}"))
    for name, label in HEADER:
        value = trace.attributes.get(name)
        if value not in (None, "", []):
            rows.append((label, value if isinstance(value, str) else json.dumps(value)))
    return rows


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
    return (
        f"{place_of(f)}: {f.op} on rank {f.rank} ({f.host}), expected {f.expected}, "
        f"found {f.found}{_note(f)}"
    )


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
