"""Sketches in a trace: the group /sketches of the file, and those of whole tensors.

A row of /sketches is one rank's share of a tensor's sketch. The attribute ``sketches`` of a sealed
file says how many rows there are and their fingerprint; without it none were taken.
"""

import numpy as np

from spimpi.hdf5_guard import own_numbers
from spimpi.trace.checksum import rows_fingerprint
from spimpi.trace.schema import SKETCH, SKETCH_DESCRIPTIONS, SKETCH_SHARE

ATTRIBUTE = "sketches"
ROWS_AT_ONCE = 1 << 16  # of a transfer
_PLACE = ("repeat", "step", "layer", "tensor")
_SUMS = ("size", "nonfinite", "sumsq", "projections")


def facts_of(rows: np.ndarray) -> dict:
    """The attribute of a file that has these rows."""
    return {"rows": len(rows), "fingerprint": f"{rows_fingerprint(rows):016x}"}


def write_group(file, rows: np.ndarray) -> None:
    """/sketches of a new file."""
    group = file.create_group("sketches")
    for name in SKETCH_SHARE.names:
        column = group.create_dataset(name, data=np.ascontiguousarray(rows[name]))
        column.attrs["description"] = SKETCH_DESCRIPTIONS[name]


def read_group(file) -> np.ndarray:
    """The rows of /sketches, dtype SKETCH_SHARE. Raises whatever h5py raises."""
    columns = {}
    for name in SKETCH_SHARE.names:
        dtype = SKETCH_SHARE[name]
        columns[name] = own_numbers(file, f"sketches/{name}", dtype.base.kind, dtype.base.itemsize)
    shape = columns["step"].shape
    rows = np.empty(shape, SKETCH_SHARE)
    for name, column in columns.items():
        if column.shape != shape + SKETCH_SHARE[name].shape or len(shape) != 1:
            msg = f"sketches/{name} has shape {column.shape}"
            raise ValueError(msg)
        rows[name] = column[:]
    return rows


def gathered(comm, own: np.ndarray, rows: np.ndarray | None) -> None:
    """Put all ranks' rows into rank 0's ``rows``, in rank order. Collective.

    ``rows`` has room for them (None on other ranks).
    """
    counts = comm.gather(len(own))
    if comm.rank:
        for start in range(0, len(own), ROWS_AT_ONCE):
            comm.Send(own[start : start + ROWS_AT_ONCE].view(np.uint8), 0)
        return
    at = len(own)
    rows[:at] = own
    for rank, count in enumerate(counts[1:], 1):
        for start in range(at, at + count, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, at + count)
            comm.Recv(rows[start:stop].view(np.uint8), rank)
        at += count


def combined(shares: np.ndarray) -> tuple[np.ndarray, int]:
    """(sketches of whole tensors in program order, how many are left out for want of shares).

    ``shares`` of dtype SKETCH_SHARE, the result of dtype SKETCH.
    """
    layered = shares["tensor"][shares["layer"] >= 0]
    # A tensor of no layer stands before the layers or after them, as the table of tensors does.
    first_layered = layered.min() if layered.size else np.iinfo(np.uint16).max
    layer = shares["layer"].astype(np.int64)
    layer[(layer < 0) & (shares["tensor"] >= first_layered)] = np.iinfo(np.int16).max
    places = [shares["repeat"], shares["step"], layer, shares["tensor"]]
    order = np.lexsort(places[::-1])
    shares, places = shares[order], np.array([place[order] for place in places], np.int64)
    new = np.ones(len(shares), bool)
    new[1:] = (places[:, 1:] != places[:, :-1]).any(axis=0)
    starts = np.flatnonzero(new)
    sketches = np.zeros(len(starts), SKETCH)
    if not len(starts):
        return sketches, 0
    for name in _PLACE:
        sketches[name] = shares[name][starts]
    for name in _SUMS:
        sketches[name] = np.add.reduceat(shares[name], starts, axis=0)
    sketches["absmax"] = np.maximum.reduceat(shares["absmax"], starts)
    whole = sketches["size"] == shares["whole"][starts]
    return sketches[whole], int((~whole).sum())
