"""Traces that say what no run has written, with digests that are right."""

import json
import shutil

import numpy as np

from spimpi.trace.checksum import RECORD, checksums, pack, rows_fingerprint, text_digest
from spimpi.trace.journals.journal import END, END_RECORD, _first_line
from spimpi.trace.journals.journal_files import journal_folder, journal_path
from spimpi.trace.schema import EVENT, RankInfo
from spimpi.trace.sealing.layout import OWN_ATTRIBUTES
from trace_samples import some_events

# What a file says of a journal's run and rank.
SAID = {
    "schema_version": 1, "rank": 0, "pid": 1, "host": "host", "started": 0.0, "device": "cpu",
    "run_id": "r", "command": "c", "world": 1, "topology": "tp=1,pp=1,dp=1", "model": "m",
}  # fmt: skip
ABSENT = object()


def put(file, name: str, data, **options) -> None:
    """Other data in the place of a data set's."""
    del file[name]
    file.create_dataset(name, data=data, **options)


def forged(path, edit, name="forged.h5", sealed=True):
    """A copy of a trace of one file, edited (``edit(h5py.File)``); ``sealed``: with its digests."""
    import h5py

    copy = path.with_name(name)
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        edit(file)
        if sealed:
            reseal(file)
    return copy


def reseal(file) -> None:
    for i, (at, n) in enumerate(zip(file["ranks/offset"][:], file["ranks/count"][:])):
        if min(at, n) >= 0 and at + n <= len(file["events/step"]):
            rows = np.zeros(n, EVENT)
            for column in EVENT.names:
                rows[column] = file[f"events/{column}"][at : at + n]
            file["ranks/fingerprint"][i] = rows_fingerprint(rows)
    in_json = json.loads(file.attrs["json"])
    said = {k: v.item() if isinstance(v, np.generic) else v for k, v in file.attrs.items()}
    facts = {k: json.loads(v) if k in in_json else v for k, v in said.items() if k not in OWN_ATTRIBUTES}
    columns = [file[f"ranks/{field}"] for field in RankInfo.__dataclass_fields__]
    ranks = [RankInfo(*row) for row in zip(*(
        c.asstr()[:].tolist() if c.dtype.kind == "O" else c[:].tolist() for c in columns
    ))]  # fmt: skip
    tensors = zip(*(file[f"tensors/{c}"].asstr()[:] for c in ("name", "shape", "dtype")))
    rows = [[tuple(vars(r).values()) for r in ranks], [(n, json.loads(s), d) for n, s, d in tensors]]
    file.attrs["digest"] = text_digest(json.dumps([said["driver"], facts, rows], sort_keys=True).encode())


def forged_journal(path, header=None, end="verified", rank=0, tensors=(("a", (4,), "f4"),), rows=3):
    """The journal of a rank of the run ``path``, of ``rows`` rows; ``header``: other facts, ABSENT
    ones left out."""
    said = SAID | {"rank": rank} | (header or {})
    said = {name: value for name, value in said.items() if value is not ABSENT}
    body = json.dumps({"header": said, "tensors": tensors}).encode()
    body += b" " * (-len(body) % 8)
    events = some_events(rows) if isinstance(rows, int) else rows
    events["tensor"] = 0
    data = _first_line(1, body) + body + pack(events, 0).tobytes()
    if end is not None:
        last = np.zeros(1, END_RECORD)
        last["number"], last["count"], last["state"] = END, len(events), end.encode()
        last["checksum"] = checksums(last.view(RECORD))
        data += last.tobytes()
    journal_folder(path).mkdir(exist_ok=True)
    file = journal_path(journal_folder(path), rank)
    file.write_bytes(data)
    return file
