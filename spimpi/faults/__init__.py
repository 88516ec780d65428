"""What can go wrong, on purpose: the faults of ``--inject`` and the places they strike."""

from spimpi.faults.places import PLACES, Part, TensorPlace, part_of
from spimpi.faults.spec import KINDS, Fault, help_text, item_bytes, parse, validate

__all__ = [
    "KINDS",
    "PLACES",
    "Fault",
    "Part",
    "TensorPlace",
    "help_text",
    "item_bytes",
    "parse",
    "part_of",
    "validate",
]
