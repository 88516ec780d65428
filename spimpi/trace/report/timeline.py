"""The timeline: each rank's steps, and how much of each was spent checking, or checks span."""

from spimpi.trace.report import svg
from spimpi.trace.report.rows import Row, labelled
from spimpi.trace.report.spans import Span
from spimpi.trace.report.svg import Picture

MOST_SPANS = 6000
MOST_LINES = 300
LEFT, TOP, WIDTH = 92, 30, 860


def draw(spans: tuple[Span, ...], rows: tuple[Row, ...], at_fault, title_id: str, told: bool):
    """A Picture. ``at_fault``: world ranks whose rows are marked; ``told``: see facts.Run."""
    height = min(max(420.0 / max(len(rows), 1), 9.0), 24.0)
    begin = min((s.start for s in spans), default=0.0)
    end = max((s.end for s in spans), default=0.0)
    scale = WIDTH / ((end - begin) or 1.0)
    content = [_axis(rows, at_fault, height, end - begin, scale)]
    shown = _merged(spans, max(MOST_SPANS // max(len(rows), 1), 8))
    parity: dict[int, int] = {}
    for s in shown:
        n = parity[s.row] = parity.get(s.row, -1) + 1
        x, y = LEFT + (s.start - begin) * scale, TOP + s.row * height
        wide = max((s.end - s.start) * scale, 0.6)
        checked = wide * min(s.checking / (s.end - s.start), 1.0) if s.end > s.start else 0.0
        row = rows[s.row]
        who = f"rank {row.label}" if row.alone else f"ranks {row.label}, on average"
        share = f"{_s(s.checking)} spent checking" if told else f"checks span {_s(s.checking)}"
        words = f"{who}, {s.name}: {_s(s.end - s.start)}, of which {share}"
        class_ = "span-a" if n % 2 == 0 else "span-b"
        content.append(svg.square(x, y + 1, wide, height - 2, class_, words))
        if checked > 0.3:
            tall = (height - 2) * 0.45
            content.append(svg.square(x, y + height - 1 - tall, checked, tall, "checking", ""))
    size = LEFT + WIDTH + 24, TOP + len(rows) * height + 8
    lines = [
        (
            rows[s.row].label, s.name, f"{s.start - begin:.6f}", f"{s.end - s.start:.6f}",
            f"{s.checking:.6f}",
        )
        for s in sorted(spans, key=lambda s: rows[s.row].label not in map(str, at_fault))[
            :MOST_LINES
        ]
    ]  # fmt: skip
    note = f"{len(lines)} of {len(spans):,} lines." if len(lines) < len(spans) else ""
    checks = "spent checking s" if told else "checks span s"
    columns = ("rank", "step", "starts at s", "lasts s", checks)
    return Picture(
        svg.drawing(*size, "".join(content), title_id), columns, tuple(lines), note
    )


def _axis(rows, at_fault, height, seconds, scale) -> str:
    drawn = [svg.text(LEFT - 8, 13, "rank", "axis", "end")]
    bottom = TOP + len(rows) * height
    marks = svg.ticks(seconds)
    for at in marks:
        x = LEFT + at * scale
        drawn.append(svg.element("line", x1=x, x2=x, y1=TOP - 4, y2=bottom, class_="grid"))
        drawn.append(svg.text(x, 13, f"{at:g} s", "tick", "middle" if at else None))
    bad = [y for y, row in enumerate(rows) if row.alone and row.label in map(str, at_fault)]
    for y in labelled(rows, height, bad):
        label = f"✕ {rows[y].label}" if y in bad else rows[y].label
        at = TOP + y * height + height / 2 + 4
        drawn.append(svg.text(LEFT - 8, at, label, "tick bad" if y in bad else "tick", "end"))
    return "".join(drawn)


def _merged(spans, most_a_row: int) -> list[Span]:
    """Neighbouring steps of a row as one, where a row has more than can be told apart."""
    by_row: dict[int, list[Span]] = {}
    for s in spans:
        by_row.setdefault(s.row, []).append(s)
    found = []
    for row, own in by_row.items():
        size = -(-len(own) // most_a_row)
        for i in range(0, len(own), size):
            few = own[i : i + size]
            name = few[0].name if len(few) == 1 else f"{few[0].name} to {few[-1].name}"
            found.append(
                Span(
                    row, name, min(s.start for s in few), max(s.end for s in few),
                    sum(s.checking for s in few),
                )
            )  # fmt: skip
    return found


def _s(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
