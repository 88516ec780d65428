"""Edits of an HDF5 file, and the digests of a trace made right again after them."""

import json

import numpy as np
from hostile import FLOATS, INTEGERS, TEXTS

SMALL = 1 << 17  # rows of a trace whose digests are made again
KINDS = (
    "attribute", "attribute", "attribute", "delete attribute", "fill", "fill", "element", "element",
    "element", "retype", "reshape", "delete", "group", "huge", "soft link", "external link",
    "external storage", "virtual", "text",
)  # fmt: skip
# What h5py raises where an edit cannot be made, or its place went with an earlier one.
IMPOSSIBLE = (
    LookupError, ValueError, TypeError, OverflowError, OSError, RuntimeError, MemoryError, AttributeError,
)  # fmt: skip
TYPES = ("<i1", "<i8", "<u8", "<f4", "<f8", ">i4", "S8", "complex128", "bool", "V5")


def draw(rng, datasets, attributes) -> tuple:
    """One edit, as plain values: (how, name, numbers that ``apply`` draws on)."""
    how = rng.choice(KINDS)
    name = rng.choice(attributes if "attribute" in how else datasets)
    return how, name, rng.random(), _value(rng)


def _value(rng):
    pools = (INTEGERS, FLOATS, TEXTS, (True, [], [1, 2], "[" * 60_000, "[]", "{}", "null", "[1e999]"))
    return rng.choice(rng.choice(pools))


def leads_outside(edit) -> bool:
    """Whether an edit makes the file read others; to open it for writing would touch these."""
    return edit[0] in ("external link", "external storage", "virtual")


def apply(file, edit) -> None:
    """Apply an edit where HDF5 can hold it; else nothing is done."""
    how, name, place, value = edit
    try:
        _apply(file, how, name, place, value)
    except IMPOSSIBLE:
        pass


def _apply(file, how, name, place, value):
    import h5py

    if how == "attribute":
        if isinstance(value, str):
            value = value.replace("\0", "")[:60_000]
        file.attrs[name] = value
        return
    if how == "delete attribute":
        del file.attrs[name]
        return
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return  # an earlier edit's: to follow it would touch another file
    old = file[name]
    n = old.shape[0] if old.shape else 0
    if how in ("fill", "element", "text"):
        if how == "text" or isinstance(value, str):
            value = str(value) if h5py.check_string_dtype(old.dtype) else int(place * 100)
        elif h5py.check_string_dtype(old.dtype):
            value = str(value)
        value = fitting(value, old.dtype)
        if how == "fill":
            old[...] = value
        elif n:
            old[int(place * n)] = value
        return
    attributes = {k: v for k, v in old.attrs.items() if k not in ("REFERENCE_LIST", "DIMENSION_LIST", "CLASS", "NAME")}
    numbers = how in ("retype", "reshape") and not h5py.check_string_dtype(old.dtype) and n <= SMALL
    data = old[...] if numbers else None
    dtype, path = old.dtype, name
    del file[name]
    if how == "delete":
        return
    if how == "group":
        file.create_group(name)
        return
    if how == "soft link":
        file[name] = h5py.SoftLink("/" + name if place < 0.5 else "/nosuch")
        return
    if how == "external link":
        file[name] = h5py.ExternalLink("../../outside/secret.h5", "/secret")
        return
    if how == "external storage":
        new = file.create_dataset(name, (max(n, 1),), "u1", external=[("../../outside/secret", 0, 64)])
    elif how == "virtual":
        layout = h5py.VirtualLayout((max(n, 1),), "<i8")
        layout[:] = h5py.VirtualSource("../../outside/secret.h5", "secret", (max(n, 1),), "<i8")
        new = file.create_virtual_dataset(name, layout)
    elif how == "huge":
        rows = (10**7, 10**9, 2**40, 2**62)[int(place * 4)]
        kind = dtype if not h5py.check_string_dtype(dtype) else h5py.string_dtype()
        new = file.create_dataset(path, (rows,), kind, chunks=(1 << 16,), compression="gzip")
    elif how == "retype":
        kind = TYPES[int(place * len(TYPES))]
        new = file.create_dataset(name, data=np.zeros(n, kind) if data is None else data.astype(kind))
    else:  # reshape
        data = np.zeros(n, "<i8") if data is None else data
        shapes = (data[: n // 2], np.concatenate([data, data]), data[None], data[:0], np.float64(1))
        new = file.create_dataset(name, data=shapes[int(place * len(shapes))])
    new.attrs.update(attributes)


def fitting(value, dtype):
    """The value as near as an integer type can hold it."""
    if dtype.kind in "iu" and isinstance(value, (int, float)):
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        return int(min(max(value, low), high)) if np.isfinite(float(min(max(value, -1e300), 1e300))) else high
    if dtype.kind == "f" and isinstance(value, int):
        return float(min(max(value, -(10**300)), 10**300))
    return value


def reseal(file) -> None:
    """Make the digests of a sealed trace fit what it now holds; where it can't be, leave them."""
    from spimpi.trace.checksum import rows_fingerprint, text_digest
    from spimpi.trace.schema import EVENT

    try:
        if any(np.prod(d.shape) > SMALL for g in ("events", "ranks", "tensors") for d in file[g].values()):
            return
        words = file["ranks/fingerprint"][:]
        for i, (start, count) in enumerate(zip(file["ranks/offset"][:].tolist(), file["ranks/count"][:].tolist(), strict=True)):
            if 0 <= start and 0 <= count and start + count <= len(file["events/step"]):
                rows = np.zeros(count, EVENT)
                for column in EVENT.names:
                    rows[column] = file["events/" + column][start : start + count].astype(EVENT[column])
                words[i] = rows_fingerprint(rows)
        file["ranks/fingerprint"][:] = words
        file.attrs["digest"] = text_digest(_tables(file).encode())
    except IMPOSSIBLE:
        pass


def _tables(file) -> str:
    """What the digest of a trace's small tables is of (trace/sealing/layout.py), as JSON."""
    in_json = set(json.loads(file.attrs["json"]))
    attributes = {}
    for name, value in file.attrs.items():
        if name not in ("schema_version", "driver", "json", "digest"):
            value = value.item() if isinstance(value, np.generic) else value
            attributes[name] = json.loads(value) if name in in_json else value
    columns = []
    for name in ("rank", "host", "pid", "device", "started", "offset", "count", "fingerprint"):
        data = file[f"ranks/{name}"]
        columns.append((data.asstr() if name in ("host", "device") else data)[:].tolist())
    tensors = [file[f"tensors/{name}"].asstr()[:].tolist() for name in ("name", "shape", "dtype")]
    rows = [[n, json.loads(s), d] for n, s, d in zip(*tensors, strict=True)]
    tables = [list(row) for row in zip(*columns, strict=True)], rows
    return json.dumps([file.attrs["driver"], attributes, list(tables)], sort_keys=True)
