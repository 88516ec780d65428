"""Which rank, and which elements: asked only after a comparison of moved data has failed.

Every rank knows the places of all blocks by then. What two blocks have in common is fingerprinted
at both ends, at its global place; one all-to-all of these words tells which pairs of ranks differ.
"""

from dataclasses import replace
from math import prod

import numpy as np

from spimpi.checks.check import Rule
from spimpi.errors import UsageError
from spimpi.fingerprint import fingerprint
from spimpi.partition import Slab


def overlap(shape, slab: Slab, other_shape, other: Slab):
    """What two blocks of a tensor have in common: (first index, shape), None where nothing."""
    start = tuple(map(max, slab.offset, other.offset))
    stop = [
        min(a + n, b + m) for a, n, b, m in zip(slab.offset, shape, other.offset, other_shape)
    ]
    if any(b <= a for a, b in zip(start, stop)):
        return None
    return start, tuple(b - a for a, b in zip(start, stop))


def coverage_problem(reports, n_loose: int, cut_twice: bool, shape) -> str:
    """What is wrong with the places of all ranks' blocks, in words; empty where nothing is."""
    if n_loose:
        return _unmatched(reports, n_loose)
    problem = _not_covered([(r, *b) for r, report in enumerate(reports)
                            for b in report.contributed], shape, "given")  # fmt: skip
    if cut_twice and not problem:
        problem = _not_covered([(r, *b) for r, report in enumerate(reports)
                                for b in report.held], shape, "received")  # fmt: skip
    return problem


def _not_covered(blocks, shape, word) -> str:
    blocks = [b for b in blocks if prod(b[1])]
    starts = np.array([slab.offset for _, _, slab in blocks], np.int64)
    starts = starts.reshape(len(blocks), len(shape))
    stops = starts + np.array([size for _, size, _ in blocks], np.int64).reshape(starts.shape)
    for i in range(len(blocks)):
        low, high = np.maximum(starts[i], starts[:i]), np.minimum(stops[i], stops[:i])
        common = np.flatnonzero((low < high).all(axis=1))
        if common.size:
            one, other = blocks[common[0]], blocks[i]
            return (
                f"blocks {word} overlap: rank {one[0]} has {_place(*one[1:])}, "
                f"rank {other[0]} has {_place(*other[1:])}"
            )
    total = sum(prod(size) for _, size, _ in blocks)
    if total == prod(shape):
        return ""
    told = "; ".join(f"rank {r} has {_place(size, slab)}" for r, size, slab in blocks[:8])
    return (
        f"blocks {word} do not cover the tensor: {total} of {prod(shape)} elements of global "
        f"shape {tuple(shape)} ({told or 'all are empty'}{', …' * (len(blocks) > 8)})"
    )


def _unmatched(reports, n_loose) -> str:
    """Blocks of one rank that another receives in another size."""
    given = {slab.offset: (r, size) for r, report in enumerate(reports)
             for size, slab in report.contributed}  # fmt: skip
    for r, report in enumerate(reports):
        for size, slab in report.held:
            sender, sent = given.get(slab.offset, (None, None))
            if sender is None or sent != size:
                gives = "nobody sends it"
                if sent is not None:
                    gives = f"rank {sender} sends one of shape {sent[n_loose:]}"
                return f"rank {r} receives a block of shape {size[n_loose:]}, and {gives}"
    return ""


def _place(shape, slab) -> str:
    return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(slab.offset, shape)) + "]"


def blamed(comm, check, reports) -> tuple[int | None, str]:
    """(the rank at fault, who differs in words). Collective.

    A rank is named where it alone explains all pairs that differ. One pair of two ranks is
    explained by either: by the receiver, or by a send buffer that has changed since; unless
    the block is there a third time, at a rank that has it as it was sent.
    """
    sent, got = np.zeros((2, comm.size), np.uint64)
    words: dict = {}
    for rank, report in enumerate(reports):
        sent[rank] = _common(check, check.contributed, report.held, words)
    for rank, report in enumerate(reports):
        got[rank] = _common(check, check.held, report.contributed, words)
    expected = np.empty_like(sent)
    comm.Alltoall(sent, expected)
    differ = np.empty((comm.size, comm.size), bool)
    comm.Allgather(expected != got, differ)
    pairs = [(int(r), int(s)) for r, s in np.argwhere(differ)]
    receivers, senders = sorted({r for r, _ in pairs}), sorted({s for _, s in pairs})
    if not pairs:
        return None, "no block differs when all are read again"
    told = "; ".join(
        f"rank {r} holds other data than rank {s} contributed" for r, s in pairs[:4]
    ) + f"; {len(pairs) - 4} more pairs" * (len(pairs) > 4)
    if len(pairs) == 1 and not _is_there_again(check, *pairs[0], comm.size):
        receiver, sender = pairs[0]
        return None, (
            f"{told}: rank {receiver} received other data, or the send buffer of rank {sender} has "
            "changed since, and nothing tells which"
        )
    if len(receivers) == 1:
        return receivers[0], told
    return (senders[0] if len(senders) == 1 else None), told


def _is_there_again(check, receiver, sender, size) -> bool:
    """Whether another rank, or the sender in other memory, holds what the sender gave, too (and
    rightly, since one pair alone differs); or whether the two are one rank."""
    if check.rule is not Rule.ASSEMBLED:
        return receiver == sender
    return receiver == sender or size > 2 or check.root is None


def _common(check, own, others, words) -> int:
    """Fingerprint of what this rank's blocks have in common with another's."""
    total = 0
    for array, slab in own:
        for size, other in others:
            common = overlap(array.shape, slab, size, other)
            if common is None:
                continue
            start, extent = common
            key = id(array), start, extent
            if key not in words:
                first = [a - b for a, b in zip(start, slab.offset)]
                part = array[tuple(slice(a, a + n) for a, n in zip(first, extent))]
                words[key] = fingerprint(part, check.tag, Slab(slab.global_shape, start))
            total ^= words[key]
    return total


def findings(comm, check, reports, history):
    """What localisation finds. Collective."""
    from spimpi.checks.localisation.localise import localise  # rarely needed, hence here

    contributed, held = check.contributed, check.held
    regions = _regions(reports) if check.n_loose else None
    if regions is not None:
        contributed, held = _flat(contributed, regions), _flat(held, regions)
    found = localise(comm, contributed, held, check.tag, history=history)
    if regions is None:
        return found
    elements = tuple(replace(e, index=_index_of(e.index[0], regions)) for e in found.elements)
    return replace(found, elements=elements)


def _regions(reports) -> dict:
    """Blocks of a tensor whose global shape is only a bound, one after the other: their first
    index -> (flat start, shape); and under None the length of all."""
    regions, total = {}, 0
    for report in reports:
        for size, slab in report.contributed:
            regions[slab.offset] = (total, size)
            total += prod(size)
    regions[None] = (total, ())
    return regions


def _flat(blocks, regions) -> list:
    shape = (regions[None][0],)
    return [
        (np.ascontiguousarray(array).reshape(-1), Slab(shape, (regions[slab.offset][0],)))
        for array, slab in blocks
    ]


def _index_of(flat: int, regions) -> tuple[int, ...]:
    for offset, (start, size) in regions.items():
        if offset is not None and start <= flat < start + prod(size):
            inside = np.unravel_index(flat - start, size)
            return tuple(int(i) + a for i, a in zip(inside, offset))
    msg = f"no block has element {flat}"
    raise UsageError(msg)
