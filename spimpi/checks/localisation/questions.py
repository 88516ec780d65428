"""Questions about blocks of a distributed tensor, answered by one MPI_BXOR a round.

A question is a block and a rank that holds it. Every rank fingerprints its share of the truth and
the holder what it found; the XOR over all ranks is 0 where the block is right. More is in
docs/localisation.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from spimpi.checks.localisation.boxes import Box
from spimpi.errors import UsageError
from spimpi.fingerprint import arrays, as_array, fingerprint
from spimpi.fingerprint.tag import Tag
from spimpi.partition import Slab
from spimpi.reduction import together


@dataclass(frozen=True)
class Case:
    """Ranks that hold the same wrong data at ``target``; ``rank``, with its ``number``-th held
    array, answers for all."""

    target: Box
    rank: int
    number: int
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """A wrong part of a held slab, by the rank that contributed it (None: several did)."""

    case: Case
    box: Box
    owner: int | None


@dataclass(frozen=True)
class Question:
    """Is what ``case.rank`` found at these disjoint boxes the truth? With ``by``: is it the truth
    of the place that many entries further along each axis (of one box)?"""

    case: Case
    boxes: tuple[Box, ...]
    by: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Description:
    """What a rank says of its arrays before the first round."""

    shape: tuple[int, ...] | None
    dtype: str
    contributed: tuple[Box, ...]
    held: tuple[Box, ...]
    tag: Tag
    limit: int
    has_history: bool


class Sources:
    """This rank's arrays, and where everybody's lie. Making it is collective over ``comm``.

    ``contributed`` and ``held`` are lists of (array, Box); ``places`` those of all ranks, of what
    they contributed: (rank, number, Box), row-major by place, empty ones left out; ``holders``
    likewise of what they hold. UsageError, on every rank, where the arguments do not fit.
    """

    def __init__(self, comm, contributed, held, tag: Tag, limit: int, history=None):
        self.comm, self.rank, self.tag, self.limit = comm, comm.rank, tag, limit
        self.history = history or {}
        with together(comm):
            self.contributed = [_checked(x, slab) for x, slab in contributed]
            self.held = [_checked(x, slab) for x, slab in held]
            own = self._describe([slab for _, slab in (*contributed, *held)])
        everyone = comm.allgather(own)
        _check_alike(everyone)
        known = next((d for d in everyone if d.shape is not None), own)
        self.shape = known.shape
        self.dtype = arrays.dtype_of(known.dtype) if known.dtype else None
        self.any_history = any(d.has_history for d in everyone)
        self.places = _numbered([d.contributed for d in everyone])
        self.holders = _numbered([d.held for d in everyone])
        _check_cover(self.places, self.holders)

    def _describe(self, slabs) -> _Description:
        if not isinstance(self.tag, Tag):
            msg = f"expected a spimpi.Tag, found {type(self.tag).__name__}"
            raise UsageError(msg)
        if not isinstance(self.limit, int) or self.limit < 1:
            msg = f"limit must be a whole number of at least 1, found {self.limit!r}"
            raise UsageError(msg)
        for key in self.history:
            if not (isinstance(key, tuple) and [type(k) for k in key] == [Tag, Slab]):
                msg = f"the keys of history are (Tag, Slab), found {key!r}"
                raise UsageError(msg)
        both = (*self.contributed, *self.held)
        shapes = {slab.global_shape for slab in slabs}
        dtypes = {str(x.dtype) for x, _ in both}
        if len(shapes) > 1 or len(dtypes) > 1:
            msg = (
                f"one tensor has one global shape and one dtype, found shapes "
                f"{sorted(shapes)} and dtypes {sorted(dtypes)}"
            )
            raise UsageError(msg)
        return _Description(
            next(iter(shapes), None),
            next(iter(dtypes), ""),
            tuple(box for _, box in self.contributed),
            tuple(box for _, box in self.held),
            self.tag,
            self.limit,
            bool(self.history),
        )

    def ask(self, questions: Sequence[Question]) -> list[int]:
        """truth ^ found of each question, as fingerprints: 0 where it holds. Collective."""
        asked = list(dict.fromkeys(questions))
        words = np.zeros(len(asked), np.uint64)
        truths = {}
        for i, question in enumerate(asked):
            for box in question.boxes:
                key = (box, question.by)
                if key not in truths:
                    truths[key] = self._truth(box, question.by)
                words[i] ^= np.uint64(truths[key])
                if question.case.rank == self.rank:
                    words[i] ^= np.uint64(self._found(question.case, box, question.by))
        answers = dict(zip(asked, self.reduce(words, MPI.BXOR).tolist()))
        return [answers[question] for question in questions]

    def reduce(self, words: np.ndarray, op) -> np.ndarray:
        """The words of all ranks, combined. Collective; nothing is sent where there are none."""
        if words.size:
            self.comm.Allreduce(MPI.IN_PLACE, words, op=op)
        return words

    def found_array(self, case: Case, box: Box) -> np.ndarray:
        """A view of what this rank, ``case.rank``, holds at a box."""
        array, outer = self.held[case.number]
        return array[box.within(outer)]

    def true_arrays(self, box: Box):
        """Views of what this rank contributed to a box, with their boxes."""
        for array, outer in self.contributed:
            part = box.intersection(outer)
            if part.size:
                yield array[part.within(outer)], part

    def _found(self, case, box, by) -> int:
        if not box.size:
            return 0
        return fingerprint(self.found_array(case, box), self.tag, self._place(box, box, by))

    def _truth(self, box, by) -> int:
        source = Box(tuple(a + d for a, d in zip(box.start, by)), box.shape) if by else box
        total = 0
        for array, part in self.true_arrays(source):
            total ^= fingerprint(array, self.tag, self._place(part, source, by))
        return total

    def _place(self, part: Box, box: Box, by) -> Slab:
        """Where fingerprints are taken: in the tensor, or (moved) in the box as a tensor."""
        if not by:
            return Slab(self.shape, part.start)
        return Slab(box.shape, tuple(a - b for a, b in zip(part.start, box.start)))


def _checked(x, slab) -> tuple[np.ndarray, Box]:
    x = as_array(x)
    arrays.word_layout(x.dtype)
    if not isinstance(slab, Slab):
        msg = f"expected a Slab with each array, found {type(slab).__name__}"
        raise UsageError(msg)
    slab.check_holds(x.shape)
    return x, Box(slab.offset, tuple(x.shape))


def _numbered(boxes_of_ranks) -> list[tuple[int, int, Box]]:
    """(rank, number of the box on its rank, box) of all that are not empty, row-major."""
    every = [
        (rank, number, box)
        for rank, boxes in enumerate(boxes_of_ranks)
        for number, box in enumerate(boxes)
        if box.size
    ]
    return sorted(every, key=lambda one: (one[2].start, one[0], one[1]))


def _check_alike(everyone: list[_Description]) -> None:
    """Raise UsageError, by rank, where ranks speak of different tensors."""
    for name in ("shape", "dtype", "tag", "limit"):
        given = [getattr(d, name) for d in everyone]
        ranks = [r for r, value in enumerate(given) if value is not None and value != ""]
        for rank in ranks[1:]:
            if given[rank] != given[ranks[0]]:
                msg = (
                    f"all ranks must localise the same tensor: rank {ranks[0]} gave {name} "
                    f"{given[ranks[0]]}, rank {rank} gave {given[rank]}"
                )
                raise UsageError(msg)


def _check_cover(places, holders) -> None:
    """Raise UsageError unless each held element was contributed exactly once."""
    if not holders:
        return
    ndim = len(holders[0][2].start)
    start = np.array([box.start for *_, box in places], np.int64).reshape(len(places), ndim)
    stop = np.array([box.stop for *_, box in places], np.int64).reshape(len(places), ndim)

    def common(box, others):
        sides = np.minimum(stop[others], box.stop) - np.maximum(start[others], box.start)
        return np.clip(sides, 0, None).prod(axis=1)

    for i, (rank, _, box) in enumerate(places[1:], 1):
        overlap = np.flatnonzero(common(box, slice(i)))
        if overlap.size:
            other, _, box_of_other = places[overlap[0]]
            msg = (
                f"each element has one owner, but rank {other} contributed shape "
                f"{box_of_other.shape} at {box_of_other.start} and rank {rank} shape {box.shape} "
                f"at {box.start}, which overlap: only the lowest rank that holds an element owns it"
            )
            raise UsageError(msg)
    for rank, box in {box: (rank, box) for rank, _, box in reversed(holders)}.values():
        covered = int(common(box, slice(None)).sum())
        if covered != box.size:
            msg = (
                f"rank {rank} holds {box.size} elements (shape {box.shape} at {box.start}), of "
                f"which the ranks contributed only {covered}"
            )
            raise UsageError(msg)
