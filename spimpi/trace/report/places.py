"""The topology drawn: a grid tp × pp for each data rank, or a ring."""

import math
import re

from spimpi.trace.report import svg
from spimpi.trace.report.svg import Picture

MOST = 1024  # squares
MOST_RANKS = 10**7  # more was never run: what says so is no topology
CELL = 34.0
GAP = 26.0


def axes(attributes) -> dict[str, int] | None:
    """The axes that the run said, tp, sp, pp and dp; None where it said none."""
    said = attributes.get("topology")
    if isinstance(said, str):
        said = {k: int(n) for k, n in re.findall(r"\b(tp|sp|pp|dp)=(\d{1,9})\b", said)}
    if not isinstance(said, dict):
        return None
    found = {k: said.get(k, 1) for k in ("tp", "sp", "pp", "dp")}
    sound = all(type(n) is int and n > 0 for n in found.values())
    return found if said and sound and math.prod(found.values()) <= MOST_RANKS else None


def draw(run, title_id: str) -> Picture | None:
    """None where the run said no topology. A rank at fault, or without a row, is marked."""
    found = axes(run.attributes)
    if found is None:
        return None
    sizes = run.attributes.get("layer_sizes")
    layers = _layers(sizes if isinstance(sizes, list) else [], found["pp"])
    if run.attributes.get("exo_rule") and found["pp"] > 1 and found["pp"] <= 64:
        return _ring(run, found["pp"], layers, title_id)
    return _grid(run, found, layers, title_id)


def _layers(sizes, stages: int) -> list[str]:
    if len(sizes) != stages or not all(type(n) is int for n in sizes):
        return [""] * stages
    first, said = 0, []
    for n in sizes:
        said.append(f"layer {first}" if n == 1 else f"layers {first}\N{EN DASH}{first + n - 1}")
        first += n
    return said


def _state(rank: int, at_fault, hosts: dict) -> tuple[str, str, str]:
    """(class, mark, words) of a rank; ``hosts``: of the ranks that recorded something."""
    if rank in at_fault:
        return "wrong", "✕", "at fault"
    if rank not in hosts:
        return "unknown", "?", "nothing recorded"
    return "held", "", "not at fault"


def _grid(run, found, layers, title_id) -> Picture:
    tp, sp, pp, dp = (found[k] for k in ("tp", "sp", "pp", "dp"))
    across = tp * sp
    plane = across * pp
    whole = [d for d in range(dp)]
    hosts, at_fault = {r.rank: r.host for r in run.ranks}, run.at_fault
    wanted = {r // plane for r in at_fault if r < plane * dp}
    if plane > MOST:
        return _table_only(run, found, title_id)
    if plane * dp > MOST:
        room = max(MOST // plane, 1)
        whole = sorted([*sorted(wanted)[:room], *(d for d in whole if d not in wanted)][:room])
        whole = sorted(set(whole))
    cell = max(min(CELL, 860.0 / max(across, 1)), 9.0)
    columns = max(1, int(900 // (across * cell + 110 + GAP)))
    content, lines = [], []
    tall = pp * cell + (GAP + 18 if len(whole) > columns else 4)
    for n, d in enumerate(whole):
        left = 100 + (n % columns) * (across * cell + 110 + GAP)
        top = (24 if dp > 1 else 4) + (n // columns) * tall
        if dp > 1:
            content.append(svg.text(left, top - 8, f"data rank {d}", "axis"))
        for p in range(pp):
            if n % columns == 0 or dp == 1:
                label = layers[p] or f"stage {p}"
                content.append(
                    svg.text(left - 8, top + p * cell + cell * 0.62, label, "tick", "end")
                )
            for t in range(across):
                rank = (d * pp + p) * across + t
                class_, mark, said = _state(rank, at_fault, hosts)
                place = f"data rank {d}, stage {p}, sequence rank {t // tp}, tensor rank {t % tp}"
                words = f"rank {rank}: {said}; {place}"
                if cell >= 22 and rank < 10000:
                    mark += str(rank)
                x, y = left + t * cell, top + p * cell
                content.append(svg.square(x, y, cell - 3, cell - 3, class_, words, mark))
                lines.append((str(rank), str(d), str(p), str(t // tp), str(t % tp),
                              layers[p].removeprefix("layers ").removeprefix("layer "),
                              hosts.get(rank, ""), said))  # fmt: skip
    rows = -(-len(whole) // columns)
    size = (
        100 + min(len(whole), columns) * (across * cell + 110 + GAP),
        (24 if dp > 1 else 4) + rows * tall,
    )
    picture = svg.drawing(*size, "".join(content), title_id)
    return _with_table(picture, lines, len(whole) < dp, dp, at_fault)


def _with_table(picture, lines, cut: bool, dp: int, at_fault) -> Picture:
    names = ("rank", "data", "stage", "sequence", "tensor", "layers", "host", "is")
    lines.sort(key=lambda line: int(line[0]) not in at_fault)
    note = f"{len({line[1] for line in lines})} of {dp} data ranks are drawn. " if cut else ""
    if len(lines) > 300:
        note += f"300 of {len(lines):,} ranks."
    return Picture(picture, names, tuple(lines[:300]), note.strip())


def _table_only(run, found, title_id) -> Picture:
    """Too many ranks in one plane to draw each: the axes in words, and who is at fault."""
    said = " × ".join(f"{k} {n}" for k, n in found.items() if n > 1)
    bad = ", ".join(map(str, sorted(run.at_fault)[:8]))
    content = svg.text(10, 20, said, "axis")
    if bad:
        content += svg.text(10, 44, f"✕ at fault: rank {bad}", "tick bad")
    lines = tuple((str(r), "at fault") for r in sorted(run.at_fault)[:300])
    note = "More ranks than can be drawn one by one."
    return Picture(svg.drawing(600, 60, content, title_id), ("rank", "is"), lines, note)


def _ring(run, n: int, layers, title_id) -> Picture:
    radius = max(110.0, n * 62.0 / (2 * math.pi))
    middle = radius + 50
    aside = 70  # for the layers, beside the ring
    content, lines = [], []
    hosts, at_fault = {r.rank: r.host for r in run.ranks}, run.at_fault
    for rank in range(n):
        angle = 2 * math.pi * rank / n - math.pi / 2
        ahead = angle + 2 * math.pi / n
        step = 30 / radius
        a, b = angle + step, ahead - step
        path = (
            f"M{aside + middle + radius * math.cos(a):.1f} {middle + radius * math.sin(a):.1f}"
            f"A{radius:.1f} {radius:.1f} 0 0 1 "
            f"{aside + middle + radius * math.cos(b):.1f} {middle + radius * math.sin(b):.1f}"
        )
        content.append(svg.element("path", d=path, class_="hop", marker_end="url(#arrow)"))
        x, y = aside + middle + radius * math.cos(angle), middle + radius * math.sin(angle)
        class_, mark, said = _state(rank, at_fault, hosts)
        words = f"rank {rank}: {said}; {layers[rank]}"
        content.append(svg.square(x - 20, y - 20, 40, 40, class_, words, mark + str(rank)))
        side = round(math.cos(angle), 6)
        at = (x + 26, "start") if side > 0 else (x - 26, "end")
        if side == 0:
            at = (x, "middle")
        down = 4 if side else 34 * math.copysign(1, math.sin(angle)) + 4
        content.append(svg.text(at[0], y + down, layers[rank], "tick", at[1]))
        lines.append((str(rank), "0", str(rank), "0", "0",
                      layers[rank].removeprefix("layers ").removeprefix("layer "),
                      hosts.get(rank, ""), said))  # fmt: skip
    arrow = svg.element("path", d="M0 0 8 4 0 8z", class_="arrow")
    marker = svg.element(
        "marker", arrow, id="arrow", viewBox="0 0 8 8", refX=6, refY=4, markerWidth=7,
        markerHeight=7, orient="auto",
    )  # fmt: skip
    content.insert(0, svg.element("defs", marker))
    size = 2 * (middle + aside), 2 * middle
    return _with_table(svg.drawing(*size, "".join(content), title_id), lines, False, 1, at_fault)
