"""Runs to report on, and reading a report as its reader does: tables, links, titles, by the
standard library's parser."""

import re
from html.parser import HTMLParser

import numpy as np
from trace_samples import TENSORS, write_alone_trace

from spimpi.cli import main
from spimpi.trace.schema import Op, Stage, Status, blank_events


class Page(HTMLParser):
    """``tables`` by the heading before them (lists of rows, the first the columns); ``titles`` of
    squares; ``links`` {name: href} of what the keyboard reaches; ``text``; ``elements``."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tables: dict[str, list[list[str]]] = {}
        self.titles: list[str] = []
        self.links: dict[str, str] = {}
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self._open: list[str] = []
        self._heading = self._cell = ""
        self.feed(self.source)

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.elements.append((name, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if name in ("meta", "link", "br"):
            return
        self._open.append(name)
        if name in ("h1", "h2", "h3"):
            self._heading = ""
        elif name == "table":
            self.tables[self._heading.strip()] = []
        elif name == "tr":
            self.tables[self._heading.strip()].append([])
        elif name in ("td", "th", "title"):
            self._cell = ""
        elif name == "a" and attributes.get("class") == "found":
            self.links[attributes["aria-label"]] = attributes["href"]

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self._open.pop() == name, f"</{name}> closes another element"
        if name in ("td", "th"):
            self.tables[self._heading.strip()][-1].append(self._cell.strip())
        elif name == "title" and "svg" in self._open:
            self.titles.append(self._cell)

    def handle_data(self, data):
        inside = self._open
        if "style" in inside:
            return
        if {"td", "th", "title"} & set(inside):
            self._cell += data
        if inside and inside[-1] in ("h1", "h2", "h3"):
            self._heading += data
        if "svg" not in inside:
            self.text += data

    def records(self, heading: str) -> list[dict[str, str]]:
        """The rows of the table under ``heading``, by column."""
        columns, *rows = self.tables[heading]
        return [dict(zip(columns, row, strict=True)) for row in rows]


def title_of(page) -> str:
    return re.search(r"<title>(.*?)</title>", page.source)[1]


def sections_of(page) -> list[str]:
    """The runs that have a section, in the page's order."""
    return re.findall(r'<section id="run\d+".*?class="of">(.*?)<', page.source, re.S)


HIDDEN = [tensor.name for tensor in TENSORS].index("hidden")
REPLICAS = "Rank × layer: hidden, fingerprints of its replicas"
VERDICTS = "Rank × layer: all checks, verdicts"
LAYERS = 6


def decoder(fingerprints, n_steps=3, expected=None) -> np.ndarray:
    """A rank's checks: of each layer a matmul and the agreement of the replicas of "hidden".

    ``fingerprints`` [steps × layers]; ``expected``: what the replicas agreed on.
    """
    events = blank_events(n_steps * LAYERS * 2)
    grid = events.reshape(n_steps, LAYERS, 2)
    grid["step"] = np.arange(n_steps)[:, None, None]
    grid["layer"] = np.arange(LAYERS)[None, :, None]
    grid["tensor"], grid["bytes"] = HIDDEN, 1000
    grid["op"], grid["stage"] = [Op.MATMUL, Op.AGREEMENT], [Stage.COMPUTE, Stage.TENSOR]
    grid["fingerprint"] = grid["expected"] = np.asarray(fingerprints, np.uint64)[:, :, None]
    events["t_start"] = np.arange(len(events)) * 0.01
    events["t_end"] = events["t_start"] + 0.004
    if expected is not None:
        grid["expected"][:, :, 1] = expected
        grid["verdict"][:, :, 1][grid["fingerprint"][:, :, 1] != expected] = Status.FAILED
    return events


def replicas(n_ranks, odd_rank=None, step=1, layer=4, seed=0) -> list[np.ndarray]:
    """Ranks that agree, but for ``odd_rank`` at one step and layer."""
    rng = np.random.default_rng(seed)
    common = rng.integers(1, 2**63, (3, LAYERS), dtype=np.uint64)
    own = np.repeat(common[None], n_ranks, axis=0)
    if odd_rank is not None:
        own[odd_rank, step, layer] ^= np.uint64(0xFF)
    merged = np.bitwise_and.reduce(own, axis=0)
    ranks = [decoder(each, expected=merged) for each in own]
    bad = own != own[:1] if odd_rank is not None else None
    for rank, events in enumerate(ranks if bad is not None else ()):
        # As verify does: every rank's check fails where one differs, and names it.
        failed = (events["op"] == Op.AGREEMENT) & (events["step"] == step)
        failed &= events["layer"] == layer
        events["verdict"][failed], events["peer"][failed] = Status.FAILED, odd_rank
    return ranks


def report(*args) -> int:
    return main(["trace", "report", *map(str, args)])


def page_of(tmp_path, ranks, status=0, **attributes) -> Page:
    (tmp_path / "run.h5").unlink(missing_ok=True)
    write_alone_trace(tmp_path / "run.h5", ranks, **attributes)
    assert report(tmp_path / "run.h5", "-o", tmp_path / "run.html", "--overwrite") == status
    return Page(tmp_path / "run.html")


def golden(flip=None) -> np.ndarray:
    """Fingerprints of whole tensors, [3 steps × LAYERS]; the one at ``flip`` another."""
    events = blank_events(3 * LAYERS)
    events["step"], events["layer"] = np.divmod(np.arange(len(events)), LAYERS)
    events["tensor"], events["op"], events["stage"] = HIDDEN, Op.CONTENT, Stage.GOLDEN
    events["fingerprint"] = events["expected"] = np.arange(len(events)) + 1
    if flip is not None:
        events["fingerprint"][flip] ^= np.uint64(1 << 40)
    return events
