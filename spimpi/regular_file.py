"""Files that are read: ordinary ones alone, opened without waiting, no longer than they say."""

import errno
import os
import stat


def open_regular(path, follow: bool = True, write: bool = False):
    """``open(path, "rb")`` of an ordinary file ("r+b": ``write``).

    Raises OSError, at once, where ``path`` is a FIFO, a device, a socket or a directory: to open
    or to read these can wait for ever. A link is followed, and what it leads to is judged; OSError
    where it is not to be followed.
    """
    # O_NONBLOCK: opening a FIFO would wait for whoever writes to it. It means nothing to files.
    flags = os.O_NONBLOCK | os.O_CLOEXEC | (os.O_RDWR if write else os.O_RDONLY)
    descriptor = os.open(path, flags | (0 if follow else os.O_NOFOLLOW))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
        return os.fdopen(descriptor, "r+b" if write else "rb")
    except BaseException:
        os.close(descriptor)
        raise


def size_of(file) -> int:
    """Bytes in an open file: what no length or count that is read from it may exceed."""
    return os.fstat(file.fileno()).st_size


def read_at_most(path, limit: int) -> bytes:
    """The whole of an ordinary file of at most ``limit`` bytes; OSError where it is longer."""
    with open_regular(path) as file:
        size = size_of(file)
        if size > limit:
            msg = f"it has {size:,} bytes, more than the {limit:,} that such a file may have"
            raise OSError(errno.EFBIG, msg, str(path))
        return file.read(limit)
