"""A rank that never comes ends the job by the watchdog, which says who waits where."""

import re
import time

PROGRAM = '''
import sys, time
from mpi4py import MPI
from spimpi.cli import main
from spimpi.inference.layers import ExactLayers

attend = ExactLayers._attend
def stuck(self, i, b):
    while (b.step, i) == (1, 2) and MPI.COMM_WORLD.rank == 1:
        time.sleep(3600)
    attend(self, i, b)
if "--stuck" in sys.argv:
    sys.argv.remove("--stuck")
    ExactLayers._attend = stuck
sys.exit(main(sys.argv[1:]))
'''


def test_a_rank_that_hangs_ends_the_job_with_its_name_and_place(run_ranks, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [program, "verify", "--no-trace", "--tokens", "4", "--topology", "tp=2"]
    sound = run_ranks(2, *command, "--timeout", "60")
    assert sound.returncode == 0, sound.stderr
    start = time.monotonic()
    hung = run_ranks(2, *command, "--timeout", "3", "--stuck")
    assert hung.returncode == 3, hung.stderr
    assert time.monotonic() - start < 40
    # Both wait, one of them for the other: both say where.
    waits = re.findall(r"no progress for (\d+) s: rank (\d) \(\S+\) waits in (.*)", hung.stderr)
    assert {rank for _, rank, _ in waits} == {"0", "1"}
    for seconds, _, place in waits:
        assert 3 <= int(seconds) < 10
        assert place.startswith("token 1 of 4, after ")
