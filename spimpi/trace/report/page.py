"""The page: facts and pictures in the template."""

from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from spimpi import __version__
from spimpi.errors import MissingDependency
from spimpi.printable import printable
from spimpi.trace.analysis.rounding import JUMP
from spimpi.trace.report import growth, places, rank_map, ranking, timeline, volume, words
from spimpi.trace.report.facts import Run
from spimpi.trace.report.squares import FAILED
from spimpi.trace.report.svg import Picture
from spimpi.units import in_bytes

MOST_PICTURED = 8  # runs; the others are in the table alone
MOST_MAPS = 5  # of a run alone; fewer where there are more
MOST_LISTED = 20  # problems, roots
HEADER = ("run_id", "command", "model", "topology", "arithmetic", "seed", "injected")


@dataclass(frozen=True)
class Figure:
    """A picture under its heading. ``legend``: which key to print with it."""

    id: str
    title: str
    caption: str
    picture: Picture
    legend: str = ""
    open: bool = True


def render(runs: list[Run], differences: list) -> str:
    """The page's HTML. ``differences``: of the first run and each other, or the reason why they
    could not be compared. Runs come worst first, whatever their order in the call."""
    found = [None, *differences]
    order = sorted(range(len(runs)), key=lambda i: ranking.place(runs[i], found[i]))
    pictured = order[:MOST_PICTURED]
    page = _template().render(
        total=ranking.overall(runs, differences, order[0]), first=runs[0],
        views=[_view(i, runs[i], len(runs)) for i in pictured],
        compared=[_compared(i, runs[0], runs[i], found[i]) for i in pictured if i],
        runs=[_line(i, runs[i], found[i], i in pictured) for i in order],
        left_out=len(runs) - len(pictured), version=__version__, style=_file("style.css"),
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"


def _file(name: str) -> str:
    return files("spimpi.trace.report").joinpath("templates", name).read_text("utf-8")


def require_jinja2() -> None:
    """MissingDependency without it, before anything is read."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        msg = "a report needs jinja2, which is not installed: pip install 'spimpi[report]'"
        raise MissingDependency(msg) from None


def _template():
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def shown(value):
        """As svg.escape; a picture is markup already."""
        is_text = isinstance(value, str) and not isinstance(value, Markup)
        return printable(value) if is_text else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=shown,
    )
    return environment.from_string(_file("report.html.j2"))


def _view(number: int, run: Run, n_runs: int) -> dict:
    id = f"run{number + 1}"
    word, class_, mark = words.VERDICTS[run.located.verdict]
    return {
        "id": id,
        "name": run.path.name,
        "path": str(run.path),
        "origin": words.origin(run),
        "word": word,
        "class_": class_,
        "mark": mark,
        "sentence": words.verdict(run),
        "first": _first(run),
        "roots": _roots(run),
        "damage": run.damage[:MOST_LISTED],
        "missing": run.missing[:MOST_LISTED],
        "more_problems": max(len(run.damage) - MOST_LISTED, 0)
        + max(len(run.missing) - MOST_LISTED, 0),
        "facts": _facts(run),
        "stages": [
            (t.name, f"{t.checks:,}", f"{t.failed:,}", f"{t.unknown:,}", in_bytes(t.bytes))
            for t in run.stages
        ],
        "figures": _figures(id, run, n_runs),
    }


def _first(run: Run) -> dict | None:
    """The first divergence in words."""
    if run.first is None:
        return None
    failure = run.first
    root = run.located.roots[0] if run.located.roots else None
    notes = []
    if failure.element >= 0:
        notes.append(f"element {failure.element}")
    if failure.nonfinite:
        notes.append(f"{failure.nonfinite:,} NaN or Inf")
    return {
        "place": words.place(failure),
        "wrong": words.wrong(failure),
        "culprit": words.culprit(root) if root else f"rank {failure.rank} recorded it",
        "values": _values(run),
        "notes": ", ".join(notes),
        "rest": words.consequences(run.located),
    }


def _values(run: Run) -> list[tuple[str, str]]:
    """(what, fingerprint): those of replicas that differ; else what was expected and found."""
    failure = run.first
    sheet = run.sheets[0] if run.sheets else None
    if failure.op == "agreement" and sheet and sheet.tensor == failure.tensor and sheet.replicas:
        name = str(failure.layer)
        column = sheet.columns.index(name) if name in sheet.columns else -1
        odd = [i for i in range(len(run.ranks)) if column >= 0 and sheet.differs[i, column]]
        if odd:
            said = [(i, f"rank {run.ranks[i].rank} has") for i in odd[:4]]
            rest = (sheet.state[:, column] & FAILED > 0) & (sheet.differs[:, column] == 0)
            n = int(sheet.differs[odd[0], column])
            said += [(int(i), f"{n} replicas have") for i in np.flatnonzero(rest)[:1]]
            return [(words, f"{sheet.fingerprint[i, column]:016x}") for i, words in said]
    said = [("expected", failure.expected), (f"found by rank {failure.rank}", failure.found)]
    return [(words, found) for words, found in said if found]  # sums of floats have none


def _roots(run: Run) -> list[tuple[str, ...]]:
    """What went wrong independently; none where there is only the first."""
    roots = run.located.roots[:MOST_LISTED]
    if len(roots) < 2:
        return []
    return [
        (words.place(r.failure), words.wrong(r.failure), words.culprit(r), f"{r.seen:,}",
         f"{r.reached.failures:,}")
        for r in roots
    ]  # fmt: skip


def _facts(run: Run) -> list[tuple[str, str]]:
    lines = [("trace", f"{run.path} ({run.driver})")]
    if run.started:
        lines.append(("started", run.started))
    hosts = f"{len(run.hosts):,} host(s): {words.few(run.hosts)}"
    lines.append(("ranks", f"{len(run.ranks):,} on {hosts}"))
    for name in HEADER:
        value = run.attributes.get(name)
        if value not in (None, "", [], {}):
            value = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append((name.replace("_id", ""), value[:2000]))
    lines.append(("time", f"{run.seconds:.3g} s from the first check to the end of the last"))
    return lines


def _figures(id: str, run: Run, n_runs: int) -> list[Figure]:
    figures = []
    names = [info.rank for info in run.ranks]
    most = MOST_MAPS if n_runs == 1 else 2
    for i, sheet in enumerate(run.sheets[:most]):
        own = f"{id}-map{i + 1}"
        kind = "fingerprints of its replicas" if sheet.replicas else "verdicts"
        where = run.place.words
        caption = (
            f"{sheet.tensor} in {where}. Within a column, equal colours and letters are equal bits."
            if sheet.replicas
            else f"What was checked of {_what(sheet)} in {where}, on each rank."
        ) + _not_here(run, sheet)
        figures.append(
            Figure(
                own, f"Rank × layer: {sheet.tensor}, {kind}", caption,
                rank_map.draw(sheet, names, f"{own}-title", own),
                ("replicas" if sheet.replicas else "verdicts")
                + (" whole" if sheet.golden is not None else ""), open=i < 2,
            )
        )  # fmt: skip
    if run.spans:
        own = f"{id}-time"
        if run.tells_checking:
            caption = "Each rank's steps, and in each the time spent checking: the run's, by bytes."
        else:
            caption = "Each rank's steps, and in each the time that its checks span."
            if "model" in run.attributes:
                caption += " Those of a layer span its computation too."
        if run.timeless:
            caption += f" {run.timeless:,} checks whose times can be of no run are left out."
        title, told = f"{own}-title", run.tells_checking
        picture = timeline.draw(run.spans, run.time_rows, run.at_fault, title, told)
        kind = "time checking" if told else "time"
        figures.append(Figure(own, "Time", caption, picture, kind))
    if run.ops:
        own = f"{id}-bytes"
        caption = "By what was checked, over all ranks."
        figures.append(
            Figure(own, "Bytes checked", caption, volume.draw(run.ops, f"{own}-title"))
        )
    own = f"{id}-topology"
    if (picture := places.draw(run, f"{own}-title")) is not None:
        caption = f"{run.attributes.get('topology')}. Tensor ranks from left to right."
        if run.attributes.get("exo_rule"):
            caption = f"A ring by the rule {run.attributes['exo_rule']}; arrows are hand-offs."
        figures.append(Figure(own, "Topology", caption, picture, "topology"))
    return figures


def _what(sheet) -> str:
    return "all tensors" if sheet.tensor == "all checks" else sheet.tensor


def _not_here(run: Run, sheet) -> str:
    """That replicas agreed where the run first went wrong, so that the map does not show it."""
    if not sheet.replicas or sheet.first < 0 or sheet.shows_first:
        return ""
    first = f"the first divergence ({run.first.op})"
    return f" In layer {sheet.columns[sheet.first]} they agreed: {first} is not in this map."


def _compared(number: int, first: Run, run: Run, found) -> dict:
    id = f"growth{number}"
    title = f"{first.path.name} and {run.path.name}"
    if isinstance(found, str):
        return {"id": id, "title": title, "words": found, "figure": None, "notes": []}
    figure = Figure(
        id, f"Growth of the difference: {title}",
        "Tensors in program order. The strip says which fingerprints are equal"
        + (
            "; above it, by how much the others differ, as sketches estimate it."
            if np.isfinite(found.table["relative"]).any()
            else ". Runs with sketches (spimpi verify --sketch) also show by how much they differ."
        ),
        growth.draw(found, f"{id}-title"), "growth",
    )  # fmt: skip
    if not len(found.table):
        figure = None
    said = [*found.missing, *found.notes, *found.remarks]
    return {
        "id": id, "title": title, "words": _difference(found), "figure": figure,
        "notes": said[:MOST_LISTED],
    }  # fmt: skip


def _difference(found) -> str:
    """The first difference of two runs in words."""
    if found.first < 0:
        n = len(found.table)
        if found.missing or found.notes:
            return f"Incomplete: no difference in the {n:,} tensors that could be compared."
        return f"No difference in the {n:,} tensors that both have." if n else "Nothing in common."
    row = found.table[found.first]
    where = growth.place(row, found.names)
    kind = str(found.judgement)
    kind = "" if kind == "different" else f": {kind}"
    n, most = f"{found.n_differ:,}", f"{len(found.table):,}"
    said = f"First difference: {where}{kind}. {n} of {most} tensors differ."
    if found.jump >= 0:
        jump = found.table[found.jump]
        said += (
            f" A jump at {growth.place(jump, found.names)}: relative {jump['relative']:.1g}, over "
            f"{JUMP:.0f} times all before it, is evidence of corruption."
        )
    return said


def _line(number: int, run: Run, found, pictured: bool) -> dict:
    """A run in the table that compares them."""
    word, class_, mark = words.VERDICTS[run.located.verdict]
    said = "" if found is None else found if isinstance(found, str) else _difference(found)
    return {
        "id": f"run{number + 1}" if pictured else "", "host": words.few(run.hosts),
        "started": run.started, "name": run.path.name, "word": word, "class_": class_, "mark": mark,
        "topology": str(run.attributes.get("topology", "")), "ranks": f"{len(run.ranks):,}",
        "checks": f"{run.located.n_checks:,}", "failed": f"{run.located.n_failed:,}",
        "seconds": f"{run.seconds:.3g} s",
        "first": words.place(run.first) if run.first else "",
        "difference": said or "(the first run)",
    }  # fmt: skip
