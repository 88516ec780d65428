"""``spimpi trace report``: what the page says, against the trace; its exit status."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from report_pages import (
    LAYERS, REPLICAS, VERDICTS, Page, decoder, golden, page_of, replicas, report, title_of,
)  # fmt: skip
from trace_samples import TENSORS, failing, some_events, write_alone_trace, write_journal

pytest.importorskip("jinja2", reason="reports need jinja2: pip install 'spimpi[report]'")

import spimpi.trace
from spimpi.trace.analysis.diff import diff
from spimpi.trace.report.facts import gather
from spimpi.trace.report.page import _difference
from spimpi.trace.schema import Op, Stage, Status, blank_events


def test_one_odd_square_is_the_faulty_rank(tmp_path):
    page = page_of(tmp_path, replicas(5, odd_rank=3), status=1, end_state="failed")
    found = [name for name in page.links if "hidden" in name]
    assert len(found) == 1
    assert found[0].startswith("first divergence: rank 3, layer 4, hidden: differs from 4 replicas")
    assert page.links[found[0]].removeprefix("#") in page.ids
    assert "CORRUPTED" in page.text
    assert "First divergence: step 1, layer 4, tensor hidden." in page.text
    assert re.search(r"At fault\s*rank 3 ", page.text)
    own = replicas(5, odd_rank=3)
    held = [int(e["fingerprint"][(e["step"] == 1) & (e["layer"] == 4)][0]) for e in own]
    assert re.search(rf"Rank 3 has\s*{held[3]:016x}\s*4 replicas have\s*{held[0]:016x}", page.text)


def test_of_two_replicas_that_differ_both_are_found(tmp_path):
    page = page_of(tmp_path, replicas(2, odd_rank=1), status=1)
    found = [n for n in page.links if "hidden" in n and "differs from 1 replica" in n]
    assert [name.split(", ")[0][-6:] for name in found] == ["rank 0", "rank 1"]


def test_replicas_of_other_data_do_not_differ(tmp_path):
    """As on the grid tp=3,dp=2: ranks 3 to 5 hold other prompts' rows."""
    page = page_of(tmp_path, replicas(3, seed=1) + replicas(3, seed=2))
    assert not page.links
    values = {tuple(r[c] for c in ("layer", "fingerprint")) for r in page.records(REPLICAS)}
    assert len(values) == 2 * LAYERS


def test_the_tables_hold_what_the_trace_holds(tmp_path):
    ranks = replicas(5, odd_rank=3)
    page = page_of(tmp_path, ranks, status=1)
    told = {(r["rank"], r["layer"]): r["fingerprint"] for r in page.records(REPLICAS)}
    expected = {
        (str(rank), str(e["layer"])): f"{e['fingerprint']:016x}"
        for rank, events in enumerate(ranks)
        for e in events[(events["step"] == 1) & (events["op"] == Op.AGREEMENT)]
    }
    assert told == expected
    by_op = {r["what"]: r for r in page.records("Bytes checked")}
    for op, name in ((Op.MATMUL, "matmul"), (Op.AGREEMENT, "agreement")):
        chosen = [events[events["op"] == op] for events in ranks]
        assert int(by_op[name]["bytes"]) == sum(int(e["bytes"].sum()) for e in chosen)
        assert int(by_op[name]["checks"]) == sum(map(len, chosen))
        n_failed = sum(int((e["verdict"] == Status.FAILED).sum()) for e in chosen)
        assert int(by_op[name]["failed"]) == n_failed
    assert len(page.records("Time")) == 5 * 3


def test_microbatches_of_a_tensor_make_one_square(tmp_path):
    ranks = replicas(3)
    halves = []
    for events in ranks:
        a, b = events.copy(), events.copy()
        a["microbatch"], b["microbatch"] = 0, 1
        b["fingerprint"], b["expected"] = 0x11, 0x11
        halves.append(np.concatenate([a, b]))
    page = page_of(tmp_path, halves)
    first = next(r for r in page.records(REPLICAS) if (r["rank"], r["layer"]) == ("0", "0"))
    whole = next(e for e in ranks[0] if e["step"] == 2 and e["op"] == Op.AGREEMENT)
    assert first["fingerprint"] == f"{int(whole['fingerprint']) ^ 0x11:016x}"


def test_a_shard_shows_its_verdict_and_its_witnesses(tmp_path):
    ranks = [decoder(np.ones((3, LAYERS))) for _ in range(3)]
    for rank, events in enumerate(ranks):
        row = int(np.flatnonzero((events["op"] == Op.MATMUL) & (events["layer"] == 2))[0])
        if rank == 1:
            ranks[rank] = failing(events, row, peer=1)
        if rank == 2:
            later = int(np.flatnonzero((events["op"] == Op.AGREEMENT) & (events["layer"] == 2))[0])
            ranks[rank] = failing(events, later, op=Op.ALLREDUCE_SUM, peer=1)
    page = page_of(tmp_path, ranks, status=1)
    says = {(r["rank"], r["layer"]): r["says"] for r in page.records(VERDICTS)}
    assert says["1", "2"] == "at fault, as a failed check says"
    assert says["2", "2"] == "a check failed; its rank is not blamed for it"
    assert says["0", "2"] == "all held"


def test_nan_that_came_from_before_blames_nobody(tmp_path):
    ranks = [decoder(np.ones((3, LAYERS))) for _ in range(3)]
    for rank, layer in ((1, 2), (2, 3)):
        events = ranks[rank]
        row = int(np.flatnonzero((events["op"] == Op.MATMUL) & (events["layer"] == layer))[0])
        events["op"][row], events["verdict"][row] = Op.AT_REST, Status.FAILED
        events["peer"][row], events["nonfinite"][row] = rank, 1
        events["expected"][row] ^= np.uint64(rank == 1)
    page = page_of(tmp_path, ranks, status=1)
    says = {(r["rank"], r["layer"]): r["says"] for r in page.records(VERDICTS)}
    assert says["1", "2"] == "at fault, as a failed check says"
    assert says["2", "3"] == "NaN or Inf, which came from before"
    assert all("rank 1, layer 2" in name for name in page.links)


def test_time_spent_checking_is_what_the_checks_cover():
    """Against a brute-force union on a grid of instants; however the rows are cut into blocks."""
    from spimpi.trace.reading.base import Block
    from spimpi.trace.report.spans import COLUMNS, Spans
    from spimpi.trace.schema import RankInfo

    rng = np.random.default_rng(7)
    infos = [RankInfo(r, "h", 1, "cpu", 100.0 + r, 0, 0, 0) for r in range(3)]
    events = some_events(240, seed=3)
    events["stage"], events["repeat"] = Stage.COMPUTE, 0
    events["step"] = rng.integers(0, 4, 240)
    events["t_start"] = rng.integers(0, 300, 240) / 64
    events["t_end"] = events["t_start"] + rng.integers(0, 40, 240) / 64
    rank = np.sort(rng.integers(0, 3, 240)).astype(np.int32)
    order = np.lexsort((events["t_start"], events["step"], rank))
    rank, events = rank[order], events[order]
    for cuts in ([240], [1, 50, 51, 130, 240]):
        spans, start = Spans(infos, np.arange(3)), 0
        for stop in cuts:
            columns = {name: events[name][start:stop].copy() for name in COLUMNS}
            spans.add(Block(rank[start:stop], columns))
            start = stop
        found = spans.spans([1, 1, 1])
        assert len(found) == 12
        for span in found:
            own = events[(rank == span.row) & (events["step"] == int(span.name.split()[1]))]
            instants = (np.arange(400) + 0.5) / 64
            covered = (own["t_start"][:, None] <= instants) & (instants < own["t_end"][:, None])
            assert span.checking == pytest.approx(covered.any(axis=0).sum() / 64)
            assert span.start == own["t_start"].min() + span.row
            assert span.end == own["t_end"].max() + span.row


EVIL = '<script>alert("1")</script>&amp;\'"'


def test_what_comes_out_of_a_file_is_no_markup(tmp_path, monkeypatch):
    import trace_samples
    from spimpi.trace.schema import TensorInfo

    evil = [TensorInfo(f"{EVIL}{i}", (-1,), "float32") for i in range(3)]
    monkeypatch.setattr(trace_samples, "TENSORS", evil)
    page = page_of(
        tmp_path, replicas(3, odd_rank=1), status=1, command=EVIL, topology=f"tp=3 {EVIL}",
        model=EVIL, injected=[EVIL],
    )  # fmt: skip
    assert not [name for name, _ in page.elements if name == "script"]
    assert "<script" not in page.source
    assert any(EVIL in name for name in page.links)
    assert EVIL in page.text


def test_the_page_needs_nothing_else(tmp_path):
    page = page_of(tmp_path, replicas(3, odd_rank=1), status=1)
    for name, attributes in page.elements:
        assert name not in ("script", "iframe", "object", "img", "embed")
        for key in ("src", "href", "data"):
            target = attributes.get(key, "#")
            assert target.startswith("#") or target == "data:,", (name, attributes)
    assert "url(http" not in page.source and "@import" not in page.source
    assert len(page.ids) == len(set(page.ids))
    assert {key.removeprefix("#") for key in page.links.values()} <= set(page.ids)
    for name, attributes in page.elements:
        if name == "svg" and "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in page.ids


def test_what_is_missing_has_a_banner_and_gives_exit_3(tmp_path, one):
    write_journal(one, tmp_path / "run.h5", some_events(30))
    assert report(tmp_path / "run.h5") == 3
    page = Page(tmp_path / "run.html")
    assert "Incomplete:" in page.text and "was never sealed" in page.text


def test_what_is_damaged_has_a_banner_and_is_left_out(tmp_path):
    import h5py

    write_alone_trace(tmp_path / "run.h5", replicas(3))
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        file["events/bytes"][5] = 7
    assert report(tmp_path / "run.h5") == 3
    page = Page(tmp_path / "run.html")
    assert "Damaged:" in page.text and "rank 0 on" in page.text
    assert {r["rank"] for r in page.records(REPLICAS)} == {"1", "2"}


def test_a_page_that_exists_is_kept(tmp_path, capfd):
    write_alone_trace(tmp_path / "run.h5", replicas(2))
    (tmp_path / "run.html").write_text("mine")
    assert report(tmp_path / "run.h5") == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert (tmp_path / "run.html").read_text() == "mine"
    assert report(tmp_path / "run.h5", "--overwrite") == 0
    assert report(tmp_path / "run.h5", "-o", "") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.h5", "run.html"]


def test_a_page_never_replaces_one_of_its_traces(tmp_path, capfd):
    for name in ("a.h5", "b.h5"):
        write_alone_trace(tmp_path / name, replicas(2))
    before = (tmp_path / "b.h5").read_bytes()
    files = [tmp_path / "a.h5", tmp_path / "b.h5"]
    assert report(*files, "-o", tmp_path / "b.h5", "--overwrite") == 2
    assert "it is of the trace" in capfd.readouterr().err
    assert (tmp_path / "b.h5").read_bytes() == before


@pytest.mark.parametrize("kind", ["absent", "other", "folder"])
def test_bad_input_gives_exit_2_and_one_line(tmp_path, kind, capfd):
    write_alone_trace(tmp_path / "good.h5", replicas(2))
    if kind == "other":
        (tmp_path / "run.h5").write_text("not a trace")
    status = report(
        tmp_path / ("good.h5" if kind == "folder" else "run.h5"),
        "-o", tmp_path / ("no/such/folder.html" if kind == "folder" else "page.html"),
    )  # fmt: skip
    assert status == 2 and capfd.readouterr().err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_without_jinja2_it_says_what_to_install(tmp_path, monkeypatch, capfd):
    write_alone_trace(tmp_path / "run.h5", replicas(2))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert report(tmp_path / "run.h5") == 2
    assert "pip install 'spimpi[report]'" in capfd.readouterr().err


def test_json_says_what_was_written(tmp_path, capfd):
    write_alone_trace(tmp_path / "run.h5", replicas(3, odd_rank=1))
    assert report(tmp_path / "run.h5", "--json") == 1
    found = json.loads(capfd.readouterr().out)
    assert found["output"] == str(tmp_path / "run.html") and found["exit_status"] == 1
    assert found["runs"][0]["verdict"] == "corrupted"


def test_several_runs_are_compared_with_the_first(tmp_path):
    for name, flip in (("a", None), ("b", None), ("c", 8)):
        write_alone_trace(tmp_path / f"{name}.h5", [golden(flip)])
    files = [tmp_path / f"{name}.h5" for name in "abc"]
    assert report(*files, "-o", tmp_path / "page.html") == 1
    page = Page(tmp_path / "page.html")
    runs = page.records("The runs")
    assert [r["run"] for r in runs] == ["c.h5", "a.h5", "b.h5"]
    assert "step 1, layer 2, hidden" in runs[0]["against the first run"]
    assert runs[2]["against the first run"].startswith("No difference")
    assert title_of(page) == "DIFFERENT: c.h5 and 2 more – spimpi report"
    assert report(*files[:2], "-o", tmp_path / "equal.html") == 0
    table = page.records("Growth of the difference: a.h5 and c.h5")
    assert [r["difference"] for r in table] == ["differs"] + ["equal"] * (3 * LAYERS - 1)
    assert (table[0]["step"], table[0]["layer"]) == ("1", "2")


def test_a_jump_of_the_difference_is_told_beside_a_first_one_that_is_rounding(tmp_path):
    for name, flip in (("a", None), ("b", 8)):
        write_alone_trace(tmp_path / f"{name}.h5", [golden(flip)])
    with spimpi.trace.open(tmp_path / "a.h5") as a, spimpi.trace.open(tmp_path / "b.h5") as b:
        found = diff(a, b)
    assert "jump" not in _difference(found)
    found.table["relative"][found.first] = 0.004
    said = _difference(replace(found, jump=found.first))
    assert "A jump at step 1, layer 2, hidden: relative 0.004, over 100 times all before" in said


def test_what_could_not_be_compared_is_no_equality(tmp_path):
    import h5py

    for name in ("a.h5", "b.h5"):
        write_alone_trace(tmp_path / name, [golden(), golden()])
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        file["events/bytes"][0] = 7
    files = [tmp_path / "a.h5", tmp_path / "b.h5"]
    assert report(*files, "-o", tmp_path / "page.html") == 3
    page = Page(tmp_path / "page.html")
    runs = page.records("The runs")
    assert runs[0]["against the first run"].startswith("Incomplete: no difference in the ")
    assert title_of(page).startswith("INCOMPLETE: b.h5 and 1 more")


def test_replicas_that_agreed_where_the_run_first_went_wrong_say_so(tmp_path):
    """The map of the tensor that was struck then has no ring."""
    ranks = replicas(3, odd_rank=1, step=1, layer=4)
    row = (1 * LAYERS + 3) * 2
    ranks[1] = failing(ranks[1], row, op=Op.AT_REST)
    said = "In layer 3 they agreed: the first divergence (at rest) is not in this map."
    assert said in page_of(tmp_path, ranks, status=1).text
    assert "they agreed" not in page_of(tmp_path, replicas(3, odd_rank=1), status=1).text


def test_what_a_run_spent_checking_is_shared_out_by_bytes(tmp_path):
    path = tmp_path / "run.h5"
    told = {"COMPUTE": 0.25, "TENSOR": 0.5, "WEIGHTS": 7.0, "GOLDEN": 9.0, "FABRIC": 5.0}
    write_alone_trace(path, replicas(3), checking_seconds=told)
    assert report(path, "-o", tmp_path / "run.html") == 0
    page = Page(tmp_path / "run.html")
    spent = {}
    for line in page.records("Time"):
        spent[line["rank"], line["step"]] = float(line["spent checking s"])
    with spimpi.trace.open(path) as trace:
        events = trace.events()
    share = events["bytes"][events["step"] == 1].sum() / events["bytes"].sum()
    of_step = sum(s for (_, step), s in spent.items() if step == "step 1")
    assert sum(spent.values()) == pytest.approx(3 * 0.75, rel=1e-4)
    assert of_step == pytest.approx(3 * 0.75 * share, rel=1e-4)
    assert "spent checking" in page.text and "checks span" not in page.text


def test_the_time_of_checks_is_not_called_time_spent_checking(tmp_path):
    """A layer's checks have the layer's time: the computation is in it."""
    text = page_of(tmp_path, replicas(2)).text
    assert "checks span" in text and "spent checking" not in text
    assert "Those of a layer span its computation too." in text


def test_runs_that_cannot_be_compared_are_shown_with_the_reason(tmp_path):
    write_alone_trace(tmp_path / "a.h5", [golden()], seed=1)
    write_alone_trace(tmp_path / "b.h5", [golden()], seed=2)
    assert report(tmp_path / "a.h5", tmp_path / "b.h5") == 3
    assert "they cannot be compared" in Page(tmp_path / "a.html").text


def test_the_growth_of_the_difference_is_drawn_by_its_size():
    from spimpi.trace.analysis.diff import COMPARED
    from spimpi.trace.report import growth

    class Found:
        table = np.zeros(10, COMPARED)
        names, first = ("hidden",), 4

    Found.table["layer"] = np.arange(10)
    Found.table["differs"][4:] = True
    Found.table["relative"][4:] = 10.0 ** np.arange(-8, -2)
    drawn = growth.draw(Found, "title")
    heights = [float(y) for y in re.findall(r'<circle cx="[^"]*" cy="([^"]*)"', drawn.svg)]
    assert len(heights) == 6
    assert np.diff(heights) == pytest.approx(np.full(5, heights[1] - heights[0]), rel=1e-3)
    assert heights[1] < heights[0]  # upwards, the same for each power of ten
    assert drawn.rows[0][-1] == "1e-08 of its size"


def test_the_topology_is_a_grid_with_the_rank_at_fault_marked(tmp_path):
    page = page_of(tmp_path, replicas(12, odd_rank=7), status=1, topology="tp=2,pp=3,dp=2")
    places = {r["rank"]: r for r in page.records("Topology")}
    assert len(places) == 12
    assert places["7"] == {
        "rank": "7", "data": "1", "stage": "0", "sequence": "0", "tensor": "1", "layers": "",
        "host": places["7"]["host"], "is": "at fault",
    }  # fmt: skip
    assert [t for t in page.titles if t.startswith("rank 7: at fault; data rank 1, stage 0")]


@pytest.mark.parametrize("said", ["tp=2,pp=1,dp=999999999", "", "tp=0", {"tp": "two"}, [1], None])
def test_a_topology_that_cannot_be_is_not_drawn(tmp_path, said):
    status = 0 if isinstance(said, str) else 3  # of another kind: damage
    assert "Topology" not in page_of(tmp_path, replicas(2), status, topology=said).tables


def test_an_exo_ring_is_drawn_as_a_ring_with_each_rank_s_layers(tmp_path):
    page = page_of(
        tmp_path, replicas(3), topology="tp=1,pp=3,dp=1", layer_sizes=[3, 1, 2], exo_rule="exo"
    )
    assert [r["layers"] for r in page.records("Topology")] == ["0–2", "3", "4–5"]
    assert page.source.count('marker-end="url(#arrow)"') == 3


def test_many_ranks_are_drawn_as_ranges_and_those_at_fault_on_their_own(tmp_path):
    page = page_of(tmp_path, replicas(300, odd_rank=217), status=1)
    assert len(page.links) == 2 and all("rank 217, layer 4" in name for name in page.links)
    assert "differs from 299 replicas" in next(iter(page.links))
    hidden = [title for title in page.titles if ", layer 4, hidden: " in title]
    ranges = [re.match(r"ranks (\d+)–(\d+), ", title) for title in hidden]
    shown = [r for m in ranges if m for r in range(int(m[1]), int(m[2]) + 1)]
    assert len(shown) == len(set(shown)) and set(range(300)) - {217} == set(shown)


def test_a_page_of_many_failures_stays_small(tmp_path):
    from spimpi.bench.synthetic_trace import synthetic_trace

    synthetic_trace(tmp_path / "run.h5", 300, 120)
    assert report(tmp_path / "run.h5") == 1
    assert (tmp_path / "run.html").stat().st_size < 5_000_000


def test_a_program_without_layers_has_a_column_a_tensor(tmp_path):
    ranks = [some_events(12, seed) for seed in range(3)]
    for events in ranks:
        events["layer"], events["step"], events["stage"] = -1, 0, Stage.PROGRAM
        events["op"], events["tensor"] = Op.ALLGATHER, np.arange(12) % 3
    page = page_of(tmp_path, ranks)
    assert {r["tensor"] for r in page.records(VERDICTS)} == {t.name for t in TENSORS}


@pytest.mark.parametrize("stage", [Stage.FABRIC, Stage.WEIGHTS])
def test_what_fails_before_the_inference_has_its_map(tmp_path, stage):
    ranks = [some_events(12, seed) for seed in range(3)]
    for events in ranks:
        events["stage"], events["step"], events["tensor"] = Stage.COMPUTE, 5, 1
        events["repeat"], events["peer"], events["op"] = 0, -1, Op.ALLGATHER
        events["stage"][:4], events["step"][:4] = stage, np.arange(4)
        events["layer"] = -1 if stage == Stage.FABRIC else np.arange(12)
    ranks[2] = failing(ranks[2], 3, op=Op.AT_REST, peer=2)
    page = page_of(tmp_path, ranks, status=1)
    (name,) = page.links
    place = "hidden" if stage == Stage.FABRIC else "layer 3"
    assert f"rank 2, {place}, all checks: at fault" in name
    assert f"First divergence: {stage.name.lower()}, hidden." in page.text


def test_an_empty_trace_has_a_page(tmp_path):
    page = page_of(tmp_path, [blank_events(0)] * 2, status=3)
    assert "INCOMPLETE" in page.text and "VERIFIED" not in page.text


def test_the_last_step_is_shown_where_nothing_failed(tmp_path):
    write_alone_trace(tmp_path / "run.h5", replicas(3))
    with spimpi.trace.open(tmp_path / "run.h5") as trace:
        assert gather(trace).place.step == 2
