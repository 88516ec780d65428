"""The registry of faults, by what they strike."""

from spimpi.bench.runtime_faults.faults import (
    attention, layers, moved, recorded, tokens, weights,
)  # fmt: skip

FAULTS = (
    *tokens.FAULTS, *layers.FAULTS, *attention.FAULTS, *weights.FAULTS, *moved.FAULTS,
    *recorded.FAULTS,
)  # fmt: skip

assert len({fault.name for fault in FAULTS}) == len(FAULTS)
