"""``spimpi trace``: its commands, and ``check`` and ``recover``. Needs no MPI."""

import json
import os
from contextlib import suppress
from dataclasses import asdict

from spimpi.cli.apart import apart
from spimpi.cli.registry import subcommand
from spimpi.cli.trace_diff import add_diff
from spimpi.cli.trace_export import add_export
from spimpi.cli.trace_locate import add_locate
from spimpi.cli.trace_report import add_report
from spimpi.cli.trace_show import add_show
from spimpi.printable import printable


SMALL = 1 << 24  # bytes that a file may have of which the disk says that it takes none


def add_arguments(parser):
    commands = parser.add_subparsers(dest="trace_command", required=True, metavar="COMMAND")
    show = add_show(commands)
    check = commands.add_parser(
        "check",
        help="whether a trace is as it was written",
        description="Read a whole trace and say whether it is as it was written, whatever its "
        "run found. Exit status: 0 intact; 3 damaged, or incomplete (what and where); "
        "2 not a trace, or still written.",
    )
    check.add_argument("file", metavar="FILE", help="the trace; of a killed run its journals")
    check.set_defaults(run_trace=_check)
    recover = commands.add_parser(
        "recover",
        help="seal the journals of a run that was killed",
        description="Make the trace of what the journals of a killed run hold, marked incomplete "
        "where something is missing. Exit status: 0 sealed; 2 nothing to recover, or still "
        "written; 3 it could not be sealed, the journals are kept.",
    )
    recover.add_argument("file", metavar="RUN", help="the trace, or the folder of its journals")
    recover.add_argument("--overwrite", action="store_true", help="replace an existing trace")
    recover.set_defaults(run_trace=_recover)
    add_locate(commands)
    add_diff(commands)
    add_export(commands)
    add_report(commands)
    for command in (show, check, recover):
        command.add_argument("--json", action="store_true", help="print it as JSON")


@subcommand("trace", "look at the trace of a run, check it", add_arguments)
def run(args) -> int:
    files = args.files if "files" in args else [args.file, getattr(args, "other", None)]
    files = list(filter(None, files))
    return apart(lambda: args.run_trace(args), " or ".join(files), _size(files))


def _size(files) -> int:
    """Bytes that reading these traces is to read: of files, their parts and their journals."""
    places = [place for file in files for place in (file, f"{file}.parts", f"{file}.journal")]
    return sum(map(_size_of, places))


def _size_of(place: str) -> int:
    with suppress(OSError):
        if not os.path.isdir(place):
            return _stored(os.stat(place))
        with os.scandir(place) as there:
            return sum(_stored(file.stat()) for file in there)
    return 0


def _stored(facts) -> int:
    """What a file takes on the disk: one with a hole is longer than what there is to read."""
    return max(512 * facts.st_blocks, min(facts.st_size, SMALL))


def _check(args) -> int:
    from spimpi.trace.reading.check import check

    found = check(args.file)
    if args.json:
        whole = {**asdict(found), "state": found.state, "exit_status": found.exit_status}
        print(json.dumps(whole, indent=1))
        return found.exit_status
    held = f"{found.events:,} events of {found.ranks:,} ranks are intact"
    print(printable(f"{found.file}: {found.state.upper()}, {held}"))
    for kind, lines in (("missing", found.missing), ("damaged", found.damage)):
        for line in lines:
            print(printable(f"  {kind}  {line}"))
    return found.exit_status


def _recover(args) -> int:
    from spimpi.trace.sealing.recover import recover

    found = recover(args.file, args.overwrite)
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return 0
    if found.was_sealed:
        intact = "" if found.missing else ", and is intact"
        print(printable(f"{found.file}: was sealed already{intact}"))
    else:
        held = f"{found.events:,} events of {found.ranks:,} ranks"
        print(printable(f"{found.file}: sealed, {held}"))
    for kind, lines in (("missing", found.missing), ("kept", found.kept)):
        for line in lines:
            print(printable(f"  {kind}  {line}"))
    return 0
