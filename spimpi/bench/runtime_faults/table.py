"""What a campaign found, as a file and as the tables of docs/what-pass-means.md.

The file has a line a fault, mode and kind of run (with a golden run or without): how many trials
struck, in how many text or logits then differed, how many were seen, how many were seen in the right
place and with the right or a wrong rank.
"""

import csv
from collections import defaultdict
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from spimpi.bench.matrix import markdown
from spimpi.bench.runtime_faults.faults import FAULTS
from spimpi.bench.runtime_faults.trial import LOGITS, TEXT
from spimpi.whole_file import whole_csv

BY_NAME = {fault.name: fault for fault in FAULTS}
WITH, WITHOUT = "golden run", "no golden run"
SUMMARY, UNSEEN = "by kind", "unseen"
BLAS = "BLAS arithmetic, in which no product is checked"


def reason(fault: str, mode: str) -> str:
    """Why a fault may go unseen in a mode where there is no golden run, or ""."""
    return BLAS if "blas" in mode else BY_NAME[fault].why


@dataclass
class Line:
    """Trials of one fault in one mode, added up."""

    fault: str
    mode: str
    run: str
    tried: int = 0
    struck: int = 0
    text: int = 0
    logits: int = 0
    seen: int = 0
    unseen_text: int = 0
    unseen_logits: int = 0
    place: int = 0
    rank_right: int = 0
    rank_wrong: int = 0

    def add(self, row) -> None:
        """Take a trial's row."""
        self.tried += 1
        if not row.struck:
            return
        self.struck += 1
        self.text += row.differs == TEXT
        self.logits += row.differs == LOGITS
        self.unseen_text += row.unseen and row.differs == TEXT
        self.unseen_logits += row.unseen and row.differs == LOGITS
        if row.status:
            self.seen += 1
            self.place += row.place
            self.rank_right += row.rank == "right"
            self.rank_wrong += row.rank == "wrong"


def lines_of(rows) -> list[Line]:
    """Rows of trials, added up by fault, mode and kind of run."""
    lines = {}
    for row in rows:
        key = row.fault, row.mode, WITH if row.golden else WITHOUT
        lines.setdefault(key, Line(*key)).add(row)
    return list(lines.values())


def write(path, lines) -> None:
    """The lines, as CSV."""
    with whole_csv(path) as out:
        out.writerow([f.name for f in fields(Line)])
        out.writerows(astuple(line) for line in lines)


def read(path) -> list[Line]:
    """What ``write`` wrote."""
    with Path(path).open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Line(*row[:3], *map(int, row[3:])) for row in rows]


def tables(lines) -> dict[str, str]:
    """{title: Markdown}: by kind of fault; what went unseen, and why."""
    return {SUMMARY: _by_kind(lines), UNSEEN: _unseen(lines)}


def _by_kind(lines) -> str:
    """Faults that change what is computed; those of a check's own words are one line."""
    head = ["fault", "places", "struck", "text differed", "logits differed", "seen", "right place",
            "right rank", "wrong rank", "unseen, golden run", "unseen, none"]  # fmt: skip
    kinds = defaultdict(list)
    exact = [line for line in lines if reason(line.fault, line.mode) != BLAS]
    blas = [line for line in lines if reason(line.fault, line.mode) == BLAS]
    for line in exact:
        fault = BY_NAME[line.fault]
        kinds["a check's own words, records, events" if fault.harmless else fault.kind].append(line)
    body = [_row(kind, of_kind) for kind, of_kind in kinds.items()]
    more = [_row(f"{BLAS}: all kinds", blas)] if blas else []
    return markdown(head, [*body, _row("**all**, exact arithmetic", exact), *more])


def _row(title, lines) -> list[str]:
    def total(name, kind=None):
        return sum(getattr(line, name) for line in lines if kind in (None, line.run))

    def unseen(kind):
        return total("unseen_text", kind) + total("unseen_logits", kind)

    names = {line.fault for line in lines if line.struck}
    counts = [total(n) for n in ("struck", "text", "logits", "seen", "place", "rank_right",
                                 "rank_wrong")]  # fmt: skip
    return [title, *(f"{n:,}" for n in (len(names), *counts, unseen(WITH), unseen(WITHOUT)))]


def _unseen(lines) -> str:
    """Each fault that went unseen in exact arithmetic although text or logits differed."""
    found = defaultdict(list)
    for line in lines:
        exact = reason(line.fault, line.mode) != BLAS
        if exact and (line.unseen_text or line.unseen_logits):
            found[line.fault, line.run].append(line)
    body = []
    for (name, kind), several in sorted(found.items()):
        fault = BY_NAME[name]
        text = sum(line.unseen_text for line in several)
        logits = sum(line.unseen_logits for line in several)
        of = sum(line.struck for line in several)
        body.append([
            fault.kind, name, kind, f"{text + logits} of {of}, {text} with other text",
            _in_words([line.mode for line in several]), fault.why or "**not expected**",
        ])  # fmt: skip
    head = ["kind", "fault", "run", "unseen", "in", "why"]
    return markdown(head, body)


def _in_words(modes) -> str:
    return ", ".join(modes) if len(modes) <= 3 else f"{len(modes)} modes"
