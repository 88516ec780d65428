"""Data at rest: fingerprint an array now, and see later whether it is still the same."""

from dataclasses import dataclass

import numpy as np

from spimpi.checks.check import Check, Rule, place_of
from spimpi.checks.pending import enforce, settle
from spimpi.checks.verdict import NO_ELEMENTS, Verdict, Where
from spimpi.errors import UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.protocols import as_memory
from spimpi.fingerprint.tag import Tag
from spimpi.partition import Slab, balanced_sizes
from spimpi.trace.schema import Established

NAME = "at rest"
# An array of more than this many bytes is watched in blocks, so that a failure can name one.
BLOCK_BYTES, MOST_BLOCKS = 1 << 16, 64


@dataclass(frozen=True, eq=False)
class AtRest:
    """An array that is not to change, and the fingerprints that it had. Made by ``at_rest``.

    ``words``: (slab, index range along the longest axis, fingerprint) of each block.
    """

    array: np.ndarray
    tag: Tag
    slab: Slab
    axis: int
    words: tuple[tuple[int, int, int], ...]
    threads: int = 1

    @property
    def fingerprint(self) -> int:
        """The array's fingerprint (its share of the whole tensor's) when the watch began."""
        total = 0
        for _, _, word in self.words:
            total ^= word
        return total

    def verify(self, comm=None, *, check=True, ctx=None) -> Verdict:
        """Check that the array has not changed since. Establishes moved.

        Without ``comm`` local: CorruptionError on this rank alone. With it collective: every rank
        brings a watch of its own (shapes may differ), and all raise, naming the rank that failed.
        """
        c = Check(NAME, self.tag, Rule.LOCAL, Established.MOVED, self.threads)
        if comm is not None:
            return settle(comm, c, self._look, check, ctx)
        c.n_bytes = self.array.nbytes
        verdict = self._alone(*self._changed())
        if ctx is not None and ctx.tracer is not None:
            ctx.tracer.record(c, verdict, ctx.world, None if verdict else ctx.rank)
        return enforce(verdict, check)

    def _alone(self, changed, now) -> Verdict:
        """The verdict of this rank alone."""
        word = self.fingerprint
        if not changed:
            some = self.array.size > 0
            return Verdict(
                True, Established.MOVED if some else Established(0),
                missing=() if some else (NO_ELEMENTS,), check=NAME, expected=word, actual=now,
            )  # fmt: skip
        where = Where(
            NAME, self.tag.name, self.tag.step, self.tag.layer, -1, None, "", 0,
            f"{word:016x}", f"{now:016x}", self._told(changed),
        )  # fmt: skip
        return Verdict(
            False, Established(0), where, check=NAME, expected=word, actual=now
        )

    def _look(self, c: Check) -> None:
        changed, now = self._changed()
        c.n_bad, c.n_bytes, c.compares = len(changed), self.array.nbytes, self.array.size > 0
        c.got = now
        c.complaint = lambda: {
            "detail": self._told(changed), "expected": self.fingerprint, "actual": now,
        }  # fmt: skip

    def _changed(self) -> tuple[list[tuple[int, int]], int]:
        """(ranges along the axis whose blocks have changed, the fingerprint now)."""
        changed, total = [], 0
        for first, last, word in self.words:
            now = _word(self.array, self.tag, self.slab, self.axis, first, last, self.threads)
            total ^= now
            if now != word:
                changed.append((first, last))
        return changed, total

    def _told(self, changed) -> str:
        n = len(self.words)
        if n == 1:
            return "it has changed since it was fingerprinted"
        start = self.slab.offset[self.axis]
        shown = ", ".join(f"{start + a}..{start + b}" for a, b in changed[:4])
        return (
            f"it has changed since it was fingerprinted: {len(changed)} of {n} blocks, along axis "
            f"{self.axis} {shown}{', …' * (len(changed) > 4)}"
        )


def at_rest(array, tag, where=None, threads=1) -> AtRest:
    """Fingerprint an array now, to ``verify()`` later that it has not changed. Local.

    where: None (all of the tensor), a TensorPartition or a Slab. The array is kept, not copied;
    after a wanted change make a new watch. UsageError for what has no fingerprint, and for what
    gives a copy of itself (numpy's scalars, some arrays of other libraries): it would never change.
    """
    array = as_memory(array)
    if not isinstance(tag, Tag):
        msg = f"expected a spimpi.Tag, found {type(tag).__name__}"
        raise UsageError(msg)
    slab = place_of(array.shape, where)
    axis = int(np.argmax(array.shape)) if array.ndim else 0
    length = array.shape[axis] if array.ndim else 1
    n = min(MOST_BLOCKS, max(1, array.nbytes // BLOCK_BYTES), length)
    first, words = 0, []
    for size in balanced_sizes(length, max(n, 1)):
        last = first + size
        words.append((first, last, _word(array, tag, slab, axis, first, last, threads)))
        first = last
    return AtRest(array, tag, slab, axis, tuple(words), threads)


def _word(array, tag, slab, axis, first, last, threads) -> int:
    if first == 0 and (array.ndim == 0 or last == array.shape[axis]):
        return fingerprint(array, tag, slab, threads)
    offset = list(slab.offset)
    offset[axis] += first
    block = array[(slice(None),) * axis + (slice(first, last),)]
    return fingerprint(block, tag, Slab(slab.global_shape, tuple(offset)), threads)
