"""What is not written yet is written when the process is told to end."""

import os
import signal
import threading
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class SignalFlush:
    """Until ``close``: SIGTERM calls ``flush`` and ends the process; SIGUSR1 calls it, and all
    goes on. There may be several at a time.

    Slurm sends either before the time limit, mpirun SIGTERM when another rank has failed. A
    thread of its own takes them: Python's handlers run between two instructions of the main
    thread, which may be inside an MPI call that never returns. ``flush`` must not communicate.

    A handler that the program has, before or later, stays and decides what follows the flush; a
    signal that it ignores stays ignored. Nothing is done where this is not the main thread, or
    the program has a wakeup descriptor of its own (asyncio). Forked children take no part.
    """

    def __init__(self, flush):
        self._flush = flush
        if threading.current_thread() is threading.main_thread():
            if not _open:
                _start()
            _open.append(self)

    def close(self) -> None:
        """Give the signals back. In the thread that made this."""
        if self in _open:
            _open.remove(self)
            if not _open:
                _stop()

    def flush(self) -> None:
        with suppress(Exception):
            self._flush()


_open: list[SignalFlush] = []
_thread: list = []  # (the thread, both ends of its pipe), where signals are taken


def _start() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    theirs = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if theirs != -1:
        signal.set_wakeup_fd(theirs)
        os.close(reader)
        os.close(writer)
        return
    thread = threading.Thread(target=_serve, args=(reader,), daemon=True)
    thread.start()
    _thread.append((thread, reader, writer))
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _nothing)  # the C handler has written to the pipe by then


def _stop() -> None:
    if _thread:
        _give_back()
        thread, reader, writer = _thread.pop()
        os.close(writer)
        thread.join()
        os.close(reader)


def _give_back() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is _nothing:
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


def _serve(reader: int) -> None:
    while numbers := os.read(reader, 64):
        if not set(numbers) & set(SIGNALS):
            continue
        for one in tuple(_open):
            one.flush()
        if signal.SIGTERM in numbers and signal.getsignal(signal.SIGTERM) is _nothing:
            os._exit(128 + signal.SIGTERM)


# A forked child's handlers would write to its parent's pipe: a worker that is told to end would
# end its parent. Signals wait until the child has given them back.


def _block() -> None:
    if _thread:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock() -> None:
    if _thread:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _in_child() -> None:
    if _thread:
        _give_back()
        _, reader, writer = _thread.pop()
        os.close(reader)
        os.close(writer)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _open.clear()


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_in_child)


def _nothing(number, frame) -> None:
    pass


@contextmanager
def flushed_on_signals(flush):
    """Within: SIGTERM and SIGUSR1 call ``flush`` (SignalFlush)."""
    signals = SignalFlush(flush)
    try:
        yield
    finally:
        signals.close()
