"""The example of the manifest runs as it says."""

from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "checkpoint_resplit.py"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_is_checked_under_another_split(run_ranks, ranks):
    done = run_ranks(ranks, EXAMPLE)
    assert done.returncode == 0, done.stderr
    agreed = "agreed, " if ranks > 1 else ""
    assert f"{ranks} ranks, by rows: verified ({agreed}expected)" in done.stdout
    assert "after a flipped bit: corrupted: " in done.stdout
    assert "layers.0.mlp.weight" in done.stdout
