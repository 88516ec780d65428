"""Checks as slices that nest: a step holds layers, a layer its checks. One rank at a time.

Viewers put the slices of a thread into each other by their times, and drop one that begins within
another and ends after it. So what does not nest goes to another thread of its rank.
"""

import numpy as np

from spimpi.trace.analysis.order import FABRIC, INFERENCE, WEIGHTS, phase_of
from spimpi.trace.schema import Stage

STEP, LAYER, CHECK = range(3)  # levels
GOLDEN = INFERENCE + 1  # compared when the inference has ended
MOST_DEEP = 100  # slices in each other; viewers drop what lies much deeper
MOST_LANES = 8  # threads of a rank; what nests in none of them ends where its lane lets it
SLICE = np.dtype(
    [("start", "<i8"), ("end", "<i8"), ("level", "u1"), ("row", "<i8"), ("lane", "<i4"),
     ("inside", "<i8"), ("own", "<i8"), ("checks", "<i8")]
)  # fmt: skip


def slices_of(columns, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(slices, names of the steps and layers) of one rank's rows.

    ``columns``: its events by name; ``start``, ``end``: of each row, int64 nanoseconds. Slices,
    dtype SLICE, in the order in which they are written; ``row``: of a check its row, else a place
    among the names; ``lane``: the number of its thread.
    """
    phase = phase_of(columns)
    phase[columns["stage"] == Stage.GOLDEN] = GOLDEN
    inference = phase >= INFERENCE
    step = np.where(inference, columns["step"].astype(np.int64), 0)
    layer = np.where(inference, columns["layer"].astype(np.int64), -1)
    steps, of_step = _groups(columns["repeat"].astype(np.int64), phase, step)
    within = np.where(layer >= 0, columns["microbatch"].astype(np.int64), -1)
    layers, of_layer = _groups(of_step, within, layer)
    # What is checked of a layer when the next one is computed makes a slice of its own.
    part = np.where(layer >= 0, _parts(of_layer, start, end), 0)
    layers, of_layer = _groups(of_step, within, layer, part)
    has_layer = layers[2] >= 0
    names = [_step_name(*of.tolist()) for of in steps.T]
    names += [f"layer {of[2]}" + f", microbatch {of[1]}" * (of[1] > 0) for of in layers.T.tolist()]
    n_steps = steps.shape[1]
    outer = _spans(of_step, start, end, STEP)
    outer["row"] = outer["own"] = np.arange(n_steps)
    outer["inside"] = -1
    inner = _spans(of_layer, start, end, LAYER)
    inner["row"] = inner["own"] = n_steps + np.arange(layers.shape[1])
    inner["inside"] = layers[0]
    checks = np.zeros(len(start), SLICE)
    checks["start"], checks["end"], checks["level"] = start, end, CHECK
    checks["row"] = np.arange(len(start))
    checks["inside"] = np.where(has_layer[of_layer], n_steps + of_layer, of_step)
    checks["own"] = checks["inside"]
    found = np.concatenate([outer, inner[has_layer], checks])
    # Of layers that take the same time the one with most checks comes first: it is computed then.
    keys = (found["row"], -found["checks"], found["level"], -found["end"], found["start"])
    found = found[np.lexsort(keys)]
    found["lane"], found["end"] = _lanes(found)
    return found, names


def _groups(*keys) -> tuple[np.ndarray, np.ndarray]:
    """(the distinct values [keys × groups], the group of each row)."""
    distinct, inverse = np.unique(np.stack(keys), axis=1, return_inverse=True)
    return distinct, inverse.reshape(-1)


def _parts(group, start, end) -> np.ndarray:
    """Of each row a number of its part of the group: a part begins when the one before ended."""
    order = np.lexsort((start, group))
    of, begins, ends = group[order], start[order], end[order]
    first = np.r_[True, of[1:] != of[:-1]]
    # A running maximum of ends that starts anew with each group, as places in one sorted order.
    by_end = np.lexsort((ends, of))
    place = np.empty(len(ends), np.int64)
    place[by_end] = np.arange(len(ends))
    reached = ends[by_end[np.maximum.accumulate(place)]]
    heads = np.flatnonzero(first | np.r_[True, begins[1:] >= reached[:-1]])
    lengths = np.diff(np.r_[heads, len(of)])
    number = _joined(of[heads], begins[heads], np.maximum.reduceat(ends, heads))
    found = np.empty(len(of), np.int64)
    found[order] = np.repeat(number, lengths)
    return found


def _joined(group, start, end) -> np.ndarray:
    """Numbers of parts: neighbours in time of one group are one, unless another begins within the
    second of them."""
    order = np.lexsort((group, start))
    of, begins, ends = group[order], start[order], end[order]
    free = np.r_[begins[2:] >= ends[1:-1], np.ones(min(len(of) - 1, 1), bool)]
    number = np.empty(len(of), np.int64)
    number[order] = np.cumsum(np.r_[True, ~((of[1:] == of[:-1]) & free)])
    return number


def _spans(group, start, end, level) -> np.ndarray:
    """A slice for each group, over all its rows."""
    found = np.zeros(int(group.max(initial=-1)) + 1, SLICE)
    found["start"], found["end"], found["level"] = np.iinfo("i8").max, np.iinfo("i8").min, level
    np.minimum.at(found["start"], group, start)
    np.maximum.at(found["end"], group, end)
    np.add.at(found["checks"], group, 1)
    return found


def _step_name(repeat: int, phase: int, step: int) -> str:
    names = {FABRIC: "fabric", WEIGHTS: "weights", GOLDEN: f"comparison of step {step}"}
    return names.get(phase, f"step {step}") + (f", repetition {repeat}" if repeat else "")


def _lanes(slices) -> tuple[list[int], list[int]]:
    """(lane, end) of slices in the order of their starts, longer ones first.

    A slice goes where what holds it is open, inside that or beside it; else to the first lane in
    which nothing is, or something of the same step or layer that holds it. Where there is none, it
    ends with what it is put into.
    """
    lanes: list[list[tuple[int, int, int]]] = []  # the open slices of each: (end, own, number)
    home: dict[int, int] = {}  # the lane of a step or a layer
    chosen, ends = [], []
    columns = (slices[name].tolist() for name in ("start", "end", "level", "inside", "own"))
    for number, (start, end, level, inside, own) in enumerate(zip(*columns)):
        at = _place(lanes, home.get(inside, 0), start, end, inside)
        if at < 0:
            at = min(range(len(lanes)), key=lambda i: len(lanes[i]))
            if len(lanes[at]) >= MOST_DEEP:
                ends[lanes[at].pop()[2]] = start
            end = min(end, lanes[at][-1][0])
        lanes[at].append((end, own, number))
        if level != CHECK:
            home[own] = at
        chosen.append(at)
        ends.append(end)
    return chosen, ends


def _place(lanes, first: int, start: int, end: int, inside: int) -> int:
    """The lane that a slice fits into, which is made where there is none; -1: there is no more."""
    for at in (first, *(i for i in range(len(lanes)) if i != first)):
        if at >= len(lanes):
            break
        lane = lanes[at]
        while lane and lane[-1][0] <= start:
            lane.pop()
        if not lane:
            return at
        holds, own, _ = lane[-1]
        if own == inside and end <= holds and len(lane) < MOST_DEEP:
            return at
    if len(lanes) < MOST_LANES:
        lanes.append([])
        return len(lanes) - 1
    return -1
