"""MPI buffers as mpi4py takes them, as flat numpy arrays: what a collective sent and received.

A buffer is an array of any library in host memory, or a list or tuple: [data, datatype],
[data, count], [data, count, datatype] or [data, count, displacement, datatype], where the second of
two or three may be the pair (count, displacement). Counts and displacements are in elements of the
datatype. Of a v-collective they are one for each rank, or one number for all: then the displacement
is what lies between the beginnings of two blocks, the pair must be a tuple (a list is counts), and
without counts the first ranks have what no equal parts leave over. All as mpi4py reads it, in its
``message_simple`` and ``message_vector``.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from operator import index
from threading import Lock

import numpy as np
from mpi4py import MPI

from spimpi.errors import UsageError
from spimpi.fingerprint.arrays import word_layout
from spimpi.fingerprint.protocols import as_array


@dataclass(frozen=True)
class Blocks:
    """A buffer's elements, flat, and where in it each rank's block begins and how long it is."""

    data: np.ndarray
    counts: tuple[int, ...]
    places: tuple[int, ...]

    def parts(self) -> list[np.ndarray]:
        """The elements for (or from) each rank."""
        return [self.data[d : d + n] for d, n in zip(self.places, self.counts)]

    def joined(self) -> np.ndarray | None:
        """All ranks' elements in one piece, where they lie one after the other."""
        first = self.places[0]
        starts = accumulate(self.counts, initial=first)
        if any(d != start for d, start in zip(self.places, starts)):
            return None
        return self.data[first : first + sum(self.counts)]

    def kept(self) -> "Blocks":
        """The same of a copy, which no collective overwrites."""
        return replace(self, data=self.data.copy())


def block_of(buffer) -> np.ndarray:
    """The elements of a buffer that is one block; errors as ``blocks_of``."""
    return blocks_of(buffer, 1).parts()[0]


def blocks_of(buffer, n: int, *, vector: bool = False) -> Blocks:
    """The ``n`` ranks' blocks of a buffer; ``vector``: of a v-collective.

    UsageError for derived datatypes, for what is no buffer, and for blocks that reach beyond it.
    """
    data, counts, displacements, datatype = _spelled(buffer, (tuple,) if vector else (tuple, list))
    elements, rest = _elements(data, datatype)
    if counts is None and rest:
        msg = f"no count is given, and {rest} bytes are left over behind the last whole element"
        raise UsageError(msg)
    read = _of_vector if vector else _of_equal_parts
    blocks = Blocks(elements, *map(tuple, read(elements.size, counts, displacements, n)))
    for d, count in zip(blocks.places, blocks.counts):
        if count < 0 or (count and not 0 <= d <= elements.size - count):
            msg = (
                f"a block of {count} elements at displacement {d} is not within the buffer's "
                f"{elements.size}"
            )
            raise UsageError(msg)
    return blocks


def _spelled(buffer, pairs) -> tuple:
    """Data, counts, displacements, datatype as given. ``pairs``: types of a pair of the middle two."""
    if not isinstance(buffer, (list, tuple)):
        return buffer, None, None, None
    if not 2 <= len(buffer) <= 4:
        msg = f"a buffer is [data, counts, displacements, datatype] or shorter, found {buffer!r}"
        raise UsageError(msg)
    if len(buffer) == 4:
        return tuple(buffer)
    data, counts, *rest = buffer
    datatype, displacements = (*rest, None)[0], None
    if not rest and isinstance(counts, (MPI.Datatype, str)):
        return data, None, None, counts
    if isinstance(counts, pairs):
        counts, displacements = counts
    return data, counts, displacements, datatype


def _of_equal_parts(size, count, displacement, n) -> tuple:
    """Counts and places of blocks that lie one after the other, behind the displacement."""
    first = 0 if displacement is None else index(displacement)
    if not 0 <= first <= size:
        msg = f"displacement {first} is not within the buffer's {size} elements"
        raise UsageError(msg)
    if count is None:
        count, rest = divmod(size - first, n)
        if rest:
            msg = f"no count is given, and {size - first} elements are no {n} equal blocks"
            raise UsageError(msg)
    count = index(count)
    return [count] * n, [first + r * count for r in range(n)]


def _of_vector(size, counts, displacements, n) -> tuple:
    """Counts and places of blocks that may differ."""
    if counts is None:
        counts = [size // n + (size % n > r) for r in range(n)]
    counts = _one_each(counts, n, "count", lambda count, r: count)
    if displacements is None:
        return counts, list(accumulate(counts, initial=0))[:n]
    return counts, _one_each(displacements, n, "displacement", lambda stride, r: r * stride)


def _one_each(given, n, what, of_number) -> list[int]:
    """A number for each of ``n`` ranks, where one is given for each, or one for all."""
    try:
        length = len(given)
    except TypeError:
        number = index(given)
        return [of_number(number, r) for r in range(n)]
    each = [index(given[i]) for i in range(length)]
    if length != n:
        msg = f"expected one {what} for each of {n} ranks, found {each}"
        raise UsageError(msg)
    return each


def _elements(data, datatype) -> tuple[np.ndarray, int]:
    """All whole elements in the order of memory, without a copy, and the bytes left over."""
    if data is None or data is MPI.BOTTOM:
        return np.empty(0, _dtype_of(datatype)), 0
    data = np.asarray(memoryview(data)) if isinstance(data, bytes) else as_array(data)
    if not (data.flags.c_contiguous or data.flags.f_contiguous):
        msg = f"MPI buffers are contiguous, found strides {data.strides} for shape {data.shape}"
        raise UsageError(msg)
    data = data.reshape(-1, order="A")
    dtype = _with_words(data.dtype) if datatype is None else _dtype_of(datatype)
    if dtype == data.dtype:
        return data, 0
    whole, rest = divmod(data.nbytes, dtype.itemsize)
    data = data.view(np.uint8)[: whole * dtype.itemsize].view(dtype)
    # What mpi4py takes may begin anywhere in memory; what reads elements may not.
    return (data if data.flags.aligned else data.copy()), rest


def _dtype_of(datatype) -> np.dtype:
    """The dtype of what MPI moves, or adds up, as elements of a predefined datatype."""
    if not isinstance(datatype, MPI.Datatype):
        if datatype not in MPI._typedict:
            msg = f"expected an MPI datatype or a code that mpi4py knows, found {datatype!r}"
            raise UsageError(msg)
        datatype = MPI._typedict[datatype]
    if not datatype.is_predefined:
        msg = f"checked collectives take predefined datatypes, found {datatype.name or 'a derived one'}"
        raise UsageError(msg)
    try:
        dtype = _with_words(np.dtype(datatype.tocode()))
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or dtype.itemsize != datatype.extent:
        msg = f"no dtype of numpy's is as MPI's {datatype.name}: give another datatype"
        raise UsageError(msg)
    return dtype


def _with_words(dtype) -> np.dtype:
    """One name for each kind and size of number; a character is the number of its bits."""
    if dtype.kind in "iuf" and dtype.isnative and dtype.itemsize <= 8:
        return np.dtype(f"{dtype.kind}{dtype.itemsize}")
    if dtype.str[1:] in ("S1", "U0", "U1"):  # MPI.WCHAR is of numpy's U without a length
        return np.dtype(np.uint8 if dtype.kind == "S" else np.uint32)
    return dtype


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
        data = block_of(buffer)
        word_layout(data.dtype)
    except (UsageError, TypeError, ValueError, LookupError):
        return _packed(buffer), True
    return data, False


def _packed(buffer) -> np.ndarray:
    """The bytes that MPI makes of a message: sent to oneself, and received as MPI.PACKED."""
    alone, status = _alone(), MPI.Status()
    with _packing:
        request = alone.Isend(buffer, 0)
        alone.Probe(0, 0, status)
        received = np.empty(status.Get_count(MPI.PACKED), np.uint8)
        alone.Recv([received, MPI.PACKED], 0, 0)
        request.Wait()
    return received


_packing = Lock()  # of threads, whose messages to oneself would meet


@cache
def _alone():
    return MPI.COMM_SELF.Dup()
