"""What is said on standard error has at most 500 characters a line, however long names are."""

from dataclasses import replace

import h5py

from spimpi import compiling
from spimpi.bench import synthetic_trace as samples
from spimpi.cli import main
from spimpi.trace.schema import RankInfo


def test_what_an_export_leaves_out_of_a_host_with_a_long_name(tmp_path, monkeypatch, capfd):
    def long(**facts):
        return replace(RankInfo(**facts), host="h" * 3000)

    monkeypatch.setattr(samples, "RankInfo", long)
    samples.synthetic_trace(tmp_path / "t.h5", 1, 3)
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        file["events/bytes"][1] ^= 1
    status = main(["trace", "export", str(tmp_path / "t.h5"), "-o", str(tmp_path / "t.csv")])
    (line,) = capfd.readouterr().err.splitlines()
    assert status == 3 and line.startswith("spimpi: left out: ") and len(line) <= 500
    assert "hhh" in line


def test_where_kernels_are_kept(tmp_path, monkeypatch, capfd):
    folder = tmp_path.joinpath(*(3 * ["c" * 200]))
    monkeypatch.setattr(compiling, "usable_folder", lambda: (folder, ""))
    monkeypatch.setattr(compiling, "_told", compiling._Told())
    compiling.announce_cold_start()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("spimpi: compiling kernels") and len(line) <= 500
