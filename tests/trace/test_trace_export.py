"""``spimpi trace export``: what other programs read of it is what the trace holds."""

import csv
import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from chrome_format import import_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_samples import TENSORS, failing, some_events, write_journal, write_trace

from spimpi.cli import main
from spimpi.errors import MissingDependency
from spimpi.trace import open as open_trace
from spimpi.trace.export import COLUMNS, export, format_of
from spimpi.trace.reading.base import DamageError, Trace
from spimpi.trace.schema import EVENT, Established, Op, RankInfo, Stage, Status, TensorInfo

NAMED = ("host", "stage", "op", "tensor", "dtype", "shape", "verdict", "established")
FINGERPRINTS = ("fingerprint", "expected")
TIMES = ("t_start", "t_end")
COMMAND = [sys.executable, "-m", "spimpi", "trace", "export"]


class Held(Trace):
    """A trace in memory: rows of each rank, by rank; of ``altered`` ones nothing can be read."""

    def __init__(self, rows: dict, tensors=TENSORS, hosts=(), altered=(), started=()):
        super().__init__("held.h5")
        self.attributes, self.tensors, self._held = {"model": "tiny"}, tensors, rows
        hosts, started = dict(zip(rows, hosts)), dict(zip(rows, started))
        self.ranks = [
            RankInfo(r, hosts.get(r, "n0"), 1, "cpu", started.get(r, 5.0), 0, len(rows[r]), 0)
            for r in rows
        ]
        self._altered = altered

    def _rows(self, info):
        if info.rank in self._altered:
            msg = f"rank {info.rank}: its events were altered"
            raise DamageError(msg)
        return self._held[info.rank]


def in_words(trace) -> list[dict]:
    """The rows that an export must show, told from the trace one by one."""
    rows = []
    for info, events in trace.intact_events():
        for event in events:
            row = {name: event[name].item() for name in EVENT.names}
            tensor = trace.tensors[row["tensor"]]
            row |= {"rank": info.rank, "host": info.host, "tensor": tensor.name}
            row |= {"dtype": tensor.dtype, "shape": "x".join(map(str, tensor.shape))}
            for name, kind in (("stage", Stage), ("op", Op), ("verdict", Status)):
                row[name] = kind(row[name]).name
            held = [bit.name for bit in Established if row["established"] & bit]
            row["established"] = "+".join(held)
            rows.append({name: row[name] for name in COLUMNS})
    return rows


def from_text(row: dict) -> dict:
    def value(name, text):
        if name in NAMED:
            return text
        if name in FINGERPRINTS:
            assert len(text) == 16
            return int(text, 16)
        return float(text) if name in TIMES else int(text)

    return {name: value(name, text) for name, text in row.items()}


def computed(text: str) -> bool:
    """Whether a spreadsheet would compute a field of this text."""
    return bool(text) and (text[0] in "\t\r\n" or text.lstrip()[:1] in set("=+-@＝＋－＠"))


def read_csv(data: bytes) -> list[dict]:
    """As docs/trace-export.md says: one apostrophe before what would be computed is no part of it."""
    rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    for row in rows:
        for name in NAMED:
            assert not computed(row[name])
            if row[name].startswith("'") and computed(row[name].lstrip("'")):
                row[name] = row[name][1:]
    return [from_text(row) for row in rows]


def read_jsonl(data: bytes) -> list[dict]:
    rows = [json.loads(line) for line in data.decode().split("\n")[:-1]]
    return [row | {name: int(row[name], 16) for name in FINGERPRINTS} for row in rows]


def read_parquet(data: bytes) -> list[dict]:
    parquet = pytest.importorskip("pyarrow.parquet")
    return parquet.read_table(io.BytesIO(data)).to_pylist()


READERS = {"csv": read_csv, "jsonl": read_jsonl, "parquet": read_parquet}
every_table = pytest.mark.parametrize("format", READERS)


def exported(trace, format: str) -> bytes:
    if format == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'spimpi[trace]'")
    file = io.BytesIO()
    export(trace, file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def sample() -> Held:
    rows = {rank: some_events(40, seed=rank) for rank in (0, 1, 4)}
    rows[1] = failing(rows[1], 7, layer=3, op=Op.ALLGATHER, tensor=1, element=2**40)
    return Held(rows, hosts=("n0", "n1", "n1"), started=(5.0, 5.25, 4.5))


@pytest.fixture
def path(tmp_path, one):
    write_trace(one, tmp_path / "run.h5", failing(some_events(50), 7), end_state="failed")
    return tmp_path / "run.h5"


@every_table
def test_a_table_shows_what_the_trace_holds(sample, format):
    rows = READERS[format](exported(sample, format))
    assert rows == in_words(sample) and len(rows) == 120


@every_table
@given(names=st.lists(st.text(max_size=8), min_size=3, max_size=3))
@settings(max_examples=30, deadline=None)
def test_any_name_comes_back(format, names):
    clean = [name.encode(errors="backslashreplace").decode() for name in names]
    events = some_events(9)
    tensors = [TensorInfo(name, (2,), names[0]) for name in names]
    held = Held({0: events}, tensors, hosts=names[1:2])
    wanted = in_words(Held({0: events}, [replace(t, name=c) for t, c in zip(tensors, clean)]))
    wanted = [row | {"dtype": clean[0], "host": clean[1]} for row in wanted]
    assert READERS[format](exported(held, format)) == wanted


@pytest.mark.parametrize(
    "name", ["=1+1", "+1", "-x", "@SUM(1)", "\t=1", " =1", "'=1", "''@", "'plain", "＝1", "-",
    'a,b"c', '"quoted" first', "two\nlines", "carriage\rreturn", "%s %", "\x00", "\\"]
)
def test_names_that_are_syntax_come_back(name):
    held = Held({0: some_events(3)}, [TensorInfo(name, (), name)] * 3, hosts=[name])
    for format, read in READERS.items():
        if format == "parquet":
            pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'spimpi[trace]'")
        for row in read(exported(held, format)):
            assert (row["tensor"], row["dtype"], row["host"]) == (name, name, name)
    (line, *_) = checks_of(chrome(held))
    assert line["args"]["tensor"] == name


@every_table
def test_a_trace_without_rows_gives_a_table_without_rows(format):
    assert READERS[format](exported(Held({}), format)) == []
    assert READERS[format](exported(Held({0: some_events(0)}), format)) == []


@every_table
def test_numbers_that_this_version_does_not_know_are_shown_as_numbers(format):
    events = some_events(2)
    events["op"], events["stage"], events["tensor"] = 250, 251, 9
    (row, _) = READERS[format](exported(Held({0: events}), format))
    assert (row["op"], row["stage"]) == ("op 250", "stage 251")
    assert (row["tensor"], row["shape"]) == ("tensor 9", "")


def test_many_rows_are_written_in_pieces(monkeypatch):
    from spimpi.trace.export import chrome as export_chrome, text as export_text

    events = some_events(100)
    whole = {format: exported(Held({3: events}), format) for format in ("csv", "chrome")}
    monkeypatch.setattr(export_text, "LINES", 7)
    monkeypatch.setattr(export_chrome, "LINES", 7)
    assert exported(Held({3: events}), "csv") == whole["csv"]
    assert exported(Held({3: events}), "chrome") == whole["chrome"]


def test_parquet_keeps_types_and_the_runs_attributes(sample, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    from spimpi.trace.export import parquet as export_parquet

    monkeypatch.setattr(export_parquet, "ROWS", 50)
    file = parquet.ParquetFile(io.BytesIO(exported(sample, "parquet")))
    types = {field.name: str(field.type) for field in file.schema_arrow}
    assert types["fingerprint"] == "uint64" and types["layer"] == "int16"
    assert types["t_start"] == "double" and types["op"] == "string"
    assert json.loads(file.schema_arrow.metadata[b"spimpi"]) == sample.attributes
    assert file.num_row_groups > 1
    assert file.read().to_pylist() == in_words(sample)


def chrome(trace) -> dict:
    return json.loads(exported(trace, "chrome"))


def checks_of(found) -> list[dict]:
    """The slices that are checks, process by process in the order of the trace's rows."""
    spans = [e for e in found["traceEvents"] if e["ph"] == "X" and "args" in e]
    return sorted(spans, key=lambda e: (e["pid"], e["args"]["t_start"], e["args"]["t_end"]))


def test_the_timeline_has_a_process_a_rank_in_the_order_of_ranks(sample):
    found = chrome(sample)
    named = [e for e in found["traceEvents"] if e["ph"] == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name"}
    assert processes == {1: "rank 0 (n0)", 2: "rank 1 (n1)", 3: "rank 4 (n1)"}
    assert found["otherData"]["model"] == "tiny" and found["otherData"]["problems"] == []
    backwards = Held({r: some_events(3) for r in (7, 2, 5)})
    said = [e for e in chrome(backwards)["traceEvents"] if e["name"] == "process_name"]
    assert [e["args"]["name"].split()[1] for e in said] == ["2", "5", "7"]


def test_a_viewer_drops_nothing_of_the_timeline(sample, traced):
    """The samples' checks overlap at random; the others are of real runs."""
    assert import_errors(exported(sample, "chrome").decode()) == []
    for name, n, *options in (("one", 1, "--sketch"), ("six", 6, "--sketch", "--topology", "tp=3,pp=2")):
        with open_trace(traced(name, n, *options)) as trace:
            text = exported(trace, "chrome").decode()
            assert import_errors(text) == []
            spans = [e for e in json.loads(text)["traceEvents"] if e["ph"] == "X"]
            assert sum("args" in e for e in spans) == len(trace)


def test_a_step_holds_its_layers_and_a_layer_its_checks():
    events = some_events(24)
    events["stage"], events["repeat"], events["microbatch"] = Stage.COMPUTE, 0, 0
    events["step"], events["layer"] = np.arange(24) // 12, np.arange(24) // 4 % 3
    events["t_start"] = np.arange(24) // 4 * 2.0
    events["t_end"] = events["t_start"] + 1.5 - np.arange(24) % 4 / 10
    spans = [e for e in chrome(Held({0: events}))["traceEvents"] if e["ph"] == "X"]
    assert len({e["tid"] for e in spans}) == 1
    names = [e["name"] if "args" not in e else e["args"]["layer"] for e in spans]
    one = [each for layer in range(3) for each in (f"layer {layer}", *[layer] * 4)]
    assert names == ["step 0", *one, "step 1", *one]


def test_what_overlaps_goes_to_another_thread_and_keeps_its_times():
    events = some_events(3)
    events["stage"], events["step"], events["layer"] = Stage.PROGRAM, 0, -1
    events["t_start"], events["t_end"] = [0.0, 1.0, 1.5], [2.0, 3.0, 1.75]
    text = exported(Held({0: events}), "chrome").decode()
    assert import_errors(text) == []
    first, second, third = checks_of(json.loads(text))
    assert first["tid"] != second["tid"] and third["tid"] in (first["tid"], second["tid"])
    assert [e["dur"] for e in (first, second, third)] == [2e6, 2e6, 0.25e6]


def test_any_number_of_overlapping_checks_has_few_threads():
    events = some_events(400)
    events["t_start"], events["t_end"] = np.arange(400.0), np.arange(400.0) + 300
    text = exported(Held({0: events}), "chrome").decode()
    assert import_errors(text) == []
    assert len({e["tid"] for e in json.loads(text)["traceEvents"] if e["ph"] == "X"}) <= 8


def test_times_of_no_run_and_ranks_of_any_number_are_written():
    events = some_events(4)
    events["t_start"], events["t_end"] = [np.nan, -1e308, 1.0, 1.0], [1.0, 1e308, np.inf, 2.0]
    ranks = {2**31 - 1: events, -1: some_events(2), 7: some_events(1)}
    held = Held(ranks, started=(1e300, np.nan, 4.0))
    text = exported(held, "chrome").decode()
    assert import_errors(text) == []
    assert json.loads(text)["otherData"]["without_a_time"] == 3
    times = [json.loads(line) for line in exported(held, "jsonl").decode().splitlines()]
    assert [row["t_start"] for row in times[:3]] == [None, -1e308, 1.0]
    assert len(read_csv(exported(held, "csv"))) == 7


def test_the_reader_of_timelines_finds_what_it_is_to_find(sample):
    """The checker itself: each of its rules, broken once."""
    whole = chrome(sample)
    span = next(e for e in whole["traceEvents"] if e["ph"] == "X")
    later = {**span, "ts": span["ts"] + span["dur"] / 2}
    for broken, said in (
        ({**span, "pid": 0}, "numbers of process"), ({**span, "pid": 3}, "is of processes"),
        (later, "ends after what holds it"), ({**span, "ts": -1.0}, "times of"),
        ({**span, "tid": 10**6}, "has no name"),
    ):  # fmt: skip
        events = [*whole["traceEvents"], broken]
        assert any(said in error for error in import_errors(json.dumps({"traceEvents": events})))


def test_the_timeline_is_in_microseconds_since_the_first_rank_started(sample):
    found = chrome(sample)
    spans, rows = checks_of(found), in_words(sample)
    assert found["otherData"]["started"] == 4.5 and len(spans) == len(rows)
    late = {rank.rank: rank.started - 4.5 for rank in sample.ranks}
    for span, row in zip(spans, rows, strict=True):
        assert span["ts"] == pytest.approx((row["t_start"] + late[row["rank"]]) * 1e6, abs=1e-2)
        assert span["dur"] == pytest.approx((row["t_end"] - row["t_start"]) * 1e6, abs=1e-2)
        assert span["name"] == f"{row['op']} {row['tensor']}"
        arguments = {name: row[name] for name in span["args"]}
        assert span["args"] == arguments | {n: f"{row[n]:016x}" for n in FINGERPRINTS}
        assert {"step", "layer", "tensor", "op", "verdict", "bytes"} <= set(span["args"])


def test_a_failed_check_is_coloured_and_marked_in_the_timeline(sample):
    events = chrome(sample)["traceEvents"]
    (mark,) = [e for e in events if e["ph"] == "i"]
    (span,) = [e for e in events if "cname" in e]
    assert mark["name"] == "FAILED ALLGATHER hidden" and mark["s"] == "p"
    assert span["cname"] == "terrible" and span["args"]["verdict"] == "FAILED"
    for name in ("pid", "tid", "ts"):
        assert mark[name] == span[name]


def test_what_nests_in_the_trace_nests_in_the_timeline():
    events = some_events(200)
    events["stage"], events["t_end"] = Stage.TENSOR, 1.0 + 1e-7 / 3
    spans = checks_of(chrome(Held({0: events})))
    assert len({round((e["ts"] + e["dur"]) * 1000) for e in spans}) == 1


@pytest.mark.parametrize("format", [*READERS, "chrome"])
def test_altered_rows_are_left_out_and_named(format):
    held = Held({rank: some_events(5) for rank in range(3)}, altered=[1])
    data = exported(held, format)
    assert held.problems == ["rank 1: its events were altered"]
    if format == "chrome":
        found = json.loads(data)
        assert {e["pid"] for e in found["traceEvents"] if e["ph"] == "X"} == {1, 3}
        assert found["otherData"]["problems"] == held.problems
    else:
        assert [row["rank"] for row in READERS[format](data)] == [0] * 5 + [2] * 5


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "jsonl", "json", "json.gz", "parquet"])
def test_the_command_writes_the_format_of_the_name(tmp_path, path, capfd, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'spimpi[trace]'")
    out = tmp_path / f"out.{suffix}"
    assert main(["trace", "export", str(path), "-o", str(out)]) == 0  # though a check failed
    assert f"{out}: 50 events" in capfd.readouterr().out
    data = gzip.decompress(out.read_bytes()) if suffix.endswith(".gz") else out.read_bytes()
    kind = suffix.removesuffix(".gz")
    with open_trace(path) as trace:
        if kind == "json":
            assert data == exported(trace, "chrome")
        else:
            assert READERS[kind](data) == in_words(trace)


def test_json_says_what_was_written(tmp_path, path, capfd):
    out = tmp_path / "out.csv"
    assert main(["trace", "export", str(path), "-o", str(out), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["events"], found["format"], found["exit_status"]) == (50, "csv", 0)
    assert found["bytes"] == out.stat().st_size


def test_a_killed_run_is_written_as_far_as_it_is_there_and_gives_exit_3(tmp_path, one, capfd):
    write_journal(one, tmp_path / "run.h5", some_events(30))
    out = tmp_path / "out.csv"
    assert main(["trace", "export", str(tmp_path / "run.h5"), "-o", str(out)]) == 3
    assert "left out: run.h5 was never sealed" in capfd.readouterr().err
    assert len(read_csv(out.read_bytes())) == 30


def test_an_existing_file_is_replaced_only_when_asked(tmp_path, path, capfd):
    out = tmp_path / "out.csv"
    out.write_text("mine")
    command = ["trace", "export", str(path), "-o", str(out)]
    assert main(command) == 2 and "exists" in capfd.readouterr().err
    assert out.read_text() == "mine"
    assert main([*command, "--overwrite"]) == 0
    assert len(read_csv(out.read_bytes())) == 50


def test_the_trace_itself_is_never_replaced(tmp_path, one, capfd):
    """Nor its parts, nor a killed run's journals, whatever name leads there."""
    sealed, killed = tmp_path / "run.h5", tmp_path / "killed.h5"
    write_trace(one, sealed, some_events(50), "parts")
    write_journal(one, killed, some_events(30))
    (tmp_path / "link.h5").symlink_to(sealed)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (part,) = (tmp_path / "run.h5.parts").iterdir()
    (journal,) = (tmp_path / "killed.h5.journal").glob("*.journal")
    for path, out in (
        (sealed, sealed), (tmp_path / "link.h5", sealed), (sealed, part), (killed, killed),
        (killed, journal),
    ):  # fmt: skip
        command = ["export", str(path), "-o", str(out), "--format", "csv", "--overwrite"]
        assert main(["trace", *command]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "it is of the trace" in line
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "out"], "tells no format"),
        (["-o", "out.csv", "--format", "xml"], "no format 'xml'"),
        (["-o", "nowhere/out.csv"], "no file can be made in nowhere"),
        (["-o", "."], "tells no format"),
        (["-o", ".", "--format", "csv"], "is a directory"),
        (["-o", "/dev/full", "--format", "csv", "--overwrite"], "no ordinary file"),
        (["-o", "-"], "tells no format"),
        (["-o", "-", "--format", "csv", "--json"], "leave one out"),
    ],
)
def test_what_cannot_be_written_is_refused(path, arguments, words, capfd, monkeypatch):
    monkeypatch.chdir(path.parent)
    before = sorted(path.parent.rglob("*"))
    assert main(["trace", "export", str(path), *arguments]) == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1
    assert sorted(path.parent.rglob("*")) == before


def test_no_trace_gives_exit_2_and_no_file(tmp_path, capfd):
    (tmp_path / "no.h5").write_text("no trace")
    for name in ("no.h5", "absent.h5"):
        status = main(["trace", "export", str(tmp_path / name), "-o", str(tmp_path / "out.csv")])
        assert status == 2 and capfd.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["no.h5"]


def test_parquet_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"pip install 'spimpi\[trace\]'"):
        format_of("out.parquet", None)


def test_no_space_left_leaves_nothing_behind(path):
    def little_space():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    before = sorted(path.parent.rglob("*"))
    for suffix in ("csv", "parquet"):
        if suffix == "parquet":
            pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'spimpi[trace]'")
        done = subprocess.run(
            [*COMMAND, path, "-o", path.with_suffix(f".{suffix}")],
            preexec_fn=little_space, capture_output=True, text=True, check=False,
            # Python caches modules without looking whether all was written: it would break others.
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert done.returncode == 2 and "File too large" in done.stderr
        assert done.stderr.count("\n") == 1
    assert sorted(path.parent.rglob("*")) == before


def test_a_full_standard_output_is_told(path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, path, "-o", "-", "--format", "csv"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2 and "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path, one):
    write_trace(one, tmp_path / "run.h5", some_events(20_000))
    command = " ".join(map(str, [*COMMAND, tmp_path / "run.h5", "-o - --format csv | head -2"]))
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout.startswith("rank,host,")
    assert done.stdout.count("\n") == 2
