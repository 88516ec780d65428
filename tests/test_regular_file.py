"""Files that are read must be ordinary ones."""

import os
import socket

import pytest

from spimpi.regular_file import open_regular, read_at_most, size_of


def test_an_ordinary_file_is_read_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with open_regular(path) as file:
        assert size_of(file) == 7 and file.read() == b"content"
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_at_most(link, 7) == b"content"


def test_what_could_wait_for_ever_is_refused_at_once(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    link = tmp_path / "link"
    link.symlink_to(fifo)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    with server:
        for path in (fifo, link, "/dev/zero", tmp_path, tmp_path / "socket"):
            with pytest.raises(OSError):
                open_regular(path)


def test_a_file_longer_than_it_may_be_is_not_read(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="more than the 1,024"):
        read_at_most(path, 1024)
