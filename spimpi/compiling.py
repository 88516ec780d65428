"""What is said while kernels are compiled: once a process, by rank 0, on standard error."""

import os
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError

from spimpi.kernel_cache import count, usable_folder
from spimpi.launch import speaks
from spimpi.printable import one_line

PERIOD = 10.0  # seconds between two lines of progress
LONG = "some 15 to 60 s"
ADVICE = "set SPIMPI_CACHE_DIR to a folder that you alone can write"


class _Told:
    """What this process has said."""

    def __init__(self):
        self.began = self.last = None  # when compiling was announced, when anything was said of it
        self.kernels = 0
        self.not_kept = False


_told = _Told()


def announce_cold_start() -> None:
    """Say that kernels will be compiled, where none are kept. Quick: before numba is imported."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":  # spimpi/jit.py refuses it
        return
    with suppress(PackageNotFoundError):  # of numba: whoever imports it says so
        folder, _ = usable_folder()
        if _told.began is None and not count(folder):
            _announce()


def compile_begins(name: str) -> None:
    """A kernel was not to be had and is compiled now."""
    if _told.began is None:
        _announce()
    now = time.monotonic()
    if now - _told.last >= PERIOD:
        _told.last = now
        _say(f"compiling kernels: {_told.kernels} done in {now - _told.began:.0f} s, now {name}")
    _told.kernels += 1


def say_not_kept(why: str) -> None:
    """A compiled kernel could not be written down."""
    if not _told.not_kept:
        _told.not_kept = True
        _say(f"compiled kernels are not kept ({why}), so that every start compiles them; {ADVICE}")


def _announce() -> None:
    _told.began = _told.last = time.monotonic()
    folder, problem = usable_folder()
    if problem:
        _told.not_kept = True
        _say(f"compiling kernels, {LONG}, at every start: none are kept, {problem}; {ADVICE}")
    else:
        which = "which this machine has not yet" if count(folder) else f"once a machine, {LONG}"
        _say(f"compiling kernels, {which}; they are kept in {folder}")


def _say(text: str) -> None:
    if speaks():
        print(one_line(f"spimpi: {text}"), file=sys.stderr, flush=True)
