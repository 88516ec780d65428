"""The benchmark of reading, of a small trace."""

import pytest

from spimpi.bench import reading
from spimpi.bench.synthetic_trace import RANK_AT_FAULT, synthetic_trace
from spimpi.trace import open as open_trace
from spimpi.trace.schema import Status


def test_a_synthetic_trace_is_intact_and_holds_the_planted_failures(tmp_path):
    synthetic_trace(tmp_path / "run.h5", 20, 400)
    synthetic_trace(tmp_path / "clean.h5", 3, 400, fails=False)
    with open_trace(tmp_path / "run.h5") as trace, open_trace(tmp_path / "clean.h5") as clean:
        rows = trace.events()
        assert trace.complete and len(rows) == 8000
        assert sum(1 for _ in trace.intact_events()) == 20 and trace.complete
        assert not (clean.events()["verdict"] == Status.FAILED).any()
        assert set(rows["verdict"][: 200]) == {Status.VERIFIED}
        pytest.importorskip("pandas", reason="needs the extra spimpi[trace]")
        failed = trace.to_pandas(where="verdict == 'FAILED'")
        assert set(failed["rank"][failed["op"] == "MATMUL"]) == {RANK_AT_FAULT}
        assert set(failed["rank"]) == set(range(20)) and failed["step"].min() >= 2


def test_all_figures_are_measured(tmp_path):
    pytest.importorskip("pandas", reason="needs the extra spimpi[trace]")
    figures = reading.measure(8, 400, tmp_path)
    assert figures["events"] == 3200 and all(value > 0 for value in figures.values())
    assert not list(tmp_path.iterdir())
