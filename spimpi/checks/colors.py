"""Painted tensors over a communicator: every rank looks at its slab, one Allgather compares.

The shares of the colour fingerprint combine by XOR to the fingerprint of the colour field. That
field is computed by all ranks, each a range of element indices that does not depend on where the
slabs lie: slabs that leave elements out, or hold some twice, do not add up to it.
docs/painting.md says what a pass proves.
"""

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from spimpi.checks.check import Check, Rule
from spimpi.checks.pending import settle
from spimpi.checks.verdict import NO_ELEMENTS, ElementError, Verdict, Where
from spimpi.errors import UsageError
from spimpi.fingerprint import as_array, combine, painting
from spimpi.fingerprint.arrays import check_where, slab_of
from spimpi.fingerprint.tag import COLOUR, Tag
from spimpi.trace.schema import Established

LISTED = 16  # corrupted elements that a verdict lists
_MOSTLY = 0.7  # of a slab painted otherwise, 1 - 2**-m have a residue: 0.75 or more
_FEW = 16
FINGERPRINT, FIELD, ELEMENTS, CORRUPTED = range(4)  # a rank's words


@dataclass(frozen=True)
class CorruptedElement(ElementError):
    """An element with a residue: wrong, and nobody knows what it was. ``expected`` is empty."""

    @property
    def bits(self) -> tuple[int, ...]:
        """Which bits differ is not known either."""
        return ()

    def __str__(self):
        found = self.found[::-1].hex()
        return f"element {list(self.index)} on rank {self.rank}: found 0x{found}"


@dataclass(frozen=True)
class Held:
    """What one rank holds and found in it. ``listed``: (global index, bytes) of the first elements
    with a residue."""

    rank: int
    host: str = ""
    dtype: str = ""
    global_shape: tuple[int, ...] = ()
    bits: int = 0
    tag: Tag | None = None
    offset: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    fingerprint: int = 0
    n_corrupted: int = 0
    listed: tuple[tuple[tuple[int, ...], bytes], ...] = ()


def verify_colors(
    comm,
    x,
    tag: Tag,
    partition=None,
    *,
    check: bool = True,
    ctx=None,
    bits: int | None = None,
    threads: int = 1,
) -> Verdict:
    """Whether a painted tensor is intact on all ranks. Collective over ``comm``.

    ``x``: this rank's slab (float64, float32, float16 or bfloat16, any array; empty where it holds
    nothing), ``partition`` its place (TensorPartition, Slab; None: the whole tensor). The same
    slab on several ranks is a replica: the lowest of them contributes, all are looked at.
    ``bits`` as it was painted. Establishes moved; one corrupted element is missed with
    probability 2**-bits. Raises CorruptionError on every rank where elements are corrupted
    (``check=False`` returns the falsy verdict), UsageError on every rank where the slabs are no
    partition of one tensor, or one of them cannot be looked at.
    """
    c = Check("colors", tag, Rule.GATHERED, Established.MOVED, threads)
    c.words = np.zeros(4, np.uint64)

    def build(c):
        held = _look(comm.rank, x, c, partition, bits, threads)
        field = _share_of_field(held, comm.rank, comm.size, threads)
        c.words[:] = held.fingerprint, field, prod(held.shape), held.n_corrupted

        def conclude(session, everyone):
            expected = int(np.bitwise_xor.reduce(everyone[:, FIELD]))
            if is_clean(everyone, prod(held.global_shape)):
                return _verdict(held, expected, expected)
            return judge(session.comm.allgather(_with_host(held)), expected)

        c.conclude = conclude

    return settle(comm, c, build, check, ctx)


def is_clean(everyone, n_elements: int) -> bool:
    """Whether all ranks' words [P, 4] need no second look: they hold each element once, none has
    a residue, and the fingerprint is the colour field's."""
    return (
        int(everyone[:, ELEMENTS].sum()) == n_elements
        and not everyone[:, CORRUPTED].any()
        and not np.bitwise_xor.reduce(everyone[:, FINGERPRINT] ^ everyone[:, FIELD])
    )


def judge(everyone: list[Held], expected: int) -> Verdict:
    """The verdict on what all ranks hold, given the fingerprint of the colour field. Pure.

    Raises UsageError where they do not hold one tensor.
    """
    owners = _owners(everyone)
    actual = combine(held.fingerprint for held in owners)
    wrong = [held for held in everyone if held.n_corrupted]
    if actual == expected and not wrong:
        return _verdict(everyone[0], expected, actual)
    one = wrong[0] if wrong else everyone[0]
    where = Where(
        check="colors",
        tensor=one.tag.name,
        step=one.tag.step,
        layer=one.tag.layer,
        microbatch=-1,
        rank=one.rank if len(wrong) == 1 else None,
        host=one.host if len(wrong) == 1 else "",
        recorded_by=one.rank,
        expected=f"{expected:016x}",
        found=f"{actual:016x}",
        detail=_detail(wrong),
        elements=_elements(wrong),
        n_wrong=sum(held.n_corrupted for held in wrong) or None,
    )
    return _verdict(one, expected, actual, where)


def _look(rank, x, c: Check, where, bits, threads) -> Held:
    """What this rank holds; the check is told what all ranks must say alike."""
    check_where(where)
    x = as_array(x)
    colors = painting.check_colors(x, c.tag, where, bits, threads)
    slab = slab_of(x.shape, where)
    used = painting.coloured_bits(x.dtype, bits)
    c.of(slab.global_shape, x.dtype)
    c.settings = f"bits {used}"
    c.held.append((x, slab))
    c.n_bytes = x.nbytes
    # Listed at once: in a batch the buffer may be used again before its end.
    listed = _listed(x, c.tag, slab, used) if colors.n_corrupted else ()
    return Held(
        rank, "", x.dtype.name, slab.global_shape, used, c.tag, slab.offset, x.shape,
        colors.fingerprint, colors.n_corrupted, listed,
    )  # fmt: skip


def _listed(x, tag, slab, bits) -> tuple:
    """(global index, bytes) of the first corrupted elements."""
    indices = painting.corrupted_elements(x, tag, slab, bits, LISTED)
    return tuple(
        (tuple(map(int, index)), x[tuple(index - np.array(slab.offset, int))].tobytes())
        for index in indices
    )


def _with_host(held: Held) -> Held:
    """What the other ranks are told once they ask."""
    from mpi4py import MPI

    return replace(held, host=MPI.Get_processor_name())


def _share_of_field(held: Held, rank: int, size: int, threads: int) -> int:
    """XOR of the colour words of this rank's range of all element indices."""
    from spimpi.fingerprint import painting_cpu

    n = prod(held.global_shape)
    itemsize = painting.arrays.dtype_of(held.dtype).itemsize
    key = held.tag.key(COLOUR, held.global_shape, itemsize)
    return painting_cpu.colour_range(key, n * rank // size, n * (rank + 1) // size, threads)


def _verdict(held: Held, expected: int, actual: int, where: Where | None = None) -> Verdict:
    some = prod(held.global_shape) > 0
    return Verdict(
        holds=where is None,
        established=Established.MOVED if where is None and some else Established(0),
        where=where,
        missing=() if some else (NO_ELEMENTS,),
        check="colors",
        expected=expected,
        actual=actual,
        strength=f"painted with {held.bits} bits: one corrupted element is missed with "
        f"probability 2**-{held.bits}",
    )


def _owners(everyone: list[Held]) -> list[Held]:
    """The lowest rank of each slab. UsageError unless these slabs are a partition of the tensor."""
    owners = {}
    for held in everyone:
        if 0 not in held.shape:
            owners.setdefault((held.offset, held.shape), held)
    owners = list(owners.values())
    starts = np.array([held.offset for held in owners], np.int64).reshape(len(owners), -1)
    stops = starts + np.array([held.shape for held in owners], np.int64).reshape(starts.shape)
    for i in range(len(owners)):
        meets = (np.maximum(starts[i], starts[:i]) < np.minimum(stops[i], stops[:i])).all(axis=1)
        if meets.any():
            a, b = owners[int(np.argmax(meets))], owners[i]
            msg = f"slabs must be the same or apart: {_place(a)} and {_place(b)} overlap in part"
            raise UsageError(msg)
    held_elements = sum(prod(held.shape) for held in owners)
    total = prod(everyone[0].global_shape)
    if held_elements != total:
        places = "; ".join([*map(_place, everyone[:8]), *["…"] * bool(everyone[8:])])
        msg = (
            f"the slabs hold {held_elements} of the {total} elements of a tensor of shape "
            f"{everyone[0].global_shape}: {places}"
        )
        raise UsageError(msg)
    return owners


def _place(held: Held) -> str:
    return f"rank {held.rank} gave shape {held.shape} at {held.offset}"


def _elements(wrong: list[Held]) -> tuple[ElementError, ...]:
    found = sorted((index, held.rank, bits) for held in wrong for index, bits in held.listed)
    return tuple(
        CorruptedElement(index=index, expected=b"", found=bits, rank=rank)
        for index, rank, bits in found[:LISTED]
    )


def _detail(wrong: list[Held]) -> str:
    if not wrong:
        return "no element has a residue: a rank computed its fingerprint wrongly"
    parts = []
    for held in wrong[:8]:
        n = prod(held.shape)
        text = f"{held.n_corrupted} of {n} elements on rank {held.rank}"
        if n >= _FEW and held.n_corrupted > _MOSTLY * n:
            text += " (as where the whole slab is of another place, step or tensor, or unpainted)"
        parts.append(text)
    more = f", and on {len(wrong) - 8} more ranks" if wrong[8:] else ""
    return f"corrupted: {', '.join(parts)}{more}"
