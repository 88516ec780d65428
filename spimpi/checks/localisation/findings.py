"""What localisation found: for users (Findings), and the facts that words are made of.

Pure: no MPI, no arrays. All places are global.
"""

from dataclasses import dataclass

from spimpi.checks.localisation.boxes import Box
from spimpi.checks.verdict import ElementError
from spimpi.fingerprint.tag import Tag
from spimpi.partition import Slab


@dataclass(frozen=True)
class Findings:
    """Which elements are wrong, where, and what that looks like. The same on every rank.

    ``elements``: at most ``limit``. ``n_wrong``: counted once for each group of ranks that hold
    the same wrong data; None where more than ``limit`` are wrong and the number is not known.
    ``blocks``: (rank, Slab, shape) that cover all wrong elements, where ``elements`` does not have
    them all. ``ranks``: those that hold wrong data; ``alike``: these in groups that hold
    the same, whose lowest rank stands for the group in ``elements`` and ``blocks``.
    """

    elements: tuple[ElementError, ...] = ()
    n_wrong: int | None = 0
    blocks: tuple[tuple[int, Slab, tuple[int, ...]], ...] = ()
    ranks: tuple[int, ...] = ()
    text: str = "nothing differs"
    alike: tuple[tuple[int, ...], ...] = ()

    def __str__(self):
        return self.text


@dataclass(frozen=True)
class Origin:
    """Whose block a found block is: what ``rank`` contributed at ``place``."""

    rank: int
    place: Box


@dataclass(frozen=True)
class BlockFacts:
    """A part of a held slab with wrong elements, and what was checked about it.

    ``part``: the part (what one rank contributed, or the whole held slab); ``box``: the smallest
    block around its wrong elements; ``n_zero``, ``n_nan``: elements of the found box whose
    bytes are all zero, or that are NaN; the truth's: ``n_true_zero``, ``n_true_nan``;
    ``owner``: the rank that contributed it, None where several did; ``origin``: whose block the
    found one is; ``earlier``: the tag under which the found part was recorded; ``shift``: (axis,
    by) where found[i] = truth[i - by].
    """

    part: Box
    box: Box
    owner: int | None = None
    n_zero: int = 0
    n_true_zero: int = 0
    n_nan: int = 0
    n_true_nan: int = 0
    origin: Origin | None = None
    earlier: Tag | None = None
    shift: tuple[int, int] | None = None


@dataclass(frozen=True)
class Unwritten:
    """A buffer of ``size`` elements in which none before the flat element ``first`` differs, and
    ``differ`` of ``looked`` that were looked at from there on do. ``n_zero`` of these found
    elements, and ``n_true_zero`` of the true ones, have no bit set."""

    first: int
    size: int
    differ: int
    looked: int
    n_zero: int = 0
    n_true_zero: int = 0

    @property
    def is_zero(self) -> bool:
        return self.n_zero == self.size - self.first


@dataclass(frozen=True)
class CaseFacts:
    """Ranks that hold the same wrong data, and all that is known about them.

    ``elements``: all of the wrong ones if ``complete``, else a sample. ``shift`` and ``earlier``:
    as of a block, but of all wrong blocks together, and of the whole ``target`` (the held slab).
    ``gone``: a difference was not there when the data were read again. ``refined``: False for a
    slab that was one too many to look into.
    """

    ranks: tuple[int, ...]
    target: Box
    elements: tuple[ElementError, ...]
    complete: bool
    blocks: tuple[BlockFacts, ...] = ()
    shift: tuple[int, int] | None = None
    earlier: Tag | None = None
    unwritten: Unwritten | None = None
    gone: bool = False
    refined: bool = True

    @property
    def n_wrong(self) -> int | None:
        """How many elements are wrong; None where that is not known."""
        if self.complete:
            return len(self.elements)
        if self.blocks and all(b.n_zero == b.box.size for b in self.blocks):
            return sum(b.box.size - b.n_true_zero for b in self.blocks)
        if self.unwritten and self.unwritten.is_zero:
            return self.unwritten.n_zero - self.unwritten.n_true_zero
        return None
