"""``spimpi manifest make | check``: a checkpoint's fingerprints. Needs no MPI; uses mpirun's."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

from spimpi.cli.registry import subcommand
from spimpi.errors import UsageError
from spimpi.launch import launch
from spimpi.printable import one_line
from spimpi.units import in_bytes

VERDICTS = {0: "verified", 1: "corrupted", 3: "incomplete"}
SHOWN = 20
NAMED = 3  # tensors that are missing for one reason


def add_arguments(parser) -> None:
    commands = parser.add_subparsers(dest="manifest_command", required=True, metavar="COMMAND")
    text = "take a fingerprint of each tensor of a checkpoint's safetensors"
    make = commands.add_parser("make", help=text, description=f"{text.capitalize()}.")
    make.add_argument("model", metavar="MODEL", help="directory, .safetensors file or its index")
    make.add_argument("-o", "--output", required=True, metavar="FILE", help="manifest to write")
    make.add_argument("--seed", type=int, help="of the fingerprints (default: 1069)")
    text = (
        "also of the scaled integers and exponents that exact arithmetic derives from the matrices "
        "(BF16, F16, F32), for `spimpi verify --manifest`"
    )
    make.add_argument("--derived", action="store_true", help=text)
    make.add_argument("--overwrite", action="store_true", help="replace an existing manifest")
    make.set_defaults(run_manifest=run_make)

    text = "compare a checkpoint's files with a manifest"
    check = commands.add_parser(
        "check",
        help=text,
        description=f"{text.capitalize()}. Exit status: 0 all tensors are equal; 1 corruption "
        "found; 2 not a manifest, or of another model; 3 tensors are missing, or unknown ones "
        "are there.",
    )
    text = "file that `spimpi manifest make` wrote"
    check.add_argument("manifest", metavar="MANIFEST", help=text)
    text = "directory, .safetensors file or its index (default: the manifest's directory)"
    check.add_argument("model", nargs="?", metavar="MODEL", help=text)
    check.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    check.set_defaults(run_manifest=run_check)

    for command in (make, check):
        text = "threads that read and fingerprint (default: this rank's share of the cores)"
        command.add_argument("--threads", type=int, metavar="N", help=text)
        text = "refuse to run on another world size"
        command.add_argument("--expect-ranks", type=int, metavar="N", help=text)


HELP = "write down a checkpoint's fingerprints, and check files against them"


@subcommand("manifest", HELP, add_arguments)
def run(args) -> int:
    if args.threads is not None and args.threads < 1:
        msg = f"--threads must be at least 1, found {args.threads}"
        raise UsageError(msg)
    return args.run_manifest(args)


def run_make(args) -> int:
    """Collective over the world where a launcher started this; else no MPI is imported."""
    from spimpi.fingerprint.tag import DEFAULT_SEED, Tag
    from spimpi.manifest.format import write_manifest
    from spimpi.whole_file import check_can_write

    seed = Tag(DEFAULT_SEED if args.seed is None else args.seed).seed
    world = _world(args)
    _on_rank_0(world, lambda: check_can_write(args.output, args.overwrite))
    with _progress(world, "reading") as progress:
        if world is None:
            from spimpi.manifest.make import make_manifest

            made = make_manifest(
                args.model, seed=seed, threads=args.threads, progress=progress,
                derived=args.derived,
            )  # fmt: skip
        else:
            from spimpi.manifest.over_ranks import make_over

            made = make_over(
                world, args.model, seed=seed, threads=args.threads, progress=progress,
                derived=args.derived,
            )  # fmt: skip
    _on_rank_0(world, lambda: write_manifest(args.output, made, args.overwrite))
    if _speaks(world):
        _say_unread(args.model)
        more = f", {len(made.derived.tensors):,} derived ones" if made.derived else ""
        size = in_bytes(made.n_bytes)
        name = one_line(args.output)
        print(f"wrote {name}: {len(made.tensors):,} tensors, {size}{more}")
        sys.stdout.flush()
    return 0


def run_check(args) -> int:
    """As ``run_make``; every rank returns the same status."""
    from spimpi.manifest.format import read_manifest

    world = _world(args)
    model = Path(args.manifest).parent if args.model is None else args.model
    manifest = _on_rank_0(world, lambda: read_manifest(args.manifest))
    with _progress(world, "checking", args.json) as progress:
        if world is None:
            from spimpi.manifest.check import check_files

            found = check_files(manifest, model, threads=args.threads, progress=progress)
        else:
            from spimpi.manifest.over_ranks import check_over

            found = check_over(world, manifest, model, threads=args.threads, progress=progress)
    if _speaks(world):
        if not args.json:
            _say_unread(model)
        print(as_json(args, model, found) if args.json else "\n".join(report(found)))
        sys.stdout.flush()
    return found.exit_status


def as_json(args, model, found) -> str:
    """The findings as one JSON object; fingerprints as 16 hex digits."""
    from spimpi.manifest.source import unread

    return json.dumps(
        {
            "verdict": VERDICTS[found.exit_status],
            "exit_status": found.exit_status,
            "manifest": str(args.manifest),
            "model": str(model),
            "tensors_checked": found.checked,
            "bytes_checked": found.n_bytes,
            "corrupted": [
                {
                    "tensor": m.tensor, "file": m.file,
                    "expected": f"{m.expected:016x}", "found": f"{m.found:016x}",
                }
                for m in found.corrupted
            ],
            "broken_files": found.broken,
            "missing_files": found.absent,
            "missing": found.missing,
            "extra": list(found.extra),
            "not_read": unread(model),
        },
        indent=1,
    )  # fmt: skip


def report(found) -> list[str]:
    """The findings for a terminal: what is wrong, the worst first, then the verdict."""
    lines = _listed("CORRUPTED", found.corrupted)
    lines += _listed("BROKEN", found.broken.values())
    lines += _listed("MISSING", found.absent.values())
    lines += _listed("MISSING", _by_reason(found.missing))
    lines += _listed("EXTRA", [f"{name}: not in the manifest" for name in found.extra])
    counted = f"{found.checked:,} tensors, {in_bytes(found.n_bytes)}"
    verdicts = {
        0: f"VERIFIED: {counted}; expected (every one equals the manifest)",
        1: f"CORRUPTED: {len(found.corrupted):,} of {counted} differ, "
        f"{len(found.broken)} files are broken",
        3: f"INCOMPLETE: {counted} equal the manifest; {len(found.missing):,} tensors and "
        f"{len(found.absent)} files are missing, {len(found.extra):,} tensors are extra",
    }
    if found.corrupted and len(found.corrupted) == found.checked > 1:
        lines.append("note       every tensor differs: these may be the weights of another model")
    return [*lines, f"verdict    {verdicts[found.exit_status]}"]


def _say_unread(model) -> None:
    from spimpi.manifest.source import unread

    for line in unread(model):
        print(f"not read   {line}")


def _by_reason(missing: dict[str, str]) -> list[str]:
    """A line for each reason: a file that is cut short takes all of its tensors along."""
    names: dict[str, list[str]] = {}
    for name, why in missing.items():
        names.setdefault(why, []).append(name)
    return [
        f"{_names(some)}: {why}"
        if len(some) <= NAMED
        else f"{len(some):,} tensors: {why}: {_names(some[:NAMED])}, … (--json has all)"
        for why, some in names.items()
    ]


def _names(some) -> str:
    return ", ".join(one_line(name, 100) for name in some)


def _listed(word: str, problems) -> list[str]:
    problems = list(problems)
    lines = [f"{word:<10} {one_line(problem)}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"{word:<10} … and {len(problems) - SHOWN:,} more (--json has all)")
    return lines


def _world(args):
    """The world, kernels imported on all ranks; None, and no MPI, where nothing launched this."""
    found = launch()
    if found is None:
        if args.expect_ranks not in (None, 1):
            msg = (
                f"expected {args.expect_ranks} ranks (--expect-ranks), found no launcher: start "
                "with mpirun"
            )
            raise UsageError(msg)
        return None
    from spimpi.cli.session import initialised_mpi
    from spimpi.launch import check_world, leader_first

    world = initialised_mpi().COMM_WORLD
    check_world(world, args.expect_ranks)
    leader_first(world, lambda: _import_kernels(getattr(args, "derived", False)))
    return world


def _import_kernels(derived: bool):
    from spimpi.fingerprint import cpu  # noqa: F401

    if derived:
        from spimpi.inference import exact  # noqa: F401


def _on_rank_0(world, work):
    if world is None:
        return work()
    from spimpi.manifest.agreed import from_rank_0

    return from_rank_0(world, work)


def _speaks(world) -> bool:
    return world is None or world.rank == 0


@contextmanager
def _progress(world, title: str, silent: bool = False):
    """Yields ``progress(done, total)``: a bar on a terminal, of rank 0's share; else None."""
    from spimpi.cli.output import _on_terminal

    if silent or not _speaks(world) or not _on_terminal():
        yield None
        return
    from rich.progress import (
        BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn,
        TransferSpeedColumn,
    )  # fmt: skip

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
