"""The confusion matrix's script: it counts what it says, and a blind check shows in it."""

import pytest

from spimpi.bench import confusion
from spimpi.bench.planted import MOVEMENT

CLEAN = "nothing: false alarms"


def test_fingerprints_miss_no_fault_and_todays_checksums_do():
    table = confusion.content_trials(1000, 200)
    assert set(table) == {*MOVEMENT, CLEAN}
    for fault, row in table.items():
        missed, tried = row["fingerprint"]
        assert (missed, tried >= 30) == (0, True), fault
    missed, tried = table["two elements swapped"]["sum of words"]
    assert missed == tried > 0
    assert table["the same bit of every n-th element"]["XOR of words"][0] > 0


def test_a_check_that_sees_nothing_is_shown_to_miss_everything(monkeypatch):
    monkeypatch.setattr(confusion, "fingerprint", lambda *_: 0)
    table = confusion.content_trials(100, 50)
    missed, tried = table["zeros for data"]["fingerprint"]
    assert missed == tried > 0
    assert table[CLEAN]["fingerprint"][0] == 0


def test_a_check_that_always_alarms_is_shown_to():
    counter = iter(range(10**9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confusion, "fingerprint", lambda *_: next(counter))
        missed, tried = confusion.content_trials(20, 50)[CLEAN]["fingerprint"]
    assert missed > tried / 2


def test_painting_misses_one_element_at_its_rate_and_many_never():
    table = confusion.painting_trials(8000)
    for name in ("float16", "bfloat16"):
        missed, tried = table["1 bit of one element"][name]
        assert 0.1 < missed / tried < 0.4  # 2**-2, of the bits above the colour
    for fault in ("zeros for data", "another rank's shard in its place", CLEAN):
        assert all(missed == 0 for missed, _ in table[fault].values()), fault


def test_sums_are_missed_below_the_stated_size_alone():
    table = confusion.sum_trials(800)
    for fault, row in table.items():
        assert row["bound, above its stated size"][0] == 0, fault
        assert row["exact (integers)"][0] == row["agreement"][0] == 0, fault
    assert all(row[0] == 0 for row in table[CLEAN].values())
    missed, tried = table["one unit in the last place of one element"]["bound, float64"]
    assert missed == tried > 0


def test_a_table_becomes_markdown():
    text = confusion.markdown({"zeros": {"sum": (1, 20000), "exact": (0, 0)}})
    assert text.splitlines()[1:] == ["| fault | sum | exact |", "|---|---|---|",
                                     "| zeros | 1 / 20,000 |  |"]  # fmt: skip
