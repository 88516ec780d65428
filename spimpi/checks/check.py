"""One check as one rank sees it, before anybody else's word is known. No MPI here.

Every check leaves the same few words: the fingerprint of what this rank gave, of what it got, how
many elements these are, and a digest of what it believes to be checking. ``fold`` makes one record
(reduction.RECORD) of any number of checks, so that a batch of any length is one reduction of 48
bytes, and ranks that made different checks find out instead of hanging.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import product
from math import prod
from time import perf_counter

import numpy as np

from spimpi.errors import SpimpiError, UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.arrays import share_memory, slab_of
from spimpi.fingerprint.protocols import as_array
from spimpi.fingerprint.tag import CONTENT, GOLDEN, MASK, Tag, absorb, mix
from spimpi.partition import Slab, TensorPartition, whole
from spimpi.trace.schema import Established

# x^64 + x^4 + x^3 + x + 1 is irreducible: doubling modulo it is a bijection on 64 bits.
_POLYNOMIAL = 0x1B
# In a record's count: one for a rank with an error or a failure of its own; below it, one for each
# check and rank that compared anything.
FAILED = 1 << 40

HANDOFFS = "hand-offs"  # name of the check that a batch makes of all its hand-offs


class Rule(Enum):
    """What the words of all ranks must fulfil."""

    ASSEMBLED = "the XOR of what all gave is what everyone got"
    MOVED = "the XOR of what all gave is the XOR of what all got"
    AGREED = "everyone got the same"
    LOCAL = "no rank found a failure of its own"
    GATHERED = "what follows from everybody's words"


@dataclass(eq=False)
class Check:
    """One check on one rank. ``contributed`` and ``held`` are lists of (array, Slab).

    The blocks given, and those got unless everyone gets everything, cover the tensor once; where
    ``n_loose`` is not 0, blocks need only be received as they were given, and so many leading axes
    of the global shape tell them apart. ``complaint``: what a local check found, in keywords.

    With Rule.GATHERED the record carries the digest and errors alone. ``words`` (uint64, as many
    as the number of ranks says, whatever the arguments are) travel by an Allgather, and
    ``conclude(session, everyone)`` makes the verdict of them, [ranks, words]. Collective.
    ``settings``: what else all ranks must say alike, in words.

    ``compares``: whether this rank's part of the check compares any element with other memory
    than its own; None: what the blocks say. ``waits``: its verdict is asked for later, so that
    buffers may be used again before it. ``yields``: its error is told only where no rank found a
    failure.

    ``tracer`` (checks/program_trace.py) takes the verdict; ``n_bytes`` were read for it here.
    """

    name: str
    tag: Tag
    rule: Rule
    established: Established
    threads: int = 1
    contributed: list = field(default_factory=list)
    held: list = field(default_factory=list)
    given: int = 0
    got: int = 0
    n_given: int = 0
    n_got: int = 0
    shape: tuple | None = None
    dtype: np.dtype | None = None
    layout: object = None
    root: int | None = None
    n_loose: int = 0
    settings: str = ""
    words: np.ndarray | None = None
    conclude: Callable | None = None
    digest: int = 0
    n_bad: int = 0
    complaint: Callable | None = None
    error: SpimpiError | None = None
    yields: bool = False
    compares: bool | None = None
    waits: bool = False
    tracer: object = None
    n_bytes: int = 0
    started: float = field(default_factory=perf_counter)

    def gives(self, array, where) -> Slab:
        """Fingerprint a block that this rank contributed; returns its slab."""
        array, slab = self._take(array, where)
        self.given ^= fingerprint(array, self.tag, slab, self.threads)
        self.n_given += array.size
        self.contributed.append((array, slab))
        return slab

    def gets(self, array, where) -> Slab:
        """Fingerprint a block that this rank holds now; returns its slab."""
        array, slab = self._take(array, where)
        self.got ^= fingerprint(array, self.tag, slab, self.threads)
        self.n_got += array.size
        self.held.append((array, slab))
        return slab

    def of(self, shape, dtype) -> None:
        """Say which tensor this is, where a rank neither gives nor gets a block of it."""
        if self.shape is None:
            self.shape, self.dtype = tuple(shape), dtype
        elif self.shape != tuple(shape):
            msg = f"expected blocks of one tensor, found global shapes {self.shape} and {shape}"
            raise UsageError(msg)
        elif self.dtype != dtype:
            msg = f"expected arrays of one dtype, found {self.dtype} and {dtype}"
            raise UsageError(msg)

    def require_apart(self, given: str, got: str) -> None:
        """Raise UsageError where what was given and what was got are the same memory: then the
        data would be compared with themselves."""
        for (a, _), (b, _) in product(self.contributed, self.held):
            if share_memory(a, b):
                raise UsageError(same_memory(given, got))

    def _take(self, array, where) -> tuple[np.ndarray, Slab]:
        array = as_array(array)
        slab = place_of(array.shape, where)
        self.of(slab.global_shape, array.dtype)
        self.n_bytes += array.nbytes
        return array, slab

    def seal(self) -> None:
        """Bind tag, shape, dtype and cut to the digest that all ranks must have alike."""
        if self.compares is None:
            self.compares = self._compares()
        # numpy's integers are equal to Python's, and print otherwise, in a digest too.
        root = None if self.root is None else int(self.root)
        known = _static_digest(self.name, self.dtype, self.layout, root, self.settings)
        shape, itemsize = (self.shape, self.dtype.itemsize) if self.dtype else ((), 0)
        self.digest = mix(known ^ self.tag.key(CONTENT, shape, itemsize))

    def _compares(self) -> bool:
        if self.rule in (Rule.LOCAL, Rule.GATHERED):
            return True
        if self.n_given != self.n_got or self.contributed is self.held:
            return self.n_given + self.n_got > 0
        # All that this rank gave it got itself: compared, unless it lies in one place.
        given, got = ([a for a, _ in some if a.size] for some in (self.contributed, self.held))
        return not all(any(share_memory(a, b) for b in got) for a in given)

    def same_as_then(self) -> bool:
        """Whether the blocks are still what they were when they were fingerprinted."""
        return all(
            self._word(blocks) == word
            for blocks, word in ((self.contributed, self.given), (self.held, self.got))
        )

    def _word(self, blocks) -> int:
        total = 0
        for array, slab in blocks:
            total ^= fingerprint(array, self.tag, slab, self.threads)
        return total

    @property
    def size_words(self) -> tuple[int, int]:
        """(this rank's share of the number of elements, what all shares must add up to)."""
        if self.rule in (Rule.AGREED, Rule.LOCAL, Rule.GATHERED):
            return 0, 0
        if self.n_loose:
            return self.n_given - self.n_got, 0
        total = prod(self.shape or ())
        if self.rule is Rule.ASSEMBLED:
            return self.n_given, total
        return self.n_given + GOLDEN * self.n_got, total + GOLDEN * total


def same_memory(given: str, got: str) -> str:
    """Why a check of two arrays in one place is refused."""
    return (
        f"`{given}` and `{got}` share memory, so that data would be compared with themselves: give "
        f"a copy of `{given}` made before the call"
    )


def place_of(shape, where) -> Slab:
    """The slab of a block of this shape; UsageError for what is neither partition nor slab."""
    if where is None:
        return whole(shape)
    if isinstance(where, TensorPartition):
        return _slab_of_partition(where, shape)
    return slab_of(shape, where)


@lru_cache(maxsize=4096)
def _slab_of_partition(partition, shape) -> Slab:
    return partition.slab(shape)


def cut_of(where):
    """What all ranks must say alike of a partition: its axis and all sizes; of a slab nothing.

    UsageError for None, and whatever else is neither.
    """
    if not isinstance(where, (TensorPartition, Slab)):
        msg = f"expected a TensorPartition or a Slab, found {type(where).__name__}"
        raise UsageError(msg)
    return (where.dim, where.all_sizes) if isinstance(where, TensorPartition) else None


@lru_cache(maxsize=4096)
def _static_digest(name, dtype, layout, root, settings) -> int:
    text = repr((name, dtype and dtype.name, layout, root, settings))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def fold(checks) -> tuple[list[int], list[int]]:
    """(the record of this rank, what the merged record must be) of any number of checks.

    Fingerprints are folded by doubling in GF(2^64): linear over XOR, as the merging is, and a
    bijection, so that one failing check always shows and several cancel like unrelated words.
    """
    xor = target = every = total = size = count = 0
    for c in checks:
        rule = c.rule
        share, got = 0, 0
        if rule is Rule.ASSEMBLED:
            share, got = c.given, c.got
        elif rule is Rule.MOVED:
            share = c.given ^ c.got
        xor = _doubled(xor) ^ share
        target = _doubled(target) ^ got
        every = absorb(every, c.digest ^ (c.got if rule is Rule.AGREED else got))
        own, all_sizes = c.size_words
        total, size = total * GOLDEN + own, size * GOLDEN + all_sizes
        count |= FAILED * (c.error is not None or c.n_bad > 0)
        count += bool(c.compares)
    record = [xor, total & MASK, every, ~every & MASK, count, MASK]
    return record, [target, size & MASK, every, ~every & MASK, 0]


def _doubled(word: int) -> int:
    return (word << 1 & MASK) ^ (_POLYNOMIAL if word >> 63 else 0)
