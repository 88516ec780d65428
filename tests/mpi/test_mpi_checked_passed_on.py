"""What the wrapper does not check: passed on, never silently."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from planted import spoilt

import spimpi
from spimpi.checked_communicator import CheckedComm
from spimpi.checks.unchecked import SYNCHRONISING, UNCHECKED

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
DOCS = Path(__file__).parents[2] / "docs" / "checks.md"

# Methods that carry no data of the user's between ranks, or make something that does.
CARRY_NOTHING = re.compile(
    r"Abort|Accept|Ack_failed|I?[Aa]gree|Attach_buffer|I?[Bb]arrier|Barrier_init|Call_errhandler|"
    r"Cart_map|Clone|Compare|Connect|Create.*|Delete_attr|Detach_buffer|Disconnect|I?[Dd]up.*|"
    r"I?[Ff]lush_buffer|Free|Free_keyval|free|Get_.*|Graph_map|I?[Pp]robe|iprobe|[Ii]s_.*|"
    r"I?[Ss]hrink|Join|Revoke|Set_.*|Spawn.*|Split.*|Sub|Shift|f2py|py2f|fromhandle|fromint|toint"
)


def test_every_method_of_mpi4pys_communicators_is_checked_or_listed_or_carries_nothing(comm):
    kinds = MPI.Intracomm, MPI.Cartcomm, MPI.Graphcomm, MPI.Distgraphcomm
    names = {n for kind in kinds for n in dir(kind) if callable(getattr(kind, n)) and n[0] != "_"}
    here = {n for n in dir(CheckedComm) if n[0].isupper()}
    left = {n for n in names - here - UNCHECKED if not CARRY_NOTHING.fullmatch(n)}
    assert not left
    assert not here & UNCHECKED
    assert here <= names and SYNCHRONISING <= names


def test_the_documents_tables_are_the_codes(comm):
    text = DOCS.read_text(encoding="utf-8")
    first, second = (
        text[text.index(f"| {title} | |") :].split("\n\n")[0]
        for title in ("checked", "not checked")
    )
    named = [set(re.findall(r"`([A-Za-z_]{2,})`", table)) for table in (first, second)]
    here = {n for n in dir(CheckedComm) if n[0].isupper()}
    assert named[0] | {f"I{n.lower()}" for n in named[0]} >= here
    assert {n for n in named[0] if n[0].isupper()} <= here
    listed = named[1] | {f"I{n.lower()}" for n in named[1]}
    assert not {n for n in UNCHECKED if not n.endswith("_init")} - listed
    sums = {"Allreduce", "Reduce", "MAXLOC", "MINLOC", "_init"}
    assert not named[1] - sums - UNCHECKED


def test_an_unchecked_call_warns_once_and_is_counted(comm):
    part = comm.Dup()
    checked, total = spimpi.checked(part), np.zeros(2)
    checked.Bcast(np.ones(2), 0)
    assert checked.verdict
    with pytest.warns(spimpi.UncheckedWarning, match="Scan is not checked") as caught:
        checked.Scan(np.ones(2), total)
    assert (total == comm.rank + 1).all() and checked.verdict is None
    assert caught[0].filename == __file__
    with pytest.warns(spimpi.UncheckedWarning, match="allreduce is not checked"):
        assert checked.allreduce(1) == comm.size
    with pytest.warns(spimpi.UncheckedWarning, match="PROD is not checked: only the operation") as caught:
        checked.Allreduce(np.full(2, 2.0), total, MPI.PROD)
    assert (total == 2**comm.size).all() and caught[0].filename == __file__
    with pytest.warns(spimpi.UncheckedWarning, match="Ireduce by MPI.MAX is not"):
        checked.Ireduce(np.full(2, 1.0 * comm.rank), total, MPI.MAX, 0).Wait()
    assert comm.rank or (total == comm.size - 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spimpi.checked(part).Scan(np.ones(2), total)
        checked.comm.Exscan(np.ones(2), total)
        assert (checked.rank, checked.size, checked.Get_size()) == (comm.rank, comm.size, comm.size)
        checked.Barrier()
        with pytest.raises(spimpi.UncheckedWarning):
            checked.Exscan(np.ones(2), total)
    assert checked.unchecked == {
        "Scan": 2, "allreduce": 1, "Allreduce by MPI.PROD": 1, "Ireduce by MPI.MAX": 1, "Exscan": 1,
    }  # fmt: skip
    part.Free()


@pytest.mark.mpi(min_size=2)
def test_a_request_is_completed_before_an_unchecked_collective(comm):
    """Rank 0 waits first, the others call the collective first; the check fails, on all."""
    checked = spimpi.checked(comm, check=False)
    inner = checked.comm
    spoilt(checked, 1)
    request = checked.Iallgather(np.ones(2), np.zeros(2 * comm.size))
    checked.comm = inner
    if comm.rank == 0:
        request.Wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checked.Scan(np.ones(1), np.zeros(1))
        checked.bcast(None)
    request.Wait()
    assert not request.verdict and request.verdict.where.rank == 1
