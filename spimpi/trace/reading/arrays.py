"""A trace as an xarray Dataset whose columns are read when they are used."""

import json

import numpy as np

from spimpi.errors import MissingDependency
from spimpi.trace.schema import DESCRIPTIONS, ENUMERATIONS, EVENT
from spimpi.trace.sealing.layout import EVENT_DIMENSION, flags_of


def to_xarray(trace):
    """What ``Trace.to_xarray`` gives."""
    try:
        import xarray
        from xarray.backends import BackendArray
        from xarray.core.indexing import (
            IndexingSupport, LazilyIndexedArray, explicit_indexing_adapter,
        )  # fmt: skip
    except ImportError:
        msg = "to_xarray needs xarray: pip install 'spimpi[trace]'"
        raise MissingDependency(msg) from None

    class Column(BackendArray):
        def __init__(self, read, dtype):
            self.read, self.dtype, self.shape = read, dtype, (len(trace),)

        def __getitem__(self, key):
            return explicit_indexing_adapter(
                key, self.shape, IndexingSupport.OUTER_1VECTOR, self._read
            )

        def _read(self, key):
            return np.asarray(self.read[key]).astype(self.dtype, copy=False)

    def variable(column, dtype, attributes):
        lazy = LazilyIndexedArray(Column(column, dtype))
        return xarray.Variable((EVENT_DIMENSION,), lazy, attributes)

    columns = {}
    for name in EVENT.names:
        columns[name] = variable(trace.column(name), EVENT[name], _attributes(name))
    rank = variable(_RankOfRow(trace), np.dtype(np.int32), {"description": "rank of the row"})
    attributes = {k: v if isinstance(v, str | int | float) else json.dumps(v)
                  for k, v in trace.attributes.items()}  # fmt: skip
    return xarray.Dataset(columns, {"rank": rank}, attributes)


def _attributes(name: str) -> dict:
    """Names of numbers as CF has them, of the type that this column has here."""
    flags = flags_of(name, EVENT[name]) if name in ENUMERATIONS else {}
    return {"description": DESCRIPTIONS[name], **flags}


class _RankOfRow:
    """The rank of each row, from the table of ranks."""

    def __init__(self, trace):
        self._ends = np.array([info.offset + info.count for info in trace.ranks], np.int64)
        self._ranks = np.array([info.rank for info in trace.ranks], np.int32)
        self._total = len(trace)

    def __getitem__(self, key):
        rows = key[0] if isinstance(key, tuple) else key
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self._total))
        return self._ranks[np.searchsorted(self._ends, rows, side="right")]
