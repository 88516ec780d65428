"""The rank × layer map: replicas' fingerprints as colours, other checks as verdicts."""

from dataclasses import dataclass, replace

import numpy as np

from spimpi.trace.report import svg
from spimpi.trace.report.rows import Row, labelled, rows
from spimpi.trace.report.squares import AT_FAULT, FAILED, MET, UNKNOWN, Sheet
from spimpi.trace.report.svg import Picture

MOST_COLUMNS = 96
MOST_LINES = 300  # of the table
MOST_LINKS = MOST_LINES  # squares that the keyboard reaches; they lead to its lines
N_COLOURS = 6  # of values; later ones share one
LETTERS = "ABCDEF"
NOT_BLAMED = "a check failed; its rank is not blamed for it"
LEFT, TOP = 92, 40
WIDTH = 860


@dataclass(frozen=True)
class Square:
    class_: str
    words: str
    mark: str = ""
    found: bool = False  # what one looks for


@dataclass(frozen=True)
class Marks:
    """Squares of a sheet, bool [ranks × columns]: those that stand out, those at fault."""

    wrong: np.ndarray
    at_fault: np.ndarray


def draw(sheet: Sheet, names: list[int], title_id: str, prefix: str) -> Picture:
    """``names``: the world rank of each row of the sheet; ``prefix``: of the ids that this map's
    table has. In the column of the first divergence what stands out is ringed."""
    marks = Marks(sheet.wrong, sheet.at_fault)
    wrong = marks.wrong
    across = rows(sheet.columns, np.flatnonzero(wrong.any(axis=0)).tolist(), MOST_COLUMNS)
    worst_first = np.argsort(-wrong.sum(axis=1), kind="stable")
    down = rows(names, [int(i) for i in worst_first if wrong[i].any()])
    width = min(max(WIDTH / max(len(across), 1), 9.0), 38.0)
    height = min(max(520.0 / max(len(down), 1), 10.0), 26.0)
    bad = [y for y, row in enumerate(down) if row.alone and wrong[row.start].any()]
    content = [_axis(across, down, bad, width, height, _is_layers(sheet))]
    lines, links = _Lines(sheet, marks, names, prefix), 0
    for y, row in enumerate(down):
        for x, column in enumerate(across):
            if (cell := _square(sheet, marks, row, column)) is None:
                continue
            where = f"{_ranks(row)}, {_place(sheet, column)}"
            at = LEFT + x * width, TOP + y * height
            size = width - 1.5, height - 1.5
            mark = cell.mark if min(size) >= 11 or cell.found else ""
            if cell.found and column.start <= sheet.first < column.stop:
                cell = replace(cell, class_=cell.class_ + " earliest")
                where = f"first divergence: {where}"
            name = f"{where}: {cell.words}"
            if cell.found and links < MOST_LINKS:
                links += 1
                drawn = svg.square(*at, *size, cell.class_, "", mark)
                content.append(svg.link(lines.link(row, column), name, drawn))
            else:
                content.append(svg.square(*at, *size, cell.class_, name, mark))
    bottom = TOP + len(down) * height
    if sheet.golden is not None:
        content.append(_golden(sheet, across, bottom + 10, width, height))
        bottom += 10 + height
    total = LEFT + max(len(across) * width, 240) + 8, bottom + 8
    picture = svg.drawing(*total, "".join(content), title_id, role="group")
    table, ids = lines.table()
    note = ""
    if len(table) < lines.total:
        note = f"{len(table)} of {lines.total:,} squares, those that stand out first."
    return Picture(picture, lines.columns, table, note, ids)


def words_of(sheet: Sheet, marks: Marks, i: int, j: int) -> str:
    """What one square says, in words."""
    if sheet.replicas and sheet.value[i, j] >= 0:
        n = int(sheet.differs[i, j])
        if n:
            return f"differs from {n} replica" + "s" * (n > 1)
    state = int(sheet.state[i, j])
    if marks.at_fault[i, j]:
        said = "as a failed check says" if state & AT_FAULT else "or suspected: its check failed"
        return f"at fault, {said}"
    if state & MET:
        return "NaN or Inf, which came from before"
    if state & FAILED:
        if sheet.replicas and not marks.wrong[i, j]:
            return "equals the majority of its replicas, another one differs"
        return NOT_BLAMED
    if state & UNKNOWN:
        return "not established"
    if not state:
        return "nothing recorded"
    return "equals its replicas" if sheet.replicas and sheet.value[i, j] >= 0 else "all held"


def _square(sheet, marks: Marks, row: Row, column: Row) -> Square | None:
    part = np.s_[row.start : row.stop, column.start : column.stop]
    state = sheet.state[part]
    if not state.any():
        return None
    found = bool(marks.wrong[part].any())
    if row.alone and column.alone:
        i, j = row.start, column.start
        words = words_of(sheet, marks, i, j)
        if sheet.replicas and sheet.value[i, j] >= 0:
            words += f"; fingerprint {sheet.fingerprint[i, j]:016x}"
            if not found:
                return _value(int(sheet.value[i, j]), words)
    else:
        words = _many(sheet, marks, part, state)
        if sheet.replicas and not found:
            values = np.unique(sheet.value[part])
            if len(values) == 1 and values[0] >= 0 and column.alone:
                return _value(int(values[0]), words)
            return Square("many", words)
    if not found:
        return _verdict(state, words)
    if sheet.replicas and sheet.differs[part].any():
        return Square("wrong", words, "≠", True)
    if marks.at_fault[part].any():
        return Square("wrong", words, "✕", True)
    return Square("saw", words, "!", True)


def _value(value: int, words: str) -> Square:
    if value < N_COLOURS:
        return Square(f"v{value}", words, LETTERS[value])
    return Square("v-more", words)


def _verdict(state, words: str) -> Square:
    bits = int(np.bitwise_or.reduce(state, axis=None))
    if bits & (FAILED | MET):
        return Square("saw", words, "!")
    if bits & UNKNOWN:
        return Square("unknown", words, "?")
    return Square("held", words)


def _many(sheet, marks: Marks, part, state) -> str:
    differ = int((sheet.differs[part] > 0).sum()) if sheet.replicas else 0
    at_fault = int(marks.at_fault[part].sum())
    if differ or at_fault:
        said = f"{differ} of {state.size} differ from their replicas" if differ else ""
        fault = f"{at_fault} of {state.size} squares are at fault" if at_fault else ""
        return "; ".join(filter(None, (said, fault)))
    bits = int(np.bitwise_or.reduce(state, axis=None))
    if bits & (FAILED | MET):
        return "checks failed; these ranks are not blamed for it"
    if bits & UNKNOWN:
        return "some not established"
    if sheet.replicas:
        n = len(np.unique(sheet.value[part]))
        return "all equal" if n == 1 else "each equals its replicas; several sets of replicas"
    return "all held"


def _golden(sheet, across, y, width, height) -> str:
    drawn = [svg.text(LEFT - 8, y + height * 0.7, "whole tensor", "tick", "end")]
    for x, column in enumerate(across):
        bits = int(np.bitwise_or.reduce(sheet.golden[column.start : column.stop]))
        if not bits:
            continue
        if bits & (FAILED | MET):
            class_, words, mark = "saw", "differs from the expected fingerprint", "!"
        elif bits & UNKNOWN:
            class_, words, mark = "unknown", "not established", "?"
        else:
            class_, words, mark = "held", "equals the expected fingerprint", ""
        name = f"whole tensor, {_place(sheet, column)}: {words}"
        mark = mark if width >= 12 else ""
        drawn.append(
            svg.square(LEFT + x * width, y, width - 1.5, height - 1.5, class_, name, mark)
        )
    return "".join(drawn)


def _axis(across, down, bad, width, height, layers: bool) -> str:
    drawn = [svg.text(LEFT, 13, "layer" if layers else "tensor", "axis")]
    every = max(1, round(34 / width)) if layers else 1
    for x, column in enumerate(across):
        label = column.label if layers else str(x + 1)
        if x % every == 0 or not column.label.isdigit():
            drawn.append(
                svg.text(LEFT + (x + 0.5) * width, TOP - 6, label, "tick", "middle")
            )
    drawn.append(svg.text(LEFT - 8, TOP - 6, "rank", "axis", "end"))
    for y in labelled(down, height, bad):
        at = TOP + y * height + height / 2 + 4
        class_ = "tick bad" if y in bad else "tick"
        drawn.append(svg.text(LEFT - 8, at, down[y].label, class_, "end"))
    return "".join(drawn)


def _is_layers(sheet) -> bool:
    return all(name.isdigit() or name in ("before", "after", "no layer") for name in sheet.columns)


def _ranks(row: Row) -> str:
    return f"rank {row.label}" if row.alone else f"ranks {row.label}"


def _place(sheet, column: Row) -> str:
    if not _is_layers(sheet):
        return f"{column.label}, {sheet.tensor}"
    named = {"before": "before the layers", "after": "after the layers"}
    if not column.alone:
        return f"layers {column.label}, {sheet.tensor}"
    label = column.label if not column.label.isdigit() else f"layer {column.label}"
    return f"{named.get(column.label, label)}, {sheet.tensor}"


class _Lines:
    """The map's table: squares that stand out, then the others, as many as are bearable."""

    def __init__(self, sheet: Sheet, marks: Marks, names, prefix: str):
        self.sheet, self.marks, self.names, self.prefix = sheet, marks, names, prefix
        self.total = int((sheet.state > 0).sum())
        self.columns = ("rank", "layer" if _is_layers(sheet) else "tensor", "says")
        if sheet.replicas:
            self.columns = (*self.columns[:2], "fingerprint", "says")

    def link(self, row: Row, column: Row) -> str:
        """To the line of a square, or of the first that is at fault of a range."""
        i, j = row.start, column.start
        if not (row.alone and column.alone):
            part = self.marks.wrong[row.start : row.stop, column.start : column.stop]
            di, dj = np.argwhere(part)[0]
            i, j = i + di, j + dj
        return f"#{self.prefix}-{self.names[i]}-{j}"

    def table(self) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
        sheet, marks = self.sheet, self.marks
        there = np.argwhere(sheet.state > 0)
        urgency = np.where(marks.wrong, 0, np.where(sheet.state & (FAILED | MET | UNKNOWN), 1, 2))
        order = np.argsort(urgency[there[:, 0], there[:, 1]], kind="stable")[:MOST_LINES]
        lines, ids = [], []
        for i, j in there[order]:
            line = (str(self.names[i]), sheet.columns[j])
            if sheet.replicas:
                known = sheet.value[i, j] >= 0
                line += (f"{sheet.fingerprint[i, j]:016x}" if known else "",)
            lines.append((*line, words_of(sheet, marks, i, j)))
            ids.append(f"{self.prefix}-{self.names[i]}-{j}")
        return tuple(lines), tuple(ids)
