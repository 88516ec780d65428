"""Traces of many ranks and events, made without a run, to measure what reads traces.

All ranks run the same program: a tensor-parallel decoder's checks, step by step and layer by
layer. Each rank's times and fingerprints are its own. Failures are planted: from the middle on
one layer's matmuls on one rank, and what follows from them on all ranks.
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from spimpi.fingerprint.tag import GOLDEN, MASK
from spimpi.trace.checksum import rows_fingerprint
from spimpi.trace.schema import (
    Established, Op, RankInfo, Stage, Status, TensorInfo, blank_events,
)  # fmt: skip
from spimpi.trace.sealing import layout
from spimpi.trace.sealing.drivers import (
    Plan, parts_folder, write_alone, write_part, write_shown_parts,
)  # fmt: skip

LAYERS = 16
RANKS_A_HOST = 8
RANK_AT_FAULT, LAYER_AT_FAULT = 1, 3
# One layer's checks: tensor, op, stage, what it establishes.
LAYER = (
    ("q_proj", Op.MATMUL, Stage.COMPUTE, Established.COMPUTED),
    ("o_proj", Op.MATMUL, Stage.COMPUTE, Established.COMPUTED),
    ("attention", Op.ALLREDUCE_SUM, Stage.TENSOR, Established.MOVED),
    ("down_proj", Op.MATMUL, Stage.COMPUTE, Established.COMPUTED),
    ("ffn", Op.ALLREDUCE_SUM, Stage.TENSOR, Established.MOVED),
    ("hidden", Op.AGREEMENT, Stage.TENSOR, Established.AGREED),
)
TENSORS = tuple(
    TensorInfo(name, (-1, 2048), "float32")
    for name in ("embedding", *(check[0] for check in LAYER), "logits")
)


def synthetic_trace(path, n_ranks: int, n_events: int, fails: bool = True) -> None:
    """Write a sealed trace of ``n_events`` checks on each of ``n_ranks``.

    ``fails``: whether a failure is planted, halfway through the run.
    """
    program = _program(n_events)
    at_fault = (program["op"] == Op.MATMUL) & (program["layer"] == LAYER_AT_FAULT)
    at_fault[: n_events // 2] = False
    first = int(at_fault.argmax()) if fails else n_events
    attributes = {
        "run_id": "synthetic", "command": "spimpi bench reading", "world": n_ranks,
        "model": "synthetic", "topology": {"tp": n_ranks}, "arithmetic": "exact-1",
        "end_state": "failed" if fails else "verified",
    }  # fmt: skip
    write_ranks(path, n_ranks, lambda rank: _rank_rows(program, rank, first), TENSORS, attributes)


def write_ranks(path, n_ranks: int, rows, tensors, attributes, driver: str = "gather") -> None:
    """Write a sealed trace of ``rows(rank)`` (asked for twice, dtype EVENT), by one process.

    ``driver``: "gather" or "parts".
    """
    path, infos, ranges = Path(path), [], []
    for rank in range(n_ranks):
        events = rows(rank)
        ranges.append(layout.column_range(events))
        infos.append(
            RankInfo(
                rank=rank,
                host=f"node{rank // RANKS_A_HOST:04d}",
                pid=1000 + rank,
                device="",
                started=1.7e9 + rank * 1e-4,
                offset=infos[-1].offset + infos[-1].count if infos else 0,
                count=len(events),
                fingerprint=rows_fingerprint(events),
            )
        )
    lows, highs = (np.array(bounds) for bounds in zip(*ranges))
    plan = Plan(
        path=path,
        own=None,
        total=sum(info.count for info in infos),
        types=layout.column_types(lows.min(axis=0), highs.max(axis=0)),
        run_id=attributes["run_id"],
        ranks=infos,
        attributes=attributes,
        tensors=list(tensors),
        temporary=path,
    )
    if driver == "gather":
        with ExitStack() as undo:
            write_alone(plan, ((info.offset, rows(info.rank)) for info in infos), undo)
            undo.pop_all()
        return
    parts_folder(path).mkdir()
    for rank in range(n_ranks):
        write_part(plan, parts_folder(path), rank, rows(rank))
    write_shown_parts(plan)


def _program(n: int) -> np.ndarray:
    """One rank's checks, all of which hold."""
    a_step = LAYERS * len(LAYER) + 2
    place = np.arange(n) % a_step
    inner = (place >= 1) & (place <= LAYERS * len(LAYER))
    check = np.where(inner, (place - 1) % len(LAYER), 0)
    events = blank_events(n)
    events["step"] = np.arange(n) // a_step
    events["layer"] = np.where(inner, (place - 1) // len(LAYER), -1)
    events["tensor"] = np.where(inner, 1 + check, np.where(place == 0, 0, len(TENSORS) - 1))
    for column, position, outside in (
        ("op", 1, Op.ALLGATHER), ("stage", 2, Stage.TENSOR), ("established", 3, Established.MOVED)
    ):  # fmt: skip
        values = np.array([int(row[position]) for row in LAYER])
        events[column] = np.where(inner, values[check], int(outside))
    events["bytes"] = 1 << 19
    # Two checks that are made together share their time.
    events["t_start"] = np.arange(n) // 2 * 1e-3
    events["t_end"] = events["t_start"] + 2e-5
    events["fingerprint"] = np.random.default_rng(n).integers(0, 2**64, n, dtype=np.uint64)
    return events


def _rank_rows(program: np.ndarray, rank: int, first: int) -> np.ndarray:
    """The program as one rank ran it; from row ``first`` on failures, as if one rank were at fault.

    The matmuls of a layer fail on the rank at fault, the agreements that follow on all ranks.
    """
    events = program.copy()
    own = np.uint64((rank + 1) * GOLDEN & MASK)
    events["fingerprint"] ^= own
    events["expected"] = events["fingerprint"]
    events["t_start"] += rank * 1e-7
    events["t_end"] += rank * 1.7e-7
    rows = np.arange(len(events))
    bad = (rows >= first) & (events["op"] == Op.AGREEMENT)
    if rank == RANK_AT_FAULT:
        bad |= (rows >= first) & (events["op"] == Op.MATMUL) & (events["layer"] == LAYER_AT_FAULT)
    events["verdict"][bad] = Status.FAILED
    events["established"][bad] = 0
    events["expected"][bad] ^= np.uint64(1)
    return events
