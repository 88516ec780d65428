"""A trace as a Parquet file, a row group at a time."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from spimpi.trace.export import COLUMNS
from spimpi.trace.names import Names
from spimpi.trace.schema import EVENT

ROWS = 1 << 20  # of a row group, at least
METADATA = b"spimpi"  # key of the run's attributes, JSON


def write_parquet(trace, file) -> int:
    """Names as strings, fingerprints uint64, the run's attributes in the schema's metadata."""
    names, n_rows, held = Names(trace), 0, []
    schema = _schema(names, trace.attributes)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for block in trace.blocks(EVENT.names):
            columns = [_array(block, name, names) for name in COLUMNS]
            held.append(pa.RecordBatch.from_arrays(columns, schema=schema))
            n_rows += len(block)
            if sum(map(len, held)) >= ROWS:
                _write(writer, held, schema)
        _write(writer, held, schema)
    return n_rows


def _write(writer, held: list, schema) -> None:
    if held:
        writer.write_table(pa.Table.from_batches(held, schema), row_group_size=ROWS)
    held.clear()


def _schema(names: Names, attributes: dict):
    types = {name: pa.from_numpy_dtype(EVENT[name]) for name in EVENT.names}
    types |= {"rank": pa.int32()}
    types |= dict.fromkeys(names.words, pa.string())
    fields = [pa.field(name, types[name], nullable=False) for name in COLUMNS]
    return pa.schema(fields, {METADATA: json.dumps(attributes).encode()})


def _array(block, name: str, names: Names):
    if name not in names.words:
        return pa.array(block[name])
    codes = names.codes(block, name)
    values = names.words[name].values[: 1 + int(codes.max(initial=-1))]
    return pa.array(values, pa.string()).take(pa.array(codes))
