"""What a trace holds: the columns of an event and of a sketch, enumerations, the table of tensors."""

from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np

SCHEMA_VERSION = 1
MOST_RANKS = 1 << 22  # of a run: no job has had as many, and memory is taken by a rank's number


class Stage(IntEnum):
    """Which part of the run made the check; PROGRAM: a program that uses the library."""

    FABRIC = 0
    WEIGHTS = 1
    COMPUTE = 2
    TENSOR = 3
    PIPELINE = 4
    DATA = 5
    GOLDEN = 6
    SEQUENCE = 7
    PROGRAM = 8


class Op(IntEnum):
    """What was checked. CONTENT is a fingerprint compared with one that was known beforehand."""

    ALLGATHER = 0
    ALLREDUCE_SUM = 1
    ALLREDUCE_MAX = 2
    ALLREDUCE_BOR = 3
    ALLREDUCE_BXOR = 4
    BROADCAST = 5
    HANDOFF = 6
    AGREEMENT = 7
    MATMUL = 8
    AT_REST = 9
    CONTENT = 10
    NONFINITE = 11
    GATHER = 12
    SCATTER = 13
    ALLTOALL = 14
    RING = 15
    REDUCE_SCATTER = 16
    ALLREDUCE_MIN = 17
    COLOURS = 18
    MESSAGE = 19


# Checks whose fingerprint is of what one rank holds.
HELD_BY_ONE = (Op.HANDOFF, Op.MESSAGE, Op.AT_REST, Op.MATMUL)


class Status(IntEnum):
    """The outcome of one check."""

    VERIFIED = 0
    FAILED = 1
    NOT_ESTABLISHED = 2


class Established(IntFlag):
    """What a check that held has established; the kinds add up."""

    MOVED = 1
    AGREED = 2
    COMPUTED = 4
    EXPECTED = 8


EVENT = np.dtype(
    [
        ("step", "<i4"),
        ("microbatch", "<i2"),
        ("repeat", "<u2"),
        ("layer", "<i2"),
        ("stage", "u1"),
        ("op", "u1"),
        ("verdict", "u1"),
        ("established", "u1"),
        ("tensor", "<u2"),
        ("nonfinite", "<u2"),
        ("peer", "<i4"),
        ("sequence", "<u4"),
        ("element", "<i8"),
        ("fingerprint", "<u8"),
        ("expected", "<u8"),
        ("bytes", "<u8"),
        ("t_start", "<f8"),
        ("t_end", "<f8"),
    ]
)

DESCRIPTIONS = {
    "step": "step of the inference; 0 is the prefill",
    "microbatch": "microbatch, -1: none",
    "repeat": "number of the repetition (--repeat), from 0",
    "layer": "decoder layer, -1: none",
    "stage": "part of the run that made the check",
    "op": "what was checked",
    "verdict": "outcome of the check",
    "established": "what the check established; the bits add up",
    "tensor": "row of /tensors",
    "nonfinite": "NaN and Inf found, at most 65535 counted",
    "peer": "world rank at the other end, -1: none",
    "sequence": "sequence number of the hand-off; of a program's collective over some of its ranks "
    "1 + the lowest of them; 0: none",
    "element": "global linear index of the corrupted element, -1: not located",
    "fingerprint": "fingerprint found",
    "expected": "fingerprint expected",
    "bytes": "bytes that the check covered on this rank",
    "t_start": "start of the check, or of the layer that it is made in, since /ranks/started, s",
    "t_end": "end of the check, or of the layer that it is made in, since /ranks/started, s",
}

# A tensor's sketch (docs/sketches.md) of one step, as ``Trace.sketches`` gives it.
SKETCH = np.dtype(
    [
        ("repeat", "<u2"),
        ("step", "<i4"),
        ("layer", "<i2"),
        ("tensor", "<u2"),
        ("size", "<i8"),
        ("nonfinite", "<i8"),
        ("absmax", "<f8"),
        ("sumsq", "<f8"),
        ("projections", "<f8", (8,)),
    ]
)

# One rank's share of it, a row of /sketches. Shares are disjoint, so that they add up.
SKETCH_SHARE = np.dtype([("rank", "<i4"), *SKETCH.descr, ("whole", "<i8")])

RANK_DESCRIPTIONS = {
    "rank": "world rank",
    "host": "name of the host that the rank ran on",
    "pid": "number of the rank's process on its host",
    "device": "what the rank computed on",
    "started": "start of the run on the rank, seconds since the epoch; the zero of t_start and t_end",
    "offset": "the rank's first row in /events",
    "count": "number of the rank's rows in /events",
    "fingerprint": "fingerprint of the rank's rows",
    "part": "file that holds the rank's rows, relative to this one",
}

TENSOR_DESCRIPTIONS = {
    "name": "name of the tensor",
    "shape": "global shape (JSON), -1 where it differs from step to step",
    "dtype": "type of the elements",
}

SKETCH_DESCRIPTIONS = {
    "rank": "world rank whose share of the tensor the row is of",
    "repeat": "number of the repetition (--repeat), from 0",
    "step": "step of the inference; 0 is the prefill",
    "layer": "decoder layer, -1: none",
    "tensor": "row of /tensors",
    "size": "elements of the share",
    "nonfinite": "NaN and Inf among them, left out of the sums and of the maximum",
    "absmax": "largest absolute value",
    "sumsq": "sum of squares",
    "projections": "sums of the elements with eight random signs, by global position",
    "whole": "elements of the whole tensor",
}

MASKS = ("established",)  # of ENUMERATIONS: those whose members are bits that add up
ENUMERATIONS = {"stage": Stage, "op": Op, "verdict": Status, "established": Established}

NOTHING = {"microbatch": -1, "layer": -1, "peer": -1, "element": -1}


def blank_events(n: int) -> np.ndarray:
    """``n`` events, shape (n,), EVENT, in which each column says "none"."""
    events = np.zeros(n, EVENT)
    for name, value in NOTHING.items():
        events[name] = value
    return events


def joined_events(parts) -> np.ndarray:
    """Arrays of events, one after the other. As bytes: numpy would join them field by field."""
    parts = [np.ascontiguousarray(part, EVENT).view(np.uint8) for part in parts]
    return np.concatenate(parts).view(EVENT) if parts else np.zeros(0, EVENT)


@dataclass(frozen=True)
class TensorInfo:
    """A row of /tensors: name, global shape (-1: differs from step to step), dtype's name.

    Rows stand in program order (first use), which is how failures are ordered.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))


@dataclass(frozen=True)
class RankInfo:
    """A row of /ranks: one rank's process and where its events lie."""

    rank: int
    host: str
    pid: int
    device: str
    started: float  # seconds since the epoch; the zero of t_start and t_end
    offset: int  # its first row in /events
    count: int
    fingerprint: int  # of its rows, see trace/checksum.py
