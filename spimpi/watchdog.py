"""Ends a job that makes no progress, saying which rank waits in which check.

A thread a rank looks at how long ago the last check was made. It calls nothing collective.
"""

import sys
import threading
import time

EXIT_STATUS = 3
GRACE = 2.0  # seconds for every rank to say where it is before the first one ends the job


class Watchdog:
    """Watches one rank; ``at`` and ``progress`` say where it is. Use as a context manager."""

    def __init__(self, timeout: float, rank: int, host: str, describe, abort):
        self.timeout, self.rank, self.host = timeout, rank, host
        self.describe, self.abort = describe, abort
        self.last = time.monotonic()
        self.place = "start-up"
        self._event = None
        self._stop = threading.Event()

    def at(self, place: str) -> None:
        """A new stage or wait begins."""
        self.place, self._event, self.last = place, None, time.monotonic()

    def progress(self, event) -> None:
        """A check was made."""
        self._event, self.last = event, time.monotonic()

    def where(self) -> str:
        after = f", after {self.describe(self._event)}" if self._event is not None else ""
        return f"{self.place}{after}"

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
            if idle < self.timeout:
                continue
            print(
                f"spimpi: no progress for {idle:.0f} s: rank {self.rank} ({self.host}) waits in "
                f"{self.where()}",
                file=sys.stderr,
                flush=True,
            )
            if not self._stop.wait(GRACE):
                self.abort(EXIT_STATUS)
            return
