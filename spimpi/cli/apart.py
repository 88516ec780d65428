"""Runs a command in a child process: HDF5 itself may crash, or run for ever, on a damaged file."""

import errno
import os
import signal
import sys
import threading
import time

from spimpi.errors import SpimpiError, UsageError

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGPROF)
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
PATIENCE = 60.0  # seconds of processor time for one call of HDF5


def apart(command, what: str, crashed: int) -> int:
    """``command()`` in a forked child: its exit status, or ``crashed`` where the child crashed.

    ``what`` is then named. The child shares standard output and error, nothing else comes back.
    Ctrl-C interrupts the child, which clears away what it was writing: status 130. For the main
    thread.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, interrupted)
        _end_with(command)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        signal.signal(signal.SIGINT, interrupted)
    if status >= 0:
        return status
    if -status == signal.SIGPIPE:  # whoever read the output has seen enough
        return 128 - status
    name = signal.Signals(-status).name
    if -status in CRASHES:
        did = "runs for ever" if -status == signal.SIGPROF else f"crashed ({name})"
        print(f"spimpi: {what} is damaged: HDF5 {did} reading it", file=sys.stderr)
        return crashed
    print(f"spimpi: reading {what} was ended by {name}", file=sys.stderr)
    return SpimpiError.exit_status


def _end_with(command) -> None:
    """End this process with the status of ``command()``, never go on as the parent would."""
    from spimpi.cli import status_of

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    threading.Thread(target=_say_alive, daemon=True).start()
    status = SpimpiError.exit_status
    try:
        status = status_of(lambda: _said(command))
        sys.stderr.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    finally:
        os._exit(status)


def _said(command) -> int:
    """``command()``, and what it printed is out; UsageError where there is no room for that."""
    try:
        status = command()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename is not None:
            raise
        msg = f"cannot write standard output: {error.strerror}"
        raise UsageError(msg) from None
    return status


def _say_alive() -> None:
    """Put off SIGPROF for as long as Python gets its turn, which a call of HDF5 does not give."""
    while True:
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        time.sleep(min(1.0, PATIENCE / 4))
