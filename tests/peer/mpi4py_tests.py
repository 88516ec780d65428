"""mpi4py's own tests on checked communicators: which end otherwise than on plain ones.

    pip download --no-deps --no-binary mpi4py mpi4py==$(python -c 'import mpi4py; print(mpi4py.__version__)')
    tar xf mpi4py-*.tar.gz
    mpirun -n 3 python -m mpi4py tests/peer/mpi4py_tests.py mpi4py-*/test

By hand: nothing of mpi4py's is kept here. Every test runs twice, on plain communicators and on checked
ones. Prints each test that passed plain and did not so checked, and exits with 1 where one of them is
not in KNOWN (docs/checks.md has the same list).
"""

import faulthandler
import fnmatch
import gc
import sys
import time
import unittest
import warnings
from importlib import import_module

from mpi4py import MPI

import spimpi
from spimpi.checked_communicator import CheckedComm

MODULES = (
    "test_cco_buf", "test_cco_vec", "test_cco_nb_buf", "test_cco_nb_vec", "test_cco_obj",
    "test_cco_pr_buf", "test_cco_pr_vec", "test_p2p_buf", "test_p2p_buf_matched", "test_p2p_obj",
    "test_p2p_obj_matched", "test_msgspec", "test_msgzero", "test_threads", "test_buffer",
)  # fmt: skip
PATIENCE = 120  # seconds for a test on all ranks

# Pattern of a test's name -> why it ends otherwise.
NO_COMM = "takes an MPI.Comm as an argument: give it checked.comm"
NO_DEVICE = "offers __cuda_array_interface__ alone, which is no host memory"
KNOWN: dict[str, str] = {
    "test_msgspec.TestMessageRMA.*": NO_COMM,
    "test_cco*_buf.*.testBcastTypeIndexed": "collectives of derived datatypes are refused, by name",
    "test_msgspec.TestMessageVectorCAIBuf.*": NO_DEVICE,
    "test_msgzero.*.testPointToPoint": "a checked Irecv needs a source and a tag",
}
# The same of tests that would leave messages behind when they fail, which Open MPI 4.1 then takes for
# the next communicator's: these are not run on checked ones.
NOT_RUN = {"test_p2p_*_matched.*.testProbeRecv": NO_COMM}

_checked: dict[str, CheckedComm] = {}  # of the test that runs


def checked(comm):
    """A checked communicator of a plain one; of the world and oneself a duplicate, one a test."""
    if comm not in (MPI.COMM_SELF, MPI.COMM_WORLD):
        return spimpi.checked(comm)
    if comm.name not in _checked:
        _checked[comm.name] = spimpi.checked(comm.Dup())
    return _checked[comm.name]


class CheckedMPI:
    """The module MPI with checked communicators, and what waits for their requests."""

    def __init__(self):
        waits = ("Waitall", "Waitany", "Waitsome", "Testall", "Testany", "Testsome")
        waits = {name: getattr(spimpi.CheckedRequest, name) for name in waits}
        waits |= {name.lower(): self._objects(name, waits[name]) for name in waits}
        waits = {name: staticmethod(call) for name, call in waits.items()}
        self.Request = type("Request", (MPI.Request,), waits)

    @staticmethod
    def _objects(name, of_buffers):
        of_objects = getattr(MPI.Request, name.lower())

        def either(requests, *statuses):
            any_checked = any(isinstance(r, spimpi.CheckedRequest) for r in requests)
            return (of_buffers if any_checked else of_objects)(requests, *statuses)

        return either

    def __getattr__(self, name):
        value = getattr(MPI, name)
        return checked(value) if name in ("COMM_SELF", "COMM_WORLD") else value


def leave_out_what_is_refused() -> None:
    """Long double has no fingerprint, and no array of another device: either would end the tests'
    loops over all arrays and types at the first of them."""
    arrayimpl = import_module("arrayimpl")
    kinds = arrayimpl.ArrayBackends
    kinds[:] = [kind for kind in kinds if "gpu" not in f"{kind.backend} {kind.__name__}".lower()]
    for kind in [arrayimpl, *arrayimpl.ArrayBackends]:
        for name in [name for name in dir(kind) if name.startswith("TypeMap")]:
            for code in "gG":
                getattr(kind, name).pop(code, None)


def tests_of(module) -> list:
    """Its tests, in one order on all ranks."""
    found, todo = [], [unittest.defaultTestLoader.loadTestsFromModule(module)]
    while todo:
        one = todo.pop()
        if isinstance(one, unittest.TestCase):
            found.append(one)
        else:
            todo.extend(one)
    return sorted(found, key=lambda test: test.id())


def is_plain(value) -> bool:
    return isinstance(value, MPI.Intracomm) and value != MPI.COMM_NULL


def run(test, in_checked: bool) -> str:
    """What became of a test: passed, skipped, or its error in a line."""
    kind, classes = type(test), []
    module = sys.modules[kind.__module__]
    if in_checked:
        for cls in kind.__mro__:
            if is_plain(vars(cls).get("COMM")):
                classes.append((cls, cls.COMM))
                cls.COMM = checked(cls.COMM)
        kind.__setattr__ = _wrapping
        module.MPI = CheckedMPI()
    result = unittest.TestResult()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test.run(result)
    finally:
        module.MPI = MPI
        for cls, comm in classes:
            cls.COMM = comm
        if in_checked:
            del kind.__setattr__
    if result.errors or result.failures:
        _, text = (result.errors + result.failures)[0]
        return text.strip().splitlines()[-1][:200]
    return "skipped" if result.skipped else "passed"


def _wrapping(test, name, value):
    object.__setattr__(test, name, checked(value) if name == "COMM" and is_plain(value) else value)


def everywhere(world, said) -> list[str]:
    """What all ranks say; ends the job where one does not come."""
    barrier, start = world.Ibarrier(), time.monotonic()
    while not barrier.Test():
        if time.monotonic() - start > PATIENCE:
            print(f"rank {world.rank} waits for the others behind: {said}", flush=True)
            faulthandler.dump_traceback()
            world.Abort(3)
        time.sleep(0.0005)
    return world.allgather(said)


def reason_of(identity, known) -> str | None:
    """Why a test ends otherwise, or is not run."""
    return next((why for pattern, why in known.items() if fnmatch.fnmatch(identity, pattern)), None)


def main(folder, patterns) -> int:
    sys.path.insert(0, folder)
    leave_out_what_is_refused()
    gc.disable()
    world, n, differ, unknown = MPI.COMM_WORLD.Dup(), 0, [], 0
    is_first = world.rank == 0
    for name in MODULES:
        try:
            module = import_module(name)
        except unittest.SkipTest as skipped:
            if is_first:
                print(f"{name}: skipped: {skipped}", flush=True)
            continue
        ran = 0
        for test in tests_of(module):
            identity = test.id()
            if patterns and not any(fnmatch.fnmatch(identity, f"*{p}*") for p in patterns):
                continue
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            gc.collect()  # else in a test, which may count references
            plain = everywhere(world, run(test, False))
            not_run = reason_of(identity, NOT_RUN)
            gc.collect()
            found = [f"not run: {not_run}"] if not_run else everywhere(world, run(test, True))
            while _checked:
                _checked.popitem()[1].comm.Free()
            faulthandler.cancel_dump_traceback_later()
            ran += 1
            if set(plain) <= {"passed"} and set(found) != {"passed"}:
                reason = not_run or reason_of(identity, KNOWN)
                unknown += reason is None
                differ.append(identity)
                if is_first:
                    print(f"{identity}: {reason or sorted(set(found))}", flush=True)
        n += ran
        if is_first:
            print(f"{name}: {ran} tests", flush=True)
    if is_first:
        print(f"{n} tests on {world.size} ranks; {len(differ)} end otherwise, {unknown} of them unknown")
    return int(unknown > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
