"""Whether a trace is intact, incomplete or damaged: all of it is read once."""

from dataclasses import dataclass
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.reading.base import DamageError
from spimpi.trace.reading.reader import open as open_trace
from spimpi.trace.reading.sealed import SealedTrace
from spimpi.trace.sealing.leftovers import parts_folder

EXIT_STATUS = {"intact": 0, "damaged": 3, "incomplete": 3}  # 1 is of corruption that a run found


@dataclass(frozen=True)
class Condition:
    """What a check of a trace found; ``ranks`` and ``events``: how many are there and intact."""

    file: str
    driver: str
    missing: list[str]
    damage: list[str]
    ranks: int = 0
    events: int = 0

    @property
    def state(self) -> str:
        if self.damage:
            return "damaged"
        return "incomplete" if self.missing else "intact"

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.state]


def check(path) -> Condition:
    """Read a whole trace, one rank at a time. UsageError where it is none, or still written."""
    try:
        trace = open_trace(path)
    except DamageError as error:
        return Condition(str(path), "", [], [str(error)])
    with trace:
        refuse_running(trace)
        intact = [info for info, _ in trace.intact_events()]
        if isinstance(trace, SealedTrace):
            trace.check_columns(intact)
        trace.check_sketches()
        n = sum(info.count for info in intact)
        return Condition(
            str(trace.path), trace.driver, trace.missing, trace.damage, len(intact), n
        )


def refuse_running(trace) -> None:
    """UsageError where the journals of ``trace`` are still written to."""
    if getattr(trace, "running", False):
        msg = (
            f"the trace {trace.path} is still being written by a running job; "
            f"spimpi trace show --live {trace.path} shows what was flushed so far"
        )
        raise UsageError(msg)


def refuse_to_replace(trace, output) -> None:
    """UsageError where ``output`` is a file of ``trace``, or of the journals that recover it."""
    output = Path(output).resolve()
    folders = [parts_folder(trace.path).resolve(), journal_folder(trace.path).resolve()]
    path = Path(trace.path)
    is_trace = output == path.resolve()
    is_trace |= path.exists() and output.exists() and output.samefile(path)  # another hard link
    if is_trace or any(folder in output.parents for folder in folders):
        msg = f"cannot write {output}: it is of the trace {trace.path}; name another file (-o)"
        raise UsageError(msg)
