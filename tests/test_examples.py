"""The programs in examples/: they run clean, and find what their option plants."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

CASES = [
    ("tensor_parallel_mlp.py", "3 steps verified on 3 ranks", "--flip",
     ("step 1, layer 1, tensor hidden, rank 2", "allgather failed")),
    ("ring_of_handoffs.py", "4 microbatches verified round 3 ranks", "--stale",
     ("tensor hidden, rank 1", "a stale buffer: that of sequence 1", "received from rank 0")),
    ("data_parallel_replica.py", "20 steps verified on 3 ranks", "--wrong",
     ("step 10, tensor parameters, rank 2", "rank 2 differs from the majority")),
    ("whole_run.py", "checks on 3 ranks, 0 failed\nverified", "--flip",
     ("corrupted: step 0, layer 3, tensor hidden, rank 1",)),
]  # fmt: skip


@pytest.mark.parametrize(("program", "said", "option", "found"), CASES)
def test_the_example_runs_clean_and_finds_its_fault(run_ranks, program, said, option, found):
    clean = run_ranks(3, EXAMPLES / program)
    assert clean.returncode == 0 and said in clean.stdout, clean.stderr
    faulty = run_ranks(3, EXAMPLES / program, option)
    assert faulty.returncode == 1, faulty.stderr
    for words in found:
        assert words in faulty.stdout, faulty.stdout
