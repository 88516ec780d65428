"""The campaign of faults in the running program: its registry, and what was published of it.

Its trials run on MPI ranks: tests/mpi/test_mpi_runtime_faults.py.
"""

from collections import Counter
from pathlib import Path

import pytest

from spimpi.bench.runtime_faults import table
from spimpi.bench.runtime_faults.fault import Hand, nudge
from spimpi.bench.runtime_faults.faults import FAULTS
from spimpi.bench.runtime_faults.hooks import Now, _owner_of, patched
from spimpi.bench.runtime_faults.modes import MODES
from spimpi.bench.runtime_faults.trial import LOGITS, NOTHING, TEXT, Row
from spimpi.context import COMMUNICATORS

DOCS = Path(__file__).parents[2] / "docs"
OPEN_KINDS = 5


def test_there_are_more_than_a_hundred_faults_in_places_that_exist():
    assert len(FAULTS) >= 100
    assert len({(f.place, f.name) for f in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        if ":" in fault.place:
            owner, name = _owner_of(fault.place)
            assert callable(getattr(owner, name)), fault.place
        else:
            assert fault.place.partition(".")[0] in COMMUNICATORS
        assert any(fault.fits(mode) for mode in MODES), fault.name


def test_what_is_left_open_is_few_kinds_with_a_reason():
    assert len({fault.why for fault in FAULTS if fault.why}) <= OPEN_KINDS


def test_modes_cover_every_way_to_split():
    names = " ".join(mode.name for mode in MODES)
    for word in ("tp=2", "tp=3", "pp=2", "dp=2", "sp=2", "exo", "tp=1", "OLMo", "blas"):
        assert word in names


def test_a_patched_place_is_put_back(monkeypatch):
    place = "spimpi.inference.head:argmax"
    owner, name = _owner_of(place)
    before, seen = getattr(owner, name), []

    def listen(call):
        seen.append(call["pieces"])
        call.result = "another"

    with pytest.raises(RuntimeError), patched(Now(), {place: [listen]}):
        assert owner.argmax("pieces") == "another"
        raise RuntimeError
    assert getattr(owner, name) is before and seen == ["pieces"]


def test_a_hand_knows_whether_it_changed_a_bit():
    import numpy as np

    hand = Hand(np.random.default_rng(1))
    array = np.arange(6, dtype=np.float32)
    hand.edit(array, lambda a, rng: None)
    assert not hand.struck
    hand.edit(array.reshape(2, 3)[:, 1:], nudge)  # a view whose elements lie apart
    assert hand.struck and (array != np.arange(6)).sum() == 1


def row(fault, **facts):
    return Row(**(dict(
        mode="tp=1 (Llama)", golden=False, fault=fault, step=0, layer=1, struck_rank=0, struck=True,
        differs=TEXT, status=1, place=True, rank="right", said="",
    ) | facts))  # fmt: skip


def test_rows_are_added_up():
    name = "attn in memory"
    rows = [row(name), row(name, status=0, place=False), row(name, differs=LOGITS, rank="wrong"),
            row(name, struck=False, differs=NOTHING, status=0)]  # fmt: skip
    (line,) = table.lines_of(rows)
    assert (line.tried, line.struck, line.text, line.logits, line.seen) == (4, 3, 2, 1, 2)
    assert (line.unseen_text, line.unseen_logits) == (1, 0)
    assert (line.place, line.rank_right, line.rank_wrong) == (2, 1, 1)
    assert "**not expected**" in table.tables([line])[table.UNSEEN]


# What was published


@pytest.fixture(scope="module")
def published():
    return table.read(DOCS / "runtime-faults.csv")


def test_lines_are_read_as_they_were_written(tmp_path, published):
    table.write(tmp_path / "lines.csv", published)
    assert table.read(tmp_path / "lines.csv") == published


def test_the_documents_tables_are_those_of_its_data(published):
    text = (DOCS / "what-pass-means.md").read_text()
    for title, made in table.tables(published).items():
        assert made in text, title


def test_every_fault_struck_somewhere(published):
    struck = Counter()
    for line in published:
        struck[line.fault] += line.struck
    assert [fault.name for fault in FAULTS if not struck[fault.name]] == []


def test_with_a_golden_run_nothing_that_changes_text_or_logits_went_unseen(published):
    assert [line for line in published if line.run == table.WITH
            and line.unseen_text + line.unseen_logits] == []  # fmt: skip


def test_without_one_what_went_unseen_is_what_is_known_to(published):
    for line in published:
        if line.unseen_text + line.unseen_logits:
            assert table.reason(line.fault, line.mode), line
