"""A model that leaves float32 by itself: rows with NaN or Inf that no fault made.

Such rows fail the check of the tensor in which they are met. Where they are all that failed, every
fingerprint is what it should be: what was computed is what the weights and the prompt give. A golden
run that meets none, on the same weights, tells a fault from a model; a second golden run that meets
the same tells a model from a fault that comes and goes.
"""

import numpy as np
from mpi4py import MPI

from spimpi.errors import UsageError
from spimpi.inference.finite import largest_weight

_PLACE = ["step", "microbatch", "layer", "tensor", "op", "stage", "nonfinite", "fingerprint"]


def only_overflow(world, recorder) -> bool:
    """Whether something failed, and all of it are rows with NaN or Inf whose bits are as they were
    made. Collective over ``world``."""
    n_failed = sum(t.failed for t in recorder.totals.values())
    counts = np.array([n_failed, recorder.n_differing], np.int64)
    world.Allreduce(MPI.IN_PLACE, counts, op=MPI.SUM)
    return bool(counts[0] > 0 and counts[1] == 0)


def same_twice(recorder) -> bool:
    """Whether the first two runs of a recorder that keeps all failures failed alike: same places,
    same bits. Local."""
    failures = recorder.all_failures()
    # In what order failures are kept depends on when they were written down.
    first, second = (sorted(failures[failures["repeat"] == r][_PLACE].tolist()) for r in (0, 1))
    return first == second


def refuse(where, checkpoint, how: str):
    """UsageError for a model that overflowed at ``where``; ``how`` it is known that it did so."""
    name, value = largest_weight(checkpoint, where.layer)
    layer = f"layer {where.layer}, " if where.layer >= 0 else ""
    msg = (
        f"the model's own arithmetic leaves float32 at step {where.step}, {layer}tensor "
        f"{where.tensor} ({where.detail}), while every fingerprint was right{how}: there is no "
        f"result to verify; the largest weight up to there is {value:.4g}, in {name}"
    )
    raise UsageError(msg)
