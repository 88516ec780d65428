"""The confusion matrix: its trials run the library's own checks, a blind check shows in it, and the
document's tables are those of its data file."""

from pathlib import Path

import numpy as np
import pytest

from spimpi.bench import confusion, matrix
from spimpi.bench.cases import (
    BOUND, COMPUTED, CONTENT, FLOATS, IN_ONE_PROCESS, PAINTED, SHARDS,
)  # fmt: skip
from spimpi.bench.matrix import ON_MPI, ONE_PROCESS
from spimpi.bench.scenes import CLEAN, LOST, MIXED, RECORD, TWICE
from spimpi.checks.sums.float_bound import factors

DOCS = Path(__file__).parents[2] / "docs"
NOTHING = lambda *_, **__: 0  # noqa: E731


def counted(rows):
    """{fault: (missed, tried)} of all rows."""
    faults = dict.fromkeys(row[2] for row in rows)
    return {f: tuple(sum(row[i] for row in rows if row[2] == f) for i in (5, 6)) for f in faults}


def trials(check, dtype="float32", share=0.01):
    return counted(confusion.case_rows(check, dtype, share))


@pytest.mark.parametrize("case", CONTENT, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "complex64"])
def test_content_fingerprints_miss_nothing(case, dtype):
    counts = trials(case.name, dtype)
    assert set(counts) == {*case.faults, CLEAN}
    for fault, (missed, tried) in counts.items():
        assert missed == 0 and tried >= 3, fault


# Where each check takes its fingerprints: patched, it compares nothing with nothing.
EYES = {
    "at_rest": ["spimpi.checks.at_rest.fingerprint"],
    "verify_weights": ["spimpi.checks.weights.fingerprint",
                       "spimpi.bench.moved_trials.fingerprint"],
    "manifest check": ["spimpi.manifest.make.fingerprint_shares",
                       "spimpi.manifest.check.fingerprint_shares"],
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENT, ids=lambda case: case.name)
def test_a_blind_check_is_shown_to_miss_everything(case, monkeypatch):
    def blind(source, *_, **__):
        return dict.fromkeys(getattr(source, "tensors", ()), 0) if "manifest" in case.name else 0

    for eye in EYES.get(case.name, ["spimpi.checks.check.fingerprint"]):
        monkeypatch.setattr(eye, blind)
    counts = trials(case.name)
    for fault in case.faults:
        missed, tried = counts[fault]
        assert missed == (0 if fault in (RECORD, LOST, TWICE) else tried) and tried, fault
    assert counts[CLEAN][0] == 0


def test_a_check_that_forgets_agreement_is_shown_to_miss_wrong_replicas(monkeypatch):
    from spimpi.checks import pending

    def forgetful(checks, fold=pending.fold):
        record, clean = fold(checks)
        record[2:4] = clean[2:4] = [0, 0]
        return record, clean

    monkeypatch.setattr(pending, "fold", forgetful)
    for check in ("verify_replicas", "verify_allgather"):
        missed, tried = trials(check, share=0.05)["a wrong replica"]
        assert 0 < missed <= tried


def test_a_handoff_that_reads_no_record_is_shown_to_miss_it(monkeypatch):
    monkeypatch.setattr("spimpi.checks.point_to_point.order_problem", lambda *_: "")
    counts = trials("verify_pipeline_handoff")
    assert counts[RECORD][0] == counts[RECORD][1] > 0
    assert counts["zeros for data"][0] == 0


def test_a_chain_that_forgets_what_went_before_is_shown_to_miss_mixed_up_ones(monkeypatch):
    monkeypatch.setattr("spimpi.checks.point_to_point.absorb", NOTHING)
    counts = trials("HandoffChain")
    assert counts[MIXED][0] == counts[MIXED][1] > 0
    assert counts["zeros for data"][0] == counts[CLEAN][0] == 0


@pytest.mark.parametrize(
    ("check", "name", "value"),
    [
        ("verify_allreduce: bound", "spimpi.checks.sums.float_bound.excess", lambda own, r: 0 * r),
        ("verify_allreduce: integers", "spimpi.checks.sums.exact.differ", NOTHING),
        ("checked().Allreduce: integers", "spimpi.checks.sums.exact.differ", NOTHING),
        ("exact_allreduce", "spimpi.checks.sums.exact.differ", NOTHING),
        ("verify_matmul", "spimpi.checks.matmul._wrong_rows", lambda *_: []),
        ("verify_colors", "spimpi.checks.colors.is_clean", lambda *_: True),
    ],
)
def test_a_check_of_values_that_compares_nothing_is_shown_to(check, name, value, monkeypatch):
    dtype = "int64" if "integers" in check or "matmul" in check else "float32"
    assert trials(check, dtype)["zeros for data"][0] == 0
    monkeypatch.setattr(name, value)
    missed, tried = trials(check, dtype)["zeros for data"]
    assert missed == tried > 0


def test_a_check_that_always_alarms_is_shown_to(monkeypatch):
    noise = np.random.default_rng(1)
    monkeypatch.setattr(
        "spimpi.checks.check.fingerprint", lambda *_: int(noise.integers(1 << 63))
    )
    missed, tried = trials("verify_gather")[CLEAN]
    assert missed == tried > 0


def test_a_bound_without_room_for_rounding_is_shown_to_alarm(monkeypatch):
    monkeypatch.setattr("spimpi.checks.sums.float_bound.phi", lambda *_: 0.0)
    factors.cache_clear()
    try:
        assert trials(BOUND.name)[CLEAN][0] > 0
    finally:
        factors.cache_clear()


@pytest.mark.parametrize("case", COMPUTED, ids=lambda case: case.name)
def test_sums_and_products_give_no_false_alarm_and_see_what_is_large(case):
    counts = trials(case.name, case.dtypes[-1])
    assert counts[CLEAN][0] == 0 < counts[CLEAN][1]
    if case.name != "compare_sketches":  # they see a part of it, by what rounding explains
        assert counts["zeros for data"][0] == 0 < counts["zeros for data"][1]


def test_one_wrong_element_of_a_sum_is_missed_below_the_stated_size_alone():
    for dtype in ("bfloat16", "float64"):
        counts = counted(confusion.size_rows(dtype, 0.02))
        smallest, *_, largest = (name for _, name in matrix.SIZES)
        assert counts[smallest][0] > 0.8 * counts[smallest][1] > 0
        assert counts[largest][0] == 0 < counts[largest][1]


def test_painting_misses_one_element_at_its_rate(monkeypatch):
    monkeypatch.setattr(confusion, "PAINTED_ELEMENTS", 1 << 14)
    for dtype, rate in (("float16", 2**-2), ("float32", 2**-8)):
        missed, tried = counted(confusion.painting_rows(dtype))[matrix.UPPER_BITS]
        assert abs(missed - tried * rate) < 5 * (tried * rate) ** 0.5


def test_todays_checksums_do_not_see_order():
    rows = confusion.others_rows("float32", 0.1)
    swapped = {row[1]: row for row in rows if row[2] == "two elements swapped"}
    *_, missed, tried = swapped["sum of words"]
    assert missed == tried > 0
    assert counted(rows)[CLEAN][0] == 0


def test_a_cell_is_the_same_in_every_run():
    first, second = (confusion.case_rows("verify_ring", "int32", 0.01) for _ in range(2))
    assert first == second


def test_a_matrix_is_read_as_it_was_written(tmp_path):
    rows = confusion.case_rows("verify_scatter", "float64", 0.01)
    rows.append((ON_MPI, "verify_scatter", CLEAN, "int64", 3, 2, 5))
    matrix.write(tmp_path / "m.csv", rows)
    assert sorted(matrix.read(tmp_path / "m.csv")) == sorted(rows)


# The published matrix


@pytest.fixture(scope="module")
def published():
    return matrix.read(DOCS / "confusion-matrix.csv")


def test_the_documents_tables_are_those_of_its_data(published):
    text = (DOCS / "what-pass-means.md").read_text()
    for title, table in matrix.tables(published).items():
        assert table in text, title


def test_every_cell_of_every_check_was_tried(published):
    tried = {row[:5] for row in published if row[6]}
    for case in IN_ONE_PROCESS:
        never = {("a contribution counted twice", "verify_allreduce: MAX")}  # changes nothing
        for fault in (*case.faults, CLEAN):
            if (fault, case.name) in never:
                continue
            for dtype in case.dtypes:
                for n in SHARDS:
                    assert (ONE_PROCESS, case.name, fault, dtype, n) in tried


def test_a_million_faults_none_missed_and_a_million_clean_trials_without_an_alarm(published):
    content = {case.name for case in CONTENT}
    counts = [0, 0]
    for _, check, fault, _, _, missed, tried in published:
        if check in content and fault != CLEAN:
            assert missed == 0
            counts[0] += tried
        elif fault == CLEAN and check not in matrix.OTHERS:
            assert missed == 0
            counts[1] += tried
    assert min(counts) >= 1_000_000


def test_the_published_painting_rates_are_two_to_the_minus_m(published):
    for dtype, m in zip(PAINTED, (2, 2, 8, 16)):
        rows = [row for row in published if row[2:4] == (matrix.UPPER_BITS, dtype)]
        missed, tried = (sum(row[i] for row in rows) for i in (5, 6))
        expected = tried * 2.0**-m
        assert abs(missed - expected) < 4 * np.sqrt(expected)


def test_no_published_error_above_the_stated_size_was_missed(published):
    largest = matrix.SIZES[-1][1]
    rows = [row for row in published if row[2] == largest]
    assert {row[3] for row in rows} == set(FLOATS)
    assert all(row[5] == 0 < row[6] for row in rows)
