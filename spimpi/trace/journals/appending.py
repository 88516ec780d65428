"""Files that ranks append to, with plain writes: of their own, or a stream of their node's."""

import contextlib
import fcntl
import os
from pathlib import Path

from spimpi.trace.journals.node_file import Stream


class Appending:
    """A new file, open for appending. FileExistsError where a rank's own file is there.

    ``sync``: what is appended is on the disk when ``append`` returns.
    """

    def __init__(self, path: Path | Stream, sync: bool = False):
        self._path, self._sync, self._position = path, sync, 0
        if isinstance(path, Stream):
            self.fd = os.open(path.file, os.O_WRONLY | os.O_NOFOLLOW)
        else:
            self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)

    def lock(self) -> None:
        """Say that a process writes it, where there are locks. Ranks of a node share theirs."""
        kind = fcntl.LOCK_SH if isinstance(self._path, Stream) else fcntl.LOCK_EX
        with contextlib.suppress(OSError):
            fcntl.flock(self.fd, kind | fcntl.LOCK_NB)

    def append(self, data) -> None:
        """Write all of ``data``. OSError where that fails: what is appended next takes its place."""
        left, position = memoryview(data), self._position
        try:
            while left:
                if isinstance(self._path, Stream):
                    n = self._path.write(self.fd, left, position)
                else:
                    n = os.write(self.fd, left)
                left, position = left[n:], position + n
            if self._sync:
                os.fsync(self.fd)
        except OSError:
            if not isinstance(self._path, Stream):
                with contextlib.suppress(OSError):
                    os.ftruncate(self.fd, self._position)
            raise
        self._position = position

    def close(self) -> None:
        os.close(self.fd)
