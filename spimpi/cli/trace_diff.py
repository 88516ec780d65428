"""``spimpi trace diff``: two runs compared."""

import json
from itertools import groupby
from math import isfinite, isnan, nan

from spimpi.cli.tables import Output

MOST_LINES = 20  # of the table of layers


def add_diff(commands) -> None:
    """The command's arguments."""
    text = "two runs: the first tensor that differs, and how the difference grows"
    parser = commands.add_parser(
        "diff",
        help=text,
        description=f"Compare {text}. Topologies and numbers of ranks may differ. Exit status: 0 "
        "the same; 1 a tensor differs; 3 nothing differs, but not all was compared; 2 not "
        "traces, still written, or of different models, seeds or prompts.",
    )
    text = "a trace; of a killed run its journals are read"
    parser.add_argument("file", metavar="A", help=text)
    parser.add_argument("other", metavar="B", help="the trace to compare with it")
    parser.set_defaults(run_trace=run_diff)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run_diff(args) -> int:
    from spimpi.trace.reading.check import refuse_running
    from spimpi.trace.analysis.diff import diff
    from spimpi.trace.reading.reader import open as open_trace

    with open_trace(args.file) as a, open_trace(args.other) as b:
        for trace in (a, b):
            refuse_running(trace)
        found = diff(a, b)
    if args.json:
        print(json.dumps(as_json(found), indent=1))
    else:
        _print(found)
    return found.exit_status


def as_json(found) -> dict:
    """All that ``diff`` prints, and every tensor that differs; fingerprints as 16 hex digits."""
    from dataclasses import asdict

    sides = {
        key: {
            "file": str(side.path), "ranks": side.ranks, "attributes": side.attributes,
            "problems": list(side.problems), "failed": side.n_failed,
            "failure": None if side.failure is None else asdict(side.failure),
        }
        for key, side in (("a", found.a), ("b", found.b))
    }  # fmt: skip
    judged = asdict(found.judgement)
    judged |= {name: _number(judged[name]) for name in ("relative", "error", "limit")}
    return {
        **sides,
        "exit_status": found.exit_status,
        "compared": len(found.table),
        "differ": found.n_differ,
        "first": None if found.first < 0 else _row(found, found.first),
        "judgement": judged,
        "jump": None if found.jump < 0 else _row(found, found.jump),
        "tokens_differ": None if found.diverged < 0 else _row(found, found.diverged),
        "layers": [
            {**row, "relative": _number(row["relative"])} for row in found.by_layer()
        ],
        "differing": [_row(found, i) for i in found.table["differs"].nonzero()[0]],
        "notes": list(found.notes),
        "missing": list(found.missing),
        "remarks": list(found.remarks),
    }  # fmt: skip


def _number(value):
    """JSON has no NaN and no infinity."""
    if value is None or isnan(value):
        return None
    return value if isfinite(value) else "infinite"


def _row(found, i) -> dict:
    from spimpi.trace.schema import Op, Stage
    from spimpi.trace.names import name_of

    row = found.table[i]
    numbers = {name: int(row[name]) for name in ("repeat", "step", "layer", "occurrence")}
    return {
        **numbers,
        "stage": name_of(Stage(int(row["stage"]))),
        "op": name_of(Op(int(row["op"]))),
        "tensor": found.names[row["tensor"]],
        "a": f"{row['a']:016x}",
        "b": f"{row['b']:016x}",
        "relative": _number(float(row["relative"])),
        "error": _number(float(row["error"])),
    }


def place(found, i) -> str:
    """Where a row is, in words."""
    from spimpi.trace.schema import Op, Stage
    from spimpi.trace.names import name_of

    row = found.table[i]
    name = found.names[row["tensor"]]
    if row["stage"] == Stage.WEIGHTS:
        return f"the weights, {name}"
    run = f" of run {row['repeat']}" if row["repeat"] else ""
    layer = f"layer {row['layer']}, " if row["layer"] >= 0 else ""
    words = f"step {row['step']}{run}, {layer}{name}"
    if row["stage"] == Stage.PROGRAM:
        again = f" number {row['occurrence']}" if row["occurrence"] else ""
        words += f" ({name_of(Op(int(row['op'])))}{again})"
    return words


def _print(found) -> None:
    out = Output()
    out.table(None, [_header("A", found.a), _header("B", found.b)])
    for line in (*found.missing, *found.notes):
        out.line(f"  {line}", "yellow")
    for line in found.remarks:
        out.line(f"  {line}")
    out.line("")
    if found.first >= 0:
        _print_difference(out, found)
    out.line(*_verdict(found))


def _header(name, side) -> tuple[str, ...]:
    attributes = side.attributes
    facts = [attributes.get(key) for key in ("model", "topology", "arithmetic")]
    facts = [f"{side.ranks} rank(s)", *(str(fact) for fact in facts if fact)]
    if side.n_failed:
        facts.append(f"{side.n_failed:,} of its checks failed")
    return name, str(side.path), ", ".join(facts)


def _print_difference(out, found) -> None:
    row = found.table[found.first]
    words = f"A {row['a']:016x}, B {row['b']:016x}"
    out.line(f"first difference: {place(found, found.first)}: {words}", "bold red")
    judgement = found.judgement
    out.line(f"  {judgement}")
    if judgement.reason:
        out.line(f"  {judgement.reason}")
    for name, side in (("A", found.a), ("B", found.b)):
        if side.failure is not None:
            out.line(f"  {_own_failure(found, name, side)}")
    after = len(found.table) - found.first - 1
    before, differ = found.first, found.n_differ - 1
    out.line(f"  before it {before:,} tensors are equal, after it {differ:,} of {after:,} differ")
    if found.jump >= 0:
        size = f"{found.table['relative'][found.jump]:.1g}"
        out.line(
            f"jump: {place(found, found.jump)}: relative {size}, over 100 times all before it: "
            "evidence of corruption, no verdict",
            "bold red",
        )
    if found.diverged >= 0:
        out.line(
            f"from {place(found, found.diverged)} on, the chosen tokens differ: later steps have "
            "other inputs"
        )
    out.line("")
    lines = _shortened(found.by_layer())
    measured = any(not isnan(line["relative"]) for line in lines)
    columns = ("run", "step", "layer", "compared", "differ", *(["relative"] if measured else []))
    rows = [
        (str(line["repeat"]), str(line["step"]), _layer(line), f"{line['compared']:,}",
         f"{line['differ']:,}", *([_size(line["relative"])] if measured else []))
        for line in lines
    ]  # fmt: skip
    out.table(columns, rows[:MOST_LINES], right=range(6))
    if len(rows) > MOST_LINES:
        out.line(f"… and {len(rows) - MOST_LINES:,} more lines (--json has all)")
    out.line("")


def _shortened(lines) -> list[dict]:
    """The layers that differ of the first step that does, then one line a step."""
    steps = [list(group) for _, group in groupby(lines, _step)]
    first, *later = (step for step in steps if any(line["differ"] for line in step))
    return [line for line in first if line["differ"]] + [_whole(step) for step in later]


def _step(line) -> tuple:
    return line["part"] == "weights", line["repeat"], line["step"]


def _whole(step) -> dict:
    known = [line["relative"] for line in step if not isnan(line["relative"])]
    sums = {name: sum(line[name] for line in step) for name in ("compared", "differ")}
    return {**step[0], **sums, "part": "all", "layer": -1, "relative": max(known, default=nan)}


def _layer(line) -> str:
    return str(line["layer"]) if line["layer"] >= 0 else line["part"]


def _size(relative: float) -> str:
    return "" if isnan(relative) else f"{relative:.1g}"


def _own_failure(found, name, side) -> str:
    f, row = side.failure, found.table[found.first]
    names = found.names
    there = (f.repeat, f.step, f.layer, f.tensor) == (
        row["repeat"], row["step"], row["layer"], names[row["tensor"]]
    )  # fmt: skip
    rank = f.peer if f.peer >= 0 and f.op != "handoff" else f.rank
    if there:
        return f"{name}'s own checks failed there: {f.op} on rank {rank}"
    layer = f"layer {f.layer}, " if f.layer >= 0 else ""
    where = f"step {f.step}, {layer}{f.tensor}: {f.op} on rank {rank}"
    return f"{name}'s own checks failed, first at {where}"


def _verdict(found) -> tuple[str, str]:
    n = len(found.table)
    if found.first >= 0:
        what = f"{found.n_differ:,} of {n:,} tensors differ"
        jump = f"; a jump at {place(found, found.jump)}" if found.jump >= 0 else ""
        first = f"the first: {place(found, found.first)}, {found.judgement}"
        return f"DIFFERENT: {what}; {first}{jump}", "bold red"
    if not n:
        return "INCOMPLETE: no tensor could be compared", "bold yellow"
    if found.missing or found.notes:
        counted = f"the {n:,} tensors that could be compared are the same"
        return f"INCOMPLETE: {counted}, but not all was compared (above)", "bold yellow"
    return f"SAME: {n:,} tensors have the same bits", "bold green"
