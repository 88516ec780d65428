"""Standard error that cannot steer a terminal, whatever a message or a traceback holds."""

import sys
from contextlib import contextmanager

from spimpi.printable import printable

KEPT = "\n\t"


class PrintableStream:
    """A text stream; what is written to it is made printable, line by line."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text, KEPT))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextmanager
def printable_errors():
    """Standard error inside is printable."""
    before = sys.stderr
    sys.stderr = PrintableStream(before)
    try:
        yield
    finally:
        sys.stderr = before
