"""Standard output and error that never raise; what standard output lost is told at the end.

A full disk, or a reader that left, must neither take a verdict away nor a rank out of the middle of
a collective run.
"""

import os
import signal
import sys

from spimpi.errors import UsageError
from spimpi.launch import speaks
from spimpi.printable import one_line


class UnfailingStream:
    """A text stream; the first OSError is kept as ``error``, and nothing is written after it."""

    def __init__(self, stream):
        self._stream, self.error = stream, None

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call, *args) -> None:
        if self.error is not None:
            return
        try:
            call(*args)
        except OSError as error:
            self.error = error
            with open(os.devnull, "wb") as nothing:  # what is still buffered would fail at the end
                os.dup2(nothing.fileno(), self._stream.fileno())

    def __getattr__(self, name):
        return getattr(self._stream, name)


def never_raise() -> None:
    """Standard output and error do not, from here on, also where they are closed."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # The lowest number that is free is the closed one's, which no file of the run may get.
            # Read only: every write fails, as it would on what is closed.
            stream = open(os.open(os.devnull, os.O_RDONLY), "w")
        if name != "stdin":
            setattr(sys, name, UnfailingStream(stream))


def status_of_output(status: int) -> int:
    """``status``, unless it is 0 and standard output could not be written, which is said."""
    sys.stdout.flush()
    sys.stderr.flush()
    error = getattr(sys.stdout, "error", None)
    if error is None:
        return status
    if isinstance(error, BrokenPipeError):  # whoever read it has seen enough
        return status or 128 + signal.SIGPIPE
    if speaks():
        said = f"spimpi: cannot write standard output: {error.strerror or error}"
        print(one_line(said), file=sys.stderr, flush=True)
    return status or UsageError.exit_status
