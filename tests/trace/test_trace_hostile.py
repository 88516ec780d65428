"""Traces and journals from elsewhere: nothing is read but their own files, and what they cannot be is
told as damage, whatever they say and however right their digests are."""

import json
import os
import shutil
from time import monotonic

import numpy as np
import pytest
from forged import ABSENT, forged, forged_journal, put
from trace_samples import same, some_events, write_alone_trace, write_trace

from spimpi.cli import main
from spimpi.errors import IncompleteError, SpimpiError
from spimpi.trace import open as open_trace
from spimpi.trace.journals import node_file
from spimpi.trace.journals.journal import read_journal
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.reading.check import check
from spimpi.trace.schema import EVENT, MOST_RANKS
from spimpi.trace.sealing.recover import recover

h5py = pytest.importorskip("h5py", reason="needs h5py")
N = 40


@pytest.fixture
def base(tmp_path):
    write_alone_trace(tmp_path / "base.h5", [some_events(N)])
    return tmp_path / "base.h5"


def is_refused(path) -> str:
    """What the check says of a trace; it must not be intact, and no row of it is given."""
    found = check(path)
    assert found.state == "damaged", found
    try:
        with open_trace(path) as trace:
            list(trace.blocks())
            assert not trace.complete
    except IncompleteError:
        pass
    return " ".join(found.damage)


def column(file, name, **options):
    """Another data set in a column's place."""
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    return file.create_dataset(name, shape, dtype, **options)


def outside(name):
    def edit(file, folder):
        n, dtype = file[name].shape[0], file[name].dtype
        (folder / "secret").write_bytes(b"s" * 4096)
        del file[name]
        if dtype.kind == "O":
            dtype = "S15"
        file.create_dataset(name, (n,), dtype, external=[(str(folder / "secret"), 0, 4096)])

    return edit


def linked(kind, name="events/step"):
    def edit(file, folder):
        del file[name]
        base = str(folder / "base.h5")
        file[name] = h5py.ExternalLink(base, name) if kind == "external" else h5py.SoftLink("/events/layer")

    return edit


def shown(name):
    def edit(file, folder):
        n, dtype = file[name].shape[0], file[name].dtype
        layout = h5py.VirtualLayout((n,), dtype)
        layout[:] = h5py.VirtualSource(str(folder / "base.h5"), name, (n,), dtype)
        del file[name]
        file.create_virtual_dataset(name, layout)

    return edit


def of_a_pipe(file, folder):
    os.mkfifo(folder / "pipe")
    del file["events/step"]
    file["events/step"] = h5py.ExternalLink(str(folder / "pipe"), "events/step")


@pytest.mark.parametrize("edit", [
    outside("ranks/host"), outside("tensors/name"), outside("events/step"), outside("ranks/count"),
    linked("external"), linked("soft"), linked("external", "events"), linked("external", "ranks/host"),
    linked("external", "tensors"), shown("events/step"), shown("ranks/pid"), of_a_pipe,
])  # fmt: skip
def test_nothing_outside_the_file_is_read(base, edit):
    path = forged(base, lambda file: edit(file, base.parent), sealed=False)
    assert "sss" not in is_refused(path)


@pytest.mark.parametrize("edit", [
    lambda f: put(f, "events/step", np.zeros(N, [("a", "i4")])),
    lambda f: put(f, "events/step", np.zeros((N, 2), "i4")),
    lambda f: put(f, "events/step", np.zeros(N, "f8")),
    lambda f: put(f, "events/step", np.zeros(N, "i4"), compression="gzip"),
    lambda f: put(f, "events/step", ["a"] * N),
    lambda f: (f.__delitem__("events"), f.__setitem__("events", 5)),
    lambda f: (f.__delitem__("events/step"), f.create_group("events/step")),
    lambda f: put(f, "ranks/rank", np.zeros(1, "i1")[:0]),
    lambda f: f.attrs.__setitem__("model", np.arange(3)),
    lambda f: f.attrs.__setitem__("digest", f["ranks"].ref),
    lambda f: f.attrs.__setitem__("json", "[" * 100_000),
    lambda f: put(f, "tensors/shape", ['{"a": 1}'] * 3),
    lambda f: put(f, "tensors/shape", ["[1e400]"] * 3),
])  # fmt: skip
def test_data_of_another_kind_are_damage(base, edit):
    is_refused(forged(base, edit, sealed=False))


def test_rows_that_were_never_written_are_no_rows(base):
    def edit(file):
        for name in ("rank", "pid", "offset", "count", "started", "fingerprint", "host", "device"):
            kind = {"started": "<f8", "fingerprint": "<u8", "host": "S1", "device": "S1"}
            del file[f"ranks/{name}"]
            file.create_dataset(f"ranks/{name}", (10**12,), kind.get(name, "<i8"))

    assert "stored in a file of" in is_refused(forged(base, edit, sealed=False))


@pytest.mark.parametrize("field, value", [
    ("count", 2**62), ("count", N + 1), ("rank", 2**31 - 1), ("rank", -1), ("rank", 1),
    ("started", 1e300), ("started", np.nan), ("offset", 1),
])  # fmt: skip
def test_a_rank_that_cannot_be_is_left_out_whatever_the_digest_says(base, field, value):
    path = forged(base, lambda file: file[f"ranks/{field}"].__setitem__(0, value))
    assert "1 of 1 ranks cannot be" in is_refused(path)
    with open_trace(path) as trace:
        assert len(trace) == 0 and not trace.ranks


def test_ranks_that_share_rows_or_a_number_are_left_out(tmp_path):
    write_alone_trace(tmp_path / "two.h5", [some_events(N), some_events(N, 1)])
    for name, (field, value) in {"a": ("offset", 0), "b": ("rank", 0)}.items():
        path = forged(tmp_path / "two.h5", lambda f: f[f"ranks/{field}"].__setitem__(1, value), name)
        assert "1 of 2 ranks cannot be" in is_refused(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e308, 1e308])
@pytest.mark.parametrize("name", ["t_start", "t_end"])
def test_times_that_no_run_can_have_are_damage(base, name, value):
    path = forged(base, lambda file: file[f"events/{name}"].__setitem__(3, value))
    assert "times" in is_refused(path) and name in is_refused(path)


@pytest.mark.parametrize("name, value", [
    ("world", "x"), ("world", MOST_RANKS + 1), ("world", 0), ("run_id", 5), ("end_state", "fine"),
    ("model", 1.5),
])  # fmt: skip
def test_what_a_run_cannot_say_of_itself_is_damage(base, name, value):
    path = forged(base, lambda file: file.attrs.__setitem__(name, value))
    assert f"the attribute {name} is not what spimpi writes" in is_refused(path)


def part_elsewhere(path, name, target=None):
    """The table and the columns say that the part is ``name``."""
    with h5py.File(path, "r+") as file:
        file["ranks/part"][0] = name
        for column_ in EVENT.names:
            n, dtype = file[f"events/{column_}"].shape[0], file[f"events/{column_}"].dtype
            layout = h5py.VirtualLayout((n,), dtype)
            layout[:] = h5py.VirtualSource(name, f"events/{column_}", (n,), dtype)
            del file[f"events/{column_}"]
            file.create_virtual_dataset(f"events/{column_}", layout)


@pytest.mark.parametrize("name", [
    "../out/rank-00000.h5", "out.parts/rank-00001.h5", "/tmp/out.parts/rank-00000.h5", "rank-00000.h5",
    "../out.parts/rank-00000.h5",
])  # fmt: skip
def test_a_part_elsewhere_is_not_read(tmp_path, one, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = tmp_path / "in" / "run.h5"
    write_trace(one, path, some_events(N), "parts")
    shutil.copy(tmp_path / "in/run.h5.parts/rank-00000.h5", tmp_path / "out")
    part_elsewhere(path, name)
    assert "is no file beside the trace, and is not read" in is_refused(path)


def test_a_part_that_a_link_leads_out_of_the_folder_is_not_read(tmp_path, one):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "run.h5"
    write_trace(one, path, some_events(N), "parts")
    shutil.move(tmp_path / "in/run.h5.parts", tmp_path / "out")
    (tmp_path / "in/run.h5.parts").symlink_to(tmp_path / "out")
    assert "is no file beside the trace" in is_refused(path)


def test_a_column_shows_its_parts_and_nothing_else(tmp_path, one):
    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(N), "parts")
    shutil.copy(tmp_path / "run.h5.parts/rank-00000.h5", tmp_path / "other.h5")
    with h5py.File(path, "r+") as file:
        name, n = "events/layer", N
        dtype = file[name].dtype
        layout = h5py.VirtualLayout((n,), dtype)
        layout[:] = h5py.VirtualSource("other.h5", name, (n,), dtype)
        del file[name]
        file.create_virtual_dataset(name, layout)
    with open_trace(path) as trace:
        assert same(trace.events(), some_events(N))  # of the part itself
        with pytest.raises(IncompleteError, match="does not show the ranks' parts"):
            trace.column("layer")
    assert check(path).state == "damaged"


# Journals


@pytest.mark.parametrize("header", [
    {"started": 10**400}, {"started": "x"}, {"started": None}, {"host": 5}, {"pid": "x"}, {"pid": 2**80},
    {"device": None}, {"host": ABSENT}, {"started": ABSENT}, {"rank": -1}, {"rank": 2**31}, {"rank": "0"},
    {"rank": 5},
])  # fmt: skip
def test_a_header_without_a_rank_that_can_be_is_damage(tmp_path, header):
    path = tmp_path / "run.h5"
    forged_journal(path, header)
    with open_trace(path) as trace:
        assert not trace.ranks and "rank-00000.journal" in trace.damage[0]
    with pytest.raises(IncompleteError, match="rank-00000.journal"):
        recover(path)


@pytest.mark.parametrize("header", [
    {"world": 10**9}, {"world": 10**30}, {"world": "x"}, {"world": [1]}, {"topology": [1, 2]},
    {"run_id": [1]}, {"missing": 5}, {"checking_seconds": {"TENSOR": "x"}}, {"layer_sizes": "abc"},
    {"seed": {}}, {"injected": "x"}, {"sketches": 5},
])  # fmt: skip
def test_other_facts_of_a_header_are_damage_and_its_rows_are_kept(tmp_path, header):
    path, (name,) = tmp_path / "run.h5", header
    forged_journal(path, header)
    for command in ("show", "locate"):
        assert main(["trace", command, str(path)]) == 3
    with open_trace(path) as trace:
        assert len(trace) == 3 and name not in trace.attributes
        assert f"the field {name} of its header is not what spimpi writes" in trace.damage[0]
    assert f"the field {name} of its header" in recover(path).missing[0]


def test_of_a_large_world_the_first_that_are_absent_are_named(tmp_path):
    path = tmp_path / "run.h5"
    forged_journal(path, {"world": MOST_RANKS}, end=None)
    began = monotonic()
    with open_trace(path) as trace:
        assert "no journal of 4194303 of 4194304 ranks: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …" in trace.missing
    assert monotonic() - began < 5


@pytest.mark.parametrize("tensors", [5, "x", [1], [["a", [1]]], [["a", [1e400], "f4"]], [["a", ["x"], "f4"]],
                                     [[5, [1], "f4"]], [["a", {}, "f4"]], [["a", [2**70], "f4"]]])  # fmt: skip
def test_a_table_of_other_rows_is_damage(tmp_path, tensors):
    path = tmp_path / "run.h5"
    forged_journal(path, tensors=tensors)
    with open_trace(path) as trace:
        assert "its header is damaged" in trace.damage[0]


@pytest.mark.parametrize("body", [b"[" * 200_000 + b"]" * 200_000, b"5", b"null", b"{}", b'{"header": 5}'])
def test_a_header_of_other_json_is_damage(tmp_path, body):
    from spimpi.trace.journals.journal import _first_line

    file = forged_journal(tmp_path / "run.h5")
    file.write_bytes(_first_line(1, body) + body)
    assert "its header is damaged" in read_journal(file).damage[0]


def test_an_end_that_says_what_no_run_says_is_damage(tmp_path):
    file = forged_journal(tmp_path / "run.h5", end="\x1b[31mfine")
    assert "record 3 is damaged" in read_journal(file).damage[0]


@pytest.mark.parametrize("line", [
    '[9, "b", [1], "f4"]', '[-1, "b", [1], "f4"]', '[0, "b", 5, "f4"]', '[1]', "5", "[" * 5000, '"x"',
])  # fmt: skip
def test_a_line_of_a_growing_table_that_is_no_row_is_damage(tmp_path, line):
    from spimpi.trace.checksum import text_digest
    from spimpi.trace.journals.growing import read_table

    path = tmp_path / "rank-00000.tensors"
    path.write_text(f"{text_digest(line.encode())} {line}\n")
    assert read_table(path) == ([], "rank-00000.tensors: line 1 is damaged or torn")


def holes(path) -> list:
    """Files of a killed run that a crash left a terabyte long."""
    return [file for file in journal_folder(path).iterdir() if os.truncate(file, 1 << 40) is None]


@pytest.mark.parametrize("separate", [False, True])
def test_a_hole_behind_the_last_record_is_told_at_once(tmp_path, separate):
    from trace_samples import TENSORS, header, some_sketches

    from spimpi.trace.journals.journal import Journal
    from spimpi.trace.journals.node_file import Stream, create

    path, ranks = tmp_path / "run.h5", (0, 1)
    folder = journal_folder(path)
    folder.mkdir()
    if not separate:
        create(folder / "node-00000.journal", ranks)
    for rank in ranks:
        at = None if separate else Stream(folder / "node-00000.journal", ranks, rank)
        journal = Journal(folder, rank, header(2, sketches=True), TENSORS if separate else None, at=at)
        if not separate:
            journal.table.row(TENSORS[0])
        journal.append(some_events(N))
        journal.flush()
        journal.sketches.append(some_sketches())
        os.close(journal._file.fd)
    holes(path)
    began = monotonic()
    with open_trace(path) as trace:
        assert len(trace) == 2 * N and len(trace.sketch_shares()) == 2 * len(some_sketches())
        assert bool(trace.damage) == separate
    assert monotonic() - began < 20


@pytest.mark.parametrize("made", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p)])
def test_what_is_no_ordinary_file_is_not_read_as_a_journal(tmp_path, made):
    path = tmp_path / "run.h5"
    forged_journal(path, {"world": 2})
    for name in ("rank-00001.journal", "node-00005.journal"):
        made(journal_folder(path) / name)
    with open_trace(path) as trace:
        assert len(trace.ranks) == 1
        assert all("and was not read" in line for line in trace.damage) and len(trace.damage) == 2
    assert recover(path).ranks == 1 and journal_folder(path).exists()


@pytest.mark.parametrize("suffix", [".tensors", ".sketches"])
def test_a_pipe_beside_a_journal_is_not_waited_for(tmp_path, suffix):
    path = tmp_path / "run.h5"
    file = forged_journal(path, {"sketches": True}, tensors=None)
    os.mkfifo(file.with_suffix(suffix))
    with open_trace(path) as trace:
        assert any("no ordinary file" in line for line in trace.damage)


@pytest.mark.parametrize("ranks", [[10**30], ["a"], [0, 0], [-1], [], [1.5], "ab", [True]])
def test_a_nodes_file_of_ranks_that_cannot_be_is_damage(tmp_path, ranks):
    path = tmp_path / "run.h5"
    journal_folder(path).mkdir()
    file = journal_folder(path) / "node-00000.journal"
    once = node_file._directory(ranks).ljust(node_file.EXTENT // 2, b"\0")
    file.write_bytes(once + once)
    with open_trace(path) as trace:
        assert "its list of ranks is damaged" in trace.damage[0]


def test_every_command_ends_with_0_to_3_whatever_a_trace_says(base, capfd):
    """One sentence, of at most 500 characters."""
    for i, edit in enumerate((
        lambda f: f.attrs.__setitem__("run_id", "x" * 30_000),
        lambda f: f["ranks/host"].__setitem__(0, "h" * 30_000),
        lambda f: f.attrs.__setitem__("json", json.dumps(["model"])),
        lambda f: f.__delitem__("tensors"),
    )):  # fmt: skip
        path = forged(base, edit, f"{i}.h5", sealed=False)
        for command in ("show", "check", "locate"):
            assert main(["trace", command, str(path)]) in (0, 1, 2, 3)
            told = capfd.readouterr().err
            assert "Traceback" not in told and all(len(line) <= 500 for line in told.splitlines())


def test_a_trace_tells_what_it_is(base, tmp_path):
    with open_trace(base) as trace:
        assert repr(trace) == "<spimpi trace base.h5: run run-1, verified, 1 ranks, 40 events>"
    forged_journal(tmp_path / "killed.h5")
    with open_trace(tmp_path / "killed.h5") as trace:
        assert repr(trace) == "<spimpi trace killed.h5: run r, incomplete, 1 ranks, 3 events>"


def test_a_trace_without_a_check_is_not_verified(tmp_path, capfd):
    write_alone_trace(tmp_path / "none.h5", [some_events(0)])
    assert main(["trace", "show", str(tmp_path / "none.h5")]) == 3
    assert "INCOMPLETE: no check failed among the 0" in capfd.readouterr().out
    assert main(["trace", "locate", str(tmp_path / "none.h5")]) == 3
    assert check(tmp_path / "none.h5").state == "intact"


def test_spimpi_errors_alone_come_from_opening(base):
    for name in ("schema_version", "driver", "json", "digest"):
        path = forged(base, lambda file: file.attrs.__delitem__(name), f"{name}.h5", sealed=False)
        with pytest.raises(SpimpiError):
            open_trace(path)


@pytest.mark.parametrize("name", ["bytes", "step", "t_end"])
def test_a_part_shows_nothing_of_another_file_either(tmp_path, name):
    """A column of the whole trace leads to the parts' columns, and these must be their own."""
    path = tmp_path / "run.h5"
    write_alone_trace(path, [some_events(N, seed=rank) for rank in range(2)], "parts")
    (part,) = path.with_name("run.h5.parts").glob("*0001.h5")
    with h5py.File(part, "r+") as file:
        outside(f"events/{name}")(file, tmp_path)
    with open_trace(path) as trace, pytest.raises(IncompleteError, match="is damaged"):
        trace.column(name)[:]
