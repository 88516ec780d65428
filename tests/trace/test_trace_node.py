"""The journals of a node's ranks in one file: each is read as if it had a file of its own."""

import os

import numpy as np
import pytest
from trace_samples import TENSORS, header, same, some_events

from spimpi.cli import main
from spimpi.trace import open as open_trace
from spimpi.trace.journals import node_file
from spimpi.trace.journals.journal import Journal, read_journal
from spimpi.trace.journals.journal_files import journal_folder, journals_in, lock
from spimpi.trace.journals.node_file import EXTENT, Stream, create, streams
from spimpi.trace.journals.node_file import opened as opened_stream
from spimpi.trace.reading.check import check
from spimpi.trace.sealing.recover import recover
from spimpi.trace.sealing.seal import prepare

RANKS = (1, 4, 6)  # of a world of which node holds every other rank or so
ROWS = 2500  # three extents and a bit


def node_journals(path, tensors=TENSORS, ranks=RANKS, world=7) -> list[Journal]:
    """Open journals of ranks that share a file."""
    prepare(path)
    file = journal_folder(path) / "node-00001.journal"
    create(file, ranks)
    return [
        Journal(file.parent, rank, header(world), tensors, at=Stream(file, ranks, rank))
        for rank in ranks
    ]


def written(path, rows=ROWS, **more) -> list[Journal]:
    journals = node_journals(path, **more)
    for start in range(0, rows, 100):
        for journal in journals:
            journal.append(some_events(rows, journal.rank)[start : min(rows, start + 100)])
            journal.flush()
    return journals


def kill(journals) -> None:
    for journal in journals:
        os.close(journal._file.fd)


def test_each_rank_is_read_back_and_the_file_is_one(tmp_path):
    path = tmp_path / "run.h5"
    for journal in written(path):
        journal.close("verified")
    (file,) = journal_folder(path).iterdir()
    found, *problems = journals_in(file.parent)
    assert [j.name for j in found] == [f"rank-{rank:05d}.journal" for rank in RANKS]
    assert problems == [[], []]
    for stream in found:
        contents = read_journal(stream)
        assert same(contents.events, some_events(ROWS, stream.rank))
        assert contents.complete and not contents.problems


@pytest.mark.parametrize("of_flush", [0.1, 0.5, 0.999])
def test_a_rank_killed_in_a_flush_tears_its_own_rows_alone(tmp_path, of_flush):
    path = tmp_path / "run.h5"
    one, two, three = written(path, 400)
    more = some_events(900, 99)

    def half_then_dies(fd, data, position):  # of a flush that crosses two extents
        data = data[: int(len(data) * of_flush)]
        while data:
            n = Stream.write(two.path, fd, data, position)
            data, position = data[n:], position + n
        raise KeyboardInterrupt

    real = two._file._path
    two._file._path = type("Torn", (Stream,), {"write": lambda self, *a: half_then_dies(*a)})(
        real.file, real.ranks, real.rank
    )
    two.append(more)
    with pytest.raises(KeyboardInterrupt):
        two.flush()
    later = some_events(50, 7)
    one.append(later)
    three.append(later)
    for journal in (one, three):
        journal.close("verified")
    kill([two])
    contents = read_journal(real)
    whole = int(900 * of_flush)
    assert same(contents.events, np.concatenate([some_events(400, 4), more[:whole]])[: 400 + whole])
    assert len(contents.problems) == (1 if 900 * 88 * of_flush % 88 >= 1 else 0)
    for journal in (one, three):
        found = read_journal(journal.path)
        assert found.complete
        assert same(found.events, np.concatenate([some_events(400, journal.rank), later]))


def test_killed_ranks_are_recovered_and_the_file_goes(tmp_path):
    path = tmp_path / "run.h5"
    kill(written(path, 40))
    found = check(path)
    assert (found.state, found.ranks, found.events) == ("incomplete", 3, 120)
    assert "no journal of 4 of 7 ranks: 0, 2, 3, 5" in found.missing
    assert "rank-00004.journal: not closed, 40 events were flushed" in found.missing
    assert recover(path).events == 120
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]
    with open_trace(path) as trace:
        assert all(same(trace.events(rank), some_events(40, rank)) for rank in RANKS)


def test_a_rank_that_never_began_is_missing(tmp_path):
    path = tmp_path / "run.h5"
    prepare(path)
    file = journal_folder(path) / "node-00000.journal"
    create(file, (0, 1))
    journal = Journal(file.parent, 1, header(2), TENSORS, at=Stream(file, (0, 1), 1))
    journal.append(some_events(5))
    journal.close("error")
    assert read_journal(Stream(file, (0, 1), 0)).missing
    assert check(path).state == "incomplete" and check(path).ranks == 1


def test_tables_that_grow_lie_in_the_same_file(tmp_path):
    path = tmp_path / "run.h5"
    journals = node_journals(path, None)
    for journal in journals:
        for tensor in TENSORS[journal.rank % 2 :]:
            journal.table.row(tensor)
        journal.append(some_events(3))
        journal.close("verified")
    assert len(list(journal_folder(path).iterdir())) == 1
    for journal in journals:
        contents = read_journal(journal.path)
        assert contents.grows and contents.complete
        assert contents.tensors == TENSORS[journal.rank % 2 :]


def test_a_running_rank_holds_the_file_and_the_last_one_frees_it(tmp_path, capfd):
    path = tmp_path / "run.h5"
    one, two, three = written(path, 40)
    for journal in (one, three):
        journal.close("verified")
    assert main(["trace", "check", str(path)]) == 2
    assert "still being written" in capfd.readouterr().err
    assert main(["trace", "recover", str(path)]) == 2
    assert main(["trace", "show", "--live", str(path)]) == 3
    two.close("verified")
    assert check(path).ranks == 3
    file = journal_folder(path) / "node-00001.journal"
    with lock(file, shared=True), lock(file, shared=True):  # ranks that seal
        assert main(["trace", "recover", str(path)]) == 2


def test_the_list_of_ranks_is_there_twice(tmp_path, capfd):
    path = tmp_path / "run.h5"
    for journal in written(path, 40):
        journal.close("verified")
    file = journal_folder(path) / "node-00001.journal"
    data = bytearray(file.read_bytes())
    data[70] ^= 4
    file.write_bytes(data)
    assert len(streams(file)[0]) == 3
    data[EXTENT // 2 + 80] ^= 4
    file.write_bytes(data)
    found = check(path)
    assert found.damage == ["node-00001.journal: its list of ranks is damaged, so none of it was read"]
    assert main(["trace", "recover", str(path)]) == 3
    assert file.exists()


def test_a_flipped_byte_is_named_or_changes_nothing(tmp_path):
    path = tmp_path / "run.h5"
    written_rows = {rank: some_events(300, rank) for rank in RANKS}
    for journal in written(path, 300):
        journal.close("verified")
    file = journal_folder(path) / "node-00001.journal"
    sound = file.read_bytes()
    rng = np.random.default_rng(0)
    used = np.flatnonzero(np.frombuffer(sound, np.uint8))
    places = [*rng.choice(used, 60), *rng.integers(0, len(sound), 60)]
    for place in map(int, places):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        bad = 0
        for stream in streams(file)[0]:
            contents = read_journal(stream)
            assert same(contents.events, written_rows[stream.rank][: len(contents.events)])
            bad += not contents.complete
            assert contents.complete or contents.problems
        # Of a rank's stream that says more than its end, of one that is not used (sketches), …
        assert bad <= 1 and (bad or place < EXTENT or sound[place] == 0)


def test_a_file_that_is_cut_short_lacks_what_was_behind(tmp_path):
    path = tmp_path / "run.h5"
    kill(written(path))
    file = journal_folder(path) / "node-00001.journal"
    whole = file.stat().st_size
    for size in (whole - 50, whole // 2, 3 * EXTENT, EXTENT, EXTENT - 1, 50, 0):
        os.truncate(file, size)
        assert check(path).state == "incomplete"
        for stream in streams(file)[0]:
            rows = read_journal(stream).events
            assert same(rows, some_events(ROWS, stream.rank)[: len(rows)])
    assert "node-00001.journal: cut short, nothing was flushed" in check(path).missing


def test_a_stream_reads_as_its_bytes_whatever_the_pieces(tmp_path):
    file = tmp_path / "node-00000.journal"
    create(file, (0, 1))
    data = np.random.default_rng(0).integers(1, 255, 3 * EXTENT + 16, np.uint8).tobytes()
    stream, fd, position = Stream(file, (0, 1), 1), os.open(file, os.O_WRONLY), 0
    while position < len(data):
        position += stream.write(fd, data[position : position + 70001], position)
    os.close(fd)
    with stream.open() as opened:
        assert opened.read(5) + opened.read() == data
    assert not Stream(file, (0, 1), 0).exists() and opened_stream(stream)[1] == len(data)


def test_few_ranks_of_a_node_have_files_of_their_own(tmp_path):
    few, many = range(node_file.SEPARATE), range(3, node_file.SEPARATE + 4)
    assert node_file.node_file(tmp_path, few) is None
    assert node_file.node_file(tmp_path, many) == tmp_path / "node-00003.journal"
