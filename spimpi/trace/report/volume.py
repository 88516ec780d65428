"""Bytes checked, by what was checked."""

from spimpi.trace.report import svg
from spimpi.trace.report.svg import Picture
from spimpi.units import in_bytes

LEFT, WIDTH, HEIGHT = 150, 560, 24


def draw(ops, title_id: str) -> Picture:
    """``ops``: OpTotals, drawn by their bytes."""
    ops = sorted(ops, key=lambda op: -op.bytes)
    most = max((op.bytes for op in ops), default=0) or 1
    content = []
    for i, op in enumerate(ops):
        y, wide = i * HEIGHT, max(op.bytes / most * WIDTH, 1.0)
        failed = f", {op.failed:,} failed" if op.failed else ""
        words = f"{op.name}: {in_bytes(op.bytes)} in {op.checks:,} checks{failed}"
        content.append(svg.text(LEFT - 8, y + 16, op.name, "tick", "end"))
        content.append(svg.square(LEFT, y + 4, wide, HEIGHT - 8, "bar", words))
        label = in_bytes(op.bytes) + (f", {op.failed:,} failed" if op.failed else "")
        class_ = "tick bad" if op.failed else "tick"
        content.append(svg.text(LEFT + wide + 8, y + 16, label, class_))
    columns = ("what", "checks", "failed", "bytes")
    lines = tuple((op.name, f"{op.checks}", f"{op.failed}", f"{op.bytes}") for op in ops)
    size = LEFT + WIDTH + 200, max(len(ops) * HEIGHT, HEIGHT)
    return Picture(svg.drawing(*size, "".join(content), title_id), columns, lines)
