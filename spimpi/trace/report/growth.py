"""How far two runs are apart, tensor by tensor in program order."""

import math

import numpy as np

from spimpi.trace.report import svg
from spimpi.trace.report.svg import Picture
from spimpi.trace.schema import Stage

LEFT, TOP, WIDTH, HEIGHT = 92, 24, 860, 240
MOST_POINTS = 3000
MOST_LINES = 300


def draw(difference, title_id: str) -> Picture:
    """``difference``: of spimpi.trace.analysis.diff. Each tensor's ‖a - b‖ / ‖a‖ where sketches tell it;
    without them, which tensors have equal fingerprints and which have not."""
    table = difference.table
    relative = np.where(table["differs"], table["relative"], 0.0)
    known = np.isfinite(relative) & (relative > 0)
    content = []
    tall = HEIGHT if known.any() else 36
    least = math.floor(math.log10(relative[known].min())) if known.any() else -1
    most = max(math.ceil(math.log10(relative[known].max())), least + 1) if known.any() else 0
    scale = WIDTH / max(len(table), 1)
    bottom = TOP + tall
    content += _axes(table, least, most, scale, bottom, known.any())
    size = max(scale * 0.9, 1.2)
    for i in _points(table, difference.first):
        row = table[i]
        x = LEFT + i * scale
        said = _value(row)
        words = f"{place(row, difference.names)}: {said}"
        if not row["differs"]:
            content.append(svg.square(x, bottom + 3, size, 5, "held", words))
            continue
        content.append(svg.square(x, bottom + 3, size, 9, "wrong", words))
        if known[i]:
            y = bottom - (math.log10(relative[i]) - least) / (most - least) * tall
            title = svg.element("title", svg.escape(words))
            content.append(
                svg.element("circle", title, cx=x + size / 2, cy=y, r=2.6, class_="point")
            )
    if difference.first >= 0:
        x = LEFT + (difference.first + 0.5) * scale
        content.append(svg.element("line", x1=x, x2=x, y1=TOP, y2=bottom, class_="first-line"))
        side = ("end", -6) if x > LEFT + WIDTH / 2 else ("start", 6)
        content.append(svg.text(x + side[1], TOP + 10, "first difference", "tick bad", side[0]))
    picture = svg.drawing(LEFT + WIDTH + 16, bottom + 28, "".join(content), title_id)
    order = np.argsort(~table["differs"], kind="stable")[:MOST_LINES]
    lines = tuple(
        (
            str(row["step"]), str(row["layer"]) if row["layer"] >= 0 else "",
            difference.names[row["tensor"]], f"{row['a']:016x}", f"{row['b']:016x}", _value(row),
        )
        for row in table[order]
    )  # fmt: skip
    note = f"{len(lines)} of {len(table):,} tensors." if len(lines) < len(table) else ""
    columns = ("step", "layer", "tensor", "this run", "other run", "difference")
    return Picture(picture, columns, lines, note)


def _points(table, first: int) -> list[int]:
    """Which rows are drawn: all, or evenly chosen ones and the first that differs."""
    if len(table) <= MOST_POINTS:
        return list(range(len(table)))
    chosen = set(np.linspace(0, len(table) - 1, MOST_POINTS).astype(int).tolist())
    return sorted(chosen | ({first} if first >= 0 else set()))


def _axes(table, least, most, scale, bottom, told: bool) -> list[str]:
    drawn = []
    if told:
        every = max(1, -(-(most - least) // 8))
        for power in range(least, most + 1, every):
            y = bottom - (power - least) / (most - least) * HEIGHT
            drawn.append(
                svg.element("line", x1=LEFT, x2=LEFT + WIDTH, y1=y, y2=y, class_="grid")
            )
            drawn.append(svg.text(LEFT - 8, y + 4, f"1e{power}", "tick", "end"))
        drawn.append(svg.text(LEFT, 12, "relative difference", "axis"))
    weights = table["stage"] == Stage.WEIGHTS
    part = np.where(weights, -1, table["step"].astype(np.int64))
    last = -100.0
    for i in np.flatnonzero(np.diff(part, prepend=-2)):
        x = LEFT + i * scale
        if x - last < 44:
            continue
        last = x
        name = "weights" if weights[i] else f"step {part[i]}"
        drawn.append(svg.text(x, bottom + 21, name, "tick"))
    return drawn


def place(row, names) -> str:
    layer = f"layer {row['layer']}, " if row["layer"] >= 0 else ""
    return f"step {row['step']}, {layer}{names[row['tensor']]}"


def _value(row) -> str:
    if not row["differs"]:
        return "equal"
    relative = float(row["relative"])
    if math.isnan(relative):
        return "differs"
    return "NaN or Inf in one" if math.isinf(relative) else f"{relative:.3g} of its size"
