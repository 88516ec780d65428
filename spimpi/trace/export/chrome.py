"""A trace as a timeline: Chrome's Trace Event Format, which Perfetto reads too.

Source: "Trace Event Format" (Google, 2016): complete events (X), instant events (i), metadata (M),
reserved colour names (cname). A rank is a process; its steps, layers and checks are slices that
nest (export/nesting.py). Perfetto knows a thread by its number alone and takes process 0 for the
idle task, so that no number stands for two things, and 0 for none.
"""

import json

import numpy as np

from spimpi.trace.export.nesting import CHECK, slices_of
from spimpi.trace.export.text import LINES, numbers, object_of, values
from spimpi.trace.names import Names, RankPlaces
from spimpi.trace.reading.base import joined
from spimpi.trace.schema import EVENT, Status

ARGUMENTS = (
    "repeat", "step", "microbatch", "layer", "op", "tensor", "dtype", "shape", "verdict",
    "established", "nonfinite", "peer", "sequence", "element", "fingerprint", "expected", "bytes",
    "t_start", "t_end",
)  # fmt: skip
FAILED = "terrible"  # Chrome's name of a colour, red
LONGEST = 1e9  # seconds, 30 years: what lies beyond is no time of a run
PLACE = ',\n{"ph":"%s","pid":%%d,"tid":%%d,"ts":%%.3f,"name":%s,"cat":%%s'
OUTER = PLACE % ("X", "%s") + ',"dur":%.3f}'
INNER = PLACE % ("X", "%s") + ',"dur":%.3f%s,"args":' + object_of(ARGUMENTS) + "}"
MARK = PLACE % ("i", "%s") + ',"s":"p"}'


def write_chrome(trace, file) -> int:
    """Write the JSON object form; returns how many checks. Holds one rank's rows at a time."""
    timeline = _Timeline(trace)
    about = timeline.metadata()
    file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n' + ",\n".join(about).encode())
    n_rows = 0
    for block in _ranks(trace):
        for text in timeline.of_rank(block):
            file.write(text.encode())
        n_rows += len(block)
    said = {
        "started": timeline.began, **trace.attributes, "problems": trace.problems,
        "without_a_time": timeline.timeless,
    }  # fmt: skip
    file.write(f'\n],"otherData":{json.dumps(_finite(said))}}}\n'.encode())
    return n_rows


class _Timeline:
    """The numbers of processes and threads, and the time that all ranks have in common."""

    def __init__(self, trace):
        self.infos, self.places, self.names = trace.ranks, RankPlaces(trace.ranks), Names(trace)
        self.written = {name: w.written(json.dumps) for name, w in self.names.words.items()}
        self.order = np.argsort(self.places.ranks, kind="stable")  # which comes first
        self.next_thread, self.timeless = 1 + len(trace.ranks), 0
        started = np.array([info.started for info in trace.ranks], float)
        sound = np.isfinite(started) & (np.abs(started) <= 100 * LONGEST)
        self.began = float(started[sound].min(initial=np.inf)) if sound.any() else 0.0
        behind = np.where(sound, started - self.began, 0.0)
        self.behind = np.rint(np.where(behind <= LONGEST, behind, 0.0) * 1e9).astype(np.int64)

    def metadata(self) -> list[str]:
        """The processes, by the ranks' numbers."""
        said = []
        for pid, row in enumerate(self.order.tolist(), 1):
            info = self.infos[row]
            name = {"name": f"rank {info.rank} ({info.host})"}
            said.append(_metadata("process_name", pid, pid, name))
            said.append(_metadata("process_sort_index", pid, pid, {"sort_index": pid}))
        return said

    def of_rank(self, block):
        """The lines of one rank's rows, each with a comma before it."""
        row = int(self.places.of(block["rank"][:1])[0])
        pid = 1 + int(np.flatnonzero(self.order == row)[0])
        start, end = self._times(block, self.behind[row])
        slices, names = slices_of(block, start, end)
        threads = self.next_thread + slices["lane"]
        n_lanes = 1 + int(slices["lane"].max())
        for lane in range(n_lanes):
            tid = self.next_thread + lane
            name = "checks" if not lane else f"checks beside these, {lane}"
            yield ",\n" + _metadata("thread_name", pid, tid, {"name": name})
            yield ",\n" + _metadata("thread_sort_index", pid, tid, {"sort_index": tid})
        self.next_thread += n_lanes
        for at in range(0, len(slices), LINES):
            part = slice(at, at + LINES)
            yield self._lines(block, slices[part], threads[part], pid, names)

    def _times(self, block, late) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of each check in whole nanoseconds, so that what nests in seconds nests in
        microseconds too. Checks whose times can be of no run lie at 0."""
        possible = (np.abs(block["t_start"]) <= LONGEST) & (np.abs(block["t_end"]) <= LONGEST)
        self.timeless += len(block) - int(possible.sum())
        found = [
            np.rint(np.where(possible, block[name], 0.0) * 1e9).astype(np.int64) + late
            for name in ("t_start", "t_end")
        ]
        found = [np.where(possible, each, 0) for each in found]
        return found[0], np.maximum(*found)

    def _lines(self, block, slices, threads, pid: int, names: list[str]) -> str:
        """Steps and layers, and checks with all that the trace says of them; in order."""
        is_check = slices["level"] == CHECK
        order = np.arange(len(slices))
        texts = np.empty(len(slices), object)
        outer = order[~is_check]
        labels = [json.dumps(names[row]) for row in slices["row"][outer].tolist()]
        kinds = np.where(slices["level"][outer] == 0, '"step"', '"layer"').tolist()
        texts[outer] = _each(OUTER, [*_when(slices[outer], threads[outer], pid), labels, kinds,
                                     _durations(slices[outer])])  # fmt: skip
        inner = order[is_check]
        rows = block.where(slices["row"][inner])
        texts[inner] = self._checks(rows, slices[inner], threads[inner], pid)
        return "".join(texts.tolist())

    def _checks(self, rows, slices, threads, pid: int) -> list[str]:
        """One text a check; that of a failed one has its mark too."""
        op, tensor = (values(rows, name, self.names, self.written) for name in ("op", "tensor"))
        failed = rows["verdict"] == Status.FAILED
        what = [
            *_when(slices, threads, pid),
            [f"{o[:-1]} {t[1:]}" for o, t in zip(op, tensor, strict=True)],
            values(rows, "stage", self.names, self.written),
        ]
        colour = np.where(failed, f',"cname":"{FAILED}"', "").tolist()
        arguments = [values(rows, name, self.names, self.written) for name in ARGUMENTS]
        arguments[-2:] = map(numbers, arguments[-2:])
        texts = _each(INNER, [*what, _durations(slices), colour, *arguments])
        for i in np.flatnonzero(failed).tolist():
            mark = [column[i] for column in what]
            mark[3] = '"FAILED ' + mark[3][1:]
            texts[i] += MARK % tuple(mark)
        return texts


def _ranks(trace):
    """All rows, one rank's at a time."""
    held = []
    for block in trace.blocks(EVENT.names):
        starts = np.flatnonzero(np.r_[True, block["rank"][1:] != block["rank"][:-1]])
        for start, stop in zip(starts, np.r_[starts[1:], len(block)]):
            part = block.where(slice(start, stop))
            if held and len(part) and part["rank"][0] != held[0]["rank"][0]:
                yield joined(held)
                held = []
            held += [part] if len(part) else []
    if held:
        yield joined(held)


def _when(slices, threads, pid: int) -> list[list]:
    return [[pid] * len(slices), threads.tolist(), (slices["start"] / 1e3).tolist()]


def _durations(slices) -> list[float]:
    return ((slices["end"] - slices["start"]) / 1e3).tolist()


def _each(template: str, columns: list[list]) -> list[str]:
    return list(map(template.__mod__, zip(*columns, strict=True)))


def _metadata(name: str, pid: int, tid: int, args: dict) -> str:
    return json.dumps({"ph": "M", "pid": pid, "tid": tid, "name": name, "args": args})


def _finite(value):
    """As JSON has it: no NaN and no infinity among an attribute's numbers."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
