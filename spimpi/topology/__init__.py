"""How a model and its work are split over ranks. Pure: nothing here imports MPI."""

from spimpi.topology.exo import ExoPartition, create_exo_partitions
from spimpi.topology.grid import Grid, Place
from spimpi.topology.tensor import TensorShard

__all__ = ["ExoPartition", "Grid", "Place", "TensorShard", "create_exo_partitions"]
