"""The command line's tests start their own ranks, so they are not under tests/mpi.

(pytest-mpi takes every test below a folder named mpi for one that runs under mpirun.)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))  # reference_models
