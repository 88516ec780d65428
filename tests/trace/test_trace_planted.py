"""What somebody put where a trace, its journals or its temporary files come to be: it stays."""

import os
import socket
import stat

import pytest
from trace_samples import same, some_events, write_journal, write_trace

from spimpi.errors import UsageError
from spimpi.trace import open as open_trace
from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.sealing import leftovers, seal as sealing
from spimpi.trace.sealing.leftovers import remove_parts
from spimpi.trace.sealing.recover import recover
from spimpi.trace.sealing.seal import check_can_write, prepare, seal
from spimpi.whole_file import check_can_write as check_file
from spimpi.whole_file import whole_file


def a_socket(path) -> None:
    os.chdir(path.parent)  # a socket's path is short
    socket.socket(socket.AF_UNIX).bind(path.name)


def a_link(path) -> None:
    path.with_name("target").write_text("mine")
    path.symlink_to(path.with_name("target"))


SPECIAL = {
    "fifo": os.mkfifo, "socket": a_socket, "link": a_link, "directory": os.mkdir,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "device": lambda path: path.symlink_to("/dev/null"),
}  # fmt: skip


@pytest.fixture(params=SPECIAL)
def special(request, tmp_path, monkeypatch):
    """A path at which something stands that is no ordinary file, which must be so at the end."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.h5"
    SPECIAL[request.param](path)
    before = os.lstat(path).st_mode
    yield path
    assert os.lstat(path).st_mode == before and not stat.S_ISREG(before)
    assert request.param != "link" or (tmp_path / "target").read_text() == "mine"


def test_a_trace_does_not_replace_it(special, one, driver):
    """Neither where it is there before the run, nor where it comes before the end."""
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="cannot write the trace|exists"):
            check_can_write(special, overwrite)
    aside = special.with_name("aside")
    special.rename(aside)
    journal = write_journal(one, special, some_events(5))
    aside.rename(special)
    with pytest.raises(UsageError, match="cannot write the trace .*: it is"):
        seal(one, journal, special, {}, driver, overwrite=True)
    with pytest.raises(UsageError, match="cannot write the trace .*: it is"):
        recover(special, overwrite=True)
    assert journal.path.exists()
    assert not [p for p in special.parent.iterdir() if "sealing" in p.name or p.name.endswith("parts")]


def test_another_file_does_not_replace_it_either(special):
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="cannot write"):
            check_file(special, overwrite)
        with pytest.raises(UsageError, match="cannot write"), whole_file(special, overwrite):
            pass


def test_what_comes_at_the_last_moment_is_not_replaced(tmp_path, one, driver, monkeypatch):
    path, publish = tmp_path / "run.h5", sealing.publish

    def late(*arguments):
        path.write_text("mine")
        publish(*arguments)

    monkeypatch.setattr(sealing, "publish", late)
    journal = write_journal(one, path, some_events(5))
    with pytest.raises(UsageError, match="run.h5 exists"):
        seal(one, journal, path, {}, driver)
    assert path.read_text() == "mine" and journal.path.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.h5", "run.h5.journal"]


@pytest.mark.parametrize("name", ["sealing", "parts", "old"])
def test_a_name_that_was_guessed_is_not_written_through(tmp_path, one, driver, monkeypatch, name):
    """Even of whom it guesses: what stands there is neither followed nor removed."""
    monkeypatch.setattr(sealing, "new_token", lambda: "0" * 16)
    path, victim = tmp_path / "run.h5", tmp_path / "victim"
    victim.write_text("mine")
    journal = write_journal(one, path, some_events(5))
    planted = tmp_path / f"run.h5.{'0' * 16}.{name}"
    planted.symlink_to(victim)
    try:
        seal(one, journal, path, {}, driver)
    except Exception as error:  # noqa: BLE001
        assert "exist" in str(error) and journal.path.exists()
    else:
        assert same(open_trace(path).events(), some_events(5))
    assert victim.read_text() == "mine"
    assert planted.is_symlink() or name == "sealing"


@pytest.mark.parametrize("name", ["run.h5.parts.old", "run.h5.sealing", "run.h5.parts.sealing"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_strangers_file_stays(tmp_path, one, driver, name, overwrite):
    path, own = tmp_path / "run.h5", tmp_path / name / "rank-00000.h5"
    own.parent.mkdir()
    own.write_text("mine")
    if overwrite:
        write_trace(one, path, some_events(3), "parts")
    write_trace(one, path, some_events(5), driver, overwrite=overwrite)
    assert own.read_text() == "mine" and same(open_trace(path).events(), some_events(5))


@pytest.mark.parametrize("place", ["run.h5.parts", "run.h5.journal"])
@pytest.mark.parametrize("made", ["file", "folder", "link"])
def test_what_is_of_no_trace_is_not_removed_with_one(tmp_path, one, place, made):
    path, thesis = tmp_path / "run.h5", tmp_path / "elsewhere" / "rank-00000.h5"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    if made == "link":
        (tmp_path / place).symlink_to(thesis.parent)
    elif made == "folder":
        (tmp_path / place / "rank-00000.h5").mkdir(parents=True)
    else:
        (tmp_path / place).mkdir()
        (tmp_path / place / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="of no trace .*not removed|has not ended"):
        prepare(path, overwrite=True)
    assert thesis.read_text() == "mine" and os.path.lexists(tmp_path / place)
    remove_parts(tmp_path / place)
    assert thesis.read_text() == "mine"


def test_journals_are_not_written_through_links(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run.h5.journal"
    victim.mkdir()
    folder.symlink_to(victim)
    with pytest.raises(UsageError, match="run.h5.journal"):
        Journal(folder, 0, {"run_id": "r"}, [])
    assert not list(victim.iterdir())
    folder.unlink()
    folder.mkdir()
    for name in ("there", "nowhere"):
        (tmp_path / "there").write_text("mine")
        (folder / "rank-00000.journal").symlink_to(tmp_path / name)
        with pytest.raises(UsageError, match="rank-00000.journal"):
            Journal(folder, 0, {"run_id": "r"}, [])
        (folder / "rank-00000.journal").unlink()
    assert (tmp_path / "there").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_another_users_folder_is_no_place_for_journals(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 12345)
    (tmp_path / "run.h5.journal").mkdir()
    with pytest.raises(UsageError, match="run.h5.journal"):
        Journal(tmp_path / "run.h5.journal", 0, {"run_id": "r"}, [])


def test_a_link_that_a_run_made_to_its_journals_is_its_own(tmp_path):
    path = tmp_path / "run.h5"
    folder = prepare(path, local=tmp_path / "disk")
    (folder / "rank-00000.journal").write_text("old")
    assert prepare(path, overwrite=True, local=tmp_path / "other") == journal_folder(path).resolve()
    assert prepare(path, overwrite=True) == journal_folder(path) and not journal_folder(path).is_symlink()


def test_names_of_a_sealing_are_of_no_use_to_the_next(tmp_path):
    tokens = {leftovers.new_token() for _ in range(100)}
    assert len(tokens) == 100 and all(leftovers.NOTE.fullmatch(f"sealing-{t}") for t in tokens)
