"""Faults in the running program: a seeded part of the campaign, and that it can't pass in vain.

What it found as a whole is in docs/runtime-faults.csv (tests/bench/test_runtime_faults.py).
"""

import numpy as np
import pytest

from spimpi.bench.runtime_faults import campaign, table
from spimpi.bench.runtime_faults.fault import Fault, after
from spimpi.bench.runtime_faults.faults import FAULTS
from spimpi.bench.runtime_faults.modes import MODES, golden_of
from spimpi.bench.runtime_faults.trial import DISAGREE, NOTHING
from spimpi.checks.recorder import Recorder
from spimpi.trace.schema import Status

pytestmark = pytest.mark.mpi

PART = 8  # one of so many faults in each mode, times the number of ranks
BY_NAME = {fault.name: fault for fault in FAULTS}
IN_MEMORY = BY_NAME["attn in memory"]
NO_CHANGE = Fault("nothing", "nothing", IN_MEMORY.place, lambda call, hand: call.proceed())


def modes(comm):
    return [mode for mode in MODES if mode.n_ranks == comm.size]


def trials(comm, *faults, mode=None):
    """(rows, clean trials, alarms) of some faults in one mode."""
    with campaign.quick_and_repeatable():
        return comm.bcast(campaign.in_mode(comm, mode or modes(comm)[0], faults))


def test_a_part_of_the_campaign(comm):
    rows, clean, alarms = campaign.campaign(comm, modes(comm), FAULTS, trials=1, part=PART * comm.size)
    assert clean >= 2 and not alarms
    assert sum(row.struck for row in rows) > 10
    for row in rows:
        fault = BY_NAME[row.fault]
        assert row.status != DISAGREE, row
        if not row.struck:
            assert row.status == 0, row
        elif row.unseen:
            assert table.reason(row.fault, row.mode) and not row.golden, row
        assert not (row.struck and fault.harmless and row.differs != NOTHING), row


def test_a_fault_is_located(comm):
    rows, _, _ = trials(comm, IN_MEMORY)
    assert len(rows) == 4  # prefill and decoding, with and without a golden run
    for row in rows:
        assert row.struck and row.status == 1 and row.place and row.rank == "right", row


def test_what_nobody_can_see_is_reported_unseen(comm):
    """After the last look at logits, the observer's copy of them changes: no check is there."""
    hidden = Fault(
        "logits after all checks", "unseeable", "spimpi.inference.head:Head.sample",
        after(lambda call: call.owner.logits, lambda call: call.owner.gathered),
    )  # fmt: skip
    rows, _, _ = trials(comm, hidden)
    assert rows and all(row.struck and row.unseen for row in rows)


def test_a_check_that_is_switched_off_is_reported_unseen(comm, monkeypatch):
    """Failed checks are recorded as good ones: the fault that was seen above no longer is."""
    add = Recorder.add

    def blind(self, events, seconds):
        events["verdict"][events["verdict"] == Status.FAILED] = Status.VERIFIED
        add(self, events, seconds)

    monkeypatch.setattr(Recorder, "add", blind)
    rows, _, alarms = trials(comm, IN_MEMORY)
    assert not alarms
    without = [row for row in rows if not row.golden]
    assert without and all(row.struck and row.unseen for row in without)


def test_an_alarm_without_a_fault_is_reported(comm, monkeypatch):
    add = Recorder.add

    def nervous(self, events, seconds):
        events = np.array(events)
        events["verdict"][:1] = Status.FAILED
        add(self, events, seconds)

    golden_of(modes(comm)[0])  # made while nobody is nervous
    monkeypatch.setattr(Recorder, "add", nervous)
    rows, clean, alarms = trials(comm, NO_CHANGE)
    assert len(alarms) == clean == 2
    assert not any(row.struck for row in rows)
