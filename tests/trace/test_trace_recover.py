"""``spimpi trace recover``: what is intact is sealed and marked, and nothing is lost."""

import json
import os
import shutil

import numpy as np
import pytest
from trace_samples import TENSORS, header, same, some_events, write_journal, write_trace

import spimpi.trace.sealing.recover as module
from spimpi.cli import main
from spimpi.errors import IncompleteError
from spimpi.trace import open as open_trace
from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.journal_files import journal_folder, journal_path
from spimpi.trace.reading.check import check
from spimpi.trace.sealing.leftovers import Sealing, new_token, parts_folder
from spimpi.trace.sealing.recover import recover


def killed(path, world=3, rows=30, present=(0, 1, 2), closed=()):
    """Journals as ranks leave them that were killed after their last flush."""
    for rank in present:
        journal = Journal(journal_folder(path), rank, header(world), TENSORS)
        journal.append(some_events(rows * (rank + 1), rank))
        journal.flush()
        if rank in closed:
            journal.close("verified")
        os.close(journal._file.fd) if journal._file else None


def recovered(capfd, path, *options) -> tuple[int, dict]:
    status = main(["trace", "recover", str(path), "--json", *options])
    return status, json.loads(capfd.readouterr().out or "null")


def test_all_that_was_flushed_is_sealed_and_marked_incomplete(tmp_path, capfd):
    path = tmp_path / "run.h5"
    killed(path)
    status, found = recovered(capfd, path)
    assert (status, found["ranks"], found["events"], found["kept"]) == (0, 3, 180, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.h5"]
    with open_trace(path) as trace:
        assert trace.driver == "gather" and not trace.complete
        assert trace.missing == found["missing"]
        for rank in range(3):
            assert f"rank-0000{rank}.journal: not closed, {30 * (rank + 1)}" in trace.missing[rank]
            assert same(trace.events(rank), some_events(30 * (rank + 1), rank))
        assert trace.attributes["end_state"] == "incomplete" and trace.attributes["recovered"]
        assert trace.tensors == TENSORS
    condition = check(path)
    assert (condition.state, condition.events, condition.missing) == (
        "incomplete", 180, found["missing"],
    )  # fmt: skip
    assert main(["trace", "show", str(path)]) == 3


def test_a_rank_that_left_nothing_is_missing_by_name(tmp_path, capfd):
    path = tmp_path / "run.h5"
    killed(path, present=(0, 2))
    _, found = recovered(capfd, path)
    assert "no journal of 1 of 3 ranks: 1" in found["missing"]
    with open_trace(path) as trace:
        assert [info.rank for info in trace.ranks] == [0, 2]
        assert same(trace.events(2), some_events(90, 2))


@pytest.mark.parametrize("cut", [0, 100])
def test_a_header_that_was_cut_short_is_missing(tmp_path, capfd, cut):
    path = tmp_path / "run.h5"
    killed(path)
    os.truncate(journal_path(journal_folder(path), 1), cut)
    _, found = recovered(capfd, path)
    assert found["ranks"] == 2
    assert "rank-00001.journal: its header is cut short, nothing was flushed" in found["missing"]


def test_a_run_that_ended_but_could_not_seal_is_recovered_whole(tmp_path, capfd):
    path = tmp_path / "run.h5"
    killed(path, closed=(0, 1, 2))
    status, found = recovered(capfd, path)
    assert status == 0 and found["missing"] == []
    with open_trace(path) as trace:
        assert trace.complete and trace.attributes["end_state"] == "verified"
    assert check(path).state == "intact"


def test_a_journal_with_damage_is_kept_and_the_rows_before_it_are_sealed(tmp_path, capfd):
    path = tmp_path / "run.h5"
    killed(path)
    damaged = journal_path(journal_folder(path), 1)
    data = bytearray(damaged.read_bytes())
    data[-200] ^= 1
    damaged.write_bytes(data)
    _, found = recovered(capfd, path)
    assert found["kept"] == [str(damaged)] and list(journal_folder(path).iterdir()) == [damaged]
    assert any("rank-00001.journal: record 57 is damaged" in line for line in found["missing"])
    with open_trace(path) as trace:
        assert same(trace.events(1), some_events(60, 1)[:57])


def test_a_job_that_still_runs_is_left_alone(tmp_path, capfd):
    path = tmp_path / "run.h5"
    journal = Journal(journal_folder(path), 0, header(1), TENSORS)
    journal.append(some_events(30))
    journal.flush()
    assert main(["trace", "recover", str(path)]) == 2
    assert "still being written by a running job" in capfd.readouterr().err
    assert journal.path.exists() and not path.exists()


def test_nothing_to_recover_is_told_in_one_line(tmp_path, one, capfd):
    write_trace(one, tmp_path / "sealed.h5", some_events(5))
    for name, text in (("sealed.h5", "sealed.h5 is sealed, and there are no journals"), ("absent.h5", "there is no trace")):
        assert main(["trace", "recover", str(tmp_path / name)]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "nothing to recover" in line and text in line
    (tmp_path / "text.h5").write_text("hello")
    assert main(["trace", "recover", str(tmp_path / "text.h5")]) == 2
    assert "text.h5 is not a trace" in capfd.readouterr().err


def test_a_trace_of_another_run_is_replaced_only_when_asked(tmp_path, one, capfd):
    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(5), "parts")
    write_journal(one, path, some_events(40), run_id="run-2")
    assert main(["trace", "recover", str(path)]) == 2
    assert "of another run; --overwrite" in capfd.readouterr().err
    status, found = recovered(capfd, path, "--overwrite")
    assert (status, found["events"]) == (0, 40)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.h5"]
    assert same(open_trace(path).events(), some_events(40))


def test_a_second_journal_of_a_rank_is_left_out_named_and_kept(tmp_path, one, capfd):
    path = tmp_path / "run.h5"
    journal = write_journal(one, path, some_events(40))
    second = journal.path.with_name("rank-00007.journal")
    shutil.copy(journal.path, second)
    with open_trace(path) as trace:
        assert [rank.rank for rank in trace.ranks] == [0] and len(trace) == 40
        assert "rank-00007.journal: of rank 0, as rank-00000.journal is; left out" in trace.damage
    _, found = recovered(capfd, path)
    assert found["events"] == 40 and found["kept"] == [str(second)]
    assert same(open_trace(path).events(), some_events(40))


def test_journals_left_beside_their_own_sealed_trace_are_removed(tmp_path, one, driver, capfd):
    path = tmp_path / "run.h5"
    journal = write_journal(one, path, some_events(40))
    kept = tmp_path / "kept"
    shutil.copytree(journal_folder(path), kept)
    module_seal(one, journal, path, driver)
    shutil.copytree(kept, journal_folder(path))
    with open_trace(path) as trace:
        assert trace.driver == driver
    assert main(["trace", "recover", str(path)]) == 0
    assert "was sealed already" in capfd.readouterr().out
    assert not journal_folder(path).exists() and check(path).state == "intact"


def module_seal(one, journal, path, driver):
    from spimpi.trace.sealing.seal import seal

    seal(one, journal, path, {"end_state": "verified"}, driver)


def test_sealing_that_does_not_read_back_keeps_the_journals(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    killed(path)
    before = {p.name: p.read_bytes() for p in journal_folder(path).iterdir()}
    write = module.write_alone

    def wrong(plan, blocks, undo):
        write(plan, ((start, np.roll(rows, 1)) for start, rows in blocks), undo)

    monkeypatch.setattr(module, "write_alone", wrong)
    with pytest.raises(IncompleteError, match="does not hold what was written"):
        recover(path)
    assert {p.name: p.read_bytes() for p in journal_folder(path).iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.h5.journal"]
    monkeypatch.undo()
    assert recover(path).events == 180


def test_what_interrupted_sealing_left_is_cleared(tmp_path):
    """What it made, by its note: before its parts had their name, and after."""
    for renamed in (False, True):
        path = tmp_path / f"{renamed}.h5"
        killed(path, closed=(0, 1, 2))
        left = Sealing(path, journal_folder(path), new_token())
        left.begin()
        left.file.write_text("half")
        left.building.mkdir()
        (left.building / "rank-00000.h5").write_text("half")
        left.made(left.building)
        if renamed:
            left.building.rename(parts_folder(path))
        recover(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["False.h5", "True.h5"]


def test_an_interrupted_sealing_gives_back_the_parts_of_the_trace_that_it_was_to_replace(
    tmp_path, one
):
    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(5), "parts")
    killed(path, closed=(0, 1, 2))
    left = Sealing(path, journal_folder(path), new_token())
    left.begin()
    parts_folder(path).rename(left.old)
    parts_folder(path).mkdir()
    (parts_folder(path) / "rank-00000.h5").write_text("new")
    left.made(parts_folder(path))
    left.undo()
    shutil.rmtree(journal_folder(path))
    with open_trace(path) as trace:
        assert same(trace.events(), some_events(5)) and trace.complete
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.h5", "run.h5.parts"]


@pytest.mark.parametrize("name", ["run.h5.sealing", "run.h5.parts.old/x", "run.h5.parts/x"])
def test_what_the_run_did_not_make_stays(tmp_path, name):
    path, mine = tmp_path / "run.h5", tmp_path / name
    killed(path, closed=(0, 1, 2))
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    recover(path)
    assert mine.read_text() == "mine" and check(path).state == "intact"


def test_an_interrupted_removal_is_finished_and_replaces_nothing(tmp_path, capfd):
    path = tmp_path / "run.h5"
    killed(path)
    kept = shutil.copytree(journal_folder(path), tmp_path / "kept")
    recover(path)
    before = path.read_bytes()
    journal_folder(path).mkdir()
    shutil.copy(kept / "rank-00002.journal", journal_folder(path))  # the last one to go
    status, found = recovered(capfd, path)
    assert (status, found["was_sealed"], found["events"]) == (0, True, 180)
    assert path.read_bytes() == before and not journal_folder(path).exists()
    journal_folder(path).mkdir()  # none was left but the folder
    assert recovered(capfd, path)[0] == 0
    assert path.read_bytes() == before and not journal_folder(path).exists()


def test_a_sealed_trace_that_holds_less_than_the_journals_is_not_taken_for_theirs(tmp_path, capfd):
    path = tmp_path / "run.h5"
    killed(path, present=(0, 1))
    recover(path)
    killed(path)
    assert main(["trace", "recover", str(path)]) == 2
    assert "of the same run and incomplete" in capfd.readouterr().err
    assert recovered(capfd, path, "--overwrite")[1]["ranks"] == 3
