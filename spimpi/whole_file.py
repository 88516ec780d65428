"""A file that is written as a whole or not at all: under another name, then renamed.

Only ordinary files are ever replaced: a device, a FIFO, a socket, a link or a directory stays.
"""

import csv
import io
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spimpi.errors import UsageError


def check_can_write(path, overwrite: bool = False) -> None:
    """Raise UsageError where a file can't be written; asked before the work for it is done."""
    path = Path(path)
    if other := no_ordinary_file(path):
        msg = f"cannot write {path}: it is {other}; name another file (-o)"
        raise UsageError(msg)
    if not overwrite and os.path.lexists(path):
        _refuse_existing(path)
    try:
        # Only writing tells: to root every directory looks writable.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        msg = (
            f"cannot write {path}: no file can be made in {path.parent} ({error.strerror}); "
            "name another file (-o)"
        )
        raise UsageError(msg) from None


@contextmanager
def whole_file(path, overwrite: bool = False) -> Iterator:
    """A binary file to write to, which becomes ``path`` where the block ends without an error.

    Raises UsageError where it cannot be written, or exists and is not to be replaced; nothing of
    it then remains.
    """
    path = Path(path)
    check_can_write(path, overwrite)
    draft = path.with_name(f".{secrets.token_hex(8)}.part")  # fits wherever the name does
    try:
        try:
            with open(draft, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            publish(draft, path, overwrite)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror or error}"
        raise UsageError(msg) from None


@contextmanager
def whole_csv(path) -> Iterator:
    """A csv.writer into a whole file, which replaces an ordinary one; errors of ``whole_file``."""
    with whole_file(path, overwrite=True) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        yield csv.writer(text, lineterminator="\n")
        text.detach()


def no_ordinary_file(path) -> str:
    """What stands at ``path`` that is never to be replaced: "a directory", "a link" …; else ""."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return ""
    if stat.S_ISREG(mode):
        return ""
    return "a directory" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "no ordinary file"


def publish(draft: Path, path: Path, overwrite: bool) -> None:
    """Give a finished file its name. UsageError where what has it is not to be replaced."""
    if other := no_ordinary_file(path):
        msg = f"cannot write {path}: it is {other}"
        raise UsageError(msg)
    if overwrite:
        os.replace(draft, path)
        return
    try:
        os.link(draft, path)  # a rename would replace what came there in the meantime
    except FileExistsError:
        _refuse_existing(path)
    except OSError:  # file systems without links
        if os.path.lexists(path):
            _refuse_existing(path)
        os.replace(draft, path)
    else:
        os.unlink(draft)


def _refuse_existing(path: Path):
    msg = f"{path} exists; name another file (-o) or replace it: --overwrite (overwrite=True)"
    raise UsageError(msg)
