"""spimpi verifies distributed transformer inference in place. See docs/ and ``spimpi --help``.

Importing the package imports neither MPI nor numba; both come with the first name that needs them.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "spimpi.errors": (
        "CorruptionError", "IncompleteError", "MissingDependency", "SpimpiError", "UsageError",
    ),
    "spimpi.partition": ("ShardedTensor", "Slab", "TensorPartition"),
    "spimpi.fingerprint": (
        "Tag", "combine", "expected_fingerprint", "fingerprint", "linear_fingerprint",
    ),
    "spimpi.reduction": (
        "agree", "dissenters", "ireduce_fingerprints", "isum_words", "reduce_fingerprints",
        "sum_words",
    ),
    "spimpi.context": ("DistributedContext",),
    "spimpi.checks.verdict": ("Verdict", "Where"),
    "spimpi.checks.weights": ("verify_weights",),
    "spimpi.topology.exo": ("ExoPartition", "create_exo_partitions"),
    "spimpi.topology.grid": ("Grid",),
    "spimpi.verification.run": ("verify_distributed_inference",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME_OF, "__version__"]


def __getattr__(name):
    if name not in _HOME_OF:
        msg = f"module 'spimpi' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
