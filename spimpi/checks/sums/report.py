"""The verdicts on sums that failed, in words and with their elements."""

import numpy as np

from spimpi.checks.verdict import ElementError, Verdict, Where
from spimpi.trace.schema import Established


def failure(
    local, strength, detail, rank=None, elements=(), expected=None, actual=None, found="",
    n_wrong=None,
) -> Verdict:  # fmt: skip
    """A verdict that does not hold. ``rank``: of the communicator, None where none stands out."""
    tag = local.tag
    hexadecimal = ["" if word is None else f"{word:016x}" for word in (expected, actual)]
    where = Where(
        check=local.name, tensor=tag.name, step=tag.step, layer=tag.layer, microbatch=0, rank=rank,
        host="", recorded_by=0, expected=hexadecimal[0], found=found or hexadecimal[1],
        detail=detail, elements=tuple(elements), n_wrong=n_wrong,
    )  # fmt: skip
    return Verdict(
        holds=False, established=Established(0), where=where, check=local.name, expected=expected,
        actual=actual, strength=strength,
    )  # fmt: skip


def found(
    local, holder, elements, detail, rank=None, expected=None, actual=None, n_wrong=None
) -> Verdict:
    """The failure of some elements of a holder's result."""
    block = local.held(holder)
    errors, words = [], []
    for one in elements:
        index = local.blocks.index_of(block, one.place)
        words.append(f"{list(index)}: {one.found}, contributions give {one.expected}")
        if not isinstance(one.expected, str):
            errors.append(
                ElementError(index, _bytes(one.expected, local), _bytes(one.found, local), holder)
            )
    if local.scattered and rank is None:
        rank = holder
    if words:
        shown = 1 if errors else 3  # those with bytes are listed by Where
        detail += f"; element {'; '.join(words[:shown])}"
    strength = "bound" if local.kind == "float" and expected is None else "exact"
    return failure(local, strength, detail, rank, errors, expected, actual, n_wrong=n_wrong)


def _bytes(value, local) -> bytes:
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(local.dtype).tobytes()


def rows(local, holder, ranges) -> str:
    """The rows of ranges (start, stop) of a holder's block, in words."""
    block = local.held(holder)
    shape = local.blocks.blocks[block].shape
    columns = shape[-1] if shape else 1
    spans = []
    for start, stop in ranges:
        first, last = start // columns, (stop - 1) // columns
        if spans and first <= spans[-1][1] + 1:
            spans[-1][1] = max(last, spans[-1][1])
        else:
            spans.append([first, last])
    names = [f"{a}" if a == b else f"{a}..{b}" for a, b in spans]
    shard = f" of shard {block}" if local.scattered else ""
    word = "row" if len(names) == 1 and ".." not in names[0] else "rows"
    return f"{word} {', '.join(names[:8])}{', …' * (len(names) > 8)}{shard}"
