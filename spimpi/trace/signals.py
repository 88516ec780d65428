"""What is not written yet is written when the process is told to end."""

import os
import signal
import threading
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def flushed_on_signals(flush):
    """Within: SIGTERM calls ``flush`` and ends the process; SIGUSR1 calls it, and all goes on.

    Slurm sends either before the time limit, mpirun SIGTERM when another rank has failed. A
    thread of its own takes them: Python's handlers run between two instructions of the main
    thread, which may be inside an MPI call that never returns. ``flush`` must not communicate.
    Where the program has handlers of its own, or this is not its main thread, nothing is changed.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or any(signal.getsignal(number) != signal.SIG_DFL for number in SIGNALS):
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_serve, args=(reader, flush), daemon=True)
    thread.start()
    for number in SIGNALS:
        signal.signal(number, _nothing)  # the C handler has written to the pipe by then
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(previous)
        os.close(writer)
        thread.join()
        os.close(reader)


def _serve(reader: int, flush) -> None:
    while numbers := os.read(reader, 64):
        with suppress(Exception):
            flush()
        if signal.SIGTERM in numbers:
            os._exit(128 + signal.SIGTERM)


def _nothing(number, frame) -> None:
    pass
