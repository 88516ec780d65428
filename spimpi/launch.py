"""What the launcher says of this process before MPI starts, and whether MPI then agrees.

Nothing here imports MPI or numpy at its top: thread limits must be set before numpy is imported,
and usage errors are said by rank 0 alone, before there is a communicator.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import sleep

from spimpi.errors import UsageError
from spimpi.printable import one_line

SHORTEST_NAP, LONGEST_NAP = 2e-5, 1e-3  # seconds
HEAD_START = 1.0  # seconds that rank 0 has to say its error
LAUNCHER_NUMBERS = (
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK", "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_LOCALID", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
)  # fmt: skip
ALONE = "SPIMPI_ALONE"  # set to 1: each process is meant to be a world of its own
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


TORCHRUN = "TORCHELASTIC_RUN_ID"  # RANK and WORLD_SIZE alone are set by hand too
_OVER_PMI = {"PALS_RANKID": "PALS", "FLUX_TASK_RANK": "flux run"}  # launchers that speak PMI too
_NAMED_ALIKE = {"jsrun": "JSM_NAMESPACE_", "MVAPICH's mpirun_rsh": "MV2_COMM_WORLD_"}


@dataclass(frozen=True)
class Launch:
    """The launcher's word on this process; a size that it does not tell is None."""

    launcher: str
    rank: int
    size: int | None
    local_rank: int | None
    local_size: int | None


def launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """What the launcher's variables say of this process; None where nothing launched it.

    The innermost launcher wins: mpirun starts its daemons through srun, whose variables the ranks
    then inherit. In the shell of an sbatch script SLURM_PROCID is 0 although nothing was launched;
    only srun sets SLURM_STEP_NUM_TASKS. torchrun's processes inherit what started torchrun, an
    mpirun that one of them starts has more ranks than one.
    """

    def number(name):
        text = environ.get(name, "")
        return int(text) if _is_number(text) else None

    step, slurm_rank = number("SLURM_STEP_NUM_TASKS"), number("SLURM_PROCID")
    by_mpi = number("OMPI_COMM_WORLD_SIZE") or (number("PMI_SIZE") if step is None else None) or 1
    if TORCHRUN in environ and by_mpi == 1 and (rank := number("RANK")) is not None:
        local_rank, local_size = number("LOCAL_RANK"), number("LOCAL_WORLD_SIZE")
        return Launch("torchrun", rank, number("WORLD_SIZE"), local_rank, local_size)
    if (rank := number("OMPI_COMM_WORLD_RANK")) is not None:
        size, local_size = number("OMPI_COMM_WORLD_SIZE"), number("OMPI_COMM_WORLD_LOCAL_SIZE")
        local_rank = number("OMPI_COMM_WORLD_LOCAL_RANK")
        return Launch("Open MPI's mpirun", rank, size, local_rank, local_size)
    pmi_rank, pmi_size = number("PMI_RANK"), number("PMI_SIZE")
    if step is not None and slurm_rank is not None and pmi_size in (None, step):
        rank = slurm_rank if pmi_rank is None else pmi_rank
        local_size = _tasks_on_node(environ, number("SLURM_NODEID"))
        return Launch("srun", rank, step, number("SLURM_LOCALID"), local_size)
    if pmi_rank is not None:
        local_rank, local_size = number("MPI_LOCALRANKID"), number("MPI_LOCALNRANKS")
        by = next((by for variable, by in _OVER_PMI.items() if variable in environ), "MPICH's mpiexec")
        return Launch(by, pmi_rank, pmi_size, local_rank, local_size)
    for by, prefix in _NAMED_ALIKE.items():
        if (rank := number(f"{prefix}RANK")) is not None:
            sizes = number(f"{prefix}SIZE"), number(f"{prefix}LOCAL_RANK")
            return Launch(by, rank, *sizes, number(f"{prefix}LOCAL_SIZE"))
    if (rank := number("PMIX_RANK")) is not None:
        return Launch("a PMIx launcher", rank, None, None, None)
    return None


def _is_number(text: str) -> bool:
    """Whether a variable's text is a number of ranks: ASCII digits, few enough of them."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def require_numbers(environ: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError where a variable of a launcher, or numba's number of threads, is no number.

    ``launch`` reads over such variables, and would take ranks for runs of their own.
    """
    for name in (*LAUNCHER_NUMBERS, "NUMBA_NUM_THREADS"):
        text, least = environ.get(name), int(name == "NUMBA_NUM_THREADS")
        if text is None or (_is_number(text) and int(text) >= least):
            continue
        found = one_line(repr(text), 60)
        msg = f"the variable {name} must be a whole number from {least} on, found {found}"
        raise UsageError(msg)


def _tasks_on_node(environ, node: int | None) -> int | None:
    """SLURM_STEP_TASKS_PER_NODE reads 4(x2),3: two nodes of 4 tasks and one of 3."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if node is None:
        return None
    for run in re.finditer(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?", text):
        node -= int(run[2] or 1)
        if node < 0:
            return int(run[1])
    return None


def launcher_rank() -> int:
    """This process's rank as the launcher says, before MPI is initialised; 0 without a launcher."""
    found = launch()
    return found.rank if found else 0


def speaks() -> bool:
    """Whether this process says what holds for all: rank 0, or a rank of who knows how many.

    A launcher's rank without its size is often left over, and no rank 0 is there to speak.
    """
    found = launch()
    return found is None or found.rank == 0 or found.size is None


def let_rank_0_speak() -> None:
    """Wait a moment on ranks other than 0, which leave with an error that rank 0 says. Local.

    Where MPI has not started, no barrier holds them back, and the first process that leaves with
    an error makes the mpirun of Open MPI 5 kill the others, rank 0 before its word.
    """
    if launcher_rank() != 0:
        sleep(HEAD_START)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_thread_limits() -> dict[str, int]:
    """Give this rank its share of the node's cores; returns the variables that were set.

    Sets OMP_NUM_THREADS, OPENBLAS_NUM_THREADS and NUMBA_NUM_THREADS to the usable cores over the
    ranks on this node, at least 1; what the user has set stays. Has an effect only before numpy
    is imported, for that is when the libraries read them.
    """
    found = launch()
    ranks = 1 if found is None else found.local_size or found.size or usable_cores()
    share = max(1, usable_cores() // ranks)
    chosen = {name: share for name in THREAD_VARIABLES if name not in os.environ}
    os.environ.update({name: str(n) for name, n in chosen.items()})
    return chosen


def check_world(comm, expect_ranks: int | None = None) -> None:
    """Raise UsageError unless the world has the launcher's size and the expected one.

    With a launcher of another MPI each process is a world of its own, and every one of them would
    pass. Not collective: it must work where the ranks do not know of each other.
    """
    size = comm.Get_size()
    found = launch()
    if _torn_apart(found, size):
        raise UsageError(_of_another_mpi(found, size))
    if expect_ranks is not None and expect_ranks != size:
        by = f"started by {found.launcher}" if found else "no launcher found: start with mpirun"
        msg = (
            f"expected {expect_ranks} ranks (--expect-ranks), found an MPI world of {size} "
            f"({by}; mpi4py uses {mpi_library()})"
        )
        raise UsageError(msg)


def _torn_apart(found: Launch | None, size: int) -> bool:
    """Whether a launcher speaks of other ranks than the world of this process has."""
    if found is None or (size == 1 and os.environ.get(ALONE) == "1"):
        return False
    return found.rank >= size if found.size is None else found.size != size


def _of_another_mpi(found: Launch, size: int) -> str:
    started = f"rank {found.rank}" if found.size is None else f"{found.size} ranks"
    which = "this launcher does not know" if found.launcher == "torchrun" else "is not this launcher's MPI"
    msg = (
        f"{found.launcher} started {started}, but the MPI world of this process has {size}: mpi4py "
        f"uses {mpi_library()}, which {which}. Start with that library's own mpirun or mpiexec (its "
        "bin folder first on PATH; under Slurm `srun --mpi=pmix` for Open MPI, `srun --mpi=pmi2` "
        "for MPICH)"
    )
    if size == 1:
        msg += f"; or set {ALONE}=1, where each process is meant to be a world of its own"
    return msg


_not_torn_apart = False


def require_world() -> None:
    """Raise UsageError in a world of 1 whose launcher started several ranks.

    There every check of the library would hold, on each rank for itself. Local, and looked at
    once; a world that MPI_Comm_spawn made is none of the launcher's.
    """
    global _not_torn_apart
    if _not_torn_apart:
        return
    from mpi4py import MPI

    found = launch()
    if MPI.Is_initialized() and MPI.COMM_WORLD.size == 1 and _torn_apart(found, 1):
        if MPI.Comm.Get_parent() == MPI.COMM_NULL:
            raise UsageError(_of_another_mpi(found, 1))
    _not_torn_apart = True


def mpi_library() -> str:
    """Name and version of the MPI library that mpi4py uses, in a few words."""
    from mpi4py import MPI

    lines = MPI.Get_library_version().strip("\0").splitlines()
    words = [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]
    return words[0].split(", package:")[0] if words else "an MPI without a name"


def naps(awake: int = 0) -> Iterator[None]:
    """Between two looks at something: nothing ``awake`` times, then naps that grow to 1 ms."""
    for _ in range(awake):
        yield
    nap = SHORTEST_NAP
    while True:
        sleep(nap)
        nap = min(2 * nap, LONGEST_NAP)
        yield


def wait_asleep(request) -> None:
    """Wait for an MPI request, asleep between looks.

    MPI libraries spin while they wait, and ranks that share a core take it from each other: where
    most of 64 ranks wait on two cores, the ones that work get a thirtieth of it.
    """
    pause = naps()
    while not request.Test():
        next(pause)


def leader_first(comm, action: Callable):
    """Run ``action`` on one rank of each node, then on the others; returns its result.

    Collective. For imports that compile kernels: the node's leader compiles, the others load.
    Where it raises, the job must end: no rank waits for the others on that path.
    """
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    if node.rank == 0:
        result = action()
        wait_asleep(node.Ibarrier())
    else:
        wait_asleep(node.Ibarrier())
        result = action()
    wait_asleep(node.Ibarrier())
    node.Free()
    return result
