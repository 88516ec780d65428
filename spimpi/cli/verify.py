"""``spimpi verify``: the main job."""

import argparse
import json
import math
import sys

from spimpi.cli.registry import subcommand
from spimpi.errors import UsageError
from spimpi.launch import speaks


PUBLISHED = ("llama-3.2-1b", "llama-3.2-3b", "olmo-2-1b", "olmo-2-7b", "olmo-3-7b")


def add_model_arguments(parser) -> None:
    """What to run: shared by verify and golden."""
    add = parser.add_argument_group("what to run").add_argument
    add("--model", metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    config = add("--config", metavar="NAME", help=f"published shapes, seeded weights: {', '.join(PUBLISHED)}")
    config.completed_by = PUBLISHED  # and no ``choices``: an unknown name is told in better words
    add("--layers", type=int, metavar="N", help="with --config: only the first N layers")
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeatable (default: built-in prompts)")
    add("--prompt-ids", action="append", default=[], metavar="IDS", help="token ids, comma-separated; repeatable")
    add("--tokens", type=int, metavar="N", help="new tokens a prompt (default: 16)")
    add("--seed", type=int, metavar="N", help="of fingerprints and seeded weights (default: 1069)")


class _HelpFaults(argparse.Action):
    """--help-faults: as --help, of the faults alone."""

    def __call__(self, parser, *_):
        from spimpi.faults import help_text

        if speaks():
            print(help_text())
        parser.exit()


def add_arguments(parser) -> None:
    parser.usage = "spimpi verify [OPTION …]"  # every option's form stands below, once
    add_model_arguments(parser)
    add = parser.add_argument_group("over which ranks").add_argument
    add("--topology", metavar="SPEC", help="tp=2,sp=2,pp=2,dp=2 (sp: sequence) or exo (default: chosen)")
    add("--memory", metavar="GB,GB,…", help="with --topology exo: memory of each rank")
    add("--exo-rule", metavar="RULE", choices=("exo", "exo-1.0", "exo-0", "gay"),
        help="with --topology exo: exo (default), exo-1.0, exo-0, gay")  # fmt: skip
    add("--expect-ranks", type=int, metavar="N", help="refuse to run on another world size")
    add("--timeout", type=float, default=120, metavar="S",
        help="end the job after S s without progress; 0: never (120)")  # fmt: skip
    add = parser.add_argument_group("what to compare with").add_argument
    add("--arith", default="exact", metavar="KIND", choices=("exact", "blas"),
        help="exact (default) or blas: plain float32")  # fmt: skip
    add("--golden", metavar="FILE", help="what tensors must reproduce (spimpi golden)")
    add("--manifest", metavar="FILE", help="what weights must equal (spimpi manifest make)")
    add("--repeat", type=int, default=1, metavar="N", help="run the inference N times in this job")
    add("--inject", action="append", default=[], metavar="FAULT",
        help="KIND:key=value,…; repeatable; see --help-faults")  # fmt: skip
    add("--help-faults", action=_HelpFaults, nargs=0, help="list the faults of --inject and exit")
    group = parser.add_argument_group("what to write")
    add, trace = group.add_argument, group.add_mutually_exclusive_group()
    trace.add_argument("--trace", metavar="FILE", help="HDF5 trace (default: a name of its own, here)")
    trace.add_argument("--no-trace", action="store_true", help="write no trace")
    add("--overwrite", action="store_true", help="replace an existing trace")
    add("--trace-driver", metavar="KIND", choices=("auto", "mpio", "parts", "gather"),
        help="auto (default), mpio, parts or gather")  # fmt: skip
    add("--journal", metavar="DIR", help="each node's own folder for journals meanwhile")
    add("--sync", action="store_true", help="wait for the disk, against a loss of power")
    add("--sketch", action="store_true", help="sketches too, to tell rounding from corruption")
    add("--json", action="store_true", help="print one JSON object instead of text")


@subcommand("verify", "run a distributed inference and verify every part of it", add_arguments)
def verify(args) -> int:
    from spimpi.cli.session import session

    if not 0 <= args.timeout < math.inf:
        msg = f"--timeout must be a finite number of seconds, or 0 (never), found {args.timeout}"
        raise UsageError(msg)
    if args.no_trace:
        _require_no_options_of_a_trace(args)
    kernels = (
        bool(args.config), "sp" in (args.topology or ""), args.sketch, args.arith == "blas"
    )  # fmt: skip
    with session(args.timeout, args.expect_ranks, *kernels) as (comm, watchdog):
        status, finish = _verify(args, comm, watchdog)
    finish()
    return status


def _require_no_options_of_a_trace(args) -> None:
    """Raise UsageError where an option says how the trace is to be, for --no-trace."""
    if args.sketch:
        msg = "--sketch puts sketches into the trace, found --no-trace"
        raise UsageError(msg)
    for option in ("--journal", "--sync", "--overwrite", "--trace-driver"):
        if getattr(args, option[2:].replace("-", "_")) not in (None, False):
            msg = f"{option} says how the trace is written, found --no-trace"
            raise UsageError(msg)


def _verify(args, comm, watchdog):
    from spimpi.cli.output import Reporter
    from spimpi.reduction import PATIENCE, together
    from spimpi.verification.job import Request, prepare
    from spimpi.verification.run import verify_distributed_inference
    from spimpi.trace.journals.journal import new_run_id
    from spimpi.verification.tracing import Tracer

    request = Request(
        model=args.model, config=args.config, layers=args.layers, topology=args.topology,
        memory=args.memory, rule=args.exo_rule, prompts=tuple(args.prompt),
        prompt_ids=tuple(args.prompt_ids), tokens=args.tokens, seed=args.seed, arith=args.arith,
        golden=args.golden, manifest=args.manifest, faults=tuple(args.inject), repeat=args.repeat,
        sketch=args.sketch,
    )  # fmt: skip
    watchdog.at("reading the request")
    run_id = comm.bcast(new_run_id())
    path = f"{run_id}.h5" if args.trace is None else args.trace
    with together(comm, PATIENCE):
        # What rank 0 alone imports is imported here, where the others wait asleep.
        reporter = Reporter(comm.rank == 0, args.json)
        job = prepare(request, comm.size, comm.rank)
        tracer = None
        if not args.no_trace:
            command = " ".join(sys.argv)
            tracer = Tracer(
                comm.rank, path, args.trace_driver or "auto", args.overwrite, command, run_id, args.journal,
                args.sync,
            )  # fmt: skip
    reporter.found(comm, job)
    try:
        outcome = verify_distributed_inference(comm, job, reporter, watchdog, tracer)
    finally:
        reporter.stop()

    def finish():
        reporter.concluded(job, outcome, tracer)

    return outcome.exit_status, finish


def as_json(job, outcome, tracer) -> str:
    """The outcome as one JSON object."""
    where = vars(outcome.verdict.where) if outcome.verdict.where else None
    names = {0: "verified", 1: "corrupted", 3: "incomplete"}
    return json.dumps(
        {
            "verdict": names[outcome.exit_status],
            "established": outcome.verdict.kinds,
            "expected_from": outcome.expected_from or None,
            "weights_expected_from": job.known.file if job.known else None,
            "where": where,
            "missing": list(outcome.verdict.missing),
            "not_read": job.checkpoint.not_read,
            "topology": job.grid.text(),
            "ranks": job.grid.size,
            "runs": outcome.completed_runs,
            "events": outcome.n_events,
            "failures": outcome.n_failed,
            "stages": {
                stage.name.lower(): {
                    "checks": t.checks, "failed": t.failed, "bytes": t.n_bytes,
                    "seconds": round(t.seconds, 6),
                }
                for stage, t in outcome.totals.items()
            },
            "seconds": {k: round(v, 6) for k, v in outcome.seconds.items()},
            "tokens": outcome.answer(),
            "trace": str(tracer.path) if tracer else None,
        },
        default=str,
    )  # fmt: skip
