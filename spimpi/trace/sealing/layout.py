"""How a sealed trace lies in its HDF5 file, the same whatever driver wrote the rows.

    /                 attributes: schema_version, driver, and all that the run says of itself
    /events/<column>  one-dimensional, contiguous; the ranks' rows one after the other
    /ranks/<column>   rank, host, pid, device, started, offset, count, fingerprint (and part)
    /tensors/<column> name, shape (JSON), dtype

Each group has one dimension, named by a dimension scale as netCDF-4 does it: /events/event,
/ranks/rank, /tensors/name. So xarray opens the groups as they are.

Integers are stored in the narrowest type that holds the column in this run (about 50 bytes an
event in place of 74). One process writes everything but the rows.
"""

import json
from dataclasses import astuple, fields

import numpy as np

from spimpi.hdf5_guard import own_attribute, own_group, own_numbers, own_texts
from spimpi.trace.checksum import text_digest
from spimpi.trace.facts import tensor_of
from spimpi.trace.schema import (
    DESCRIPTIONS, ENUMERATIONS, EVENT, MASKS, RANK_DESCRIPTIONS, SCHEMA_VERSION,
    TENSOR_DESCRIPTIONS, RankInfo, TensorInfo,
)  # fmt: skip

OWN_ATTRIBUTES = ("schema_version", "driver", "json", "digest")
MISSING = "missing"  # the attribute of a recovered trace: what its journals lacked, a list
NARROWED = tuple(
    name for name in EVENT.names if EVENT[name].kind in "iu" and "u8" not in EVENT[name].str
) + ("bytes",)
ROWS_AT_ONCE = 1 << 16
EVENT_DIMENSION = "event"
LIBVER = ("v108", "v110")  # attributes beyond 64 kB, and virtual datasets; read since HDF5 1.10


def column_types(low, high) -> dict[str, np.dtype]:
    """The stored type of each column, from the least and greatest value of each of NARROWED."""
    types = {name: EVENT[name] for name in EVENT.names}
    for name, least, most in zip(NARROWED, low, high, strict=True):
        kinds = ("i1", "<i2", "<i4", "<i8") if least < 0 else ("u1", "<u2", "<u4", "<u8")
        types[name] = next(
            np.dtype(kind)
            for kind in kinds
            if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max
        )
    return types


def column_range(events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest value of each of NARROWED, int64; zeros where there are no events."""
    if not len(events):
        return np.zeros(len(NARROWED), np.int64), np.zeros(len(NARROWED), np.int64)
    columns = [np.ascontiguousarray(events[name]) for name in NARROWED]
    low = np.array([int(column.min()) for column in columns], np.int64)
    return low, np.array([int(column.max()) for column in columns], np.int64)


def write_tables(file, driver: str, attributes: dict, ranks, tensors, parts=None) -> None:
    """Attributes, /ranks and /tensors of a new file. ``parts``: name of each rank's part file."""
    import h5py

    in_json = []
    for name, value in attributes.items():
        if not _is_plain(value):
            in_json.append(name)
            value = json.dumps(value)
        file.attrs[name] = value
    file.attrs["schema_version"] = SCHEMA_VERSION
    file.attrs["driver"] = driver
    file.attrs["json"] = json.dumps(in_json)
    file.attrs["digest"] = tables_digest(driver, attributes, ranks, tensors)
    text = h5py.string_dtype()
    table = file.create_group("ranks")
    types = {int: "<i8", float: "<f8", str: text}
    for position, column in enumerate(fields(RankInfo)):
        dtype = "<u8" if column.name == "fingerprint" else types[column.type]
        values = [astuple(rank)[position] for rank in ranks]
        table.create_dataset(column.name, data=np.array(values, dtype=dtype))
    if parts is not None:
        table.create_dataset("part", data=np.array(parts, dtype=text))
    _describe_table(table, RANK_DESCRIPTIONS)
    _name_dimension(table, table["rank"])
    table = file.create_group("tensors")
    for name in ("name", "shape", "dtype"):
        values = [getattr(tensor, name) for tensor in tensors]
        values = [json.dumps(v) if name == "shape" else v for v in values]
        table.create_dataset(name, data=np.array(values, dtype=text))
    _describe_table(table, TENSOR_DESCRIPTIONS)
    _name_dimension(table, table["name"])


def _describe_table(table, descriptions: dict) -> None:
    for name, column in table.items():
        column.attrs["description"] = descriptions[name]


def _name_dimension(group, scale, name: str | None = None) -> None:
    """Make one data set of a group the dimension scale of the others."""
    scale.make_scale(name or scale.name.rpartition("/")[2])
    for dataset in group.values():
        if dataset != scale:
            dataset.dims[0].attach_scale(scale)


def _name_events(group, total: int) -> None:
    """A dimension of no coordinate: a data set without storage, of a name that netCDF-4 knows."""
    scale = group.create_dataset(EVENT_DIMENSION, (total,), "i1")
    _name_dimension(group, scale, f"This is a netCDF dimension but not a netCDF variable.{total:10}")


def describe(dataset, name: str) -> None:
    """Say in the file what a column is, and the names of its numbers."""
    dataset.attrs["description"] = DESCRIPTIONS[name]
    if name in ENUMERATIONS:
        members = list(ENUMERATIONS[name])
        dataset.attrs["names"] = [member.name for member in members]
        dataset.attrs["values"] = [int(member) for member in members]
        dataset.attrs.update(flags_of(name, dataset.dtype))


def flags_of(name: str, dtype) -> dict:
    """Names of an enumeration's numbers as CF has them: flag_values (flag_masks where bits add
    up), of the column's own type, and flag_meanings."""
    members = list(ENUMERATIONS[name])
    flags = "flag_masks" if name in MASKS else "flag_values"
    meanings = " ".join(member.name for member in members)
    return {flags: np.array(list(map(int, members)), dtype), "flag_meanings": meanings}


def create_columns(file, total: int, types: dict) -> None:
    """Empty contiguous columns, their space allocated and never filled."""
    import h5py

    group = file.create_group("events")
    for name, dtype in types.items():
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_layout(h5py.h5d.CONTIGUOUS)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((total,))
        h5type = h5py.h5t.py_create(dtype, logical=True)
        dataset = h5py.h5d.create(group.id, name.encode(), h5type, space, creation)
        describe(h5py.Dataset(dataset), name)
    _name_events(group, total)


def create_virtual_columns(file, total: int, types: dict, ranks, parts) -> None:
    """Columns that show the rows of the part files in place."""
    import h5py

    group = file.create_group("events")
    for name, dtype in types.items():
        layout = h5py.VirtualLayout(shape=(total,), dtype=dtype)
        for rank, part in zip(ranks, parts, strict=True):
            if rank.count:
                literal = part.replace("%", "%%")  # HDF5 reads names of sources as formats
                source = h5py.VirtualSource(literal, f"events/{name}", (rank.count,), dtype)
                layout[rank.offset : rank.offset + rank.count] = source
        if total:
            describe(group.create_virtual_dataset(name, layout), name)
        else:
            describe(group.create_dataset(name, (0,), dtype), name)
    _name_events(group, total)


def read_tables(file) -> tuple[dict, list[RankInfo], list[TensorInfo], list[str], bool]:
    """Attributes, ranks, tensors, names of the parts, and whether they are as they were written.

    Raises whatever h5py raises where the file is not a sealed trace.
    """
    in_json = set(json.loads(own_attribute(file, "json")))
    driver, attributes = own_attribute(file, "driver"), {}
    for name in file.attrs:
        if name in OWN_ATTRIBUTES:
            continue
        value = own_attribute(file, name)
        value = value.item() if isinstance(value, np.generic) else value
        attributes[name] = json.loads(value) if name in in_json else value
    columns = [_rank_column(file, column.name, column.type) for column in fields(RankInfo)]
    ranks = [RankInfo(*row) for row in zip(*columns, strict=True)]
    names, shapes, dtypes = (own_texts(file, f"tensors/{c}") for c in ("name", "shape", "dtype"))
    tensors = [
        tensor_of([name, json.loads(shape), dtype])
        for name, shape, dtype in zip(names, shapes, dtypes, strict=True)
    ]
    parts = own_texts(file, "ranks/part") if driver == "parts" else []
    digest = tables_digest(driver, attributes, ranks, tensors)
    return attributes, ranks, tensors, parts, digest == own_attribute(file, "digest")


def _rank_column(file, name: str, kind: type) -> list:
    """A column of /ranks, as Python's own numbers or texts."""
    if kind is str:
        return own_texts(file, f"ranks/{name}")
    kinds = "u" if name == "fingerprint" else "f" if kind is float else "i"
    return of_one_dimension(own_numbers(file, f"ranks/{name}", kinds))[:].tolist()


def event_column(file, name: str, opened=own_numbers):
    """A column of /events of an open file, whose rows lie in the file; ``opened``: of hdf5_guard."""
    return event_columns(file, (name,), opened)[name]


def event_columns(file, names=EVENT.names, opened=own_numbers) -> dict:
    """Columns of /events by name."""
    events, columns = own_group(file, "events"), {}
    for name in names:
        kinds = "iu" if name in NARROWED else EVENT[name].kind
        columns[name] = of_one_dimension(opened(events, name, kinds, EVENT[name].itemsize))
    return columns


def of_one_dimension(column):
    if len(column.shape) != 1:
        msg = f"{column.name} has shape {column.shape}, expected one dimension"
        raise ValueError(msg)
    return column


def read_rows(columns, start: int, count: int) -> np.ndarray:
    """Rows of /events, as they were recorded (dtype EVENT); ``columns`` by name."""
    events = np.empty(count, EVENT)
    for name in EVENT.names:
        events[name] = columns[name][start : start + count]
    return events


def tables_digest(driver: str, attributes: dict, ranks, tensors) -> str:
    rows = [[astuple(row) for row in table] for table in (ranks, tensors)]
    return text_digest(json.dumps([driver, attributes, rows], sort_keys=True).encode())


def _is_plain(value) -> bool:
    """Whether HDF5 can hold the value as it is: text without NUL, a 64-bit integer, a float."""
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        return "\0" not in value and value.isprintable()
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    return isinstance(value, float)
