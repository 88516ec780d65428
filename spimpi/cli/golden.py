"""``spimpi golden``: write the fingerprints that any distributed run must reproduce."""

from spimpi.cli.registry import subcommand
from spimpi.cli.verify import add_model_arguments
from spimpi.errors import UsageError


def add_arguments(parser) -> None:
    add_model_arguments(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="golden file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing golden file")


@subcommand("golden", "run on one rank and write the expected fingerprints", add_arguments)
def golden(args) -> int:
    from spimpi.cli.session import session

    with session(0, None) as (comm, _):
        if comm.size > 1:
            msg = f"spimpi golden runs on one rank, found {comm.size}: start it without mpirun"
            raise UsageError(msg)
        made = _golden(args)
    columns = made.table.shape[1]
    print(
        f"wrote {args.output}: {made.workload.model} ({made.workload.identity}), "
        f"{len(made.workload.prompts)} prompts, {made.table.shape[0]} steps of {columns} tensors"
    )
    return 0


def _golden(args):
    from spimpi.inference import golden as golden_runs
    from spimpi.verification.job import Request, prepare
    from spimpi.verification.run import make_golden
    from spimpi.whole_file import check_can_write

    check_can_write(args.output, args.overwrite)
    request = Request(
        model=args.model, config=args.config, layers=args.layers, prompts=tuple(args.prompt),
        prompt_ids=tuple(args.prompt_ids), tokens=args.tokens, seed=args.seed,
    )  # fmt: skip
    made = make_golden(prepare(request, 1))
    golden_runs.write(args.output, made, args.overwrite)
    return made
