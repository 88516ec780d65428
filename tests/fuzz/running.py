"""One command in a forked child of this process, which has everything imported: bounded, measured,
judged."""

import os
import re
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

SECONDS = 20.0
PATIENCE = 5  # times that, for a second look: a machine that does much else makes anything slow
MEMORY = 2 << 30  # bytes resident
MOST_MAPPED = 6 << 30  # beyond what this process has mapped: protects the machine
MESSAGE = 500  # characters of a line on standard error
MEANWHILE = re.compile(r"spimpi: (\d+ s: |compiling kernels)")  # where a run is, on a slow machine
# Control characters (but for newline and tab), and what turns the direction of reading.
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Outcome:
    """How a command ended. ``status``: negative where a signal ended it; None: it was stopped."""

    status: int | None
    out: str
    err: str
    seconds: float
    peak: int  # bytes resident, of the largest process
    processor: float = 0.0  # seconds, of all its processes that were waited for


def load() -> None:
    """Import what the commands import, and no MPI library's start: each child starts its own."""
    from spimpi.launch import set_thread_limits

    set_thread_limits()
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from importlib import import_module

    for name in (
        "mpi4py.MPI", "h5py", "numba", "rich.console", "rich.table", "jinja2", "spimpi.cli.verify",
        "spimpi.inference.model", "spimpi.inference.checkpoint_seeded", "spimpi.inference.sketching",
        "spimpi.verification.run", "spimpi.verification.known_weights", "spimpi.manifest.make",
        "spimpi.manifest.check", "spimpi.trace.reading.check", "spimpi.trace.sealing.recover",
        "spimpi.trace.analysis.diff", "spimpi.trace.export.text", "spimpi.trace.checksum_kernel",
    ):  # fmt: skip
        try:
            import_module(name)
        except ImportError:  # optional, or elsewhere in another version
            pass


def run(argv, folder: Path, seconds=SECONDS, memory=MEMORY, environ=None, main=None) -> Outcome:
    """``spimpi *argv`` in ``folder``, in a child with a session of its own.

    ``main`` stands in for the command line in the tests of this campaign.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    said = [folder.parent / f".{folder.name}.{name}" for name in ("out", "err")]
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(argv, folder, said, environ or {}, main)
    status, usage = None, None
    while usage is None:
        done, code, found = os.wait4(pid, os.WNOHANG)
        if done:
            status, usage = os.waitstatus_to_exitcode(code), found
        elif time.monotonic() - start > seconds:
            os.killpg(pid, signal.SIGKILL)
            _, _, usage = os.wait4(pid, 0)
        else:
            time.sleep(0.005)
    took = time.monotonic() - start
    try:  # what it left running
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    out, err = (_text(path) for path in said)
    return Outcome(status, out, err, took, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


def _text(path: Path) -> str:
    with open(path, "rb") as file:
        text = file.read(4 << 20).decode("utf-8", "replace")
    path.unlink()
    return text


def _become(argv, folder, said, environ, main) -> None:
    """Run the command in this process, which never returns."""
    status = 70
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = _mapped() + MOST_MAPPED
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(said, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.environ.update(environ)
        # Streams as a new interpreter would have them, whatever this process's own became.
        sys.stdout = open(1, "w", encoding="utf-8", errors="strict", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.argv = ["spimpi", *argv]
        if main is None:
            from spimpi.cli import entry as main
        try:
            main()
            status = 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1  # as Python itself ends
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _mapped() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def judge(outcome: Outcome, may_find_corruption: bool, most_lines=1, memory=MEMORY) -> list[str]:
    """What is wrong with how a command ended, whatever it was given; [] where nothing is.

    ``most_lines``: of errors, on standard error.
    """
    wrong = []
    if outcome.status is None:
        wrong.append(f"hang: still running after {outcome.seconds:.0f} s")
    elif outcome.processor > SECONDS:
        wrong.append(f"hang: {outcome.processor:.0f} s of processor time")
    elif outcome.status < 0:
        wrong.append(f"ended by signal {-outcome.status}")
    elif outcome.status > 3:
        wrong.append(f"exit status {outcome.status}")
    elif outcome.status == 1 and not may_find_corruption:
        wrong.append("exit status 1 without corruption")
    if "Traceback (most recent call last)" in outcome.err + outcome.out:
        wrong.append("traceback")
    if outcome.peak > memory:
        wrong.append(f"memory: {outcome.peak >> 20} MiB")
    lines = [line for line in outcome.err.splitlines() if line.strip() and not MEANWHILE.match(line)]
    if "traceback" not in wrong and outcome.status is not None and outcome.status >= 0:
        if outcome.status == 2 and len(lines) > most_lines:
            wrong.append(f"lines on standard error: {len(lines)}")
        if strange := [line for line in lines if not line.startswith("spimpi")]:
            wrong.append(f"not spimpi's own words on standard error: {strange[0][:80]!r}")
        if any(len(line) > MESSAGE for line in lines):
            wrong.append(f"long line on standard error: {max(map(len, lines))} characters")
        if outcome.status > 1 and not (lines or outcome.out.strip()):
            wrong.append("says nothing")
    if steering := STEERS.findall(outcome.out + outcome.err):
        wrong.append(f"raw control characters: {sorted(set(steering))[:4]}")
    return wrong


class Outside:
    """Everything below some folders, but one subfolder: whether anything there was touched."""

    def __init__(self, *roots: Path, but: str):
        self.roots, self.but = roots, but
        self.before = self._look()

    def _look(self) -> dict:
        found = {}
        for root in self.roots:
            for path in root.iterdir():
                if path.name == self.but:
                    continue
                for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
                    facts = each.lstat()
                    mark = facts.st_mode, facts.st_size, facts.st_mtime_ns, facts.st_ino
                    found[f"{path.parent.name}/{each.relative_to(root)}"] = mark
        return found

    def touched(self) -> list[str]:
        """Names of what was made, changed or removed since the last look."""
        now = self._look()
        old, self.before = self.before, now
        return sorted(name for name in {*old, *now} if old.get(name) != now.get(name))
