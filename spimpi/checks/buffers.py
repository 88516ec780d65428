"""MPI buffers as mpi4py takes them, as flat numpy arrays: what a collective sent and received.

A buffer is an array of any library in host memory, or a list: [data, datatype], [data, count],
[data, count, datatype], [data, (count, displacement), datatype]; of v-collectives [data, counts,
displs, datatype] and the forms without displacements or datatype. Counts and displacements are in
elements.
"""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
from mpi4py import MPI

from spimpi.errors import UsageError
from spimpi.fingerprint.arrays import word_layout
from spimpi.fingerprint.protocols import as_array


@dataclass(frozen=True)
class Message:
    """A buffer's elements, flat, and its counts and displacements as given (None: not given)."""

    data: np.ndarray
    counts: object = None
    displacements: object = None

    def whole(self) -> np.ndarray:
        """The elements of a message that is one block."""
        if self.counts is None:
            return self.data
        start = int(self.displacements or 0)
        return self.data[start : start + int(self.counts)]

    def parts(self, size: int) -> list[np.ndarray]:
        """The elements for (or from) each of ``size`` ranks."""
        counts = self.counts_of(size)
        return [self.data[d : d + n] for d, n in zip(self.places_of(size), counts, strict=True)]

    def joined(self, size: int) -> np.ndarray | None:
        """All ranks' elements in one piece, where they lie one after the other."""
        counts, places = self.counts_of(size), self.places_of(size)
        first = places[0]
        if any(d != first + at for d, at in zip(places, accumulate(counts, initial=0))):
            return None
        return self.data[first : first + sum(counts)]

    def places_of(self, size: int) -> list[int]:
        """Where each rank's elements begin."""
        places = self.displacements
        if places is None or np.ndim(places) == 0:
            first = int(places or 0)
            return list(accumulate(self.counts_of(size), initial=first))[:size]
        return [int(d) for d in places]

    def counts_of(self, size: int) -> list[int]:
        """How many elements each rank has; equal parts where no counts were given."""
        if self.counts is None:
            return [self.data.size // size] * size
        if np.ndim(self.counts) == 0:
            return [int(self.counts)] * size
        counts = [int(n) for n in self.counts]
        if len(counts) != size:
            msg = f"expected one count for each of {size} ranks, found {counts}"
            raise UsageError(msg)
        return counts


def message_of(buffer) -> Message:
    """A buffer as mpi4py takes it; UsageError for derived datatypes and what is no buffer."""
    if not isinstance(buffer, (list, tuple)):
        return Message(_flat(buffer, None))
    if not 2 <= len(buffer) <= 4:
        msg = f"a buffer is [data, counts, displacements, datatype] or shorter, found {buffer!r}"
        raise UsageError(msg)
    data, *rest = buffer
    datatype = rest.pop() if isinstance(rest[-1], (MPI.Datatype, str)) else None
    counts, displacements = (*rest, None, None)[:2]
    if isinstance(counts, tuple) and displacements is None and len(counts) == 2:
        counts, displacements = counts
    return Message(_flat(data, datatype), counts, displacements)


def _flat(data, datatype) -> np.ndarray:
    """All elements in the order of memory, without a copy."""
    data = np.asarray(memoryview(data)) if isinstance(data, bytes) else as_array(data)
    if not (data.flags.c_contiguous or data.flags.f_contiguous):
        msg = f"MPI buffers are contiguous, found strides {data.strides} for shape {data.shape}"
        raise UsageError(msg)
    data = data.reshape(-1, order="A")
    if datatype is None:
        return data
    if isinstance(datatype, str):
        return data.view(np.dtype(datatype))
    if not datatype.is_predefined:
        found = datatype.name or "a derived one"
        msg = f"checked collectives take predefined datatypes, found {found}"
        raise UsageError(msg)
    if datatype.Get_size() == data.itemsize:
        return data
    try:
        return data.view(np.dtype(datatype.tocode()))
    except (TypeError, ValueError) as unknown:
        msg = f"no elements of datatype {datatype.name} in an array of dtype {data.dtype}"
        raise UsageError(msg) from unknown


class Unreadable:
    """Stands for a buffer that cannot be read: whoever looks at it as an array gets the error."""

    def __init__(self, error):
        self._error = error

    @property
    def __array_interface__(self):
        raise self._error


def elements_of(buffer) -> tuple[np.ndarray, bool]:
    """A message's elements, flat, and whether they are its packed bytes.

    That they are where it has a derived datatype, or a dtype that has no fingerprint. What mpi4py
    refuses raises what mpi4py raises.
    """
    try:
        data = message_of(buffer).whole()
        word_layout(data.dtype)
    except UsageError:
        return _packed(buffer), True
    return data, False


def _packed(buffer) -> np.ndarray:
    """The bytes that MPI makes of a message: sent to oneself, and received as MPI.PACKED."""
    alone, status = _alone(), MPI.Status()
    request = alone.Isend(buffer, 0)
    alone.Probe(0, 0, status)
    received = np.empty(status.Get_count(MPI.PACKED), np.uint8)
    alone.Recv([received, MPI.PACKED], 0, 0)
    request.Wait()
    return received


@cache
def _alone():
    return MPI.COMM_SELF.Dup()
