"""What the launchers' variables mean, as the launchers were seen to set them."""

import subprocess
import sys
import tracemalloc
from os import environ

import pytest

from spimpi import launch as module
from spimpi.errors import UsageError
from spimpi.launch import Launch, check_world, launch, require_numbers, set_thread_limits

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "5",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
HYDRA = {"PMI_SIZE": "3", "PMI_RANK": "2", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_NTASKS": "11",
}
SBATCH_SHELL = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}


class World:
    """A communicator is asked for nothing but its size here."""

    def __init__(self, size):
        self.size = size

    def Get_size(self):
        return self.size


def test_mpirun_of_open_mpi_tells_rank_and_sizes():
    assert launch(OPEN_MPI) == Launch("Open MPI's mpirun", 4, 5, 1, 3)


def test_mpiexec_of_mpich_tells_rank_and_sizes():
    assert launch(HYDRA) == Launch("MPICH's mpiexec", 2, 3, 2, 3)


def test_srun_tells_how_many_tasks_share_the_node():
    assert launch(SRUN) == Launch("srun", 9, 11, 1, 3)


def test_srun_with_pmi_is_srun_still():
    assert launch(SRUN | {"PMI_RANK": "9", "PMI_SIZE": "11"}) == Launch("srun", 9, 11, 1, 3)


def test_the_shell_of_a_batch_script_was_not_launched():
    assert launch(SBATCH_SHELL) is None


def test_mpirun_inside_an_srun_step_is_what_counts():
    step = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert launch(step | OPEN_MPI).size == 5
    assert launch(step | HYDRA) == Launch("MPICH's mpiexec", 2, 3, 2, 3)


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}  # fmt: skip


def test_torchruns_processes_are_no_world_of_mpis(monkeypatch):
    found = Launch("torchrun", 1, 2, 1, 2)
    assert launch(TORCHRUN) == found
    assert launch(TORCHRUN | SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == found
    assert launch(TORCHRUN | SRUN | {"PMI_RANK": "0", "PMI_SIZE": "4"}) == found
    assert launch(TORCHRUN | OPEN_MPI).launcher == "Open MPI's mpirun"  # started by one of them
    by_hand = {name: text for name, text in TORCHRUN.items() if "ELASTIC" not in name}
    assert launch(by_hand) is None
    monkeypatch.setattr(module, "launch", lambda: found)
    with pytest.raises(UsageError, match="torchrun started 2 ranks.* which this launcher does not know"):
        check_world(World(1))


def test_other_launchers_say_rank_and_size_too():
    jsm = {f"JSM_NAMESPACE_{n}": v for n, v in (("RANK", "2"), ("SIZE", "4"), ("LOCAL_RANK", "0"))}
    assert launch(jsm) == Launch("jsrun", 2, 4, 0, None)
    assert launch({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2"}).size == 2
    over_pmi = {"PMI_RANK": "1", "PMI_SIZE": "4"}
    assert launch({**over_pmi, "PALS_RANKID": "1"}) == Launch("PALS", 1, 4, None, None)
    assert launch({**over_pmi, "FLUX_TASK_RANK": "1"}).launcher == "flux run"


def test_a_rank_that_the_world_has_not_is_enough(monkeypatch):
    monkeypatch.setattr(module, "launch", lambda: launch({"PMIX_RANK": "1"}))
    check_world(World(2))
    with pytest.raises(UsageError, match="a PMIx launcher started rank 1, but .* has 1"):
        check_world(World(1))


def test_a_process_that_is_meant_to_be_alone_may_be(monkeypatch):
    monkeypatch.setattr(module, "launch", lambda: launch(HYDRA))
    with pytest.raises(UsageError, match="SPIMPI_ALONE=1"):
        check_world(World(1))
    monkeypatch.setenv("SPIMPI_ALONE", "1")
    check_world(World(1))
    with pytest.raises(UsageError, match="has 2"):
        check_world(World(2))


def test_threads_are_the_ranks_share_of_the_node_and_the_users_choice_stays(monkeypatch):
    environ = OPEN_MPI | {"OMP_NUM_THREADS": "7"}
    monkeypatch.setattr(module, "usable_cores", lambda: 6)
    monkeypatch.setattr(module, "launch", lambda: launch(environ))
    monkeypatch.setattr(module.os, "environ", environ)
    assert set_thread_limits() == {"OPENBLAS_NUM_THREADS": 2, "NUMBA_NUM_THREADS": 2}
    assert environ["OMP_NUM_THREADS"] == "7"


def test_a_launcher_of_another_mpi_is_refused(monkeypatch):
    monkeypatch.setattr(module, "launch", lambda: launch(HYDRA))
    check_world(World(3))
    with pytest.raises(UsageError, match="MPICH's mpiexec started 3 ranks.* has 1"):
        check_world(World(1))


def test_fewer_ranks_than_expected_are_refused_even_without_a_launcher(monkeypatch):
    monkeypatch.setattr(module, "launch", lambda: None)
    check_world(World(1))
    with pytest.raises(UsageError, match="expected 4 ranks.*found an MPI world of 1"):
        check_world(World(1), expect_ranks=4)


LEAVES = """
import sys
from spimpi import cli, launch

launch.sleep = lambda seconds: print("waits")
sys.argv = ["spimpi", *sys.argv[1:]]
cli.entry()
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["verify", "--no-such-option"], 2), (["trace", "show", "absent.h5"], 2), (["--help"], 0)],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_ranks_that_leave_with_an_error_before_mpi_starts_let_rank_0_say_it(
    tmp_path, rank, arguments, status
):
    known = ("OMPI_COMM_WORLD_", "PMI", "SLURM_", "MPI_LOCAL")
    env = {name: value for name, value in environ.items() if not name.startswith(known)}
    command = [sys.executable, "-c", LEAVES, *arguments]
    done = subprocess.run(
        command, env=env | HYDRA | {"PMI_RANK": str(rank)}, cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == status
    assert (done.stdout == "waits\n") == (rank != 0 and status != 0)
    assert bool(done.stderr) == (rank == 0 and status != 0)


@pytest.mark.parametrize("text", ["²", "", "-1", "1e3", "9" * 5000, "x"])
@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_RANK", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_launcher_s_variable_that_is_no_number_is_read_over_and_refused(name, text):
    assert launch({name: text}) is None
    with pytest.raises(UsageError, match=f"{name} must be a whole number") as caught:
        require_numbers({name: text})
    assert len(str(caught.value)) <= 500


def test_numba_needs_a_thread_and_sound_variables_pass():
    with pytest.raises(UsageError, match="NUMBA_NUM_THREADS must be a whole number from 1 on"):
        require_numbers({"NUMBA_NUM_THREADS": "0"})
    require_numbers({**OPEN_MPI, **HYDRA, **SRUN, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "4,2"})


@pytest.mark.parametrize(
    ("node", "tasks"),
    [(0, 4), (1, 4), (2, 3), (3, 7), (1_000_001, 7), (1_000_002, 1), (1_000_003, None)],
)
def test_tasks_on_a_node_are_found_without_a_list_of_all_nodes(node, tasks):
    given = {"SLURM_NODEID": str(node), "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,7(x999999),1(x1)"}
    tracemalloc.start()
    assert launch(SRUN | given).local_size == tasks
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_tasks_on_nodes_are_ascii_numbers():
    assert launch(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "²(x2),3"}).local_size is None
