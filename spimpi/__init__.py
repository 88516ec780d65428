"""spimpi verifies distributed transformer inference in place. See docs/ and ``spimpi --help``.

Importing the package imports neither MPI nor numba; both come with the first name that needs them.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "spimpi.errors": (
        "CorruptionError", "IncompleteError", "MissingDependency", "SpimpiError",
        "UncheckedWarning", "UsageError",
    ),
    "spimpi.partition": ("ShardedTensor", "Slab", "TensorPartition"),
    "spimpi.fingerprint": (
        "Tag", "as_array", "combine", "expected_fingerprint", "fingerprint", "linear_fingerprint",
    ),
    "spimpi.fingerprint.painting": (
        "color_embeddings", "color_fingerprint", "color_hidden_states", "color_logits",
        "colors_of", "corrupted_elements",
    ),
    "spimpi.checks.colors": ("verify_colors",),
    "spimpi.reduction": (
        "agree", "dissenters", "ireduce_fingerprints", "isum_words", "reduce_fingerprints",
        "sum_words",
    ),
    "spimpi.context": ("DistributedContext",),
    "spimpi.checks.localisation.findings": ("Findings",),
    "spimpi.checks.localisation.localise": ("localise",),
    "spimpi.checks.verdict": ("ElementError", "Verdict", "Where"),
    "spimpi.trace.schema": ("Established",),
    "spimpi.manifest.format": ("Manifest", "read_manifest", "write_manifest"),
    "spimpi.manifest.make": ("make_manifest",),
    "spimpi.manifest.check": ("check_files",),
    "spimpi.checks.at_rest": ("AtRest", "at_rest"),
    "spimpi.checks.collectives": (
        "verify_allgather", "verify_alltoall", "verify_broadcast", "verify_gather",
        "verify_scatter",
    ),
    "spimpi.checks.matmul": ("project_weight", "verify_matmul"),
    "spimpi.checks.point_to_point": ("HandoffChain", "verify_pipeline_handoff"),
    "spimpi.checks.replicas": ("verify_replicas",),
    "spimpi.checks.ring": ("verify_ring",),
    "spimpi.checked_communicator": ("checked",),
    "spimpi.checks.requests": ("CheckedRequest",),
    "spimpi.checks.sums.verify": ("verify_allreduce", "verify_reduce_scatter"),
    "spimpi.checks.sums.sketch": (
        "Sketch", "SketchComparison", "compare_sketches", "reduce_sketch", "sketch",
    ),
    "spimpi.exact_sum": ("exact_allreduce",),
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
    from spimpi.optional import optional_packages

    with optional_packages():
        value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
