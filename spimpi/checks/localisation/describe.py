"""A corruption in words. Every phrase is a fact that was checked; where there is none, it says so.

Pure: facts in (spimpi.checks.localisation.findings), text out. The table of phrases is in docs/localisation.md.
"""

from collections.abc import Sequence

import numpy as np

from spimpi.checks.localisation.boxes import Box, joined, name_of
from spimpi.checks.localisation.findings import BlockFacts, CaseFacts
from spimpi.checks.verdict import ElementError
from spimpi.fingerprint.tag import Tag

FEW = 4  # blocks, or bits, that are listed; more are counted


def describe(cases: Sequence[CaseFacts], tag: Tag, shape, dtype: np.dtype) -> str:
    """What is wrong with a tensor of this tag, global shape and dtype, in one line."""
    if not cases:
        return "nothing differs"
    texts: dict[str, list[tuple[int, ...]]] = {}
    for case in cases:
        texts.setdefault(describe_case(case, tag, shape, dtype), []).append(case.ranks)
    if len(texts) == 1 and len(cases) == 1:
        return next(iter(texts))
    told = [f"on {_ranks(groups)}: {text}" for text, groups in texts.items()]
    if len(told) > FEW:
        told[FEW:] = [f"{len(told) - FEW} other groups of ranks hold other wrong data"]
    return "; ".join(told)


def describe_case(case: CaseFacts, tag: Tag, shape, dtype: np.dtype) -> str:
    """What ranks that hold the same wrong data hold."""
    if not case.refined:
        return f"errors in {name_of(case.target, shape)}, not looked into"
    if not case.elements and (case.gone or case.complete):
        return "the difference was gone when the data were read again"
    text = _explained(case, tag, shape, dtype)
    if text is None:
        text = f"{_amount(case, shape)} differ, no simple pattern"
    if case.gone:
        text += " (and some of the difference was gone when the data were read again)"
    return text


def _explained(case: CaseFacts, tag, shape, dtype) -> str | None:
    """The first explanation that holds, None where none does."""
    single = case.elements[0] if case.complete and len(case.elements) == 1 else None
    if single and len(single.bits) == 1:
        return _of_one(single, dtype)
    return (
        _swapped_elements(case)
        or _earlier(case, tag, shape)
        or _of_others(case, shape)
        or _zeros(case, shape)
        or _shifted(case, shape)
        or _same_bits(case, shape)
        or (_of_one(single, dtype) if single else None)
        or _nan(case, shape)
        or _byte_order(case, shape, dtype)
        or _unwritten(case)
    )


def _of_one(error: ElementError, dtype) -> str:
    if is_nan(error.found, dtype) and not is_nan(error.expected, dtype):
        text = f"{_bits(error.bits)} of one element, which became NaN"
        return text if len(error.bits) <= FEW else "NaN for one element"
    if not any(error.found) and len(error.bits) > 1:
        return "zero for one element"
    return f"{_bits(error.bits)} of one element"


def _bits(bits) -> str:
    if len(bits) == 1:
        return f"one bit ({bits[0]})"
    if len(bits) <= 8:
        return f"{len(bits)} bits ({', '.join(map(str, bits))})"
    return f"{len(bits)} bits"


def _swapped_elements(case: CaseFacts) -> str | None:
    if not case.complete or len(case.elements) != 2:
        return None
    a, b = case.elements
    is_swap = a.found == b.expected and b.found == a.expected
    return "two elements swapped" if is_swap else None


def _earlier(case: CaseFacts, tag: Tag, shape) -> str | None:
    """ "shard of step 6 in step 7", of the whole slab or of each wrong part."""
    if case.earlier:
        differing = _differing(case.earlier, tag)
        if case.target.shape != tuple(shape):
            return f"shard of {differing}"
        return differing if case.earlier.name != tag.name else f"tensor of {differing}"
    told = [b for b in case.blocks if b.earlier]
    if not told:
        return None
    tags = list(dict.fromkeys(b.earlier for b in told))
    if len(tags) > 1:
        each = [(name_of(b.part, shape), _differing(b.earlier, tag)) for b in told]
        return _listed(case, [f"{place}: shard of {differing}" for place, differing in each])
    if len(told) == 1 and len(case.blocks) == 1:
        return f"shard of {_differing(tags[0], tag)}"
    places = _places([b.part for b in told], shape)
    return _listed(case, [f"{places}: shards of {_differing(tags[0], tag)}"], len(told))


def _differing(earlier: Tag, tag: Tag) -> str:
    """What two tags differ in: "step 6 in step 7"."""
    there, here = [], []
    if earlier.name != tag.name:
        there.append(f"tensor {earlier.name!r}")
        here.append(f"tensor {tag.name!r}")
    for field in ("seed", "layer", "step"):
        a, b = getattr(earlier, field), getattr(tag, field)
        if a != b:
            there.append(f"{field} {a}")
            here.append(f"{field} {b}")
    return f"{', '.join(there)} in {', '.join(here)}"


def _of_others(case: CaseFacts, shape) -> str | None:
    """Blocks that are another rank's, or swapped with each other."""
    told = [b for b in case.blocks if b.origin]
    if not told:
        return None
    if len(told) == len(case.blocks) == 2 and _is_swap(*told):
        first, second = (name_of(b.box, shape) for b in told)
        return f"{first} and {second} are swapped"
    return _listed(case, [_whose(b, shape) for b in told])


def _is_swap(a: BlockFacts, b: BlockFacts) -> bool:
    return a.origin.place == b.box and b.origin.place == a.box


def _whose(block: BlockFacts, shape) -> str:
    place, origin = name_of(block.box, shape), block.origin
    is_many = place.startswith(("rows", "elements"))
    verb, those = ("are", "those") if is_many else ("is", "that")
    if origin.rank == block.owner:
        return f"{place} {verb} {name_of(origin.place, shape)}"
    return f"{place} {verb} {those} of rank {origin.rank}"


def _zeros(case: CaseFacts, shape) -> str | None:
    if case.complete and case.elements and not any(any(e.found) for e in case.elements):
        n = len(case.elements)
        return "zero for one element" if n == 1 else f"zeros for {n} elements"
    if case.unwritten and case.unwritten.is_zero:
        first, size = case.unwritten.first, case.unwritten.size
        return f"zeros for data from element {first} of {size} to the end"
    if case.blocks and all(b.n_zero == b.box.size for b in case.blocks):
        return f"zeros for data in {_places([b.box for b in case.blocks], shape)}"
    return None


def _shifted(case: CaseFacts, shape) -> str | None:
    if case.shift and len(case.blocks) > 1:
        return _shift(case.shift)
    told = [b for b in case.blocks if b.shift]
    if len(told) == 1 and len(case.blocks) == 1:
        return f"{name_of(told[0].box, shape)} {_shift(told[0].shift)}"
    if not told:
        return None
    return _listed(case, [f"{name_of(b.box, shape)} {_shift(b.shift)}" for b in told])


def _shift(shift) -> str:
    axis, by = shift
    return f"shifted by {'one' if by > 0 else 'minus one'} along axis {axis}"


def _same_bits(case: CaseFacts, shape) -> str | None:
    masks = {e.bits for e in case.elements}
    n = len(case.elements)
    if n < 2 or len(masks) > 1 or len(bits := next(iter(masks))) > FEW:
        return None
    one = f"the same bit ({bits[0]})" if len(bits) == 1 else f"the same {_bits(bits)}"
    if case.complete:
        return f"{one} of {n} elements"
    return f"{_amount(case, shape)} differ: {one} of each of the {n} that were looked at"


def _nan(case: CaseFacts, shape) -> str | None:
    fresh = sum(b.n_nan - b.n_true_nan for b in case.blocks)
    boxes = [b.box for b in case.blocks]
    if fresh > 0 and case.complete and fresh == len(case.elements):
        return f"NaN for {fresh} elements"
    if fresh > 0 and all(b.n_nan == b.box.size for b in case.blocks):
        return f"NaN for data in {_places(boxes, shape)}"
    if fresh > 0:
        return f"{_amount(case, shape)} differ, {fresh} of them NaN now"
    return None


def _byte_order(case: CaseFacts, shape, dtype) -> str | None:
    width = dtype.itemsize // (2 if dtype.kind == "c" else 1)

    def turned(data: bytes) -> bytes:
        return b"".join(data[i : i + width][::-1] for i in range(0, len(data), width))

    if width == 1 or len(case.elements) < 2:
        return None
    if not all(e.found == turned(e.expected) for e in case.elements):
        return None
    if case.complete:
        return f"the bytes of {len(case.elements)} elements in reverse order"
    n = len(case.elements)
    return f"{_amount(case, shape)} differ: reversed bytes in each of the {n} that were looked at"


def _unwritten(case: CaseFacts) -> str | None:
    end = case.unwritten
    if not end:
        return None
    return (
        f"from element {end.first} of {end.size} on, {end.differ} of {end.looked} elements that "
        f"were looked at differ, and none before: as where a buffer was not written to its end"
    )


def _listed(case: CaseFacts, told: list[str], n_told: int | None = None) -> str:
    """A few phrases, and how many blocks are not in them."""
    n_told = len(told) if n_told is None else n_told
    text = "; ".join(told[:FEW])
    if len(told) > FEW:
        text += f"; {len(told) - FEW} more such blocks"
    rest = len(case.blocks) - n_told
    if rest:
        text += f"; in {rest} other block{'s' * (rest > 1)}: no simple pattern"
    return text


def _amount(case: CaseFacts, shape) -> str:
    if case.complete:
        n = len(case.elements)
        return f"{n} element{'s' * (n > 1)}"
    places = _places([b.box for b in case.blocks], shape)
    return f"more than {len(case.elements)} elements, all in {places},"


def _places(boxes: list[Box], shape) -> str:
    names = [name_of(box, shape) for box in joined(boxes)]
    if len(names) > FEW:
        names[FEW:] = [f"{len(names) - FEW} more blocks"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _ranks(groups) -> str:
    """ "rank 1", "ranks 0, 2"; a group that holds the same data is "ranks 0, 2 (alike)"."""
    names = []
    for ranks in groups:
        listed = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
        names.append(f"rank {listed}" if len(ranks) == 1 else f"ranks {listed} (alike)")
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


def is_nan(data: bytes, dtype) -> bool:
    """Whether one element's bytes are NaN; False of integers."""
    return n_nan(np.frombuffer(data, dtype)) > 0


def n_nan(x: np.ndarray) -> int:
    """How many elements are NaN; bfloat16 and float8 (kind V) have NaN, int4 has not."""
    if x.dtype.kind not in "fcV":
        return 0
    try:
        with np.errstate(invalid="ignore"):  # signalling NaNs are what is looked for
            return int(np.isnan(x).sum())
    except TypeError:
        return 0
