"""What can befall a file as a whole: cut, altered, emptied, replaced by what is no file."""

import os
import stat
from pathlib import Path

HOW = (
    "cut", "cut at its start", "a byte flipped", "bytes zeroed", "emptied", "longer", "sparse",
    "a FIFO", "a folder", "a device", "a link to itself", "a link to nothing", "removed",
    "not to be read", "noise", "another format",
)  # fmt: skip


def draw(rng) -> tuple[str, float]:
    """How a file is damaged, and where in it (a fraction)."""
    return rng.choice(HOW), rng.random()


def apply(path: Path, damage) -> None:
    how, where = damage
    if not path.is_file():
        return
    data = bytearray(path.read_bytes())
    place = int(where * max(len(data) - 1, 0))
    path.unlink()  # it may be a link to the campaign's own
    if how == "cut":
        path.write_bytes(data[:place])
    elif how == "cut at its start":
        path.write_bytes(data[place:])
    elif how == "a byte flipped" and data:
        data[place] ^= 1 << int(where * 1000) % 8
        path.write_bytes(data)
    elif how == "bytes zeroed":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
        path.write_bytes(data)
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "longer":
        path.write_bytes(bytes(data) + b"\xff" * 4096)
    elif how == "sparse":
        path.write_bytes(data)
        os.truncate(path, len(data) + (1 << 30))
    elif how == "a FIFO":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()
    elif how == "a device":
        path.symlink_to("/dev/zero" if where < 0.5 else "/dev/full")
    elif how == "a link to itself":
        path.symlink_to(path.name)
    elif how == "a link to nothing":
        path.symlink_to("nosuch")
    elif how == "not to be read":
        path.write_bytes(data)
        path.chmod(stat.S_IWUSR)
    elif how == "noise":
        path.write_bytes(bytes((i * 167 + place) % 256 for i in range(4096)))
    elif how == "another format":
        path.write_bytes(b"PK\x03\x04" + bytes(data[:1000]))
