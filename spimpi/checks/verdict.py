"""What a check, or a whole run, established; and where the first failure is."""

from dataclasses import dataclass, field

from spimpi.trace.schema import Established

NO_ELEMENTS = "there are no elements: nothing was compared"  # what a verdict then misses


@dataclass(frozen=True)
class ElementError:
    """One wrong element: its GLOBAL index, its bytes (little-endian) as they should be and as they
    are, and the rank that holds it."""

    index: tuple[int, ...]
    expected: bytes
    found: bytes
    rank: int

    @property
    def bits(self) -> tuple[int, ...]:
        """Which bits differ, 0 being the lowest of the element's first byte."""
        mask = int.from_bytes(self.expected, "little") ^ int.from_bytes(self.found, "little")
        return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)

    def __str__(self):
        bits = ", ".join(map(str, self.bits))
        return (
            f"element {list(self.index)} on rank {self.rank}: expected "
            f"0x{self.expected[::-1].hex()}, found 0x{self.found[::-1].hex()} (bits {bits})"
        )


@dataclass(frozen=True)
class Where:
    """The place of a failure.

    ``rank`` is the rank at fault, None where no one is singled out: of the world in a run of
    ``spimpi verify``, of its communicator in a check of the library. ``recorded_by`` is the rank
    that saw it; ``layer`` -1 means none; ``elements`` are the first that were found wrong, and
    ``n_wrong`` how many there are, None where that is not known.
    """

    check: str
    tensor: str
    step: int
    layer: int
    microbatch: int
    rank: int | None
    host: str
    recorded_by: int
    expected: str
    found: str
    detail: str = ""
    repeat: int = 0
    elements: tuple[ElementError, ...] = ()
    n_wrong: int | None = None

    def __str__(self):
        layer = f"layer {self.layer}, " if self.layer >= 0 else ""
        host = f" ({self.host})" if self.host else ""
        rank = f"rank {self.rank}{host}" if self.rank is not None else "no single rank"
        text = f"step {self.step}, {layer}tensor {self.tensor}, {rank}: {self.check} failed"
        if self.expected or self.found:
            text += f"; expected {self.expected}, found {self.found}"
        text = f"{text}; {self.detail}" if self.detail else text
        return "; ".join([text, *map(str, self.elements[:SHOWN_ELEMENTS]), *self._more()])

    def _more(self) -> list[str]:
        """How many wrong elements are not shown, where some are."""
        more = (self.n_wrong or len(self.elements)) - SHOWN_ELEMENTS
        if not self.elements or more <= 0:
            return []
        return [f"{more:,} more" if self.n_wrong else f"at least {more:,} more"]


SHOWN_ELEMENTS = 3  # of a failure, in words


@dataclass(frozen=True)
class Verdict:
    """Truthy when nothing that was compared is wrong.

    ``established`` says what a pass proves: moved (bits arrived), agreed (replicas are equal),
    computed (arithmetic checked), expected (equals a fingerprint known beforehand). ``missing``
    says what was not compared; where that is everything (no elements, one rank alone) the verdict
    is truthy, since nothing is wrong, and establishes nothing. ``check`` names the check;
    ``expected`` and ``actual`` are fingerprints, None where the check does not compare them;
    ``strength`` says in words how strong the check of a sum or of a hand-off was.
    """

    holds: bool
    established: Established
    where: Where | None = None
    missing: tuple[str, ...] = field(default=())
    check: str = ""
    expected: int | None = None
    actual: int | None = None
    strength: str = ""

    def __bool__(self):
        return self.holds

    @property
    def kinds(self) -> list[str]:
        """Names of what was established, lower case."""
        return [kind.name.lower() for kind in Established if kind in self.established]

    def __str__(self):
        if self.where is not None:
            return f"corrupted: {self.where}"
        strength = f"; {self.strength}" if self.strength else ""
        words = f"verified ({', '.join(self.kinds) or 'nothing'}{strength})"
        if not self.missing:
            return words
        rest = f"; the rest is {words}" if self.holds and self.established else ""
        return f"incomplete: {'; '.join(self.missing)}{rest}"
