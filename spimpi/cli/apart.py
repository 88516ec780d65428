"""Runs a command in a child process: HDF5 itself may crash, or run for ever, on a damaged file.

The child may take as much memory, and as long, as files of that size can need: for 1 MiB 1.5 GiB and
12 s. A file that asks for more is told, and not waited for. What does not count: the imports, the
time in which the machine does other work, and that in which nobody takes the output.
"""

import os
import resource
import select
import signal
import sys
import threading
import time
import traceback

from spimpi.cli.streams import status_of_output
from spimpi.errors import IncompleteError, SpimpiError
from spimpi.printable import one_line

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGPROF)
PATIENCE = 60.0  # seconds of processor time for one call of HDF5
SECONDS, BYTES_A_SECOND = 10.0, 500_000  # for a command, and for each byte that it is to read
MEMORY, MEMORY_A_BYTE = 3 << 29, 8
GRACE = 2.0  # seconds to clear away what was being written
TICK = 0.25  # seconds: a process that was stopped has not waited
DEBUG = "SPIMPI_DEBUG"  # environment: an exception that nobody expected is shown where it was raised


def apart(command, what: str, size: int = 0) -> int:
    """``command()`` in a forked child: its exit status, or 3 where the child crashed.

    ``what`` it reads is then named; ``size``: of how many bytes. The child shares standard output
    and error, nothing else comes back. Where it takes longer than reading ``size`` bytes can, its
    status is 3. Ctrl-C interrupts the child, which clears away what it was writing: status 130.
    For the main thread.
    """
    what = one_line(what, 250)
    sys.stdout.flush()
    sys.stderr.flush()
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    told, tell = os.pipe()  # the child says that it begins; its end closes the pipe
    pid = os.fork()
    if pid == 0:
        os.close(told)
        signal.signal(signal.SIGINT, interrupted)
        _end_with(command, what, size, tell)
    os.close(tell)
    try:
        limit = SECONDS + size / BYTES_A_SECOND
        in_time = _ends_within(limit, pid, told)
        if not in_time:
            _end(pid, told)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(told)
        signal.signal(signal.SIGINT, interrupted)
    if not in_time:
        print(
            f"spimpi: {what}: not read within {limit:.0f} s, which files of {size:,} bytes should "
            "not need: it is damaged, or the machine has too much to do",
            file=sys.stderr,
        )
        return IncompleteError.exit_status
    if status >= 0:
        return status
    name = signal.Signals(-status).name
    if -status in CRASHES:
        did = "runs for ever" if -status == signal.SIGPROF else f"crashed ({name})"
        print(f"spimpi: {what} is damaged: HDF5 {did} reading it", file=sys.stderr)
        return IncompleteError.exit_status
    print(f"spimpi: reading {what} was ended by {name}", file=sys.stderr)
    return SpimpiError.exit_status


def _ends_within(limit: float, pid: int, told: int) -> bool:
    """Wait for the child's end, at most so long since it began to read."""
    left, began, starved = limit, False, 0.0
    while left > 0:
        if select.select([told], [], [], TICK)[0]:
            if not os.read(told, 1):
                return True
            began, starved = True, _starved(pid)
        elif began and _takes_output():
            before, starved = starved, _starved(pid)
            left -= max(0.0, TICK - (starved - before))
    return False


def _starved(pid: int) -> float:
    """Seconds that a process waited for a processor, as far as the system tells."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        return 0.0


def _takes_output() -> bool:
    """Whether standard output can be written: a pager that is full, a terminal that is held, can't."""
    output = select.poll()
    try:
        output.register(1, select.POLLOUT)
        return bool(output.poll(0))
    except OSError:
        return True


def _end(pid: int, told: int) -> None:
    """End the child as Ctrl-C does, then by force."""
    os.kill(pid, signal.SIGINT)
    if not select.select([told], [], [], GRACE)[0]:
        os.kill(pid, signal.SIGKILL)


def _end_with(command, what: str, size: int, tell: int) -> None:
    """End this process with the status of ``command()``, never go on as the parent would."""
    from spimpi.cli import status_of

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    threading.Thread(target=_say_alive, daemon=True).start()
    status = SpimpiError.exit_status
    try:
        import h5py  # noqa: F401  its import is no reading

        os.write(tell, b".")
        _limit_memory(MEMORY + MEMORY_A_BYTE * size)
        status = status_of_output(status_of(lambda: _read(command, what)))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    finally:
        os._exit(status)


def _limit_memory(n_bytes: int) -> None:
    """Let this process take so much more than it has. Where the system can't: no limit."""
    try:
        with open("/proc/self/status") as file:
            (has,) = (line.split()[1] for line in file if line.startswith("VmData"))
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = (int(has) << 10) + n_bytes
        if most == resource.RLIM_INFINITY or wanted < most:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
    except (OSError, ValueError):
        pass


def _read(command, what: str) -> int:
    """``command()``; what it did not expect of a file is damage, in one sentence.

    A file can say anything, and whatever is raised while it is read is told as IncompleteError.
    It may be a fault of spimpi all the same: the environment variable SPIMPI_DEBUG shows where.
    """
    try:
        return command()
    except SpimpiError:
        raise
    except MemoryError:
        msg = f"{what} is damaged: reading it takes more memory than files of its size can need"
        raise IncompleteError(msg) from None
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        msg = (
            f"{what} cannot be read: {type(error).__name__}: {error} "
            f"({os.path.basename(where.filename)}:{where.lineno}). It is damaged, or this is a "
            f"fault of spimpi: {DEBUG}=1 shows where"
        )
        raise IncompleteError(one_line(msg)) from None


def _say_alive() -> None:
    """Put off SIGPROF for as long as Python gets its turn, which a call of HDF5 does not give."""
    while True:
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        time.sleep(min(1.0, PATIENCE / 4))
