"""``spimpi bench``: the figures of docs/benchmarks.md, each with its peer in the same run."""

import json

from spimpi.cli.registry import subcommand
from spimpi.errors import UsageError
from spimpi.whole_file import check_can_write

NAMES = (
    "fingerprint", "inference", "checks", "trace", "reading", "confusion", "runtime-faults", "startup",
)  # fmt: skip
# Of one process, which starts others itself where it needs them:
ALONE = ("reading", "confusion", "runtime-faults", "startup")
HELP = (
    "measure: fingerprint, inference and checks (mpirun -n 2), trace (-n 4), reading, confusion, "
    "runtime-faults, startup"
)


def add_arguments(parser) -> None:
    parser.add_argument("benchmark", choices=NAMES, help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--output", metavar="FILE",
        help="confusion, runtime-faults: write all that was found there (CSV)",
    )  # fmt: skip


@subcommand("bench", HELP, add_arguments)
def bench(args) -> int:
    from importlib import import_module

    measure = import_module(f"spimpi.bench.{args.benchmark.replace('-', '_')}").measure
    if args.output is not None and args.benchmark not in ("confusion", "runtime-faults"):
        msg = f"--output is of confusion and runtime-faults, found it with {args.benchmark}"
        raise UsageError(msg)
    if args.output is not None:
        check_can_write(args.output, overwrite=True)  # before the minutes that it takes
    if args.benchmark in ALONE:
        figures = measure(**({"output": args.output} if args.output is not None else {}))
        speaks = True
    else:
        from spimpi.cli.session import session

        with session(0, None) as (comm, _):
            figures = measure(comm)
            speaks = comm.rank == 0
    if speaks and args.json:
        print(json.dumps(figures))
    elif speaks:
        for name, value in figures.items():
            print(f"{name:<48} {value}")
    return 0
