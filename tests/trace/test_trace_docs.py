"""The example of docs/trace.md runs as it stands there, with nothing but h5py and numpy."""

import subprocess
import sys
from pathlib import Path

import pytest
from trace_samples import failing, some_events, write_alone_trace, write_trace

from spimpi.trace.schema import EVENT, SKETCH_SHARE, Op

PAGE = (Path(__file__).parents[2] / "docs" / "trace.md").read_text()


def example(number: int = 1) -> str:
    return PAGE.split("```python\n")[number].split("```")[0]


def test_the_example_of_the_page_finds_the_planted_failure(tmp_path, one, driver):
    events = failing(some_events(100), 60, step=7, layer=3, tensor=1, op=Op.MATMUL)
    write_trace(one, tmp_path / "run.h5", events, driver)
    done = subprocess.run(
        [sys.executable, "-c", example()], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (line,) = done.stdout.splitlines()
    assert line.split()[:5] == ["7", "3", "hidden", "MATMUL", "0"]
    assert line.split()[-1] == hex(events["expected"][60])


def test_the_example_with_spimpi_finds_it_too(tmp_path, one, monkeypatch):
    pytest.importorskip("xarray", reason="needs the extra spimpi[trace]")
    events = [failing(some_events(100, seed), 60, layer=3, op=Op.MATMUL) for seed in range(8)]
    write_alone_trace(tmp_path / "run.h5", events)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(example(2), found)  # noqa: S102
    assert list(found["failed"]["rank"]) == list(range(8)) and set(found["failed"]["op"]) == {"MATMUL"}
    assert set(found["layer3"].columns) == {"step", "op", "t_end"}
    assert len(found["layer3"]) == sum((events[rank]["layer"] == 3).sum() for rank in (0, 7))


def test_the_example_needs_ten_lines_and_no_spimpi():
    lines = [line for line in example().splitlines() if line and not line.startswith("import")]
    assert len(lines) <= 10 and "spimpi" not in example()


def test_the_page_names_every_column():
    assert all(f"`{name}`" in PAGE for name in EVENT.names + SKETCH_SHARE.names)
