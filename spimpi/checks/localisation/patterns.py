"""What a wrong block is, where it is something known: other ranks' data, an earlier step's, shifted
data, zeros, a buffer that was not written to its end.

Each is a comparison of fingerprints or a count; docs/localisation.md, "Words". All functions here
that take Sources are collective.
"""

from dataclasses import replace
from itertools import islice

import numpy as np
from mpi4py import MPI

from spimpi.checks.localisation.borders import first_elements
from spimpi.checks.localisation.boxes import Box, bounding, flat_index, flat_range
from spimpi.checks.localisation.describe import n_nan
from spimpi.checks.localisation.findings import BlockFacts, CaseFacts, Origin, Unwritten
from spimpi.checks.localisation.questions import Case, Question, Sources
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import mix
from spimpi.partition import Slab, whole

TELLING_BYTES = 16  # fewer bytes are equal by chance too easily, unless they are a whole part
LOOKED_AT = 64  # elements that are looked at in what may be an unwritten end
RECORDS = 64  # earlier fingerprints that are tried for one block

NO_RANK = np.iinfo(np.int64).max


def add_patterns(sources: Sources, cases: list[Case], facts: list[CaseFacts]) -> list[CaseFacts]:
    """The facts, with all that can be said about the blocks in them."""
    chosen = [i for i, one in enumerate(facts) if _has_pattern(one)]
    if not chosen:
        return facts
    blocks = [(cases[i], block) for i in chosen for block in facts[i].blocks]
    blocks, uniform = _counted(sources, blocks)
    blocks = _origins(sources, blocks, uniform)
    wide = {i: bounding([b.box for b in facts[i].blocks]) for i in chosen}
    shifts = _shifts(
        sources,
        [(case, block.box) for case, block in blocks] + [(cases[i], wide[i]) for i in chosen],
    )
    earlier = _earlier(
        sources,
        [(case, b.part, b.owner) for case, b in blocks]
        + [(cases[i], cases[i].target, None) for i in chosen],
    )
    unwritten = _unwritten(sources, [(cases[i], facts[i], wide[i]) for i in chosen])
    done = iter(
        replace(block, shift=shift, earlier=tag)
        for (_, block), shift, tag in zip(blocks, shifts, earlier)
    )
    told = list(facts)
    for at, i in enumerate(chosen, len(blocks)):
        told[i] = replace(
            facts[i],
            blocks=tuple(islice(done, len(facts[i].blocks))),
            shift=shifts[at],
            earlier=earlier[at],
            unwritten=unwritten[at - len(blocks)],
        )
    return told


def _has_pattern(case: CaseFacts) -> bool:
    """One wrong element tells by itself what happened, unless it is all that its owner sent."""
    if not case.blocks:
        return False
    return not case.complete or len(case.elements) > 1 or case.blocks[0].part.size == 1


def _counted(sources: Sources, blocks):
    """The blocks with their zeros and NaNs counted; and which are one value throughout."""
    table = np.zeros((len(blocks), 5), np.int64)
    for row, (case, block) in zip(table, blocks):
        if case.rank == sources.rank:
            found = sources.found_array(case, block.box)
            row[:3] = *_zeros_and_nans(found), _is_uniform(found)
        for truth, _ in sources.true_arrays(block.box):
            row[3:] += _zeros_and_nans(truth)
    sources.reduce(table, MPI.SUM)
    counted = [
        (case, replace(block, n_zero=zero, n_nan=nan, n_true_zero=true_zero, n_true_nan=true_nan))
        for (case, block), (zero, nan, _, true_zero, true_nan) in zip(blocks, table.tolist())
    ]
    return counted, table[:, 2].astype(bool).tolist()


def _words_of(x: np.ndarray) -> list[np.ndarray]:
    """The elements' bits: one view of unsigned words, two where an element is complex."""
    halves = [x.real, x.imag] if x.dtype.kind == "c" else [x]
    return [half.view(f"u{half.dtype.itemsize}") for half in halves]


def _zeros_and_nans(x: np.ndarray) -> tuple[int, int]:
    """How many elements have no bit set, and how many are NaN."""
    zero = np.ones(x.shape, bool)
    for words in _words_of(x):
        zero &= words == 0
    return int(zero.sum()), n_nan(x)


def _is_uniform(x: np.ndarray) -> bool:
    return all((words == words[(0,) * x.ndim]).all() for words in _words_of(x))


def _origins(sources: Sources, blocks, uniform):
    """The blocks with whose data they are, where a rank has the same block at the same place of
    a part of its own: one word a block goes to all ranks, and each compares."""
    n_bytes = sources.dtype.itemsize
    hashes = np.zeros(len(blocks), np.uint64)
    eligible = []
    for i, ((case, block), plain) in enumerate(zip(blocks, uniform)):
        is_part = block.box == block.part
        telling = is_part or (block.box.size * n_bytes >= TELLING_BYTES and not plain)
        if telling and block.owner is not None and block.n_zero < block.box.size:
            eligible.append(i)
            if case.rank == sources.rank:
                hashes[i] = _hash(sources, sources.found_array(case, block.box))
    hashes = hashes[eligible]
    sources.reduce(hashes, MPI.BXOR)
    targets = sorted({box for *_, box in sources.holders}, key=lambda b: (b.start, b.shape))
    widest = 1 + max(number for _, number, _ in sources.places)
    codes = np.full(len(eligible), NO_RANK, np.int64)
    for at, i in enumerate(eligible):
        block = blocks[i][1]
        for number, (array, outer) in enumerate(sources.contributed):
            for t, target in enumerate(targets):
                place = _same_place(block, outer.intersection(target))
                if place is None:
                    continue
                if _hash(sources, array[place.within(outer)]) == hashes[at]:
                    code = (sources.rank * widest + number) * len(targets) + t
                    codes[at] = min(codes[at], code)
    sources.reduce(codes, MPI.MIN)
    outers = {(rank, number): box for rank, number, box in sources.places}
    told = list(blocks)
    for i, code in zip(eligible, codes.tolist()):
        if code != NO_RANK:
            case, block = blocks[i]
            of_rank, t = divmod(code, len(targets))
            rank, number = divmod(of_rank, widest)
            place = _same_place(block, outers[rank, number].intersection(targets[t]))
            told[i] = case, replace(block, origin=Origin(rank, place))
    return told


def _same_place(block: BlockFacts, other: Box) -> Box | None:
    """The block as it would lie in another part; None where it does not fit, or lies there."""
    step = zip(block.box.start, block.part.start, other.start)
    place = Box(tuple(a - b + c for a, b, c in step), block.box.shape)
    return place if place != block.box and other.contains(place) else None


def _hash(sources: Sources, array: np.ndarray) -> np.uint64:
    """A block's fingerprint as a tensor of its own: alike wherever it lies."""
    return np.uint64(fingerprint(array, sources.tag, whole(array.shape)))


def _shifts(sources: Sources, blocks) -> list[tuple[int, int] | None]:
    """(axis, by) of each (case, box) where found[i] == truth[i - by]; else None.

    Found data that are all alike never pass: truth would have to be the same value, and then the
    box's own border would not be wrong.
    """
    tried = []
    for i, (case, box) in enumerate(blocks):
        for axis, n in enumerate(box.shape):
            big = n > 2 and box.size // n * (n - 1) * sources.dtype.itemsize >= TELLING_BYTES
            if not big:
                continue
            first, last = box.start[axis], box.stop[axis]
            for by, window in ((1, (first + 1, last)), (-1, (first, last - 1))):
                step = tuple(-by if a == axis else 0 for a in range(len(box.shape)))
                tried.append((i, axis, by, Question(case, (box.along(axis, *window),), step)))
    words = sources.ask([question for *_, question in tried])
    shifts: list = [None] * len(blocks)
    for (i, axis, by, _), word in zip(tried, words):
        if word == 0 and shifts[i] is None:
            shifts[i] = (axis, by)
    return shifts


def _earlier(sources: Sources, regions) -> list:
    """The tag under which each (case, box, owner) was recorded as it is found; else None.

    The records are those that the holder and the owner have of the slab that begins there.
    """
    if not sources.any_history:
        return [None] * len(regions)
    own = []
    for i, (case, box, owner) in enumerate(regions):
        if sources.rank in (case.rank, owner):
            slab = Slab(sources.shape, box.start)
            records = [
                (i, tag, int(word))
                for (tag, place), word in sources.history.items()
                if place == slab and tag != sources.tag
            ]
            own += records[-RECORDS:]
    records = [one for ranks in sources.comm.allgather(own) for one in ranks]
    hits = np.full(len(regions), NO_RANK, np.int64)
    for number, (i, tag, word) in enumerate(records):
        case, box, _ = regions[i]
        if case.rank == sources.rank:
            found = sources.found_array(case, box)
            if fingerprint(found, tag, Slab(sources.shape, box.start)) == word:
                hits[i] = min(hits[i], number)
    sources.reduce(hits, MPI.MIN)
    return [None if hit == NO_RANK else records[hit][1] for hit in hits.tolist()]


def _unwritten(sources: Sources, cases) -> list[Unwritten | None]:
    """The buffers that seem not to have been written to their end; else None. Each of ``cases``
    is (case, its facts, box around what is wrong)."""
    regions = {}
    for i, (case, facts, box) in enumerate(cases):
        # The buffer is one owner's part where one part is wrong, else all that the rank holds.
        region = facts.blocks[0].part if len(facts.blocks) == 1 else case.target
        if _is_end(box, region):
            regions[i] = (case, region)
    firsts = first_elements(sources, list(regions.values()))
    looked = {}
    for (i, (case, region)), index in zip(regions.items(), firsts):
        first = flat_index(index, region)
        if first > 0 and region.size - first > 3:
            looked[i] = (case, region, first, _some(first, region.size))
    words = iter(
        sources.ask(
            [
                Question(case, (flat_range(region, number, number + 1)[0],))
                for case, region, _, numbers in looked.values()
                for number in numbers
            ]
        )
    )
    zeros = np.zeros((len(looked), 2), np.int64)
    for row, (case, region, first, _) in zip(zeros, looked.values()):
        for box in flat_range(region, first, region.size):
            if case.rank == sources.rank:
                row[0] += _zeros_and_nans(sources.found_array(case, box))[0]
            row[1] += sum(_zeros_and_nans(truth)[0] for truth, _ in sources.true_arrays(box))
    sources.reduce(zeros, MPI.SUM)
    told: list = [None] * len(cases)
    for (i, (_, region, first, numbers)), both in zip(looked.items(), zeros.tolist()):
        differ = sum(next(words) != 0 for _ in numbers)
        one = Unwritten(first, region.size, differ, len(numbers), *both)
        if one.is_zero or 4 * differ >= 3 * len(numbers):
            told[i] = one
    return told


def _is_end(box: Box, region: Box) -> bool:
    """Whether a box is, or is around, the last elements of a region in row-major order."""
    if not box.shape or box.stop != region.stop:
        return False
    # All but one element along the leading axes, then one that is cut, then all along the rest.
    cut = next((a for a, n in enumerate(box.shape) if n > 1), len(box.shape) - 1)
    return all(box.shape[a] == region.shape[a] for a in range(cut + 1, len(box.shape)))


def _some(first: int, size: int) -> list[int]:
    """At most LOOKED_AT flat elements of ``first``..``size``, the first among them; scattered, so
    that no period hides between them."""
    n = size - first
    if n <= LOOKED_AT:
        return list(range(first, size))
    return sorted({first, *(first + mix(i) % n for i in range(1, LOOKED_AT))})
