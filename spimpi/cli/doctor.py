"""``spimpi doctor``: what this environment can do, and whether all ranks compute alike."""

import json
import os
import platform
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

from spimpi.cli.registry import subcommand
from spimpi.cli.session import initialised_mpi
from spimpi.launch import (
    THREAD_VARIABLES,
    check_world,
    launch,
    leader_first,
    mpi_library,
    usable_cores,
)
from spimpi.printable import printable

PACKAGES = ("spimpi", "numpy", "numba", "h5py", "mpi4py", "safetensors")

# Facts in which ranks must not differ, and how the report names them.
COMPUTING = {"digest": "digest of the elementary functions", "denormals": "denormals kept"}
SOFTWARE = {
    "python": "Python",
    "packages": "package versions",
    "mpi": "MPI library",
    "hdf5": "HDF5",
    "parallel_hdf5": "parallel HDF5",
}


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--expect-ranks", type=int, metavar="N", help="exit 2 unless the world has N ranks"
    )


HELP = "what this environment can do, and whether all ranks compute alike"


@subcommand("doctor", HELP, add_arguments)
def run(args) -> int:
    """Collective over the world. 0: fit; 1: ranks compute differently; 2: unfit environment."""
    comm = initialised_mpi().COMM_WORLD
    check_world(comm, args.expect_ranks)
    facts = comm.allgather(rank_facts(comm))
    status, problems, notes = findings(facts)
    if comm.rank == 0:
        if args.json:
            report = {"status": status, "problems": problems, "notes": notes, "ranks": facts}
            print(json.dumps(report, indent=1))
        else:
            print("\n".join(map(printable, report_lines(facts, status, problems, notes))))
        sys.stdout.flush()
    return status


def rank_facts(comm) -> dict:
    """What this rank finds about itself, as plain values.

    Collective: the kernels are compiled once a node.
    """
    from mpi4py import MPI

    found = launch()
    facts = {
        "rank": comm.rank,
        "host": MPI.Get_processor_name(),
        "launcher": found.launcher if found else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "mpi": mpi_library(),
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES},
        "memory": _available_memory(),
        "errors": [],
    }
    facts |= _hdf5_facts(facts["errors"])
    facts |= leader_first(comm, lambda: _computing_facts(facts["errors"]))
    return facts


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source tree" if package == "spimpi" else None


def _hdf5_facts(errors: list) -> dict:
    try:
        import h5py
    except ImportError as error:
        errors.append(f"h5py cannot be imported: {error}")
        return {"hdf5": None, "parallel_hdf5": False}
    return {"hdf5": h5py.version.hdf5_version, "parallel_hdf5": bool(h5py.get_config().mpi)}


def _computing_facts(errors: list) -> dict:
    facts = {"digest": None, "denormals": None, "cache": None}
    try:
        from spimpi.jit import cache_folder

        folder = cache_folder()
        facts["cache"] = {
            "folder": str(folder),
            "writable": _writable(folder),
            "compiled": len(list(folder.rglob("*.nbi"))),
        }

        from spimpi.inference.elementary import digest

        facts["digest"] = f"{digest():016x}"
        facts["denormals"] = _denormals_kept()
    except ImportError as error:
        errors.append(f"the kernels cannot be imported: {error}")
    return facts


def _denormals_kept() -> bool:
    """Whether this thread, with all libraries loaded, computes with denormals.

    A library built with -ffast-math may switch them off for the whole process when it is loaded.
    """
    import numpy as np

    smallest = [np.finfo(t).smallest_subnormal for t in (np.float32, np.float64)]
    return all((np.array([x]) * x.dtype.type(1))[0] > 0 for x in smallest)


def _writable(folder: Path) -> bool:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _available_memory() -> int | None:
    """Bytes that this node can still give out; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), None)


def findings(facts: list[dict]) -> tuple[int, list[str], list[str]]:
    """Exit status, problems and notes from the facts of all ranks; pure, the same on each rank."""
    problems, status = [], 0
    for rank in facts:
        problems += [f"{_place(rank)}: {error}" for error in rank["errors"]]
        missing = [name for name, version in rank["packages"].items() if version is None]
        if missing:
            problems.append(f"{_place(rank)}: not installed: pip install {' '.join(missing)}")
    for key, name in SOFTWARE.items():
        problems += _differences(facts, key, name)
    status = 2 if problems else 0

    computing = [line for key, name in COMPUTING.items() for line in _differences(facts, key, name)]
    computing += [
        f"{_place(rank)}: flushes denormals to zero (a library built with -ffast-math?)"
        for rank in facts
        if rank["denormals"] is False
    ]
    status = 1 if computing else status

    notes = [
        f"the kernel cache {folder} is not writable on {host}: every start compiles anew; set "
        "SPIMPI_CACHE_DIR to a folder that is"
        for host, folder in sorted(
            {(r["host"], r["cache"]["folder"]) for r in facts if _cache_is_closed(r)}
        )
    ]
    return status, computing + problems, notes


def _cache_is_closed(rank: dict) -> bool:
    return rank["cache"] is not None and not rank["cache"]["writable"]


def _differences(facts: list[dict], key: str, name: str) -> list[str]:
    """One line a rank whose value is not the majority's; all ranks where there is no majority."""
    values = [json.dumps(rank[key], sort_keys=True) for rank in facts]
    (common, count), *others = Counter(values).most_common()
    if not others:
        return []
    if 2 * count <= len(values):
        return [
            f"{_place(rank)}: {name}: found {value}, and no majority of ranks agrees"
            for rank, value in zip(facts, values, strict=True)
        ]
    return [
        f"{_place(rank)}: {name}: expected {common} as on {count} of {len(values)} ranks, "
        f"found {value}"
        for rank, value in zip(facts, values, strict=True)
        if value != common
    ]


def _place(rank: dict) -> str:
    return f"rank {rank['rank']} on {rank['host']}"


def report_lines(facts, status, problems, notes) -> list[str]:
    """The findings for a terminal; what is said once is rank 0's, and holds for all that agree."""
    first = facts[0]
    hosts = Counter(rank["host"] for rank in facts)
    most = ", ".join(f"{host}: {n}" for host, n in hosts.most_common(4))
    more = f", and {len(hosts) - 4} more" if len(hosts) > 4 else ""
    packages = ", ".join(f"{name} {version}" for name, version in first["packages"].items())
    memory = min((rank["memory"] for rank in facts if rank["memory"]), default=None)
    cpus = " / ".join(f"{cpu} ({n} rank(s))" for cpu, n in Counter(r["cpu"] for r in facts).items())
    rows = [
        ("packages", f"Python {first['python']}, {packages}"),
        ("MPI", f"{first['mpi']}, started by {first['launcher'] or 'no launcher'}"),
        ("ranks", f"{len(facts)} on {len(hosts)} node(s): {most}{more}"),
        ("processor", cpus),
        ("threads", _thread_line(first)),
        ("memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB free a node"),
        ("traces", _trace_line(first)),
        ("kernels", _cache_line(first)),
        ("computing", _computing_line(facts, status)),
    ]
    lines = [f"{name:<10} {text}" for name, text in rows]
    lines += [f"note: {note}" for note in notes] + [f"PROBLEM: {problem}" for problem in problems]
    verdict = {0: "fit", 1: "NOT FIT: ranks compute differently", 2: "NOT FIT: see the problems"}
    return [*lines, f"doctor: {verdict[status]}"]


def _thread_line(rank: dict) -> str:
    limits = ", ".join(f"{name}={n}" for name, n in rank["threads"].items())
    return f"{rank['cores']} usable cores; a rank: {limits}"


def _trace_line(rank: dict) -> str:
    if rank["hdf5"] is None:
        return "none: h5py is missing"
    if rank["parallel_hdf5"]:
        return f"mpio: HDF5 {rank['hdf5']} is parallel, the ranks write one file"
    return f"parts: HDF5 {rank['hdf5']} is serial, a file a rank and a virtual data set over them"


def _cache_line(rank: dict) -> str:
    cache = rank["cache"]
    if cache is None:
        return "none: numba is missing"
    state = f"{cache['compiled']} compiled" if cache["compiled"] else "none compiled before this"
    return f"{state}, in {cache['folder']}"


def _computing_line(facts, status) -> str:
    if status == 1:
        return "differs between ranks, or denormals are flushed: see below"
    if any(rank["digest"] is None for rank in facts):
        return "not established: the kernels cannot be imported on every rank"
    return f"alike on {len(facts)} rank(s), denormals kept (digest {facts[0]['digest']})"
