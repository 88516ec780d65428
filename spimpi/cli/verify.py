"""``spimpi verify``: the main job."""

import argparse
import json
import sys

from spimpi.cli.registry import subcommand
from spimpi.errors import UsageError


def add_model_arguments(parser) -> None:
    """What to run: shared by verify and golden."""
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    parser.add_argument("--config", metavar="NAME", help="published shapes with seeded weights: llama-3.2-1b, llama-3.2-3b, olmo-2-1b, olmo-2-7b, olmo-3-7b")
    parser.add_argument("--layers", type=int, metavar="N", help="with --config: only the first N layers")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable (default: built-in prompts)")
    parser.add_argument("--prompt-ids", action="append", default=[], metavar="IDS", help="token ids, comma-separated; repeatable")
    parser.add_argument("--tokens", type=int, metavar="N", help="new tokens a prompt (default: 16)")
    parser.add_argument("--seed", type=int, help="of fingerprints and seeded weights (default: 1069)")


def add_arguments(parser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    parser.add_argument("--topology", metavar="SPEC", help="tp=2,sp=2,pp=2,dp=2 (sp: sequence) or exo (default: chosen from world size and model)")
    parser.add_argument("--memory", metavar="GB,GB,…", help="with --topology exo: memory of each rank")
    parser.add_argument("--exo-rule", default="exo", choices=("exo", "exo-1.0", "exo-0", "gay"), help="how exo gives out layers (default: exo)")
    parser.add_argument("--arith", default="exact", choices=("exact", "blas"), help="exact arithmetic, or plain float32 BLAS for comparison")
    parser.add_argument("--golden", metavar="FILE", help="fingerprints that every tensor must reproduce (spimpi golden)")
    parser.add_argument("--manifest", metavar="FILE", help="fingerprints that the weights must equal, in place of a second read (spimpi manifest make)")
    parser.add_argument("--inject", action="append", default=[], metavar="FAULT", help="KIND:key=value,…; repeatable; see below")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="run the inference N times in this job")
    parser.add_argument("--sketch", action="store_true", help="put a sketch of every tensor of the first run into the trace, to tell rounding from corruption; takes time")
    trace = parser.add_mutually_exclusive_group()
    trace.add_argument("--trace", metavar="FILE", help="HDF5 trace (default: a name of its own in this directory)")
    trace.add_argument("--no-trace", action="store_true", help="write no trace")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing trace")
    parser.add_argument("--trace-driver", default="auto", choices=("auto", "mpio", "parts", "gather"), help="how the trace is written")
    parser.add_argument("--journal", metavar="DIR", help="where each node keeps its ranks' journals while the run goes on (default: beside the trace)")
    parser.add_argument("--sync", action="store_true", help="wait until the disk has what is flushed, against a loss of power")
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="end the job after S seconds without progress; 0: never (default: 120)")
    parser.add_argument("--expect-ranks", type=int, metavar="N", help="refuse to run on another world size")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    from spimpi.faults import help_text

    parser.epilog = help_text()


@subcommand("verify", "run a distributed inference and verify every part of it", add_arguments)
def verify(args) -> int:
    from spimpi.cli.session import session

    if not args.timeout >= 0:
        msg = f"--timeout must be 0 (never) or a number of seconds, found {args.timeout}"
        raise UsageError(msg)
    if args.sketch and args.no_trace:
        msg = "--sketch puts sketches into the trace, found --no-trace"
        raise UsageError(msg)
    kernels = (
        bool(args.config), "sp" in (args.topology or ""), args.sketch, args.arith == "blas"
    )  # fmt: skip
    with session(args.timeout, args.expect_ranks, *kernels) as (comm, watchdog):
        status, finish = _verify(args, comm, watchdog)
    finish()
    return status


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
    path = args.trace or f"{run_id}.h5"
    with together(comm, PATIENCE):
        # What rank 0 alone imports is imported here, where the others wait asleep.
        reporter = Reporter(comm.rank == 0, args.json)
        job = prepare(request, comm.size, comm.rank)
        tracer = None
        if not args.no_trace:
            command = " ".join(sys.argv)
            tracer = Tracer(
                comm.rank, path, args.trace_driver, args.overwrite, command, run_id, args.journal,
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
