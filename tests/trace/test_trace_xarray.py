"""A trace as an xarray Dataset: by spimpi, and by xarray itself from the file."""

import sys

import numpy as np
import pytest
from trace_samples import TENSORS, some_events, write_alone_trace, write_journal, write_trace

from spimpi.errors import IncompleteError, MissingDependency
from spimpi.trace import open as open_trace
from spimpi.trace.schema import EVENT, Established, Op

xarray = pytest.importorskip("xarray", reason="needs the extra spimpi[trace]")
COUNTS = (20, 0, 30)
RANKS = [some_events(count, seed) for seed, count in enumerate(COUNTS)]
ROWS = np.concatenate(RANKS)


@pytest.mark.parametrize("driver", ["gather", "parts"])
def test_a_dataset_holds_every_column_and_the_rank_of_each_row(tmp_path, driver):
    write_alone_trace(tmp_path / "run.h5", RANKS, driver)
    with open_trace(tmp_path / "run.h5") as trace:
        dataset = trace.to_xarray()
        assert dataset.sizes == {"event": 50} and set(dataset.data_vars) == set(EVENT.names)
        for name in EVENT.names:
            assert dataset[name].dtype == EVENT[name]
            assert np.array_equal(dataset[name], ROWS[name])
        assert np.array_equal(dataset["rank"], np.repeat([0, 1, 2], COUNTS))
        some = dataset.isel(event=[3, 19, 20, 49])
        assert np.array_equal(some["t_end"], ROWS["t_end"][[3, 19, 20, 49]])
        assert list(some["rank"].values) == [0, 0, 2, 2]
        assert np.array_equal(dataset["step"][-5:], ROWS["step"][-5:])
        assert dataset.attrs["model"] == "tiny" and dataset.attrs["topology"] == '{"tp": 2}'


def test_numbers_are_named_as_in_the_cf_conventions(tmp_path, one):
    write_trace(one, tmp_path / "run.h5", some_events(3))
    with open_trace(tmp_path / "run.h5") as trace:
        op, established = (trace.to_xarray()[name].attrs for name in ("op", "established"))
    names = dict(zip(op["flag_values"], op["flag_meanings"].split(), strict=True))
    assert names == {member.value: member.name for member in Op}
    assert list(established["flag_masks"]) == [member.value for member in Established]


def test_a_dataset_is_read_only_where_it_is_used(tmp_path):
    write_alone_trace(tmp_path / "run.h5", RANKS)
    with open_trace(tmp_path / "run.h5") as trace:
        dataset = trace.to_xarray()
        steps = dataset["step"].load()
    assert np.array_equal(steps, ROWS["step"])
    with pytest.raises((ValueError, RuntimeError)):  # the file is closed
        dataset["layer"].load()


def test_a_missing_part_is_no_dataset(tmp_path):
    write_alone_trace(tmp_path / "run.h5", RANKS, "parts")
    (tmp_path / "run.h5.parts" / "rank-00002.h5").unlink()
    with open_trace(tmp_path / "run.h5") as trace, pytest.raises(IncompleteError, match="missing"):
        trace.to_xarray()


def test_journals_give_the_same_dataset(tmp_path, one):
    write_journal(one, tmp_path / "killed.h5", ROWS)
    write_trace(one, tmp_path / "run.h5", ROWS)
    with open_trace(tmp_path / "killed.h5") as killed, open_trace(tmp_path / "run.h5") as run:
        xarray.testing.assert_equal(killed.to_xarray().load(), run.to_xarray().load())


def test_xarray_opens_the_groups_of_the_file_and_names_their_dimensions(tmp_path, one, driver):
    pytest.importorskip("h5netcdf", reason="needs the extra spimpi[trace]")
    path = tmp_path / "run.h5"
    write_trace(one, path, ROWS, driver)

    def opened(group):
        return xarray.open_dataset(path, group=group, engine="h5netcdf")

    with opened("events") as events, opened("ranks") as ranks, opened("tensors") as tensors:
        assert (events.sizes, ranks.sizes, tensors.sizes) == (
            {"event": 50}, {"rank": 1}, {"name": 3},
        )  # fmt: skip
        assert set(events.variables) == set(EVENT.names)
        assert all(np.array_equal(events[name], ROWS[name]) for name in EVENT.names)
        assert "MATMUL" in events["op"].attrs["names"]
        assert list(ranks["rank"].values) == [0] and int(ranks["count"].sel(rank=0)) == 50
        assert tensors["dtype"].sel(name="hidden").item() == TENSORS[1].dtype


def test_dimension_scales_take_no_room_and_are_there_without_events(tmp_path, one, driver):
    import h5py

    write_trace(one, tmp_path / "none.h5", some_events(0), driver)
    write_trace(one, tmp_path / "run.h5", ROWS, driver)
    for name, rows in (("none", 0), ("run", 50)):
        with h5py.File(tmp_path / f"{name}.h5") as file:
            scale = file["events/event"]
            assert scale.is_scale and scale.shape == (rows,)
            assert scale.id.get_storage_size() == 0
            assert all(file["events"][c].dims[0][0] == scale for c in EVENT.names)
            assert file["ranks/host"].dims[0][0] == file["ranks/rank"]
            assert file["tensors/shape"].dims[0].keys() == ["name"]


def test_without_xarray_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_alone_trace(tmp_path / "run.h5", RANKS)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with (
        open_trace(tmp_path / "run.h5") as trace,
        pytest.raises(MissingDependency, match=r"pip install 'spimpi\[trace\]'"),
    ):
        trace.to_xarray()
