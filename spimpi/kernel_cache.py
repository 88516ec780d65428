"""Where compiled kernels are kept, and whether what lies there may be loaded.

A compiled kernel is machine code in a pickle: to load it is to run it. So nothing is read from a
folder in which anybody but this user and root can have put it, and nothing is unpickled that is
not, byte for byte, what was written. numba's own cache looks at neither, and falls back to other
places (`__pycache__`) where its folder cannot be written.

Nothing here imports numba, so that a cold start can be told before that slow import.
"""

import contextlib
import hashlib
import os
import stat
from functools import cache
from importlib import metadata
from pathlib import Path

KERNEL_FILES = (
    "jit.py",
    "fingerprint/tag.py",
    "fingerprint/cpu.py",
    "fingerprint/words.py",
    "fingerprint/lanes.py",
    "fingerprint/painting_cpu.py",
    "fingerprint/projections.py",
    "inference/elementary.py",
    "inference/kernels.py",
    "inference/exact.py",
    "inference/product.py",
    "inference/attention.py",
    "inference/sequence_kernels.py",
    "inference/qk_norm.py",
    "inference/checkpoint_seeded.py",
    "inference/tensors.py",
    "trace/checksum_kernel.py",
)
SUFFIX = ".nbi"  # numba's, which whoever clears caches knows
MAGIC = b"spimpi-kernel-1\n"
DIGEST_BYTES = 32
MOST_LINKS = 40  # as the kernel follows
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@cache
def cache_folder() -> Path | None:
    """The folder of this version's kernels, whether or not it exists; None: there is no home.

    In $SPIMPI_CACHE_DIR, else in the user's cache folder. It is named after numba's version and
    the sources of all kernels, which inline helpers from other files.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256(metadata.version("numba").encode())
    for name in KERNEL_FILES:
        path = package / name
        if path.exists():
            digest.update(name.encode() + path.read_bytes())
    root = os.environ.get("SPIMPI_CACHE_DIR")
    if not root:
        base = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(base):  # as the XDG specification says
            # An empty HOME would be expanded to the root of the file system.
            base = "" if os.environ.get("HOME") == "" else os.path.expanduser("~/.cache")
        root = os.path.join(base, "spimpi")
        if not os.path.isabs(root):  # a user whom the system does not know, without HOME
            return None
    return Path(os.path.abspath(root)) / digest.hexdigest()[:16]


def count(folder: Path | None) -> int:
    """How many files of compiled kernels lie in a folder, of whatever content."""
    try:
        return sum(name.endswith(SUFFIX) for name in os.listdir(folder)) if folder else 0
    except OSError:
        return 0


@cache
def usable_folder() -> tuple[Path | None, str]:
    """The folder that kernels are loaded from and kept in, or None and why there is none."""
    folder = cache_folder()
    problem = prepare(folder)
    return (None, problem) if problem else (folder, "")


def prepare(folder: Path | None) -> str:
    """Make the folder where it is missing; "" where kernels may be kept there, else why not.

    It and all folders above it, links included, must be this user's or root's, and such that no
    other user can put anything in its place.
    """
    if folder is None:
        return "there is no home directory (HOME)"
    try:
        missing = _walk(folder)
        if missing:
            _make(folder, missing)
            _walk(folder)
    except OSError as error:
        where = error.filename if error.filename is not None else folder
        return f"{where}: {error.strerror or error}"
    except _Unsafe as found:
        return str(found)
    return ""


class _Unsafe(Exception):
    """Another user can change what a path leads to."""


def _walk(folder: Path) -> int:
    """Judge every step of a path; how many of its last parts do not exist.

    Raises _Unsafe, and OSError where a step cannot be looked at. The path is followed link by
    link: a link in somebody else's hands leads where he wants.
    """
    left = list(reversed(folder.parts[1:]))
    at, links = folder.parts[0], 0
    own, link = len(left), None  # parts of the path itself that are left, the link followed
    _judge(at, os.lstat(at), is_last=not left)
    while left:
        path = os.path.join(at, left.pop())
        if len(left) < own:
            own, link = len(left), None
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            if link is not None:
                raise OSError(2, "it is a link that leads nowhere", link) from None
            return len(left) + 1
        if stat.S_ISLNK(found.st_mode):
            _require_owner(path, found)
            links, link = links + 1, link or path
            if links > MOST_LINKS:
                raise OSError(40, "too many links", path)
            target = Path(os.path.normpath(os.path.join(at, os.readlink(path))))
            left += reversed(target.parts[1:])
            at = target.parts[0]
            continue
        _judge(path, found, is_last=not left)
        at = path
    return 0


def _judge(path, found, is_last: bool) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(20, "it is no folder", path)
    _require_owner(path, found)
    others = found.st_mode & OTHERS_WRITE
    # In a folder such as /tmp nobody moves what is another's, but anybody may add to it.
    if others and (is_last or not found.st_mode & stat.S_ISVTX):
        who = "other users" if others & stat.S_IWOTH else "its group"
        msg = f"{path} can be written by {who} (mode {stat.S_IMODE(found.st_mode):04o})"
        raise _Unsafe(msg)


def _require_owner(path, found) -> None:
    if found.st_uid not in (0, os.geteuid()):
        msg = f"{path} belongs to another user (uid {found.st_uid})"
        raise _Unsafe(msg)


def _make(folder: Path, missing: int) -> None:
    """Make the last parts of a path, which no other user may write whatever the umask is."""
    for path in [*reversed(folder.parents), folder][-missing:]:
        with contextlib.suppress(FileExistsError):  # another rank of this node was first
            os.mkdir(path, 0o755)
            # A umask of 002 leaves 755 as it is, and ACLs that are inherited show here.
            if os.lstat(path).st_mode & OTHERS_WRITE:
                os.chmod(path, 0o755)


def read(path: Path) -> bytes | None:
    """What ``write`` put there; None where there is nothing, or anything else.

    A file is believed if it is this user's or root's, nobody else can write it, and its digest is
    that of its content. Cut, empty and altered files are as good as none.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_mode & OTHERS_WRITE:
            return None
        if found.st_uid not in (0, os.geteuid()):
            return None
        try:
            data = file.read()
        except OSError:
            return None
    start = len(MAGIC) + DIGEST_BYTES
    content = data[start:]
    whole = data.startswith(MAGIC) and data[len(MAGIC) : start] == _digest(path.name, content)
    return content if whole else None


def write(path: Path, content: bytes) -> None:
    """Put a file in place as a whole or not at all; OSError where that cannot be done."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(draft, flags, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) & ~OTHERS_WRITE)
            file.write(MAGIC + _digest(path.name, content) + content)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def _digest(name: str, content: bytes) -> bytes:
    """Of the content and of the name, so that no file stands for another."""
    state = hashlib.blake2b(name.encode(), digest_size=DIGEST_BYTES)
    state.update(content)
    return state.digest()
