"""Sketches of tensors, and how far apart two of them are: docs/sketches.md.

``sketch`` and ``compare_sketches`` are local; ``reduce_sketch`` is collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from spimpi.checks.sums import float_bound, words as sum_words
from spimpi.checks.sums.exact import global_runs
from spimpi.checks.verdict import NO_ELEMENTS
from spimpi.distance import CERTAIN, ERROR, N_PROJECTIONS, distances, relative_distances
from spimpi.errors import UsageError
from spimpi.fingerprint import arrays, as_array, fingerprint, projections
from spimpi.fingerprint.tag import SKETCH, Tag
from spimpi.partition import Slab
from spimpi.units import are


@dataclass(frozen=True)
class Sketch:
    """Eight projections of a tensor or of a shard, Σx², max|x|, non-finite count, fingerprint.

    ``key`` is that of the tensor's sketch stream, ``dtype`` the dtype's name, ``n_elements`` how
    many items the sketch is of. Sketches of disjoint shards add up (``reduce_sketch``).
    """

    key: int
    dtype: str
    n_elements: int
    projections: tuple[float, ...]
    sum_squares: float
    absmax: float
    nonfinite: int
    fingerprint: int

    @property
    def norm(self) -> float:
        """The Euclidean norm of the finite elements."""
        return sqrt(self.sum_squares)


@dataclass(frozen=True)
class SketchComparison:
    """How far apart two tensors are, by their sketches.

    ``distance`` estimates ‖x - y‖, ``relative`` is that over ‖x‖; both have a standard error of
    about a quarter (``error`` is that of ``relative``). ``limit``: the largest relative distance
    that reordered rounding explains, None where it is not known. ``verdict``: "same bits",
    "reordered rounding", "different", or "" where none can be claimed. ``missing``: what was not
    compared, in words.
    """

    verdict: str
    distance: float
    relative: float
    error: float
    limit: float | None
    missing: str = ""

    def __str__(self):
        if self.verdict == "same bits" or (self.missing and not self.verdict):
            return self.verdict or self.missing
        size = f"relative {self.relative:.1g} ± {self.error:.1g}"
        text = f"{self.verdict} ({size})" if self.verdict else f"{size}, no limit is known"
        return f"{text}; {self.missing}" if self.missing else text


def sketch(array, tag: Tag, where=None) -> Sketch:
    """The sketch of a tensor, or of the shard that ``where`` (a TensorPartition or Slab) says.

    float64, float32, float16, bfloat16, complex or integer arrays. Local. UsageError for others.
    """
    given = as_array(array)
    word = fingerprint(given, tag, where)
    slab = arrays.slab_of(given.shape, where)
    x = sum_words.items(given)
    if x is not given:
        slab = Slab((*slab.global_shape, 2), (*slab.offset, 0))
    if x.dtype.kind not in "biu" and float_bound.format_of(x.dtype) is None:
        msg = f"no sketch of {given.dtype}: expected integers, float64/32/16, bfloat16 or complex"
        raise UsageError(msg)
    key = tag.key(SKETCH, slab.global_shape, x.dtype.itemsize)
    sums = np.zeros((10, 2))
    nonfinite = 0
    for run, first in global_runs(x, slab):
        wide = run.astype(np.float64) if x.dtype.kind in "biu" else sum_words.widened(run)
        wide = np.require(wide, requirements=("C", "A"))
        nonfinite += projections.sketch_run(wide, np.uint64(key), np.uint64(first), sums)
    total = sums.sum(axis=1)
    return Sketch(
        key=key, dtype=given.dtype.name, n_elements=x.size,
        projections=tuple(float(s) for s in total[:N_PROJECTIONS]), sum_squares=float(total[8]),
        absmax=float(sums[9, 0]), nonfinite=nonfinite, fingerprint=word,
    )  # fmt: skip


def reduce_sketch(comm, own: Sketch) -> Sketch:
    """The sketch of the whole tensor from those of its shards, the same on every rank.

    Each element must be in one shard. UsageError on every rank where they are of different
    tensors. Collective.
    """
    everyone = comm.allgather(own)
    for rank, one in enumerate(everyone):
        if (one.key, one.dtype) != (everyone[0].key, everyone[0].dtype):
            msg = (
                f"sketches of different tensors do not add up: rank 0 has {everyone[0].dtype}, "
                f"stream {everyone[0].key:016x}, rank {rank} {one.dtype}, stream {one.key:016x}"
            )
            raise UsageError(msg)
    return combine_sketches(everyone)


def combine_sketches(parts: Sequence[Sketch]) -> Sketch:
    """The sketch of the union of disjoint shards of one tensor; local."""
    word = 0
    for one in parts:
        word ^= one.fingerprint
    return Sketch(
        key=parts[0].key, dtype=parts[0].dtype, n_elements=sum(p.n_elements for p in parts),
        projections=tuple(float_bound.exact_sum(s) for s in zip(*(p.projections for p in parts))),
        sum_squares=float_bound.exact_sum([p.sum_squares for p in parts]),
        absmax=max(p.absmax for p in parts), nonfinite=sum(p.nonfinite for p in parts),
        fingerprint=word,
    )  # fmt: skip


def compare_sketches(
    a: Sketch, b: Sketch, addends: Sequence[Sketch] | None = None
) -> SketchComparison:
    """How far apart two tensors are; local.

    ``addends``: sketches of the P tensors of which both are the float sum (in two orders). With
    them "reordered rounding" and "different" can be told apart; without them no such verdict is
    claimed. UsageError where the sketches are of different tensors.
    """
    if a.key != b.key or a.n_elements != b.n_elements:
        msg = (
            f"sketches of different tensors cannot be compared: {a.n_elements} items of stream "
            f"{a.key:016x} and {b.n_elements} of {b.key:016x} (name, layer, step, shape and item "
            "size must be the same)"
        )
        raise UsageError(msg)
    distance, norm = float(distances(a.projections, b.projections)), a.norm
    relative = float(relative_distances(distance, norm))
    limit = None if addends is None else _limit(a, addends)
    if not a.n_elements:
        return SketchComparison("", 0.0, 0.0, 0.0, limit, NO_ELEMENTS)
    if a.fingerprint == b.fingerprint and a.dtype == b.dtype:
        return SketchComparison("same bits", 0.0, 0.0, 0.0, limit)
    if a.nonfinite == b.nonfinite == a.n_elements:
        missing = "all elements are NaN or Inf, and their bits differ: nothing else was compared"
        return SketchComparison("", 0.0, 0.0, 0.0, limit, missing)
    missing = f"{are(a.nonfinite)} NaN or Inf: not compared" if a.nonfinite else ""
    if a.nonfinite != b.nonfinite:
        verdict = "different"
    elif limit is None:
        verdict = ""
    else:
        verdict = "different" if distance > limit * norm else "reordered rounding"
    return SketchComparison(verdict, distance, relative, relative * ERROR, limit, missing)


def _limit(a: Sketch, addends) -> float:
    """The relative distance of two orders of one sum that is reached with odds of 2.3e-12."""
    facts = float_bound.format_of(arrays.dtype_of(a.dtype.replace("complex128", "float64")))
    if a.dtype == "complex64":
        facts = float_bound.format_of(np.float32)
    if facts is None:
        msg = f"sums of {a.dtype} do not round: compare their fingerprints"
        raise UsageError(msg)
    if any(one.n_elements != a.n_elements for one in addends) or not addends:
        msg = "addends must be sketches of tensors of the same shape"
        raise UsageError(msg)
    n = len(addends)
    reduced = float_bound.phi(n - 1, facts.unit * float_bound.WIDER)
    bound = 2 * reduced * sum(one.norm for one in addends)
    bound += (4 * n + 6) * sqrt(a.n_elements) * facts.tiny
    # The sketches round too: each projection once, by its own size.
    bound += 4 * float_bound.DOUBLE * max(map(abs, a.projections))
    return CERTAIN * bound / a.norm if a.norm else np.inf
