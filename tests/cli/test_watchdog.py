"""A rank that never comes ends the job by the watchdog, which says who waits where."""

import re
import time

from spimpi.watchdog import Watchdog

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
    # Both wait, one of them for the other: rank 1 is stuck before the reduction where rank 0 waits.
    waits = re.findall(r"no progress for (\d+) s: rank (\d) \(\S+\) waits in (.*)", hung.stderr)
    places = {int(rank): place for _, rank, place in waits}
    assert all(3 <= int(seconds) < 10 for seconds, _, _ in waits)
    assert places[0] == "token 2 of 4: allreduce max of attn_max, step 1, layer 2"
    assert places[1] == "token 2 of 4: matmuls and checks of qkv, step 1, layer 2"


def test_a_stage_that_may_take_long_is_given_its_time_and_no_other(capsys):
    ended = []
    with Watchdog(0.2, 0, "n1", ended.append) as watchdog:
        watchdog.at("compiling kernels", 60)
        time.sleep(0.6)
        assert not ended
        watchdog.at("fabric")
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended == [3]
    assert "waits in fabric" in capsys.readouterr().err
