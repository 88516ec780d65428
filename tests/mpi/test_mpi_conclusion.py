"""The conclusion of a run: no exchange of it that goes wrong leaves "verified", and all ranks say the
same. What reaches one rank alone in the very last exchange is known to that rank alone."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import quick_fabric, verify

from spimpi.checks.recorder import Recorder
from spimpi.context import DistributedContext
from spimpi.errors import IncompleteError
from spimpi.inference.tensors import PROGRAM
from spimpi.trace.schema import Established, Op, Stage
from spimpi.verification import accounts, conclude

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]

JOB = SimpleNamespace(golden_wanted=False, exact=True, faults=("one", "two"))
NAMES = list(PROGRAM)


class Garbled:
    """A communicator whose n-th exchange gives ``spoil`` of what it should, on this rank."""

    def __init__(self, comm, n, spoil):
        self.comm, self.n, self.spoil, self.at = comm, n, spoil, 0
        self.changed = False

    def __getattr__(self, name):
        call = getattr(self.comm, name)
        if name not in ("Allreduce", "Iallreduce", "allreduce", "allgather", "bcast"):
            return call

        def run(*args, **kwargs):
            turn, self.at = self.at, self.at + 1
            result = call(*args, **kwargs)
            if turn != self.n:
                return result
            if name == "Iallreduce":
                result.Wait()
                result = SimpleNamespace(Wait=lambda: None, Test=lambda: True)
            if name[0].islower():
                spoilt = self.spoil(result)
                self.changed = repr(spoilt) != repr(result)
                return spoilt
            received = args[1][0]["total"] if isinstance(args[1], list) else args[1]
            before = received.tobytes()
            self.spoil(received)
            self.changed = received.tobytes() != before
            return result

        return run


def one_more(found):
    return _spoilt(found, lambda n: n + 1)


def negative(found):
    return _spoilt(found, lambda n: -n - 1)


def huge(found):
    return _spoilt(found, lambda n: n + (1 << 62))


def nothing(found):
    if isinstance(found, np.ndarray):
        found[:] = 0
    return None


def shuffled(found):
    if isinstance(found, np.ndarray):
        found[:] = np.roll(found, 1)
    return found[::-1] if isinstance(found, (list, tuple)) else "words"


def _spoilt(found, change):
    """Every number in what an exchange brought, changed."""
    if isinstance(found, np.ndarray):
        found[:] = change(found.view(np.int64)).view(found.dtype)
        return found
    if isinstance(found, bool) or found is None:
        return not found
    if isinstance(found, int):
        return change(found)
    if isinstance(found, (list, tuple)):
        return type(found)(_spoilt(one, change) for one in found)
    if isinstance(found, conclude._Said):
        return replace(found, n_failed=change(found.n_failed))
    return f"{found}!"


KINDS = (one_more, negative, huge, nothing, shuffled)


def recorder_of(rank, failed=False):
    recorder = Recorder({name: i for i, name in enumerate(NAMES)}, rank)
    for step in range(3):
        recorder.one(
            "attn", Op.AT_REST, Stage.COMPUTE, Established.MOVED, 1, 1 + (failed and step == 1),
            failed and step == 1, t_start=0.0, step=step, layer=2, bytes=64,
        )  # fmt: skip
    return recorder


def concluded(ctx, n=None, spoil=None, failing=()):
    """(the conclusion, its ``n``-th exchange spoilt here; how many it made; whether that changed
    anything)."""
    real = ctx.world
    ctx.world = garbled = Garbled(real, n, spoil)
    recorder = recorder_of(real.rank, real.rank in failing)
    try:
        found = conclude.conclusion(
            ctx, JOB, recorder, NAMES, False, 3, [True, real.rank == 0], "a golden file"
        )
    finally:
        ctx.world = real
    return found, garbled.at, real.allreduce(garbled.changed, op=MPI.LOR)


@pytest.fixture
def ctx(comm):
    with DistributedContext(comm) as ctx:
        ctx.hosts  # noqa: B018  collective on first use
        yield ctx


def test_what_all_ranks_counted_is_added_up(comm, ctx):
    found, _, _ = concluded(ctx)
    assert found.verdict and found.n_failed == 0 and found.n_events == 3 * comm.size
    assert found.totals[Stage.COMPUTE].checks == 3 * comm.size
    assert found.totals[Stage.COMPUTE].n_bytes == 192 * comm.size
    assert found.expected_from == "a golden file"


@pytest.mark.parametrize("spoil", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("struck", ["one rank", "all ranks"])
def test_no_exchange_that_goes_wrong_leaves_verified(comm, ctx, spoil, struck):
    _, n_exchanges, _ = concluded(ctx)
    assert n_exchanges >= 6
    culprit = comm.size - 1
    for n in range(n_exchanges):
        here = struck == "all ranks" or comm.rank == culprit
        found, made, changed = concluded(ctx, n if here else None, spoil)
        holds = comm.allgather((bool(found.verdict), str(found.verdict), found.n_failed, made))
        assert {made for *_, made in holds} == {n_exchanges}
        assert all(n_failed == 0 for _, _, n_failed, _ in holds)
        if not changed:  # such as equal words in another order
            continue
        assert not holds[culprit][0], (n, holds)
        if n < n_exchanges - 1 or struck == "all ranks":
            assert not any(held for held, *_ in holds), (n, holds)
            assert "do not fit together" in holds[0][1]


@pytest.mark.parametrize("spoil", KINDS, ids=lambda kind: kind.__name__)
def test_a_failure_stays_one_whatever_exchange_goes_wrong(comm, ctx, spoil):
    """Corrupted, or incomplete; the same on all ranks, and none waits for ever."""
    culprit = comm.size - 1
    found, n_exchanges, _ = concluded(ctx, failing={0})
    where = found.verdict.where
    assert (where.step, where.layer, where.tensor, where.rank) == (1, 2, "attn", 0)
    for n in range(n_exchanges):
        found, _, _ = concluded(ctx, n if comm.rank == culprit else None, spoil, failing={0})
        said = comm.allgather((bool(found.verdict), found.n_failed > 0, str(found.verdict)))
        assert not any(held for held, *_ in said)
        if n < n_exchanges - 1:
            assert len({failed for _, failed, _ in said}) == 1, (n, said)


@pytest.mark.parametrize("field", range(len(accounts.account(recorder_of(0), 3, [1, 1]))))
def test_a_number_of_one_rank_that_is_counted_wrong_is_not_verified(comm, ctx, monkeypatch, field):
    """What a rank hands in to one of the two sums alone."""
    def altered(own, real=accounts.empty_records):
        records = real(own)
        if comm.rank == comm.size - 1:
            def later(array):
                array["total"][field] += np.uint64(7)
            records = _Altered(records, later)
        return records

    class _Altered:
        """Records one of whose words is changed as they are sent."""

        def __init__(self, records, later):
            self.records, self.later = records, later

        def __setitem__(self, name, values):
            self.records[name] = values
            self.later(self.records)

        def __getattr__(self, name):
            return getattr(self.records, name)

    monkeypatch.setattr(accounts, "empty_records", altered)
    merge = ctx.records.merge
    monkeypatch.setattr(
        ctx.records, "merge", lambda comm, r: merge(comm, getattr(r, "records", r)), raising=False
    )
    found, _, _ = concluded(ctx)
    assert not found.verdict and "two reductions" in str(found.verdict)


def test_ranks_that_disagree_whether_anything_failed_all_stop(comm):
    """Between two repetitions: the struck rank must not stop alone."""
    with DistributedContext(comm) as ctx:
        recorder = recorder_of(comm.rank)
        assert not conclude.any_failed(ctx, recorder)
        real = ctx.world
        for n in (0, 1):
            for spoil in (one_more, negative, nothing):
                ctx.world = Garbled(real, n if comm.rank == comm.size - 1 else None, spoil)
                with pytest.raises(IncompleteError, match="do not fit together"):
                    conclude.any_failed(ctx, recorder)
        ctx.world = real
        assert conclude.any_failed(ctx, recorder_of(comm.rank, failed=comm.rank == 0))


def test_a_run_whose_failed_counts_disagree_is_incomplete(comm, monkeypatch):
    """The whole run: the sum of failed checks comes out wrong on one rank."""
    quick_fabric(monkeypatch)
    summed = conclude.summed

    def wrong(ctx, own):
        real = ctx.world
        ctx.world = Garbled(real, 1 if ctx.rank == comm.size - 1 else None, one_more)
        try:
            return summed(ctx, own)
        finally:
            ctx.world = real

    monkeypatch.setattr(conclude, "summed", wrong)
    outcome = verify(comm, tokens=1)
    assert comm.allgather(outcome.exit_status) == [3] * comm.size
    assert "two reductions" in str(outcome.verdict)


def test_checks_due_and_faults_that_changed_nothing_are_counted_over_all_ranks(comm, ctx):
    recorder = recorder_of(comm.rank)
    found = conclude.conclusion(ctx, JOB, recorder, NAMES, False, 4, [True, False], "")
    text = str(found.verdict)
    assert f"{4 * comm.size} checks were due, {3 * comm.size} were recorded" in text
    assert "injected faults that changed nothing: two" in text


def test_the_same_exchanges_are_made_whatever_was_found(comm, ctx):
    _, quiet, _ = concluded(ctx)
    _, loud, _ = concluded(ctx, failing={comm.size - 1})
    assert quiet == loud


def test_tokens_that_changed_on_any_rank_are_every_ranks_verdict(comm, ctx):
    culprit = comm.size - 1
    found = conclude.conclusion(
        ctx, JOB, recorder_of(comm.rank), NAMES, False, 3, [True, True], "", comm.rank != culprit
    )
    where = found.verdict.where
    assert not found.verdict and found.n_failed == 1
    assert (where.tensor, where.rank) == ("tokens", culprit)


def test_a_failure_that_no_rank_counts_is_corruption_still(comm, ctx):
    """The count of failed checks struck in memory, on the rank that has the failure."""
    recorder = recorder_of(comm.rank, failed=comm.rank == 0)
    for totals in recorder.totals.values():
        totals.failed = 0
    found = conclude.conclusion(ctx, JOB, recorder, NAMES, False, 3, [True, True], "")
    outcome = conclude.Outcome(found.verdict, {}, {}, found.n_events, found.n_failed, None, "")
    assert outcome.exit_status == 1 and found.n_failed and found.verdict.where.step == 1
