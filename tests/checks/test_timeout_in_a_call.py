"""A rank that waits in MPI itself for one that never comes: the job ends, and says who is missing."""

PROGRAM = """
import time
import numpy as np, spimpi
from mpi4py import MPI

comm = MPI.COMM_WORLD
with spimpi.DistributedContext(comm, timeout=1) as ctx:
    checked = spimpi.checked(comm, ctx)
    if comm.rank == 1:
        time.sleep(60)
    checked.Allgather(np.ones(2), np.empty(2 * comm.size))
"""


def test_the_job_ends_and_names_the_rank_that_never_came(run_ranks, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ended = run_ranks(3, program, timeout=50)
    assert ended.returncode != 0
    assert "Allgather of 'Allgather', step 1: given up after 1 s" in ended.stderr
    assert "rank 1 in <module> (program.py:10), waits in no check" in ended.stderr
