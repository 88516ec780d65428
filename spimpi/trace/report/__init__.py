"""``spimpi trace report``: runs as one HTML page that needs nothing else (docs/trace-report.md)."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from spimpi.errors import SpimpiError
from spimpi.trace.analysis.diff import diff
from spimpi.trace.reading.check import refuse_running, refuse_to_replace
from spimpi.trace.reading.reader import open as open_trace
from spimpi.trace.report import page
from spimpi.trace.report.facts import Run, gather
from spimpi.whole_file import check_can_write, whole_file


@dataclass(frozen=True)
class Report:
    """What was written where. ``differences``: of the first run and each other one, or why they
    could not be compared."""

    output: Path
    runs: tuple[Run, ...]
    differences: tuple

    @property
    def exit_status(self) -> int:
        """1 where a failure or a difference was found, 3 where something is missing, else 0."""
        found = [run.located.exit_status for run in self.runs]
        found += [3 if isinstance(d, str) else d.exit_status for d in self.differences]
        return 1 if 1 in found else max(found)


def report(paths, output, overwrite: bool = False) -> Report:
    """Write one HTML page about the traces ``paths`` to ``output``. Local, needs no MPI.

    UsageError where one is not a trace, is still written, or ``output`` exists (unless
    ``overwrite``), is of one of them or cannot be written; MissingDependency without jinja2.
    """
    output = Path(output)
    check_can_write(output, overwrite)
    page.require_jinja2()
    with ExitStack() as opened:
        traces = [opened.enter_context(open_trace(path)) for path in paths]
        for trace in traces:
            refuse_running(trace)
            refuse_to_replace(trace, output)
        runs = [gather(trace) for trace in traces]
        differences = [_difference(traces[0], other) for other in traces[1:]]
    html = page.render(runs, differences)
    with whole_file(output, overwrite) as file:
        file.write(html.encode("utf-8", "replace"))
    return Report(output, tuple(runs), tuple(differences))


def _difference(first, other):
    try:
        return diff(first, other)
    except SpimpiError as error:
        return str(error)
