"""The machine's own MPI and parallel HDF5: found, or installed where that is allowed, or explained.

Only the standard library: this runs before anything is installed.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

DEBIAN_PACKAGES = ("gcc", "libc6-dev", "openmpi-bin", "libopenmpi-dev", "libhdf5-openmpi-dev")
DEBIAN_HDF5 = "usr/lib/*/hdf5/openmpi"


class Missing(Exception):
    """Something is needed that cannot be installed from here; the message says how to get it."""


@dataclass(frozen=True)
class SystemMpi:
    """Where the machine's own MPI and its parallel HDF5 lie."""

    mpicc: str
    mpiexec: str
    hdf5: str


def path_without_environments() -> str:
    """PATH without virtual environments: an activated one may bring an MPI of its own."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(f for f in folders if not Path(f, "activate").exists())


def run_quietly(*command: str) -> str:
    """What a command prints, empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _is_parallel(hdf5: Path) -> bool:
    headers = [*hdf5.glob("include/H5pubconf*.h"), *hdf5.glob("include/*/H5pubconf*.h")]
    parallel = re.compile(r"^#define\s+H5_HAVE_PARALLEL\s+1", re.MULTILINE)
    return any(parallel.search(header.read_text(errors="replace")) for header in headers)


def _find_hdf5(path: str) -> Path | None:
    """$HDF5_DIR, else Debian's, else the one whose h5pcc is on PATH; only one built with MPI."""
    if chosen := os.environ.get("HDF5_DIR"):
        if not _is_parallel(Path(chosen)):
            msg = (
                f"HDF5_DIR={chosen} is not an HDF5 built with MPI: expected a header there, "
                "include/H5pubconf.h, that defines H5_HAVE_PARALLEL. Unset HDF5_DIR or name another"
            )
            raise Missing(msg)
        return Path(chosen)
    candidates = sorted(Path("/").glob(DEBIAN_HDF5))
    if h5pcc := shutil.which("h5pcc", path=path):
        prefix = re.search(r"Installation point:\s*(\S+)", run_quietly(h5pcc, "-showconfig"))
        candidates += [Path(prefix[1])] if prefix else []
    return next((folder for folder in candidates if _is_parallel(folder)), None)


def _look() -> tuple[SystemMpi | None, dict[str, str]]:
    """What is here, and what is missing: a description for each missing part."""
    path = path_without_environments()
    hdf5 = _find_hdf5(path)
    # Where several MPIs are installed, Debian's names tell which one its HDF5 was built with.
    suffix = ".openmpi" if hdf5 and hdf5.match("hdf5/openmpi") else ""
    mpicc = shutil.which("mpicc" + suffix, path=path) or shutil.which("mpicc", path=path)
    mpiexec = shutil.which("mpiexec" + suffix, path=path) or shutil.which("mpiexec", path=path)
    missing = {}
    if not mpiexec:
        missing["mpiexec"] = "an MPI launcher: no mpiexec on PATH"
    if not mpicc or not run_quietly(mpicc, "--version"):
        missing["mpicc"] = "an MPI compiler: no working mpicc on PATH"
    if not hdf5:
        missing["hdf5"] = (
            "an HDF5 built with MPI: none in HDF5_DIR, in Debian's place or by h5pcc on PATH"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing["python"] = f"Python's C headers (Python.h) of {sys.executable}"
    return None if missing else SystemMpi(mpicc, mpiexec, str(hdf5)), missing


def install_debian(*packages: str) -> bool:
    """Install Debian packages where this is allowed; False where it is not, or where it fails."""
    apt = shutil.which("apt-get")
    if not apt or os.geteuid() != 0:
        return False
    print(f"-- apt-get install {' '.join(packages)}", flush=True)
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(
            [apt, "-qq", *command],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            return False
    return True


def find_or_install() -> SystemMpi:
    """The machine's MPI and parallel HDF5; as root on Debian they are installed when missing."""
    found, missing = _look()
    if found:
        return found
    packages = list(DEBIAN_PACKAGES)
    if "python" in missing and sys.base_prefix == "/usr":
        packages.append("python3-dev")
    if install_debian(*packages):
        found, missing = _look()
        if found:
            return found
    lines = "\n".join(f"  - {what}" for what in missing.values())
    msg = (
        f"The tests need the machine's own MPI and parallel HDF5. Missing here:\n{lines}\n"
        f"On Debian and Ubuntu: sudo apt-get install {' '.join(packages)}\n"
        "Elsewhere: load or install an MPI and an HDF5 built with it (often `module load openmpi "
        "hdf5`),\nand set HDF5_DIR to the folder that holds its include/ and lib/."
    )
    raise Missing(msg)


def find_or_install_browser() -> None:
    """Headless Chromium and its driver, for the tests of the report; without them those skip."""
    names = ("chromium", "chromedriver")
    if all(map(shutil.which, names)) or install_debian("chromium", "chromium-driver"):
        return
    print("-- no Chromium with its driver: the browser tests of the report will be skipped")
