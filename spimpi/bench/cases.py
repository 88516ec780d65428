"""Which check is tried with which faults and dtypes, and how often."""

from collections.abc import Callable
from dataclasses import dataclass

from spimpi.bench import (
    checked_trials as checked, computed_trials as computed, moved_trials as moved,
)  # fmt: skip
from spimpi.bench.chain_trials import chain
from spimpi.bench.planted import CONTRIBUTION, MOVEMENT, REPLICA, ROUNDING
from spimpi.bench.scenes import RECORD, SEQUENCE

SHARDS = (2, 3, 4, 8)
DTYPES = ("uint8", "float16", "bfloat16", "float32", "int32", "float64", "int64", "complex64")
PAINTED = ("float16", "bfloat16", "float32", "float64")
FLOATS = (*PAINTED, "complex64")
WHOLE_NUMBERS = ("uint8", "int32", "int64")


@dataclass(frozen=True)
class Case:
    """A check: ``trial(scene)`` gives (call, callers); ``hold(scenes, ranks)``, where there is one,
    decides in one process instead. ``trials`` and ``clean`` for each dtype and number of ranks
    (and fault); ``batched``: on real ranks many share a batch."""

    name: str
    trial: Callable | None
    dtypes: tuple[str, ...] = DTYPES
    faults: tuple[str, ...] = tuple(MOVEMENT)
    trials: int = 150
    clean: int = 2150
    hold: Callable | None = None
    batched: bool = True


_REPLICATED = (*MOVEMENT, *REPLICA)
_SUMMED = (*MOVEMENT, *CONTRIBUTION)
_ROUNDED = (*_SUMMED, *ROUNDING)



def _wrapped(name, trial, faults=tuple(MOVEMENT), dtypes=DTYPES, trials=4, batched=True) -> Case:
    """Of a checked communicator; what decides is as in the check of the same data."""
    return Case(f"checked().{name}", trial, dtypes, faults, trials, 40, batched=batched)


# Checks that compare content fingerprints.
CONTENT = (
    Case("verify_allgather", moved.allgather, faults=_REPLICATED),
    Case("verify_broadcast", moved.broadcast, faults=_REPLICATED),
    Case("verify_gather", moved.gather),
    Case("verify_scatter", moved.scatter),
    Case("verify_alltoall", moved.alltoall),
    Case("verify_ring", moved.ring),
    Case("verify_pipeline_handoff", moved.handoff, faults=(*MOVEMENT, RECORD)),
    Case("at_rest", moved.at_rest),
    Case("verify_replicas", moved.replicas, faults=_REPLICATED),
    Case("verify_weights", moved.weights, faults=_REPLICATED, hold=moved.weights_hold,
         batched=False),
    Case("manifest check", moved.files, hold=moved.files_hold, batched=False),
    Case("HandoffChain", chain, faults=(*MOVEMENT, RECORD, *SEQUENCE), trials=4, clean=60,
         batched=False),
    _wrapped("Allgather", checked.allgather, _REPLICATED),
    _wrapped("Bcast", checked.broadcast, _REPLICATED),
    _wrapped("Gather", checked.gather),
    _wrapped("Scatter", checked.scatter),
    _wrapped("Alltoallv", checked.alltoallv),
)  # fmt: skip
PAINTING = Case("verify_colors", moved.colors, PAINTED, trials=60, clean=6000, batched=False)


def _sum(name, trial, dtypes, faults=_SUMMED, trials=24, clean=1500) -> Case:
    return Case(name, trial, dtypes, faults, trials, clean, batched=False)


BOUND = _sum("verify_allreduce: bound", computed.allreduce_floats, FLOATS, _ROUNDED)
WRAPPING = _sum(
    "verify_allreduce: integers that wrap", computed.allreduce_wrapping, ("uint8", "int32")
)
COMPUTED = (
    BOUND,
    _sum("verify_allreduce: agreement", computed.allreduce_disagreeing, FLOATS,
         (*_ROUNDED, *REPLICA), clean=300),
    _sum("verify_allreduce: floats that hold integers", computed.allreduce_integral, PAINTED,
         _ROUNDED),
    _sum("verify_allreduce: integers", computed.allreduce_integers, WHOLE_NUMBERS,
         trials=100),
    _sum("verify_allreduce: MAX", computed.allreduce_max, (*PAINTED, *WHOLE_NUMBERS), clean=500),
    _sum("verify_allreduce: BXOR", computed.allreduce_xor, WHOLE_NUMBERS, clean=500),
    _sum("verify_reduce_scatter: bound", computed.reduce_scatter, FLOATS, _ROUNDED, clean=500),
    _sum("verify_reduce_scatter: integers", computed.reduce_scatter_integers, WHOLE_NUMBERS,
         trials=100, clean=500),
    Case("verify_matmul", computed.matmul, ("int32", "int64", "float32", "float64"), trials=60),
    _sum("compare_sketches", computed.sketches, FLOATS, _ROUNDED, clean=500),
    _sum("exact_allreduce", computed.exact_sum, FLOATS, (*_SUMMED, *REPLICA), trials=6, clean=50),
    _wrapped("Allreduce: bound", checked.allreduce, _ROUNDED, FLOATS, 6, batched=False),
    _wrapped("Allreduce: integers", checked.allreduce_integers, _SUMMED, WHOLE_NUMBERS, 10,
             batched=False),
)  # fmt: skip

IN_ONE_PROCESS = (*CONTENT, PAINTING, *COMPUTED)
# Requests and messages of a checked communicator have no ranks in one process.
WITH_MPI_ALONE = (
    _wrapped("Iallgather", checked.iallgather, _REPLICATED, batched=False),
    _wrapped("Send, Recv", checked.messages, batched=False),
)  # fmt: skip
ON_RANKS = (*IN_ONE_PROCESS, WRAPPING, *WITH_MPI_ALONE)
