"""Chrome's Trace Event Format read as strictly as Perfetto's importer does: what it would drop.

Source: "Trace Event Format" (Google, 2016), and what Perfetto documents of importing it: a thread
is known by its number alone, process 0 is the idle task, slices of a thread nest or are apart.
"""

import json
from collections import defaultdict
from math import isfinite

MOST_DEEP = 512


def import_errors(text: str) -> list[str]:
    """What is wrong with a file, in words; nothing where a viewer shows all of it."""

    def no_constant(name):
        raise ValueError(f"{name} is no JSON")

    found = json.loads(text, parse_constant=no_constant)
    errors: list[str] = []
    process_of: dict[int, int] = {}
    processes, threads, slices = {}, {}, defaultdict(list)
    order = {}
    for e in found["traceEvents"]:
        kind, pid, tid = e["ph"], e["pid"], e["tid"]
        if not all(isinstance(number, int) and 0 < number < 2**31 for number in (pid, tid)):
            errors.append(f"numbers of process and thread {pid}, {tid}")
        if process_of.setdefault(tid, pid) != pid:
            errors.append(f"thread {tid} is of processes {process_of[tid]} and {pid}")
        if kind == "M":
            names = {"process_name": processes, "thread_name": threads}.get(e["name"])
            if names is not None:
                errors += [f"two names of {e}"] * ((pid, tid) in names)
                names[pid, tid] = e["args"]["name"]
            elif e["name"] == "process_sort_index":
                order[pid] = e["args"]["sort_index"]
            continue
        if not all(isfinite(time) and time >= 0 for time in (e["ts"], e.get("dur", 0))):
            errors.append(f"times of {e['name']}: {e['ts']}, {e.get('dur')}")
        if kind == "X":
            begin = round(e["ts"] * 1000)
            slices[tid].append((begin, begin + round(e["dur"] * 1000), e["name"]))
        elif kind != "i":
            errors.append(f"phase {kind}")
    named = {pid for pid, _ in processes}
    for tid, own in slices.items():
        pid = process_of[tid]
        known = pid in named and pid in order
        errors += [f"process {pid} has no name or no place"] * (not known)
        errors += [f"thread {tid} has no name"] * ((pid, tid) not in threads)
        errors += _overlaps(tid, own)
    names = {pid: name for (pid, _), name in processes.items()}
    ranks = [int(names[pid].split()[1]) for pid in sorted(order, key=order.get)]
    errors += ["ranks are out of order"] * (ranks != sorted(ranks))
    return errors


def _overlaps(tid, slices) -> list[str]:
    """A viewer sorts by the start alone: of equal ones the file's order counts."""
    errors, open_slices = [], []
    for begin, end, name in sorted(slices, key=lambda each: each[0]):
        while open_slices and open_slices[-1] <= begin:
            open_slices.pop()
        if open_slices and end > open_slices[-1]:
            errors.append(f"thread {tid}: {name} at {begin} ns ends after what holds it")
            continue
        open_slices.append(end)
        errors += [f"thread {tid}: {name} lies too deep"] * (len(open_slices) > MOST_DEEP)
    return errors
