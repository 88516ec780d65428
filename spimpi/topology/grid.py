"""The grid of ranks, tensor × sequence × pipeline × data: how one is chosen, or read from text."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from spimpi.errors import UsageError
from spimpi.partition import balanced_sizes
from spimpi.printable import one_line
from spimpi.topology.exo import RULES, create_exo_partitions

AXES = ("tp", "sp", "pp", "dp")  # neighbours in the world first
_LONGEST = 9  # digits of an axis
_SHOWN = 8  # memory sizes in a message


class Place(NamedTuple):
    """A rank's coordinates: data rank ``d``, pipeline stage ``p``, sequence rank ``s``, tensor
    rank ``t``."""

    d: int
    p: int
    s: int
    t: int


@dataclass(frozen=True)
class Grid:
    """``tp`` × ``sp`` × ``pp`` × ``dp`` ranks; ``layer_sizes`` are the layers of each stage.

    World rank = ((d·pp + p)·sp + s)·tp + t. ``rule`` is the exo rule that gave the layer sizes,
    for a ring whose last stage hands back to the first; empty for every other topology.
    """

    tp: int
    pp: int
    dp: int
    layer_sizes: tuple[int, ...]
    rule: str = ""
    sp: int = 1

    def __post_init__(self):
        object.__setattr__(self, "layer_sizes", tuple(self.layer_sizes))
        if min(self.tp, self.sp, self.pp, self.dp) < 1:
            msg = f"tp, sp, pp and dp must be 1 or more, found {self.text()}"
            raise UsageError(msg)
        if len(self.layer_sizes) != self.pp or min(self.layer_sizes) < 1:
            msg = (
                f"each of {self.pp} pipeline stages needs one layer or more, "
                f"found layer sizes {list(self.layer_sizes)}"
            )
            raise UsageError(msg)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.tp * self.sp * self.pp * self.dp

    @property
    def n_layers(self) -> int:
        return sum(self.layer_sizes)

    def coordinates(self, rank: int) -> Place:
        if not 0 <= rank < self.size:
            msg = f"ranks of {self.text()} are 0..{self.size - 1}, found {rank}"
            raise UsageError(msg)
        rest, t = divmod(rank, self.tp)
        rest, s = divmod(rest, self.sp)
        d, p = divmod(rest, self.pp)
        return Place(d, p, s, t)

    def rank_of(self, d: int, p: int, s: int, t: int) -> int:
        sizes = (self.dp, self.pp, self.sp, self.tp)
        if not all(0 <= at < size for at, size in zip((d, p, s, t), sizes)):
            msg = f"no rank at d={d}, p={p}, s={s}, t={t} of {self.text()}"
            raise UsageError(msg)
        return ((d * self.pp + p) * self.sp + s) * self.tp + t

    def text(self) -> str:
        """The canonical form, which ``parse`` reads: ``tp=2,pp=2,dp=2``; sp where it is not 1."""
        sequence = f"sp={self.sp}," if self.sp > 1 else ""
        return f"tp={self.tp},{sequence}pp={self.pp},dp={self.dp}"

    def describe(self) -> str:
        """One line for people: the axes and the layers of each stage."""
        ring = f"exo ring (rule {self.rule}), " if self.rule else ""
        ranks = f"{self.size} rank" + "s" * (self.size > 1)
        return f"{ring}{self.text()}: {ranks}, layers {'+'.join(map(str, self.layer_sizes))}"


def choose(world_size: int, n_heads: int, n_layers: int) -> Grid:
    """The topology of a world size when none is asked for.

    tp is the largest divisor of the world size that is at most the number of heads, pp the
    largest divisor of the rest that is at most the number of layers, dp what is left. sp is 1.
    """
    _require_positive(world_size, n_heads, n_layers)
    tp = _largest_divisor(world_size, n_heads)
    pp = _largest_divisor(world_size // tp, n_layers)
    return Grid(tp, pp, world_size // (tp * pp), balanced_sizes(n_layers, pp))


def parse(text, world_size: int, n_heads: int, n_layers: int, memory=None, rule=None) -> Grid:
    """The grid that ``text`` asks for: ``tp=2,sp=2,pp=2,dp=2``, ``exo``, or None to choose one.

    Axes that are left out are 1. ``exo`` is a ring of all ranks whose layers follow ``memory``,
    one number a rank (equal where None), by ``rule`` (exo's where None); another rule's name instead
    of ``exo`` asks for that rule. Raises UsageError where the text is malformed, the axes do not multiply to
    the world size, there are more tensor ranks than heads or more stages than layers, or a rank
    would have no layer; the message names the nearest topologies that fit.
    """
    _require_positive(world_size, n_heads, n_layers)
    if text is not None and text.strip() in RULES:
        name = text.strip()
        if rule not in (None, name) and name != "exo":
            msg = f"--topology {name} asks for the exo rule {name}, found --exo-rule {_shown(rule)}"
            raise UsageError(msg)
        return _ring(world_size, n_layers, memory, rule if rule and name == "exo" else name)
    for what, given in (("memory sizes belong", memory), ("a rule (--exo-rule) belongs", rule)):
        if given is not None:
            found = f"topology {_shown(text)}" if text else "no --topology"
            msg = f"{what} to an exo ring (--topology exo), found {found}"
            raise UsageError(msg)
    if text is None:
        return choose(world_size, n_heads, n_layers)
    asked, shown = _axes(text), one_line(text, 80)
    tp, sp, pp, dp = (asked.get(axis, 1) for axis in AXES)
    problem = None
    if tp * sp * pp * dp != world_size:
        product = tp * sp * pp * dp
        factors = "·".join(str(asked.get(axis, 1)) for axis in AXES if axis != "sp" or sp > 1)
        problem = f"topology {shown} is {factors} = {product} ranks, the world has {world_size}"
    elif tp > n_heads:
        problem = f"topology {shown} has more tensor ranks than the model's {n_heads} heads"
    elif pp > n_layers:
        problem = f"topology {shown} has more pipeline stages than the model's {n_layers} layers"
    if problem:
        near = ", ".join(nearest(world_size, asked, n_heads, n_layers))
        msg = f"{problem}; the nearest that fit {world_size} ranks: {near}"
        raise UsageError(msg)
    return Grid(tp, pp, dp, balanced_sizes(n_layers, pp), sp=sp)


def nearest(world_size, asked, n_heads, n_layers, max_dp=None, count=3, fits=None) -> list[str]:
    """Topologies of exactly this world size that fit, those that keep most of ``asked`` first.

    sp is more than 1 only where it is asked for. ``fits(axes)`` may refuse more of them.
    """
    max_dp = max_dp or world_size
    fitting = [
        axes
        for tp in _divisors(world_size)
        for sp in (_divisors(world_size // tp) if "sp" in asked else (1,))
        for pp in _divisors(world_size // (tp * sp))
        for axes in [{"tp": tp, "sp": sp, "pp": pp, "dp": world_size // (tp * sp * pp)}]
        if tp <= n_heads and pp <= n_layers and axes["dp"] <= max_dp and (not fits or fits(axes))
    ]

    def distance(axes):
        changed = [axis for axis in asked if axes[axis] != asked[axis]]
        far = sum(abs(math.log(axes[axis] / asked[axis])) for axis in changed)
        unasked = sum(axes[axis] > 1 for axis in AXES if axis not in asked)
        return len(changed), round(far, 9), unasked, axes["dp"], axes["pp"], axes["sp"]

    return [_text(axes, asked) for axes in sorted(fitting, key=distance)[:count]]


def fitting_sizes(world_size: int, n_heads: int, n_layers: int, n_prompts: int) -> list[int]:
    """The nearest world sizes, below and above, whose chosen topology the prompts can fill."""

    def fits(size):
        return choose(size, n_heads, n_layers).dp <= n_prompts

    largest = n_heads * n_layers * n_prompts
    below = next(size for size in range(min(world_size - 1, largest), 0, -1) if fits(size))
    above = next((size for size in range(world_size + 1, largest + 1) if fits(size)), None)
    return [below] if above is None else [below, above]


def require_prompts(grid: Grid, n_prompts: int, n_heads: int, asked: bool = True) -> None:
    """Raise UsageError where data ranks would have no prompt, with what would fit.

    ``asked``: the topology was given, so the message names others of the same world size;
    where it was chosen, the message names the nearest world sizes instead.
    """
    if n_prompts < 1:
        msg = "a run needs one prompt or more, found none"
        raise UsageError(msg)
    if grid.dp <= n_prompts:
        return
    problem = (
        f"{grid.text()} spreads prompts over {grid.dp} data ranks, and the prompts are only {n_prompts}: "
        f"ranks would be idle; give {grid.dp} prompts"
    )
    if asked:
        near = nearest(grid.size, _axes_of(grid), n_heads, grid.n_layers, max_dp=n_prompts)
        if near:
            msg = f"{problem}, or one of these topologies: {', '.join(near)}"
            raise UsageError(msg)
    sizes = fitting_sizes(grid.size, n_heads, grid.n_layers, n_prompts)
    msg = f"{problem}, or run on {' or '.join(map(str, sizes))} ranks"
    raise UsageError(msg)


def require_tokens(grid: Grid, lengths, n_heads: int) -> None:
    """Raise UsageError where a sequence rank would have no token of any prompt, with what fits.

    ``lengths``: tokens of every prompt. Shorter prompts than sp are fine beside a longer one.
    """

    def problem(axes):
        block = balanced_sizes(len(lengths), axes["dp"])
        for d, size in enumerate(block):
            longest = max(lengths[sum(block[:d]) :][:size])
            if longest < axes["sp"]:
                return d, longest
        return None

    if grid.sp == 1 or not (found := problem(_axes_of(grid))):
        return
    d, longest = found
    whose = f"the longest prompt of data rank {d}" if grid.dp > 1 else "the longest prompt"
    near = nearest(
        grid.size, _axes_of(grid), n_heads, grid.n_layers, max_dp=len(lengths),
        fits=lambda axes: axes["sp"] == 1 or problem(axes) is None,
    )  # fmt: skip
    msg = (
        f"{grid.text()} splits each prompt over {grid.sp} sequence ranks, and {whose} has "
        f"{longest} token{'s' * (longest != 1)}: ranks would be idle; give a longer prompt, "
        + (f"or one of these topologies: {', '.join(near)}" if near else "or run on fewer ranks")
    )
    raise UsageError(msg)


def _axes_of(grid: Grid) -> dict[str, int]:
    """The grid as axes that were asked for; sp only where it is used."""
    return {axis: getattr(grid, axis) for axis in AXES if axis != "sp" or grid.sp > 1}


def _ring(world_size, n_layers, memory, rule):
    memory = [1] * world_size if memory is None else list(memory)
    if len(memory) != world_size:
        msg = (
            f"an exo ring needs one memory size a rank: {world_size} ranks, found {len(memory)} "
            f"sizes ({_sizes(memory)})"
        )
        raise UsageError(msg)
    if world_size > n_layers:
        msg = (
            f"an exo ring of {world_size} ranks leaves ranks idle: the model has {n_layers} "
            f"layers; the nearest size that fits is {n_layers} ranks"
        )
        raise UsageError(msg)
    if rule == "exo-0" and any(a < b for a, b in zip(memory, memory[1:])):
        msg = (
            "exo rule 'exo-0' orders the ring by memory: give the sizes in descending order, "
            f"found {_sizes(memory)}"
        )
        raise UsageError(msg)
    sizes = [part.size for part in create_exo_partitions(memory, n_layers, rule)]
    if len(sizes) < world_size or 0 in sizes:
        sizes += [0] * (world_size - len(sizes))
        msg = (
            f"exo rule {rule!r} gives {world_size} ranks {_sizes(sizes)} of "
            f"{n_layers} layers: ranks would be idle; {_smaller_ring(memory, n_layers, rule)}"
            "or use the rule 'exo', which gives every rank a layer"
        )
        raise UsageError(msg)
    return Grid(1, world_size, 1, tuple(sizes), rule)


def _sizes(values) -> str:
    """Memory sizes, or layers, in a message."""
    more = f", … ({len(values)} in all)" if len(values) > _SHOWN else ""
    return one_line(", ".join(map(str, values[:_SHOWN])), 120) + more


def _smaller_ring(memory, n_layers, rule):
    """The largest ring without its smallest memories that this rule leaves no rank of idle."""
    for n in range(len(memory) - 1, 0, -1):
        keep = sorted(range(len(memory)), key=lambda i: (-memory[i], i))[:n]
        kept = [memory[i] for i in sorted(keep)]
        try:
            grid = _ring(n, n_layers, kept, rule)
        except UsageError:
            continue
        ranks = f"{grid.size} rank" + "s" * (grid.size > 1)
        return f"the nearest that fits is {ranks} with memory {one_line(','.join(map(str, kept)), 120)}, "
    return ""


def _axes(text: str) -> dict[str, int]:
    asked = {}
    for part in text.split(","):
        axis, equals, number = (s.strip() for s in part.partition("="))
        if axis not in AXES or not equals:
            msg = (
                f"a topology is axes tp, sp, pp and dp as in tp=2,pp=2,dp=2, or one of "
                f"{', '.join(RULES)}; found {_shown(part.strip())} in {_shown(text)}"
            )
            raise UsageError(msg)
        if axis in asked:
            msg = f"topology {_shown(text)} gives {axis} twice"
            raise UsageError(msg)
        is_number = number.isascii() and number.isdigit() and len(number) <= _LONGEST
        if not is_number or int(number) < 1:
            msg = (
                f"{axis} must be a whole number of 1 or more, and of at most {_LONGEST} digits, "
                f"found {_shown(number)} in {_shown(text)}"
            )
            raise UsageError(msg)
        asked[axis] = int(number)
    return asked


def _shown(text: str) -> str:
    return one_line(repr(text), 80)


def _text(axes, asked):
    return ",".join(f"{axis}={axes[axis]}" for axis in AXES if axes[axis] > 1 or axis in asked)


def _require_positive(world_size, n_heads, n_layers):
    if min(world_size, n_heads, n_layers) < 1:
        msg = (
            f"a topology needs ranks, heads and layers, found {world_size} ranks, {n_heads} heads, "
            f"{n_layers} layers"
        )
        raise UsageError(msg)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _largest_divisor(n: int, limit: int) -> int:
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)
