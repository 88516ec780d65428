"""Ends a job that makes no progress, saying which rank waits in which check.

A thread a rank looks at how long ago the last check was made. It calls nothing collective.
"""

import sys
import threading
import time
from contextlib import suppress

EXIT_STATUS = 3
GRACE = 2.0  # seconds for every rank to say where it is before the first one ends the job


class Watchdog:
    """Watches one rank; ``at`` and ``progress`` say where it is. Use as a context manager.

    ``before_abort`` is called, on the watchdog's thread, before it ends the job.
    """

    def __init__(self, timeout: float, rank: int, host: str, abort):
        self.timeout, self.rank, self.host, self.abort = timeout, rank, host, abort
        self.last, self.limit = time.monotonic(), timeout
        self.place = "start-up"
        self.before_abort = lambda: None
        self._inside = None
        self._stop = threading.Event()

    def at(self, place: str, patience: float = 0.0) -> None:
        """A new stage begins, which may take ``patience`` seconds without a sign of life."""
        self.place, self._inside, self.last = place, None, time.monotonic()
        self.limit = max(self.timeout, patience)

    def enter(self, what: str, tensor: str, step: int, layer: int) -> None:
        """A part of a stage begins, with what its check will be. On the decoding path: cheap."""
        self._inside = (what, tensor, step, layer)
        self.last = time.monotonic()

    def where(self) -> str:
        """The stage and the check, in words."""
        if self._inside is None:
            return self.place
        what, tensor, step, layer = self._inside
        at_layer = f", layer {layer}" if layer >= 0 else ""
        return f"{self.place}: {what} of {tensor}, step {step}{at_layer}"

    def __enter__(self):
        if self.timeout > 0:
            threading.Thread(target=self._watch, daemon=True, name="spimpi-watchdog").start()
        return self

    def __exit__(self, *_):
        self._stop.set()

    def _watch(self):
        period = min(1.0, self.timeout / 4)
        while not self._stop.wait(period):
            idle = time.monotonic() - self.last
            if idle < self.limit:
                continue
            print(
                f"spimpi: no progress for {idle:.0f} s: rank {self.rank} ({self.host}) waits in "
                f"{self.where()}\n",
                end="",  # in one piece: other ranks write there too
                file=sys.stderr,
                flush=True,
            )
            if not self._stop.wait(GRACE):
                with suppress(Exception):
                    self.before_abort()
                self.abort(EXIT_STATUS)
            return


class Unwatched:
    """Stands where no watchdog is."""

    def at(self, place: str, patience: float = 0.0) -> None:
        pass

    def enter(self, what: str, tensor: str, step: int, layer: int) -> None:
        pass
