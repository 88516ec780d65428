"""One file for the journals of all ranks of a node: streams that grow side by side.

    extent 0        what streams there are, twice: a line of text as in a journal, JSON
    extent 1, 2, …  64 KiB each; extent 1 + j*S + s is the j-th of stream s, of S

So each rank writes at places that are its own, with plain pwrite() and no word to anybody: nothing
rests on how a file system orders appends, and a rank killed in a write tears its own stream alone.
What was never written is a hole, and reads as zeros: a stream ends at its last byte that is not 0.
To whoever reads, a Stream behaves as the Path of a rank's own file would.
"""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

from spimpi.regular_file import open_regular, size_of
from spimpi.trace.checksum import text_digest
from spimpi.trace.schema import MOST_RANKS

MAGIC = "spimpi-journals"
SEPARATE = 16  # ranks of a node up to which each has files of its own
EXTENT = 1 << 16  # a multiple of pages and of file systems' blocks
SUFFIXES = (".journal", ".tensors", ".sketches")
FIRST_LINE = 64
VERSION = 1
ALIGNED = 8  # what is binary is written in words


@dataclass(frozen=True)
class Stream:
    """One rank's file within a node's, such as ``rank-00003.journal``."""

    file: Path
    ranks: tuple[int, ...]
    rank: int
    suffix: str = SUFFIXES[0]

    @property
    def stem(self) -> str:
        return f"rank-{self.rank:05d}"

    @property
    def name(self) -> str:
        return self.stem + self.suffix

    @property
    def parent(self) -> Path:
        return self.file.parent

    def __str__(self) -> str:
        return f"{self.name} in {self.file}"

    def with_suffix(self, suffix: str) -> "Stream":
        return Stream(self.file, self.ranks, self.rank, suffix)

    def offset(self, position: int) -> int:
        """Where in the file the byte ``position`` of this stream is."""
        own = self.ranks.index(self.rank) * len(SUFFIXES) + SUFFIXES.index(self.suffix)
        extent, within = divmod(position, EXTENT)
        return (1 + extent * len(self.ranks) * len(SUFFIXES) + own) * EXTENT + within

    def write(self, fd: int, data, position: int) -> int:
        """As os.pwrite; at most to the end of an extent."""
        room = EXTENT - position % EXTENT
        return os.pwrite(fd, data[:room], self.offset(position))

    def open(self, mode: str = "rb"):
        return io.BufferedReader(_Reader(self), EXTENT)

    def exists(self) -> bool:
        with self.open() as file:
            return bool(file.raw.length)


class _Reader(io.RawIOBase):
    """The bytes of a stream, those that are there when it is opened."""

    def __init__(self, stream: Stream):
        self._stream, self._position = stream, 0
        self._file = open_regular(stream.file, follow=False)
        self._fd = self._file.fileno()
        self.length = self._end()

    def _end(self) -> int:
        """After the last byte that is not 0, at a whole word."""
        streams = len(self._stream.ranks) * len(SUFFIXES)
        own = (self._stream.offset(0) // EXTENT) % streams
        for first, last in reversed(_data(self._fd)):
            # The extents of this stream among those that hold data, from the last one back.
            for extent in range(last - (last - own) % streams, max(first, 1) - 1, -streams):
                there = os.pread(self._fd, EXTENT, extent * EXTENT).rstrip(b"\0")
                if there:
                    start = (extent - 1) // streams * EXTENT
                    return start + -(-len(there) // ALIGNED) * ALIGNED
        return 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = min(len(buffer), self.length - self._position, EXTENT - self._position % EXTENT)
        if n <= 0:
            return 0
        there = os.pread(self._fd, n, self._stream.offset(self._position))
        buffer[:n] = there.ljust(n, b"\0")  # the end of the file may be within a word
        self._position += n
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def _data(fd: int) -> list[tuple[int, int]]:
    """The first and the last extent of each region of a file that is no hole, in order."""
    size, at, found = os.fstat(fd).st_size, 0, []
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # a hole to the end
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start // EXTENT, (at - 1) // EXTENT))
    return found


def opened(path):
    """A journal's file, or one beside it, open for reading, and how many bytes it has.

    ``path``: a Path or a Stream. OSError where no ordinary file stands there; no link is followed.
    """
    if isinstance(path, Stream):
        file = path.open()
        return file, file.raw.length
    file = open_regular(path, follow=False)
    return file, size_of(file)


def node_file(folder, ranks) -> Path | None:
    """The file that ``ranks``, all those of one node, share; None where they are few."""
    if len(ranks) <= SEPARATE:
        return None
    return Path(folder) / f"node-{min(ranks):05d}.journal"


def create(path: Path, ranks) -> None:
    """Make a node's file, before its ranks open it. FileExistsError where it is there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        once = _directory(tuple(ranks)).ljust(EXTENT // 2, b"\0")
        os.pwrite(fd, once + once, 0)
    finally:
        os.close(fd)


def streams(path: Path) -> tuple[list[Stream], str]:
    """The journals in a node's file, in the order of ranks, and what is wrong where there are none."""
    with open_regular(path, follow=False) as file:
        start = file.read(EXTENT)
    for copy in (start[: EXTENT // 2], start[EXTENT // 2 :]):
        try:
            length = int(copy[:FIRST_LINE].split()[2])
            ranks = tuple(json.loads(copy[FIRST_LINE : FIRST_LINE + length])["ranks"])
        except (ValueError, IndexError, KeyError, TypeError, RecursionError):
            continue
        if copy.startswith(_directory(ranks)) and _are_ranks(ranks):
            return [Stream(path, ranks, rank) for rank in sorted(ranks)], ""
    return [], f"{path.name}: its list of ranks is damaged, so none of it was read"


def _are_ranks(ranks) -> bool:
    numbers = all(type(rank) is int and 0 <= rank < MOST_RANKS for rank in ranks)
    return numbers and 0 < len(ranks) == len(set(ranks))


def _directory(ranks) -> bytes:
    body = json.dumps({"ranks": ranks, "extent": EXTENT, "suffixes": SUFFIXES}).encode()
    start = f"{MAGIC} {VERSION} {len(body)} "
    return (start + text_digest(start.encode() + body)).ljust(FIRST_LINE - 1).encode() + b"\n" + body
