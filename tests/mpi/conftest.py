"""What the multi-rank tests share: models on disk, and worlds smaller than the one they run in."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

from reference_models import random_tensors, tiny_config, write  # noqa: E402


@pytest.fixture(scope="session")
def shared_folder(comm, request):
    """A temporary folder that all ranks see; rank 0 makes it, and takes it away."""
    folder = Path(comm.bcast(tempfile.mkdtemp(prefix="spimpi-test-") if comm.rank == 0 else None))
    yield folder
    if comm.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def model(comm, shared_folder):
    """``model(name, seed=1, **facts)``: the directory of a random model, written by rank 0."""
    made = {}

    def make(name, seed=1, **facts):
        if name not in made:
            if comm.rank == 0:
                config = tiny_config(name=name, **facts)
                write(shared_folder / name, config, random_tensors(config, seed))
            comm.Barrier()
            made[name] = shared_folder / name
        return made[name]

    return make
