"""A trace as text: a line an event, by one template for all lines of a format.

``map`` over a template and columns keeps the loop over events within the interpreter's C.
"""

import json

import numpy as np

from spimpi.trace.export import COLUMNS
from spimpi.trace.names import Names
from spimpi.trace.reading.base import Block
from spimpi.trace.schema import EVENT, Status

LINES = 1 << 15  # made at a time
TEXT = "%s"
PLACES = {
    **dict.fromkeys(COLUMNS, "%d"),
    **dict.fromkeys(("t_start", "t_end"), "%r"),
    **dict.fromkeys(("fingerprint", "expected"), "%016x"),
    **dict.fromkeys(
        ("host", "stage", "op", "tensor", "dtype", "shape", "verdict", "established"), TEXT
    ),
}
ARGUMENTS = (
    "repeat", "step", "microbatch", "layer", "op", "tensor", "dtype", "shape", "verdict",
    "established", "nonfinite", "peer", "sequence", "element", "fingerprint", "expected", "bytes",
)  # fmt: skip
FAILED = "terrible"  # Chrome's name of a colour, red


def write_csv(trace, file) -> int:
    """RFC 4180 but for the line's end, a line feed; the first line names the columns."""
    file.write((",".join(COLUMNS) + "\n").encode())
    template = ",".join(PLACES[name] for name in COLUMNS) + "\n"
    return _write_lines(trace, file, template, COLUMNS, _in_csv)


def write_jsonl(trace, file) -> int:
    """An object a line."""
    return _write_lines(trace, file, _object(COLUMNS) + "\n", COLUMNS, json.dumps)


def write_chrome(trace, file) -> int:
    """Chrome's Trace Event Format, the JSON object form: a rank is a process, a stage a thread.

    Source: "Trace Event Format" (Google, 2016): complete events (X), instant events (i), metadata
    (M), reserved colour names (cname).
    """
    began = min((rank.started for rank in trace.ranks), default=0.0)
    behind = np.zeros(1 + max((rank.rank for rank in trace.ranks), default=-1), np.int64)
    for rank in trace.ranks:
        behind[rank.rank] = round((rank.started - began) * 1e9)  # nanoseconds
    lines = [line for rank in trace.ranks for line in _process(rank)]
    file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n' + ",\n".join(lines).encode())
    names, n_rows, stages = Names(trace), 0, set()
    written = {name: words.written(json.dumps) for name, words in names.words.items()}
    for block in _pieces(trace):
        stages.update(np.unique(block["rank"].astype(np.int64) << 8 | block["stage"]).tolist())
        file.write(_chrome_lines(block, names, written, behind).encode())
        n_rows += len(block)
    stage = names.words["stage"]
    threads = [
        _metadata("thread_name", place >> 8, place & 255, {"name": stage.name(place & 255)})
        for place in sorted(stages)
    ]
    file.write("".join(",\n" + line for line in threads).encode())
    about = {"started": began, **trace.attributes, "problems": trace.problems}
    file.write(f'\n],"otherData":{json.dumps(about)}}}\n'.encode())
    return n_rows


def _write_lines(trace, file, template: str, columns, escape) -> int:
    names, n_rows = Names(trace), 0
    written = {name: words.written(escape) for name, words in names.words.items()}
    for block in _pieces(trace):
        file.write(_lines(template, [_values(block, c, names, written) for c in columns]).encode())
        n_rows += len(block)
    return n_rows


def _lines(template: str, columns: list[list]) -> str:
    return "".join(map(template.__mod__, zip(*columns, strict=True)))


def _pieces(trace):
    for block in trace.blocks(EVENT.names):
        for start in range(0, len(block), LINES):
            yield block.where(slice(start, start + LINES))


def _values(block: Block, column: str, names: Names, written: dict) -> list:
    if column in written:
        return written[column][names.numbers(block, column)].tolist()
    return block[column].tolist()


def _in_csv(text: str) -> str:
    if any(c in text for c in ',"\n\r'):
        return '"' + text.replace('"', '""') + '"'
    return text


def _object(columns) -> str:
    """Template of a JSON object; fingerprints are text, for JSON's readers round large numbers."""
    places = {name: PLACES[name] for name in columns}
    for name in places:
        if places[name] == "%016x":
            places[name] = '"%016x"'
    return "{" + ",".join(f'"{name}":{place}' for name, place in places.items()) + "}"


def _chrome_lines(block: Block, names: Names, written: dict, behind: np.ndarray) -> str:
    """The events of a block, each with a comma before it; a failed one has an instant too."""
    rank = block["rank"]
    late = behind[rank]
    # Whole nanoseconds, so that what nests in seconds nests in microseconds too.
    start = np.rint(block["t_start"] * 1e9).astype(np.int64) + late
    end = np.rint(block["t_end"] * 1e9).astype(np.int64) + late
    failed = block["verdict"] == Status.FAILED
    what = [
        rank.tolist(), block["stage"].tolist(), (start / 1e3).tolist(),
        _values(block, "op", names, written), _values(block, "tensor", names, written),
    ]  # fmt: skip
    what[3] = [f"{op[:-1]} {tensor[1:]}" for op, tensor in zip(what[3], what[4], strict=True)]
    what[4] = _values(block, "stage", names, written)
    place = ',\n{"ph":"%s","pid":%%d,"tid":%%d,"ts":%%.3f,"name":%s,"cat":%%s'
    colour = np.where(failed, f',"cname":"{FAILED}"', "").tolist()
    arguments = [_values(block, name, names, written) for name in ARGUMENTS]
    template = place % ("X", "%s") + ',"dur":%.3f%s,"args":' + _object(ARGUMENTS) + "}"
    durations = (np.maximum(end - start, 0) / 1e3).tolist()
    text = _lines(template, [*what, durations, colour, *arguments])
    if failed.any():
        marks = [[column[i] for i in np.flatnonzero(failed)] for column in what]
        marks[3] = ['"FAILED ' + name[1:] for name in marks[3]]
        text += _lines(place % ("i", "%s") + ',"s":"p"}', marks)
    return text


def _process(rank) -> list[str]:
    name = {"name": f"rank {rank.rank} ({rank.host})"}
    return [
        _metadata("process_name", rank.rank, 0, name),
        _metadata("process_sort_index", rank.rank, 0, {"sort_index": rank.rank}),
    ]


def _metadata(name: str, pid: int, tid: int, args: dict) -> str:
    return json.dumps({"ph": "M", "pid": pid, "tid": tid, "name": name, "args": args})
