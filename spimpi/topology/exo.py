"""Which layers each device of an exo ring holds: four rules.

exo (github.com/exo-explore/exo) gives each device of a ring a range of layers in proportion to
its memory, by a rule that has changed twice; the fourth rule here rounds plainly. The arithmetic
is float64 and Python's ``round`` (half to even), because that is what exo computes with: an exact
tie that float64 breaks is broken here as it is there. Only a device's share of the memory is taken
from exact numbers, so 1.8 and 0.8 GB split as 18 and 8 do.
"""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from spimpi.errors import UsageError
from spimpi.printable import one_line

_LARGEST = 100  # digits of a memory size


@dataclass(frozen=True)
class ExoPartition:
    """The layers ``start`` to ``stop - 1`` of a ring's device; ``memory`` in the unit given."""

    device: int | str
    start: int
    stop: int
    memory: int | float | Decimal | Fraction

    @property
    def size(self) -> int:
        return self.stop - self.start


def create_exo_partitions(devices, n_layers: int, rule: str = "exo") -> list[ExoPartition]:
    """The ring's partitions, in ring order, which begins with the device that holds layer 0.

    ``devices`` are memory sizes, in any one unit, and are then named 0, 1, … by place, or pairs
    (name, memory). Rules:

    - ``exo`` (exo since 1.0.64): floor(share·L), the largest fractional remainders get one more
      (ties to the lower rank), then at least one layer a device, taken from the largest.
    - ``exo-1.0`` (exo 1.0 before 1.0.64): max(1, round(L·share)), the last takes the rest.
    - ``exo-0`` (exo 0.0.x): devices sorted by (memory, name) descending, borders at the
      cumulative share rounded to 5 digits, times L, cut to an integer; devices without layers
      are left out of the result, the last one extends to the last layer.
    - ``gay``: round(share·L), the last takes the rest; devices may get no layer.

    Raises UsageError, naming the rule, where the last device would be left with fewer than no
    layers, and for "exo" where there are fewer layers than devices; also for an unknown rule,
    no devices, two devices of one name, memory that is not a positive number.
    """
    if rule not in RULES:
        msg = f"unknown exo rule {rule!r}; known are {', '.join(RULES)}"
        raise UsageError(msg)
    ring = [_named(i, device) for i, device in enumerate(devices)]
    names = [name for name, _ in ring]
    if not ring or len(set(names)) < len(names):
        msg = f"an exo ring needs one or more devices of different names, found {names}"
        raise UsageError(msg)
    if n_layers < 1:
        msg = f"an exo ring needs a model of one or more layers, found {n_layers}"
        raise UsageError(msg)
    total = sum(_exact(memory) for _, memory in ring)
    if rule == "exo-0":
        ring.sort(key=lambda device: (_exact(device[1]), device[0]), reverse=True)
    shares = [float(_exact(memory) / total) for _, memory in ring]
    borders = RULES[rule](shares, n_layers)
    partitions = [
        ExoPartition(name, start, stop, memory)
        for (name, memory), start, stop in zip(ring, borders, borders[1:])
    ]
    if rule == "exo-0":
        partitions = [part for part in partitions if part.size]
    return partitions


def parse_memory(text: str) -> list[Decimal]:
    """Memory sizes from text such as ``18,8`` or ``17.5,8``: one a rank, in GB."""
    try:
        sizes = [Decimal(part.strip()) for part in text.split(",")]
        for size in sizes:
            _exact(size)
    except (InvalidOperation, UsageError):
        found = one_line(repr(text), 120)
        msg = f"memory is one positive number of GB a rank, as in 18,8; found {found}"
        raise UsageError(msg) from None
    return sizes


def _named(rank: int, device):
    return tuple(device) if isinstance(device, (tuple, list)) else (rank, device)


def _exact(memory) -> Fraction:
    try:
        exact = Fraction(0 if _is_far(memory) else memory)
    except (TypeError, ValueError, OverflowError):
        exact = Fraction(0)
    if exact <= 0:
        msg = (
            f"a device's memory must be a positive number, and of at most {_LARGEST} "
            f"digits, found {one_line(repr(memory), 60)}"
        )
        raise UsageError(msg)
    return exact


def _is_far(memory) -> bool:
    """Whether a decimal number is too long to be written out, as a fraction does."""
    if not isinstance(memory, Decimal):
        return False
    return max(abs(memory.adjusted()), len(memory.as_tuple().digits)) > _LARGEST


def _borders(sizes) -> list[int]:
    borders = [0]
    for size in sizes:
        borders.append(borders[-1] + size)
    return borders


def _largest_remainder(shares, n_layers):
    if n_layers < len(shares):
        msg = (
            f"exo rule 'exo' gives each device at least one layer: {len(shares)} devices are "
            f"more than the model's {n_layers} layers; use at most {n_layers}"
        )
        raise UsageError(msg)
    ideal = [share * n_layers for share in shares]
    sizes = [int(x) for x in ideal]
    # sorted() is stable, which is what gives ties to the lower rank
    by_remainder = sorted(range(len(sizes)), key=lambda i: sizes[i] - ideal[i])
    for i in by_remainder[: n_layers - sum(sizes)]:
        sizes[i] += 1
    for i, size in enumerate(sizes):
        if size == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[i] = 1
    return _borders(sizes)


def _last_takes_the_rest(rule, shares, n_layers, least):
    sizes = [max(least, round(share * n_layers)) for share in shares[:-1]]
    rest = n_layers - sum(sizes)
    if rest < 0:
        msg = (
            f"exo rule {rule!r} leaves the last of {len(shares)} devices {rest} of {n_layers} "
            f"layers: the others' shares were rounded up to {sum(sizes)} in all; "
            "use fewer devices or the rule 'exo'"
        )
        raise UsageError(msg)
    return _borders([*sizes, rest])


def _rounded_at_least_one(shares, n_layers):
    return _last_takes_the_rest("exo-1.0", shares, n_layers, least=1)


def _rounded(shares, n_layers):
    return _last_takes_the_rest("gay", shares, n_layers, least=0)


def _rounded_borders(shares, n_layers):
    borders, end = [0], 0.0
    for share in shares:
        end = round(end + share, 5)
        borders.append(min(n_layers, int(end * n_layers)))
    # rounded shares may add up to 0.99999, which would lose the last layer
    borders[-1] = n_layers
    return borders


RULES = {
    "exo": _largest_remainder,
    "exo-1.0": _rounded_at_least_one,
    "exo-0": _rounded_borders,
    "gay": _rounded,
}
