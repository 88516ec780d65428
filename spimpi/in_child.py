"""A value that is made in a child process, because what makes it may crash or take all memory."""

import faulthandler
import os
import pickle
import resource
import select
import signal
import time

from spimpi.errors import SpimpiError

_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE)
_OTHERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # whose handlers are the parent's
_PATIENCE = 60.0  # seconds for a child whose processor time does not run out


def in_child(work, memory: int, seconds: int):
    """What ``work()`` gives in a forked child, which may take ``memory`` bytes more than this
    process has, and ``seconds`` of processor time. Local; ``work`` must not communicate.

    A SpimpiError of ``work`` is raised here too. ValueError, with what happened, where the child
    crashed, took too long or raised anything else.
    """
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        _make(work, tell, memory, seconds)
    os.close(tell)
    try:
        said = _all_of(told, time.monotonic() + _PATIENCE)
        if said is None:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(told)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if said is None or status in (-signal.SIGXCPU, -signal.SIGKILL):
        msg = "reading it takes for ever"
        raise ValueError(msg)
    if status:
        what = signal.Signals(-status).name if status < 0 else f"status {status}"
        msg = f"reading it crashed: {what}"
        raise ValueError(msg)
    kind, value = pickle.loads(said)
    if kind is None:
        return value
    raise kind(value)


def _make(work, tell: int, memory: int, seconds: int) -> None:
    """The child: writes what ``work()`` gives, and ends without what the parent has at its end."""
    try:
        faulthandler.disable()
        for number in (*_CRASHES, *_OTHERS):  # MPI libraries have handlers that print pages
            signal.signal(number, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)  # glibc and HDF5 say there what has happened
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_CPU, seconds)
        with open("/proc/self/statm") as file:
            has = int(file.read().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, has + memory)
        try:
            said = None, work()
        except SpimpiError as error:
            said = type(error), str(error)
        except Exception as error:
            said = ValueError, str(error) or type(error).__name__
        with os.fdopen(tell, "wb") as pipe:
            pipe.write(pickle.dumps(said))
        os._exit(0)
    finally:
        os._exit(SpimpiError.exit_status)


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (soft, hard))


def _all_of(pipe: int, deadline: float) -> bytes | None:
    """All that is written to a pipe until it is closed; None where that takes too long."""
    pieces = []
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(pipe, 1 << 20)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
    return None
