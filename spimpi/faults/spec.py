"""What ``--inject`` asks for: one fault at one place, read from text and checked.

``parse`` knows the words, ``validate`` the run. Neither touches a payload.
"""

from dataclasses import dataclass

from spimpi.errors import UsageError
from spimpi.faults.places import PLACES, WEIGHT_BYTES, Part, part_of
from spimpi.printable import one_line
from spimpi.topology.pipeline import stage_of, stage_ranges
from spimpi.topology.sequence import split_rows

LONGEST_NUMBER = 18  # digits
SHOWN = 60  # characters of a word in a message
EVERYWHERE = ("rank", "layer", "tensor", "step")
# kind -> (what it does, the keys that it takes beside those of every kind)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bitflip": ("flip one bit of one element", ("element", "bit")),
    "swap": ("exchange two elements that differ", ("element", "other")),
    "stale": ("leave the previous step's values in the buffer", ()),
    "misplace": ("take the rank's part off by one", ()),
    "drop": ("leave out the rank's contribution to a sum", ()),
    "miscompute": ("add 1 to one integer of a matmul's result", ("element",)),
    "replica": ("change one element of one rank's copy, before it is compared", ("element",)),
}


@dataclass(frozen=True)
class Fault:
    """One fault: what happens, to which tensor, on which world rank.

    layer is -1 for tensors that belong to none. element and other are global linear indices of
    the tensor at that step; None: the first that the rank has, and the next that differs from it.
    step counts from the prefill, 0, and does not apply to weights (0).
    """

    kind: str
    rank: int
    tensor: str
    layer: int = -1
    step: int = 0
    element: int | None = None
    other: int | None = None
    bit: int = 0

    def __str__(self):
        """The text that ``parse`` reads."""
        known = (*EVERYWHERE, *KINDS[self.kind][1])
        values = {key: getattr(self, key) for key in known}
        if PLACES[self.tensor].is_weight:
            del values["step"]
        given = [f"{key}={v}" for key, v in values.items() if v is not None and v != -1]
        return f"{self.kind}:{','.join(given)}"


def parse(text: str) -> Fault:
    """The fault that ``KIND:key=value,…`` describes.

    Raises UsageError, naming what is known, for an unknown kind, tensor or key, a missing rank,
    tensor or layer, numbers that are not whole and not negative, and a kind that cannot happen
    to that tensor.
    """
    kind, _, rest = (part.strip() for part in text.partition(":"))
    text = one_line(text, 200)
    if kind not in KINDS:
        msg = f"--inject {text}: unknown kind {_shown(kind)}{_hint(kind, KINDS)}"
        raise UsageError(msg)
    values = _values(text, kind, rest)
    for key in ("rank", "tensor"):
        if key not in values:
            msg = f"--inject {text}: {key}= is missing, as in {_example(kind)}"
            raise UsageError(msg)
    tensor = values["tensor"]
    if tensor not in PLACES:
        msg = f"--inject {text}: unknown tensor {_shown(tensor)}{_hint(tensor, PLACES)}"
        raise UsageError(msg)
    place = PLACES[tensor]
    if kind not in place.kinds:
        able = ", ".join(name for name, other in PLACES.items() if kind in other.kinds)
        msg = (
            f"--inject {text}: {kind} cannot happen to {tensor} (what can: "
            f"{', '.join(place.kinds)}); {kind} can happen to {able}"
        )
        raise UsageError(msg)
    if place.in_layer != ("layer" in values):
        wants = "needs layer=" if place.in_layer else "belongs to no layer: leave out layer="
        msg = f"--inject {text}: {tensor} {wants}"
        raise UsageError(msg)
    if place.is_weight and "step" in values:
        msg = f"--inject {text}: {tensor} is read once, before the first step: leave out step="
        raise UsageError(msg)
    if values.get("element", -1) == values.get("other", -2):
        msg = f"--inject {text}: element and other are the same, so nothing would change"
        raise UsageError(msg)
    return Fault(kind, **values)


def _values(text, kind, rest) -> dict:
    known = (*EVERYWHERE, *KINDS[kind][1])
    values = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known:
            msg = f"--inject {text}: {kind} takes no key {_shown(key)}{_hint(key, known)}"
            raise UsageError(msg)
        if key in values:
            msg = f"--inject {text}: {key} is given twice"
            raise UsageError(msg)
        if key != "tensor":
            digits = equals and value.isascii() and value.isdigit()
            if not digits or len(value) > LONGEST_NUMBER:
                msg = (
                    f"--inject {text}: {key} must be a whole number from 0, of at most "
                    f"{LONGEST_NUMBER} digits, found {_shown(value)}"
                )
                raise UsageError(msg)
            value = int(value)
        values[key] = value
    return values


def validate(
    fault: Fault, grid, config, lengths, n_steps: int, *, exact=True, weight_itemsize=None
) -> None:
    """Raise UsageError unless the fault's place exists in this run, and the fault changes it.

    ``config``: the model's sizes (ModelConfig); ``lengths``: tokens of every prompt; ``n_steps``
    counts the prefill; ``exact``: exact arithmetic (else BLAS, which has fewer places);
    ``weight_itemsize``: bytes of a stored weight, where it is not what the config says.
    """
    place = PLACES[fault.tensor]
    if not place.exists_in(config):
        family = place.models.replace("llama", "Llama").replace("olmo", "OLMo")
        _refuse(fault, f"this model has no {fault.tensor}: only {family} models have one")
    _require_rank_and_layer(fault, place, grid)
    if not exact and (fault.kind == "miscompute" or fault.tensor.endswith("_max")):
        _refuse(fault, f"{fault.kind} of {fault.tensor} needs exact arithmetic, not --arith blas")
    if not 0 <= fault.step < n_steps:
        _refuse(fault, f"steps of this run are 0 (the prefill) to {n_steps - 1}")
    alone = getattr(grid, place.axis) == 1
    if alone and fault.kind in place.shared and not place.is_weight:
        _refuse(fault, _why_shared(fault, place))
    if fault.tensor == "last_rows" and fault.step:
        _refuse(fault, "last rows are gathered in the prefill alone, step 0")
    tied = fault.tensor == "lm_head" and config.tie_word_embeddings
    if tied and grid.pp == 1:
        _refuse(fault, "the model's head is its embedding: use tensor=embed_tokens")
    part = part_of(fault.tensor, fault.rank, grid, config, lengths, fault.step)
    if place.is_weight and fault.kind == "misplace" and part.is_whole:
        why = f"the rank reads the whole of {fault.tensor}; misplace needs a shard of it (tp > 1)"
        _refuse(fault, why)
    _require_elements(fault, part)
    if place.in_layer and not place.is_weight:
        _require_one_microbatch(fault, part, grid, lengths)
    bits = 8 * item_bytes(fault.tensor, config, exact, weight_itemsize)
    if fault.bit >= bits:
        _refuse(fault, f"an element of {fault.tensor} has {bits} bits, 0 to {bits - 1}")


def item_bytes(tensor: str, config, exact=True, weight_itemsize=None) -> int:
    """Bytes of an element of a tensor, as it is in memory when a fault strikes it."""
    place = PLACES[tensor]
    if place.is_weight:
        return weight_itemsize or WEIGHT_BYTES[config.dtype]
    if not exact and tensor in ("attn_out", "ffn_out", "qk_sum"):
        return 4
    return place.itemsize


def help_text() -> str:
    """The kinds, tensors and places, for ``--help``."""
    lines = ["faults: --inject KIND:key=value,…   (may be repeated)", "", "kinds"]
    for kind, (what, keys) in KINDS.items():
        lines.append(f"  {kind:<11} {what}{': ' + ', '.join(keys) if keys else ''}")
    lines += [
        "",
        "every kind takes rank= (a world rank), tensor=, layer= (of layer tensors) and step=",
        "(default 0, the prefill; not of weights). element= and other= are linear indices of the",
        "global tensor and must be the rank's (default: its first, and the next that differs);",
        "bit= counts from the lowest (default 0).",
        "",
        "tensors, in program order; R rows, H hidden, D head size, F FFN, V vocabulary",
    ]
    for place in PLACES.values():
        where = "" if place.in_layer else f" [{place.scope} stage, no layer]"
        lines.append(f"  {place.name:<13} {place.shape:<29} {place.held}{where}")
        kinds = [k + "*" * (k in place.shared) for k in place.kinds]
        only = f" [{place.models} models]" if place.models else ""
        lines.append(f"  {'':<13} {place.what}{only}: {', '.join(kinds)}")
    note = "* where tp > 1; of kv and last_rows where sp > 1"
    lines += ["", note, "", f"example: --inject {_example('bitflip')}"]
    return "\n".join(lines)


def _example(kind):
    tensor = "attn_out" if kind in ("drop", "miscompute") else "hidden"
    numbers = {"element": 17, "other": 18, "bit": 30}
    keys = "".join(f",{key}={numbers[key]}" for key in KINDS[kind][1])
    return f"{kind}:rank=2,layer=3,tensor={tensor}{keys}"


def _hint(word, known):
    import difflib

    close = difflib.get_close_matches(word[:SHOWN], list(known), n=1)
    guess = f": did you mean {close[0]}?" if close else ";"
    return f"{guess} known are {', '.join(known)}"


def _shown(word: str) -> str:
    return one_line(repr(word), SHOWN)


def _refuse(fault, why):
    msg = f"--inject {fault}: {why}"
    raise UsageError(msg)


def _why_shared(fault, place):
    if place.axis == "sp":
        return f"{fault.tensor} is gathered over sequence ranks, only where sp > 1, and here sp=1"
    if fault.tensor.endswith("_max"):
        return f"{fault.tensor} is reduced over ranks only where tp > 1, and here tp=1"
    if "miscompute" in place.kinds:
        return (
            f"{fault.tensor} is summed over ranks only where tp > 1, and here tp=1; "
            "what can happen to it is miscompute"
        )
    return f"{fault.kind} of {fault.tensor} needs other tensor ranks, and here tp=1"


def _require_rank_and_layer(fault, place, grid):
    if not 0 <= fault.rank < grid.size:
        _refuse(fault, f"ranks of this run are 0 to {grid.size - 1}")
    stage = grid.coordinates(fault.rank).p
    if place.in_layer:
        if not 0 <= fault.layer < grid.n_layers:
            _refuse(fault, f"layers of this model are 0 to {grid.n_layers - 1}")
        home = stage_of(grid.layer_sizes, fault.layer)
        what = f"layer {fault.layer}"
    else:
        home = 0 if place.scope == "first" else grid.pp - 1
        what = fault.tensor
    if home != stage:
        own = stage_ranges(grid.layer_sizes)[stage]
        _refuse(
            fault,
            f"{what} is on ranks {_ranks_of_stage(grid, home)}; rank {fault.rank} has layers "
            f"{own.start} to {own.stop - 1}",
        )


def _ranks_of_stage(grid, p):
    firsts, n = [grid.rank_of(d, p, 0, 0) for d in range(grid.dp)], grid.sp * grid.tp
    return ", ".join(f"{r}-{r + n - 1}" if n > 1 else str(r) for r in firsts)


def _require_elements(fault, part: Part):
    if part.size < 1 + (fault.kind in ("swap", "misplace")):
        what = "no element" if part.size == 0 else "one element"
        _refuse(fault, f"the rank has {what} of {fault.tensor}: nothing would change")
    if fault.other == part.first and fault.element is None:
        _refuse(fault, "other is the first element, which element is by default: give another")
    total = part.shape[0] * part.width
    for key in ("element", "other"):
        element = getattr(fault, key)
        if element is None or part.holds(element):
            continue
        if element >= total:
            _refuse(fault, f"{key} must be one of the {total} elements of shape {part.shape}")
        rows, columns = _spans(part.rows), ", ".join(_span(c) for c in part.columns)
        _refuse(
            fault,
            f"{key} {element} is row {element // part.width}, column {element % part.width} of "
            f"shape {part.shape}; rank {fault.rank} has rows {rows}, columns {columns} "
            f"(its first element is {part.first})",
        )


def _require_one_microbatch(fault, part, grid, lengths):
    if fault.other is None:
        return
    d, _, s, _ = grid.coordinates(fault.rank)
    split = split_rows(lengths, grid, d, fault.step)
    element = part.first if fault.element is None else fault.element
    own = [e // part.width for e in (element, fault.other)]
    if fault.tensor == "kv":
        blocks = [split.gathered(m) for m in range(len(split.pieces))]
    else:
        blocks = [range(*piece) for piece in split.own(s)]
    if not any(all(row in block for row in own) for block in blocks):
        spans = "; ".join(_spans(block) for block in blocks if len(block))
        _refuse(
            fault,
            f"element and other must be in one microbatch, and are in rows {own[0]} and {own[1]}; "
            f"the rank's microbatches are rows {spans}",
        )


def _span(block: range) -> str:
    return f"{block.start} to {block.stop - 1}"


def _spans(rows) -> str:
    """Ascending rows as spans without a gap."""
    if isinstance(rows, range):
        return _span(rows)
    rows = [int(row) for row in rows]
    starts = [row for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    stops = [row + 1 for i, row in enumerate(rows) if i + 1 == len(rows) or rows[i + 1] != row + 1]
    return ", ".join(_span(range(*ends)) for ends in zip(starts, stops))
