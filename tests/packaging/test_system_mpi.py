"""What is missing for the tests is found, and said with the way to get it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "cmake"))
import system_mpi


@pytest.fixture
def hdf5(tmp_path, monkeypatch):
    """An HDF5 whose header says what the test wants it to."""

    def make(line):
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "H5pubconf.h").write_text(line)
        monkeypatch.setenv("HDF5_DIR", str(tmp_path))

    return make


def test_a_serial_hdf5_is_refused_by_name(hdf5, tmp_path):
    hdf5("/* #undef H5_HAVE_PARALLEL */\n")
    with pytest.raises(system_mpi.Missing, match=f"HDF5_DIR={tmp_path} is not"):
        system_mpi.find_or_install()


def test_without_mpi_and_root_the_message_says_what_to_install(hdf5, monkeypatch):
    hdf5("#define H5_HAVE_PARALLEL 1\n")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(system_mpi.os, "geteuid", lambda: 1000)
    with pytest.raises(system_mpi.Missing) as caught:
        system_mpi.find_or_install()
    message = str(caught.value)
    assert "no mpiexec on PATH" in message and "no working mpicc" in message
    assert "an HDF5 built with MPI: none" not in message
    assert "apt-get install" in message and "libhdf5-openmpi-dev" in message


def test_the_mpi_of_an_activated_environment_is_not_the_machines(tmp_path, monkeypatch):
    (tmp_path / "activate").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin")
    assert system_mpi.path_without_environments() == "/usr/bin"
