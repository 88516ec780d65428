"""What the numbers of a trace are called."""

import numpy as np


def places(names) -> tuple[list[str], np.ndarray]:
    """The different names in their order, and the place among them of each of ``names``."""
    names = list(names)
    different = list(dict.fromkeys(names))
    place = {name: i for i, name in enumerate(different)}
    return different, np.array([place[name] for name in names], np.int64)


def host_places(trace) -> tuple[list[str], np.ndarray]:
    """The hosts of a trace, and the place among them of each rank's, by the rank's number."""
    hosts, place = places(info.host for info in trace.ranks)
    ranks = [info.rank for info in trace.ranks]
    of_rank = np.zeros(max(ranks, default=-1) + 1, np.int64)
    of_rank[ranks] = place
    return hosts, of_rank


def member(kind, number):
    """The enumeration's member, or the plain number where a later spimpi has added one."""
    try:
        return kind(int(number))
    except ValueError:
        return int(number)


def name_of(member) -> str:
    return getattr(member, "name", str(member)).lower().replace("_", " ")


def tensor_name(tensors, row: int) -> str:
    return tensors[row].name if row < len(tensors) else f"tensor {row}"
