"""``spimpi trace report``: the worst of several runs, who is at fault, and what no run can have."""

import re

import numpy as np
import pytest
from report_pages import (
    LAYERS, REPLICAS, VERDICTS, Page, decoder, golden, page_of, replicas, report, sections_of,
    title_of,
)  # fmt: skip
from trace_samples import failing, write_alone_trace

pytest.importorskip("jinja2", reason="reports need jinja2: pip install 'spimpi[report]'")

from spimpi.trace.schema import Op, Stage, Status


def test_of_several_runs_the_worst_gives_the_title_and_comes_first(tmp_path):
    """Whatever their order in the call; with its host and its date."""
    made = {
        "good": replicas(3, seed=5), "bad": replicas(3, odd_rank=1, seed=5),
        "worse": [failing(e, 0, op=Op.AT_REST) for e in replicas(3, odd_rank=1, seed=5)],
    }  # fmt: skip
    for name, ranks in made.items():
        write_alone_trace(tmp_path / f"{name}.h5", ranks)
    files = [tmp_path / f"{name}.h5" for name in made]
    assert report(*files, "-o", tmp_path / "page.html") == 1
    page = Page(tmp_path / "page.html")
    assert title_of(page) == "CORRUPTED: worse.h5 and 2 more – spimpi report"
    top = page.text[page.text.index("CORRUPTED") : page.text.index("The runs")]
    assert "Of 3 runs 2 corrupted; 1 verified." in " ".join(top.split())
    assert "The worst: worse.h5 (" in top and "first at step 0, layer 0, tensor hidden." in top
    assert sections_of(page) == ["worse.h5", "bad.h5", "good.h5"]
    runs = page.records("The runs")
    assert [r["run"] for r in runs] == sections_of(page)
    assert all(r["host"] and re.fullmatch(r"\d{4}-\d\d-\d\d .* UTC", r["started"]) for r in runs)
    assert report(*files[::2], files[0], "-o", tmp_path / "page.html", "--overwrite") == 1
    assert sections_of(Page(tmp_path / "page.html"))[0] == "worse.h5"
    assert report(files[0], "-o", tmp_path / "good.html") == 0
    assert title_of(Page(tmp_path / "good.html")) == "VERIFIED: good.h5 – spimpi report"


def test_the_one_run_of_many_that_failed_is_pictured(tmp_path):
    from spimpi.trace.report.page import MOST_PICTURED

    write_alone_trace(tmp_path / "good.h5", [golden()])
    write_alone_trace(tmp_path / "bad.h5", [failing(golden(), 4)])
    files = [tmp_path / "good.h5"] * (MOST_PICTURED + 3) + [tmp_path / "bad.h5"]
    assert report(*files, "-o", tmp_path / "page.html") == 1
    page = Page(tmp_path / "page.html")
    assert sections_of(page)[0] == "bad.h5" and len(sections_of(page)) == MOST_PICTURED
    assert "the last 4 runs of the table" in page.text
    assert [r["run"] for r in page.records("The runs")][0] == "bad.h5"


def test_at_fault_is_who_is_blamed_and_no_one_else(tmp_path):
    """Rank 1 flips a bit; then all replicas of the later layers differ, and nobody is named."""
    ranks = replicas(4)
    for rank, events in enumerate(ranks):
        later = (events["op"] == Op.AGREEMENT) & (events["step"] == 1) & (events["layer"] > 2)
        events["verdict"][later], events["tensor"][later] = Status.FAILED, 2
        if rank == 1:
            row = np.flatnonzero((events["step"] == 1) & (events["layer"] == 2))[0]
            ranks[rank] = failing(events, row, op=Op.AT_REST)
    page = page_of(tmp_path, ranks, status=1)
    assert re.search(r"At fault\s*rank 1 ", page.text)
    says = {(r["rank"], r["layer"]): r["says"] for r in page.records(VERDICTS)}
    at_fault = {place for place, said in says.items() if said.startswith("at fault")}
    assert at_fault == {("1", "2")}
    assert says["0", "4"] == says["1", "4"] == "a check failed; its rank is not blamed for it"
    assert all("rank 1, layer 2" in name for name in page.links if "all checks" in name)


def test_where_nobody_is_blamed_the_first_failure_stands_out_all_the_same(tmp_path):
    ranks = [decoder(np.ones((3, LAYERS))) for _ in range(3)]
    for events in ranks:
        for layer in (2, 4):
            row = np.flatnonzero((events["step"] == 1) & (events["layer"] == layer))[0]
            events["op"][row], events["verdict"][row] = Op.ALLREDUCE_SUM, Status.FAILED
    page = page_of(tmp_path, ranks, status=1)
    assert "not told by the checks" in page.text
    assert not any("at fault" in r["says"] for r in page.records(VERDICTS))
    found = [name for name in page.links if "all checks" in name]
    assert len(found) == 3 and all("first divergence: " in n and "layer 2" in n for n in found)


def test_the_map_that_holds_the_first_divergence_comes_first(tmp_path):
    ranks = replicas(3, odd_rank=1, step=1, layer=4)
    maps = [name for name in page_of(tmp_path, ranks, status=1).tables if "Rank × layer" in name]
    assert maps[0] == REPLICAS
    ranks[1] = failing(ranks[1], (1 * LAYERS + 3) * 2, op=Op.AT_REST)
    page = page_of(tmp_path, ranks, status=1)
    assert [name for name in page.tables if "Rank × layer" in name][:2] == [VERDICTS, REPLICAS]
    ringed = [name for name in page.links if name.startswith("first divergence")]
    assert ringed and all("all checks" in name and "layer 3" in name for name in ringed)


def test_two_ends_of_which_one_is_at_fault_are_suspected(tmp_path):
    ranks = [decoder(np.ones((3, LAYERS))) for _ in range(3)]
    for rank, peer in ((0, 2), (2, 0)):
        row = np.flatnonzero((ranks[rank]["step"] == 1) & (ranks[rank]["layer"] == 2))[0]
        ranks[rank] = failing(ranks[rank], row, op=Op.HANDOFF, stage=Stage.PIPELINE, peer=peer)
    page = page_of(tmp_path, ranks, status=1)
    says = {(r["rank"], r["layer"]): r["says"] for r in page.records(VERDICTS)}
    suspected = "at fault, or suspected: its check failed"
    assert says["0", "2"] == says["2", "2"] == suspected and says["1", "2"] == "all held"


def timed(times):
    ranks = replicas(2)
    for events in ranks:
        events["t_start"], events["t_end"] = times
    ranks[0]["t_start"][0], ranks[0]["t_end"][0] = 0.0, 1.0
    return ranks


@pytest.mark.parametrize("times", [(-2e9, 2e9), (0.0, 5e-324)])
def test_times_of_no_run_are_left_out_of_the_timeline(tmp_path, times):
    text = page_of(tmp_path, timed(times)).text
    left_out = times[1] != 5e-324
    assert ("71 checks whose times can be of no run are left out" in text) == left_out


@pytest.mark.parametrize("times", [(-1e308, 1e308), (np.nan, 1.0), (0.0, np.inf)])
def test_times_that_are_none_are_damage(tmp_path, times):
    assert "INCOMPLETE" in page_of(tmp_path, timed(times), status=3).text


@pytest.mark.parametrize("most", [0.0, 5e-324, 1e-320, 1e308, np.inf, np.nan, -1.0])
def test_an_axis_of_any_length_ends(most):
    from spimpi.trace.report.svg import ticks

    assert ticks(most) == [0.0]
    assert ticks(10.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_rank_numbers_take_no_memory_and_numbers_out_of_range_no_picture(tmp_path):
    """As a forged file has them; the lookup is by search."""
    from spimpi.trace.names import RankPlaces
    from spimpi.trace.schema import RankInfo

    for numbers in ([2**31 - 1, -1, 7], [0, 1, 2], [5], []):
        places = RankPlaces([RankInfo(n, "h", 1, "", 0.0, 0, 0, 0) for n in numbers])
        asked = [*numbers, 3, -2, 2**31 - 2]
        expected = [numbers.index(n) if n in numbers else -1 for n in asked]
        assert places.of(np.array(asked)).tolist() == expected


def test_what_turns_or_hides_text_is_written_out(tmp_path):
    name = "run \u202egnp.h5"
    write_alone_trace(tmp_path / name, replicas(2), model="a\x1b[31m\u200bb")
    assert report(tmp_path / name, "-o", tmp_path / "run.html") == 0
    page = Page(tmp_path / "run.html")
    assert not set("\x1b\u202e\u200b") & set(page.source)
    assert r"run \u202egnp.h5" in page.text and r"a\x1b[31m\u200bb" in page.text
