"""Names that one sealing alone writes under, and what it leaves behind where it is killed.

Nobody can guess these names, and each is made new: what stands there already, a file or a link that
somebody planted, is never written through nor removed. Beside the journals the sealing notes its
names, and which files it made (their numbers in the file system, which a rename keeps). So whoever
recovers the run, or overwrites it, can remove what is left, and nothing else.
"""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from spimpi.regular_file import read_at_most

NOTE = re.compile(r"sealing-([0-9a-f]{16})")
PART = re.compile(r"rank-\d{5,10}\.h5")
LONGEST = 4096  # bytes of a note
LONGEST_ENDING = len(".0123456789abcdef.sealing")  # of what Sealing adds to a trace's name


def parts_folder(path) -> Path:
    return Path(f"{path}.parts")


def new_token() -> str:
    return secrets.token_hex(8)


class Sealing:
    """A sealing of the trace ``path``, whose journals are in ``folder``."""

    def __init__(self, path, folder, token: str):
        self.path, self.note = Path(path), Path(folder) / f"sealing-{token}"
        self.file = Path(f"{path}.{token}.sealing")
        self.building = Path(f"{path}.{token}.parts")
        self.old = Path(f"{path}.{token}.old")  # the parts of a trace that is overwritten

    def begin(self) -> None:
        """Make the note, before anything else is made."""
        os.close(os.open(self.note, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))

    def made(self, place: Path) -> None:
        """Note that this sealing made a file or a folder."""
        with open(self.note, "a") as file:
            file.write(_number(place) + "\n")

    def owns(self, place: Path) -> bool:
        """Whether this sealing made what stands at ``place`` now, under whatever name."""
        with suppress(OSError):
            return _number(place) in read_at_most(self.note, LONGEST).decode().split("\n")
        return False

    def undo(self) -> None:
        """Remove what a sealing left that did not come to its end; an earlier trace is as it was."""
        parts = parts_folder(self.path)
        if not self.owns(self.path):  # which means that it came to its end
            if self.owns(parts):
                remove_parts(parts)
            if not os.path.lexists(parts):
                with suppress(OSError):
                    os.rename(self.old, parts)
        self.clear()

    def clear(self) -> None:
        """Remove what has a name of this sealing, the note last."""
        remove_parts(self.old)
        remove_parts(self.building)
        with suppress(OSError):
            self.file.unlink(missing_ok=True)
        with suppress(OSError):
            self.note.unlink(missing_ok=True)


def killed_sealings(path, folder) -> list[Sealing]:
    """The sealings of ``path`` that have a note in the folder of its journals."""
    with suppress(OSError):
        noted = (NOTE.fullmatch(name) for name in sorted(os.listdir(folder)))
        return [Sealing(path, folder, found[1]) for found in noted if found]
    return []


def remove_parts(folder: Path) -> None:
    """Remove the parts of a trace, and their folder where nothing else is in it; links stay."""
    with suppress(OSError):
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for name in os.listdir(held):
                if PART.fullmatch(name):
                    os.unlink(name, dir_fd=held)
        finally:
            os.close(held)
        os.rmdir(folder)


def strangers(folder: Path, known=PART) -> list[str]:
    """What stands in a folder that has no name of ours; the folder's own name where it is none."""
    if not os.path.lexists(folder):
        return []
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    with os.scandir(folder) as there:
        return sorted(
            entry.name for entry in there
            if not known.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False)
        )  # fmt: skip


def _number(place: Path) -> str:
    facts = os.lstat(place)
    return f"{facts.st_dev} {facts.st_ino}"
