"""An MPI session of the command line: start-up, errors on any rank, the end."""

import sys
import traceback
from contextlib import contextmanager

from spimpi.errors import SpimpiError


@contextmanager
def session(timeout: float, expect_ranks: int | None):
    """Yields (the world, a watchdog). Kernels are compiled once a node before that.

    A SpimpiError must have been raised on every rank, and passes on. Any other exception is one
    rank's alone: it ends the whole job by MPI_Abort with status 4, since the others would wait.
    """
    from mpi4py import MPI

    from spimpi.launch import check_world
    from spimpi.watchdog import Watchdog

    world = MPI.COMM_WORLD
    host = MPI.Get_processor_name()
    try:
        check_world(world, expect_ranks)
        with Watchdog(timeout, world.rank, host, _describe, world.Abort) as watchdog:
            watchdog.at("compiling kernels")
            import_kernels(world)
            yield world, watchdog
    except SpimpiError:
        raise
    except BaseException:
        traceback.print_exc()
        print(f"spimpi: rank {world.rank} ({host}) ends the job", file=sys.stderr, flush=True)
        world.Abort(4)
        raise


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
