"""Golden files, sealed traces with their digests made right again, journals of killed runs."""

import shutil
import warnings
from functools import cache

import damage
import hdf5_edits
import numpy as np
from cases import Case, fresh, kind, link
from hostile import Edit, draw_edits, dumps, edited, value

HIGHEST = {"<i4": 2**31 - 1, "<i2": 2**15 - 1, "<u2": 65535, "|u1": 255, "<u4": 2**32 - 1}
BYTES_MAY_DIFFER = ("weights", "prompts", "seed", "fingerprints", "tokens", "origin")


@cache
def _names(path) -> tuple[list, list]:
    """Data sets and attributes of an HDF5 file."""
    import h5py

    with h5py.File(path, "r") as file:
        datasets = []
        file.visititems(lambda name, item: datasets.append(name) if isinstance(item, h5py.Dataset) else None)
        return datasets, list(file.attrs)


def _edited(source, place, changes, sealed):
    import h5py

    shutil.copyfile(source, place)
    with h5py.File(place, "r+") as file, np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for change in changes:
            if not hdf5_edits.leads_outside(change):
                hdf5_edits.apply(file, change)
        if sealed:
            hdf5_edits.reseal(file)
        for change in changes:
            if hdf5_edits.leads_outside(change):
                hdf5_edits.apply(file, change)


@kind(12)
def golden(rng, sound):
    datasets, attributes = _names(sound / "golden.h5")
    changes = tuple(hdf5_edits.draw(rng, datasets, attributes) for _ in range(rng.choice((1, 1, 2))))
    argv = ("verify", "--model", "model", "--no-trace", "--golden", "g.h5")
    if rng.random() < 0.5:
        argv = ("verify", "--no-trace", "--golden", "g.h5")
    origins = ("5", "[]", "{}", '{"config": "llama-3.2-1b", "layers": 1e9}', '{"model": "model"}',
               '{"model": "model", "tokens": 100000}', '{"model": "model", "faults": ["x"]}')  # fmt: skip
    if rng.random() < 0.3:
        changes = (("attribute", "origin", 0.0, rng.choice(origins)),)
    if rng.random() < 0.75:  # as files of before, so that the digest does not hide the changes
        changes += (("delete attribute", "digest", 0.0, None),)

    def write(folder, changes):
        link(sound, folder, "model")
        _edited(sound / "golden.h5", folder / "g.h5", changes, sealed=False)

    differs = any(name in BYTES_MAY_DIFFER for _, name, *_ in changes)
    return Case("golden", argv, changes, write, differs)


def _case(kind, argv, changes, write) -> Case:
    """Rows may say that a check failed; `trace check` does not tell what the run found."""
    return Case(kind, argv, changes, write, argv[1] != "check")


def _trace_command(rng, name):
    other = rng.choice((name, "good.h5"))
    return rng.choice((
        ("trace", "show", name), ("trace", "show", name, "--json"), ("trace", "check", name),
        ("trace", "check", name, "--json"), ("trace", "diff", name, "good.h5"),
        ("trace", "diff", "good.h5", name), ("trace", "locate", name), ("trace", "locate", name, other),
        ("trace", "export", name, "-o", "made.json"), ("trace", "export", name, "-o", "made.csv"),
        ("trace", "export", name, "-o", "made.parquet"), ("trace", "report", name, "-o", "made.html"),
        ("trace", "report", name, "good.h5", "-o", "made.html"), ("trace", "recover", name),
    ))  # fmt: skip


@kind(30)
def trace(rng, sound):
    base = rng.choice(("run.h5", "failed.h5", "parts.h5", "run.h5"))
    datasets, attributes = _names(sound / base)
    changes = tuple(hdf5_edits.draw(rng, datasets, attributes) for _ in range(rng.choice((1, 1, 2, 3))))
    sealed = rng.random() < 0.85

    def write(folder, changes):
        link(sound, folder, "run.h5.parts" if (sound / "run.h5.parts").exists() else "model")
        if base == "parts.h5":
            shutil.copytree(sound / "parts.h5.parts", folder / "t.h5.parts")
            shutil.copytree(sound / "parts.h5.parts", folder / "parts.h5.parts")
        (folder / "good.h5").hardlink_to(sound / "run.h5")
        _edited(sound / base, folder / "t.h5", changes, sealed)

    return _case("trace", _trace_command(rng, "t.h5"), changes, write)


@kind(6)
def trace_files(rng, sound):
    """A trace, or a part of one, damaged as a whole."""
    base = rng.choice(("run.h5", "parts.h5"))
    file = "t.h5"
    if base == "parts.h5" and rng.random() < 0.5:
        file = f"t.h5.parts/{next((sound / 'parts.h5.parts').iterdir()).name}"
    how = damage.draw(rng)

    def write(folder, changes):
        shutil.copyfile(sound / base, folder / "t.h5")
        if base == "parts.h5":
            shutil.copytree(sound / "parts.h5.parts", folder / "t.h5.parts")
        (folder / "good.h5").hardlink_to(sound / "run.h5")
        for name, done in changes:
            damage.apply(folder / name, done)

    return _case("trace_files", _trace_command(rng, "t.h5"), ((file, how),), write)


HEADER = {
    "schema_version": 1, "rank": 0, "pid": 1, "host": "host", "started": 0.0, "device": "cpu",
    "run_id": "r", "command": "c", "world": 2, "topology": "tp=2,pp=1,dp=1", "model": "m",
    "sketches": False,
}  # fmt: skip
TENSORS = [["hidden", [4, 4], "float32"], ["logits", [-1, 64], "float32"]]


@kind(20)
def journal(rng, sound):
    """Journals of two ranks: fields of one's header, columns of its rows, its end."""
    tree = {"header": HEADER, "tensors": TENSORS}
    changes = list(draw_edits(rng, tree)) if rng.random() < 0.7 else []
    rows = _draw_rows(rng) if rng.random() < 0.5 or not changes else ()
    changes += rows
    end = rng.choice(("verified", "failed", "", "\x1b[2J", None, "verified", "x" * 66))
    ranks = rng.choice((1, 2, 2))
    damaged = (("rank-00000.journal", damage.draw(rng)),) if rng.random() < 0.1 else ()
    changes += damaged

    def write(folder, changes):
        (folder / "t.h5.journal").mkdir()
        (folder / "good.h5").hardlink_to(sound / "run.h5")
        for rank in range(ranks):
            own = changes if rank == 0 else ()
            content = {"header": HEADER | {"rank": rank, "world": ranks}, "tensors": TENSORS}
            content = edited(content, [c for c in own if isinstance(c, Edit)])
            data = _journal_bytes(content, [c for c in own if _is_row(c)], end)
            fresh(folder / f"t.h5.journal/rank-{rank:05d}.journal", data)
        for name, done in [c for c in changes if c in damaged]:
            damage.apply(folder / "t.h5.journal" / name, done)

    name = rng.choice(("t.h5", "t.h5.journal", "t.h5"))
    return _case("journal", _trace_command(rng, name), tuple(changes), write)


def _is_row(change) -> bool:
    return isinstance(change, tuple) and change[0] == "rows"


def _draw_rows(rng) -> list:
    from spimpi.trace.schema import EVENT

    found = []
    for _ in range(rng.choice((1, 2))):
        column = rng.choice(EVENT.names)
        kind = EVENT[column]
        new = value(rng, 1.0 if kind.kind == "f" else 1)
        if not isinstance(new, (int, float)):
            new = HIGHEST.get(kind.str, 2**62)
        found.append(("rows", column, new, rng.random() < 0.5))
    return found


def _journal_bytes(content, rows, end) -> bytes:
    """A journal of three rows as trace/journals/journal.py describes it, its checksums right."""
    from spimpi.trace.checksum import RECORD, checksums, pack, text_digest
    from spimpi.trace.journals.journal import END, END_RECORD
    from spimpi.trace.schema import blank_events

    events = blank_events(3)
    events["stage"], events["op"], events["t_end"], events["bytes"] = 3, 2, 1.0, 8
    for _, column, new, all_rows in rows:
        dtype = events.dtype[column]
        fitting = hdf5_edits.fitting(new, dtype)
        if dtype.kind != "f" and not isinstance(fitting, int):
            fitting = 0
        events[column][slice(None) if all_rows else slice(1)] = fitting
    body = dumps(content).encode(errors="surrogatepass")
    body += b" " * (-len(body) % 8)
    start = f"spimpi-journal 1 {len(body)} "
    first = (start + text_digest(start.encode() + body)).ljust(63).encode() + b"\n"
    data = first + body + pack(events, 0).tobytes()
    if end is not None:
        record = np.zeros(1, END_RECORD)
        record["number"], record["count"], record["state"] = END, len(events), end.encode()
        record["checksum"] = checksums(record.view(RECORD))
        data += record.tobytes()
    return data


@kind(5)
def node_journal(rng, sound):
    """The journals of a node's ranks in one file: its list of ranks."""
    content = {"ranks": [0, 1], "extent": 1 << 16, "suffixes": [".journal", ".tensors", ".sketches"]}
    changes = tuple(draw_edits(rng, content))
    version = rng.choice((1, 1, 1, 2, -1, 10**30))

    def write(folder, changes):
        from spimpi.trace.checksum import text_digest

        (folder / "t.h5.journal").mkdir()
        (folder / "good.h5").hardlink_to(sound / "run.h5")
        body = dumps(edited(content, changes)).encode(errors="surrogatepass")
        start = f"spimpi-journals {version} {len(body)} "
        line = (start + text_digest(start.encode() + body)).ljust(63).encode() + b"\n" + body
        half = 1 << 15
        data = line.ljust(half, b"\0")[:half] * 2
        stream = _journal_bytes({"header": HEADER, "tensors": TENSORS}, (), "verified")
        fresh(folder / "t.h5.journal/node-00000.journal", data + stream.ljust(1 << 16, b"\0"))

    return _case("node_journal", _trace_command(rng, "t.h5"), changes, write)


