"""``spimpi trace locate``: what failed first, what because of it, what independently."""

import json
from dataclasses import asdict

from spimpi.cli.tables import Output
from spimpi.cli.trace_show import in_words, place_of, print_problems, verdict_line
from spimpi.errors import UsageError


def add_locate(commands) -> None:
    """The command's arguments."""
    text = "what failed first, what can have failed because of it, what failed independently"
    parser = commands.add_parser(
        "locate",
        help=text,
        description=f"Say {text}, and which ranks and hosts the failures share. Exit status: 0 "
        "nothing failed, and the trace is whole; 1 a check failed; 2 not a trace, or still "
        "written; 3 nothing failed in what is there, but something is missing or altered.",
    )
    parser.add_argument("file", metavar="FILE", help="the trace; of a killed run its journals")
    text = "entries of each list to print (default 10)"
    parser.add_argument("--failures", type=int, default=10, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run_trace=run_locate)


def run_locate(args) -> int:
    if args.failures < 0:
        msg = f"--failures must not be negative, found {args.failures}"
        raise UsageError(msg)
    from spimpi.trace.reading.check import refuse_running
    from spimpi.trace.analysis.locate import locate
    from spimpi.trace.reading.reader import open as open_trace

    with open_trace(args.file) as trace:
        refuse_running(trace)
        found = locate(trace, args.failures)
    if args.json:
        about = {"file": str(trace.path), "missing": trace.missing, "damage": trace.damage}
        print(json.dumps(about | asdict(found), indent=1))
    else:
        _print(trace, found)
    return found.exit_status


def _print(trace, found) -> None:
    out = Output()
    print_problems(out, trace, "what failed in what is missing is not known")
    if found.roots:
        _print_root(out, "the first failure", found.roots[0])
        if found.n_roots > 1:
            _print_others(out, found)
        if found.consequences:
            _print_consequences(out, found)
        _print_places(out, found)
    elif found.first:
        out.line(f"the first failure: {in_words(found.first)}", "bold red")
        out.line("")
    if found.n_failed:
        text = f"{found.n_roots:,} independent, {found.n_consequences:,} can be consequences"
        if found.unclassified:
            text += f", {found.unclassified:,} later ones are not looked at"
        out.line(f"failures   {text}")
    out.line(*verdict_line(found))


def _print_root(out, title: str, root) -> None:
    out.line(f"{title}: {in_words(root.failure)}", "bold red")
    out.line(f"  at fault: {_at_fault(root)}")
    out.line(f"  why: {root.why}")
    out.line(f"  can have caused: {_reached(root.reached)}")
    out.line("")


def _at_fault(root) -> str:
    if not root.suspects:
        return "no rank is named by the checks"
    ranks = " or ".join(f"rank {rank}" for rank in root.suspects)
    hosts = " or ".join(host for host in root.hosts if host)
    return ranks + (f" ({hosts})" if hosts else "")


def _reached(reached) -> str:
    if not reached.failures:
        return "no later failure"
    spans = [
        f"{name} {_span(values)}"
        for name, values in (("step", reached.steps), ("layer", reached.layers))
        if values
    ]
    failures = f"{reached.failures:,} later failure{'s' * (reached.failures > 1)}"
    ranks = f"{reached.ranks:,} rank{'s' * (reached.ranks > 1)}"
    return f"{failures}: {', '.join(spans)}, recorded on {ranks}"


def _span(values) -> str:
    low, high = values
    return f"{low}" if low == high else f"{low}..{high}"


def _print_others(out, found) -> None:
    others = found.roots[1:]
    title = f"{found.n_roots - 1:,} more failed independently: no earlier failure can have caused them"
    out.line(title, "bold red")
    rows = [
        (f"{number}.", place_of(root.failure), root.failure.op, _at_fault(root),
         f"{root.seen:,}", f"{root.reached.failures:,}")
        for number, root in enumerate(others, 2)
    ]  # fmt: skip
    columns = ("", "where", "check", "at fault", "seen by", "can have caused")
    out.table(columns, rows, right=(0, 4, 5))
    left = found.n_roots - 1 - len(others)
    if left > 0:
        out.line(f"… and {left:,} more (--failures)")
    for shared in found.shared:
        out.line(f"  {shared.roots:,} of all {found.n_roots:,}: {shared.kind} {shared.value}")
    out.line("")


def _print_consequences(out, found) -> None:
    n = len(found.consequences)
    flow = "" if found.flow_known else ", as far as the order of the program tells"
    out.line(f"can be consequences{flow}: {found.n_consequences:,} failures, the first {n:,}")
    out.line("(reachable by data flow from an earlier failure, which is no proof)")
    for failure in found.consequences:
        out.line(f"  {in_words(failure)}")
    out.line("")


def _print_places(out, found) -> None:
    places = [*found.ranks, *(found.hosts if len(found.hosts) > 1 else [])]
    columns = ("", "host", "at fault", "named", "recorded")
    rows = [(p.name, p.host, *(f"{n:,}" for n in (p.roots, p.named, p.recorded))) for p in places]
    out.line("ranks: independent failures that they are at fault for or suspected of,")
    out.line("failed checks that name them, failed checks that they recorded")
    out.table(columns, rows, right=(2, 3, 4))
    out.line("")
