"""``spimpi trace check``: intact, incomplete or damaged, and what is."""

import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from trace_samples import TENSORS, failing, header, some_events, write_journal, write_trace

from spimpi.cli import main
from spimpi.cli import apart as module
from spimpi.cli.apart import apart
from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.journal_files import journal_folder


def check(capfd, path) -> tuple[int, dict]:
    """Exit status and JSON; the printed form has the same status, and names the same lines."""
    status = main(["trace", "check", str(path), "--json"])
    found = json.loads(capfd.readouterr().out)
    assert main(["trace", "check", str(path)]) == status == found["exit_status"]
    first, *lines = capfd.readouterr().out.splitlines()
    assert found["state"].upper() in first
    assert lines == [f"  missing  {m}" for m in found["missing"]] + [
        f"  damaged  {d}" for d in found["damage"]
    ]
    return status, found


def damaged(capfd, path) -> dict:
    status, found = check(capfd, path)
    assert (status, found["state"]) == (3, "damaged")
    return found


def refused(capfd, path) -> str:
    assert main(["trace", "check", str(path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_an_intact_trace_gives_exit_0_whatever_its_run_found(tmp_path, one, driver, capfd):
    path = tmp_path / "run.h5"
    write_trace(one, path, failing(some_events(50), 7), driver, end_state="failed")
    status, found = check(capfd, path)
    assert (status, found["state"], found["ranks"], found["events"]) == (0, "intact", 1, 50)
    assert found["driver"] == driver and not found["missing"] and not found["damage"]


def test_a_missing_part_makes_it_incomplete(tmp_path, one, capfd):
    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(50), "parts")
    (tmp_path / "run.h5.parts" / "rank-00000.h5").unlink()
    status, found = check(capfd, path)
    assert (status, found["ranks"], found["events"]) == (3, 0, 0)
    assert "the part run.h5.parts/rank-00000.h5 is missing" in found["missing"][0]


def test_a_part_of_another_run_is_damage(tmp_path, one, capfd):
    for name, n in (("old", 40), ("run", 50)):
        write_trace(one, tmp_path / f"{name}.h5", some_events(n), "parts")
    part = "rank-00000.h5"
    shutil.copy(tmp_path / "old.h5.parts" / part, tmp_path / "run.h5.parts" / part)
    found = damaged(capfd, tmp_path / "run.h5")
    assert "is not the one that was written" in found["damage"][0]


def test_an_altered_value_is_damage_and_its_rank_is_named(tmp_path, one, driver, capfd):
    import h5py

    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(50), driver)
    rows = path if driver != "parts" else tmp_path / "run.h5.parts" / "rank-00000.h5"
    with h5py.File(rows, "r+") as file:
        file["events/layer"][7] += 1
    found = damaged(capfd, path)
    assert found["events"] == 0
    assert "rank 0 on" in found["damage"][0] and "events were altered" in found["damage"][0]


def test_a_column_that_shows_other_rows_than_the_parts_hold_is_damage(tmp_path, one, capfd):
    import h5py

    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(50), "parts")
    with h5py.File(path, "r+") as file:
        del file["events/layer"]
        file["events/layer"] = some_events(50)["layer"] + 1
    found = damaged(capfd, path)
    assert found["events"] == 50 and "altered" in found["damage"][0]


def test_a_column_that_calls_a_number_otherwise_is_damage(tmp_path, one, driver, capfd):
    import h5py

    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(50), driver)
    with h5py.File(path, "r+") as file:
        names = list(file["events/verdict"].attrs["names"])
        file["events/verdict"].attrs["names"] = [names[1], names[0], *names[2:]]
    found = damaged(capfd, path)
    assert "calls 0 FAILED, not VERIFIED" in found["damage"][0]


def test_a_file_cut_short_is_damage(tmp_path, one, driver, capfd):
    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(50), driver)
    os.truncate(path, path.stat().st_size // 2)
    found = damaged(capfd, path)
    assert "is damaged or cut short" in found["damage"][0]


def test_the_journals_of_a_killed_run_are_incomplete(tmp_path, one, capfd):
    path = tmp_path / "run.h5"
    journal = write_journal(one, path, some_events(50), world=3)
    os.truncate(journal.path, journal.path.stat().st_size - 100)  # the end, part of a record
    status, found = check(capfd, path)
    assert (status, found["driver"], found["events"]) == (3, "journals", 49)
    assert any("record 49 is torn" in line for line in found["missing"])
    assert "no journal of 2 of 3 ranks: 1, 2" in found["missing"]


def test_a_flipped_byte_in_a_journal_is_damage(tmp_path, one, capfd):
    path = tmp_path / "run.h5"
    journal = write_journal(one, path, some_events(50))
    data = bytearray(journal.path.read_bytes())
    data[-200] ^= 1
    journal.path.write_bytes(data)
    found = damaged(capfd, path)
    assert "record 48 is damaged" in found["damage"][0]


def test_a_trace_that_is_still_written_is_refused_unless_shown_live(tmp_path, capfd):
    path = tmp_path / "run.h5"
    journal = Journal(journal_folder(path), 0, header(1), TENSORS)
    journal.append(some_events(30))
    journal.flush()
    assert "still being written by a running job" in refused(capfd, path)
    assert main(["trace", "show", str(path)]) == 2
    capfd.readouterr()
    assert main(["trace", "show", "--live", "--json", str(path)]) == 3
    assert json.loads(capfd.readouterr().out)["events"] == 30
    journal.close("verified")
    assert check(capfd, path)[0] == 3


def test_the_journals_of_a_later_run_come_before_an_earlier_trace(tmp_path, one, capfd):
    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(50), "parts")
    write_journal(one, path, some_events(20), run_id="run-2")
    status, found = check(capfd, path)
    assert (status, found["driver"], found["events"]) == (3, "journals", 20)


def test_what_is_not_a_trace_is_refused_in_one_line(tmp_path, capfd):
    from mpi4py import MPI  # noqa: F401

    import h5py

    (tmp_path / "text.h5").write_text("not HDF5")
    (tmp_path / "empty.h5").write_text("")
    h5py.File(tmp_path / "other.h5", "w").close()
    with h5py.File(tmp_path / "newer.h5", "w") as file:
        file.attrs["schema_version"] = 2
    assert "there is no trace" in refused(capfd, tmp_path / "absent.h5")
    assert "not an HDF5 file" in refused(capfd, tmp_path / "text.h5")
    assert "not an HDF5 file" in refused(capfd, tmp_path / "empty.h5")
    assert "without a schema_version" in refused(capfd, tmp_path / "other.h5")
    assert "has schema 2, this spimpi reads up to schema 1" in refused(capfd, tmp_path / "newer.h5")


def test_a_crash_of_the_reader_is_told_as_damage(capfd):
    def crash():
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGSEGV)

    assert apart(crash, "run.h5") == 3
    assert capfd.readouterr().err == "spimpi: run.h5 is damaged: HDF5 crashed (SIGSEGV) reading it\n"
    assert apart(lambda: 5, "run.h5") == 5


def test_a_reader_that_runs_for_ever_is_told_as_damage(capfd, monkeypatch):
    def run_for_ever():
        faulthandler.disable()
        re.match(r"(a+)+$", "a" * 60 + "b")  # one call that never gives Python its turn

    monkeypatch.setattr(module, "PATIENCE", 1.0)
    assert apart(run_for_ever, "run.h5") == 3
    assert capfd.readouterr().err == "spimpi: run.h5 is damaged: HDF5 runs for ever reading it\n"


def test_an_interrupted_command_clears_away_and_says_nothing(tmp_path):
    """Ctrl-C goes to the parent and to the child."""
    program = f"""
import os, pathlib, signal, sys
from spimpi.cli.apart import apart

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored

def command():
    file = pathlib.Path({str(tmp_path / "part")!r})
    file.touch()
    try:
        os.killpg(0, signal.SIGINT)
        signal.pause()
    finally:
        file.unlink()

status = apart(command, "run.h5")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
sys.exit(status)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, start_new_session=True
    )
    assert (done.returncode, done.stderr) == (130, "") and not (tmp_path / "part").exists()


def test_a_reader_that_closes_the_pipe_gives_no_traceback(tmp_path, one):
    path = tmp_path / "run.h5"
    write_trace(one, path, some_events(50))
    command = f"{sys.executable} -m spimpi trace check --json {path} | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_a_reader_that_waits_is_ended_after_the_time_that_its_file_can_need(capfd, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.5)
    began = time.monotonic()
    assert apart(lambda: time.sleep(600), "run.h5") == 3
    assert time.monotonic() - began < 60
    told = capfd.readouterr().err
    assert told.startswith("spimpi: run.h5: not read within 0 s, which files of 0 bytes")


def test_a_larger_file_has_more_time_and_more_memory(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.2)
    assert apart(lambda: time.sleep(1) or 5, "run.h5", size=100 * module.BYTES_A_SECOND) == 5
    monkeypatch.setattr(module, "MEMORY", 1 << 20)

    def take():
        return 5 if bytearray(1 << 27) else 6

    assert apart(take, "run.h5", size=1 << 27) == 5
    assert apart(take, "run.h5", size=0) == 3


def test_memory_beyond_what_the_file_can_need_is_told_as_damage(capfd):
    assert apart(lambda: len(bytearray(1 << 33)), "run.h5", size=1 << 20) == 3
    assert "run.h5 is damaged: reading it takes more memory" in capfd.readouterr().err


def test_time_in_which_nobody_takes_the_output_does_not_count(tmp_path):
    """As in a pager."""
    program = """
import sys
import time
from spimpi.cli import apart
apart.SECONDS = 0.5

def command():
    print("x" * 1_000_000)
    return 5

sys.exit(apart.apart(command, "run.h5"))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as started:
        time.sleep(4)
        assert len(started.stdout.read()) == 1_000_001
    assert started.returncode == 5


def test_what_nobody_expected_is_damage_in_one_sentence_unless_it_is_looked_for(capfd, monkeypatch):
    def fail():
        raise KeyError("x" * 2000 + "\x1b[31m\n")

    monkeypatch.delenv("SPIMPI_DEBUG")
    assert apart(fail, "run.h5") == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("spimpi: run.h5 cannot be read: KeyError") and len(line) <= 508
    assert "\x1b" not in line and "SPIMPI_DEBUG=1" in line
    monkeypatch.setenv("SPIMPI_DEBUG", "1")
    assert apart(fail, "run.h5") == 4
    assert "Traceback" in capfd.readouterr().err
