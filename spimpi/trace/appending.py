"""Appending to a file that a killed process leaves readable: all of what is given, or nothing."""

import contextlib
import os


def append_whole(fd: int, data, sync: bool = False) -> None:
    """Write all of ``data`` at the file's end. OSError, the file as it was, where that fails.

    ``sync``: wait until the disk has it.
    """
    data = memoryview(data)
    size = os.fstat(fd).st_size
    try:
        while data:
            data = data[os.write(fd, data) :]
        if sync:
            os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size)  # whole records only, so that a retry can follow
        raise
