"""What survives a loss of power: files and folders whose content is on the disk."""

import os


def sync(path) -> None:
    """Wait until the disk has a file's content, or a folder's names. OSError where it fails."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
