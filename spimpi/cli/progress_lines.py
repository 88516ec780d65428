"""Where a long run is, for a log: a line every 10 s on standard error, from a thread."""

import sys
import threading
import time

PERIOD = 10.0  # seconds


class ProgressLines:
    """Says ``place`` every PERIOD seconds until ``stop``, also while a stage takes long."""

    def __init__(self):
        self.place = "starting"
        self._start = time.monotonic()
        self._stop = threading.Event()
        threading.Thread(target=self._speak, daemon=True, name="spimpi-progress").start()

    def stop(self) -> None:
        self._stop.set()

    def _speak(self) -> None:
        while not self._stop.wait(PERIOD):
            seconds = time.monotonic() - self._start
            print(f"spimpi: {seconds:.0f} s: {self.place}", file=sys.stderr, flush=True)
