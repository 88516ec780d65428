"""An MPI session of the command line: start-up, errors on any rank, the end."""

import sys
import time
import traceback
from contextlib import contextmanager

from spimpi.errors import SpimpiError

PATIENCE = 10.0  # seconds for every rank to raise an error that concerns all


@contextmanager
def session(timeout: float, expect_ranks: int | None):
    """Yields (the world, a watchdog). Kernels are compiled once a node before that.

    A SpimpiError that all ranks raise passes on. One that some raise alone ends the whole job by
    MPI_Abort, with its own status, since the others would wait; any other exception with status 4.
    """
    from mpi4py import MPI

    from spimpi.launch import check_world
    from spimpi.watchdog import Watchdog

    world = MPI.COMM_WORLD
    host = MPI.Get_processor_name()
    check_world(world, expect_ranks)
    ending = world.Dup()  # so that the end's barrier meets no other message
    try:
        with Watchdog(timeout, world.rank, host, _describe, world.Abort) as watchdog:
            watchdog.at("compiling kernels")
            import_kernels(world)
            yield world, watchdog
    except SpimpiError as error:
        if not _all_come(ending):
            print(f"spimpi: {error}", file=sys.stderr)
            _end_job(world, host, error.exit_status)
        raise
    except BaseException:
        traceback.print_exc()
        _end_job(world, host, 4)
        raise


def _all_come(comm) -> bool:
    """Whether all ranks of ``comm`` call this within PATIENCE seconds."""
    barrier, start = comm.Ibarrier(), time.monotonic()
    while not barrier.Test():
        if time.monotonic() - start > PATIENCE:
            return False
        time.sleep(0.01)
    return True


def _end_job(world, host, status) -> None:
    print(f"spimpi: rank {world.rank} ({host}) ends the job", file=sys.stderr, flush=True)
    world.Abort(status)


def import_kernels(world) -> None:
    """Import all kernels: a leader on every node compiles them, the others load. Collective."""
    from mpi4py import MPI

    import numba  # noqa: F401  the slow import, which all ranks can do at the same time

    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    if node.rank == 0:
        import spimpi.inference.model  # noqa: F401
    node.Barrier()
    import spimpi.inference.model  # noqa: F401, F811

    node.Free()


def _describe(event) -> str:
    from spimpi.trace.schema import Op

    op = Op(int(event["op"])).name.lower().replace("_", " ")
    return f"{op} of step {int(event['step'])}, layer {int(event['layer'])}"
