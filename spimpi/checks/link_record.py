"""What the two ends of a hand-off tell each other: one record of fixed size each way. No MPI.

The size does not depend on the buffer, so ends whose shapes differ do not hang.
"""

import numpy as np

from spimpi.errors import UsageError

MAX_DIMS = 16
NOT_GIVEN = -(2**63)
HANDED_ON, CLOSED = 0, 1

LINK_RECORD = np.dtype(
    [
        ("kind", "<i8"),
        ("from_rank", "<i8"),
        ("sequence", "<i8"),
        ("step", "<i8"),
        ("layer", "<i8"),
        ("microbatch", "<i8"),
        ("first_layer", "<i8"),
        ("last_layer", "<i8"),
        ("seed", "<u8"),
        ("name", "<u8"),  # the first 8 bytes of a BLAKE2b of it
        ("running", "<u8"),
        ("n_dims", "<i8"),
        ("dims", "<i8", MAX_DIMS),
        ("place", "<u8"),  # digest of the slab
        ("dtype", "S16"),
        ("error", "<i8"),
        ("fingerprint", "<u8"),  # the sender's: before the send, where it was watched
        ("now", "<u8"),  # the same at the check
        ("watched", "<i8"),
    ]
)

# What makes a hand-off another one than the receiver waits for, and the words for it.
_PLACE = ("step", "layer", "microbatch", "first_layer", "last_layer")


def shape_of(record) -> tuple[int, ...]:
    """The shape of the buffer that a record is of."""
    return tuple(int(n) for n in record["dims"][: int(record["n_dims"])])


def usage_problem(records, ranks, names) -> str:
    """What the two ends gave that is not of one tensor, in words; empty where it is.

    records, ranks, names of the tag: of the sender and of the receiver.
    """
    for what, values in (
        ("sending rank", [int(r["from_rank"]) for r in records]),
        ("name", [repr(n) for n in names]),
        ("seed", [int(r["seed"]) for r in records]),
        ("dtype", [r["dtype"].decode() for r in records if r["kind"] == HANDED_ON]),
    ):
        if len(values) == 2 and values[0] != values[1]:
            return _differ(what, values, ranks)
    return ""


def shape_problem(records, ranks) -> str:
    """As ``usage_problem``, of the buffers' shapes and places."""
    shapes = [shape_of(r) for r in records]
    if shapes[0] != shapes[1]:
        return _differ("shape", shapes, ranks)
    if records[0]["place"] != records[1]["place"]:
        return "the ends gave another `where`, or tensors of another global shape"
    return ""


def _differ(what, values, ranks) -> str:
    told = ", ".join(f"rank {rank} gave {value}" for rank, value in zip(ranks, values))
    return f"the ends differ in {what}: {told}"


def order_problem(sent, waited) -> str:
    """What the sender's record says that the receiver does not wait for; empty where nothing."""
    if sent["kind"] != waited["kind"]:
        n = int(waited["sequence"]) if waited["kind"] == CLOSED else int(sent["sequence"])
        who = "receiver" if waited["kind"] == CLOSED else "sender"
        lost = "a buffer was lost" if who == "receiver" else "a buffer was received twice"
        return f"{lost}: the {who} closed the chain after {n} hand-offs, the other end has more"
    late = int(sent["sequence"]) - int(waited["sequence"])
    names = [n for n in ("sequence", *_PLACE) if sent[n] != waited[n]]
    if not names:
        if sent["running"] != waited["running"]:
            return "the hand-offs before this one were not the same at both ends: mixed-up chains"
        return ""
    kind = "a buffer of another place"
    if late:
        kind = "a stale or repeated buffer" if late < 0 else "a buffer was lost or reordered"
    found = ", ".join(f"{n} {_value(sent[n])} (expected {_value(waited[n])})" for n in names)
    return f"{kind}: {found}"


def _value(word) -> str:
    return "not given" if int(word) == NOT_GIVEN else str(int(word))


def dims_of(shape) -> list[int]:
    """A shape as the record holds it; UsageError where it has too many axes."""
    if len(shape) > MAX_DIMS:
        msg = f"a hand-off's buffer has at most {MAX_DIMS} axes, found shape {shape}"
        raise UsageError(msg)
    return [*shape, *[0] * (MAX_DIMS - len(shape))]
