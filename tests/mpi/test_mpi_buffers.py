"""Buffers are read as mpi4py reads them: every spelling beside what MPI really moved."""

import array

import numpy as np
import pytest
from mpi4py import MPI

import spimpi
from spimpi.checks.buffers import block_of, blocks_of, elements_of

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
BEFORE = -1.0
EQUAL, UNEVEN = False, True  # collectives of equal blocks, and v-collectives


def _spellings(n):
    """(name, of a v-collective, elements of the buffer, what stands behind the buffer)."""
    d, each = MPI.DOUBLE, list(range(n))
    places = [sum(each[:r]) + r for r in each]
    room = sum(each) + 2 * n
    return [
        ("bare", EQUAL, 2 * n, ()),
        ("type", EQUAL, 2 * n, (d,)),
        ("code", EQUAL, 2 * n, ("d",)),
        ("count", EQUAL, 3 * n, (2,)),
        ("numpy's count", EQUAL, 3 * n, (np.int32(2),)),
        ("0-d count", EQUAL, 3 * n, (np.array(2),)),
        ("pair", EQUAL, 2 * n + 3, ((2, 3),)),
        ("list of a pair", EQUAL, 2 * n + 3, ([2, 3],)),
        ("count, type", EQUAL, 3 * n, (2, d)),
        ("count, no type", EQUAL, 3 * n, (2, None)),
        ("no count, type", EQUAL, 2 * n, (None, d)),
        ("pair, type", EQUAL, 2 * n + 3, ((2, 3), d)),
        ("list of a pair, type", EQUAL, 2 * n + 3, ([2, 3], d)),
        ("displacement alone", EQUAL, 2 * n + 3, ((None, 3), d)),
        ("count alone of a pair", EQUAL, 2 * n + 3, ((2, None), "d")),
        ("four", EQUAL, 2 * n + 3, (2, 3, d)),
        ("four without a count", EQUAL, 2 * n + 3, (None, 3, d)),
        ("four without a type", EQUAL, 2 * n + 3, (2, 3, None)),
        ("nothing", EQUAL, 3, (0, d)),
        ("bare", UNEVEN, 3 * n - 1, ()),
        ("type", UNEVEN, 3 * n - 1, (d,)),
        ("one count", UNEVEN, 3 * n, (2,)),
        ("counts", UNEVEN, room, (each,)),
        ("counts of numpy", UNEVEN, room, (np.array(each, np.int16), d)),
        ("counts as a range", UNEVEN, room, (range(n), d)),
        ("pair", UNEVEN, room, ((each, places),)),
        ("pair of a count and a stride", UNEVEN, 4 * n, ((2, 4),)),
        ("counts and a stride", UNEVEN, n * n, ((each, n), d)),
        ("stride alone", UNEVEN, 3 * n, ((None, 3), d)),
        ("no stride", UNEVEN, room, ((each, None), d)),
        ("stride of none", UNEVEN, 4 * n, (1, 0, d) if n == 1 else (1, 1, d)),
        ("four", UNEVEN, room, (each, places, d)),
        ("four backwards", UNEVEN, 2 * n, ([2] * n, [2 * (n - 1 - r) for r in each], d)),
        ("four with a stride", UNEVEN, 4 * n, (2, 4, d)),
        ("four without counts", UNEVEN, 5 * n, (None, 5, d)),
        ("four without anything", UNEVEN, 3 * n - 1, (None, None, None)),
    ]


def _wrong_spellings(n):
    """What mpi4py refuses, before anything is sent."""
    d = MPI.DOUBLE
    return [
        ("no list", EQUAL, 2 * n, (2, 3)),
        ("too long", EQUAL, 2 * n, (2, 3, d, d)),
        ("unknown code", EQUAL, 2 * n, ("nothing",)),
        ("a displacement behind the end", EQUAL, 2 * n, (0, 2 * n + 1, d)),
        ("a displacement before the start", EQUAL, 2 * n, (1, -1, d)),
        ("unequal parts", EQUAL, 2 * n + 1, ()) if n > 1 else ("float", EQUAL, 3, (1.0, d)),
        ("no whole elements", EQUAL, 3, (MPI.DOUBLE_COMPLEX,)),
        ("a pair of three", EQUAL, 2 * n, ((1, 2, 3), d)),
        ("counts of another number", UNEVEN, 3 * n, ([1] * (n + 1), d)),
        ("places of another number", UNEVEN, 3 * n, (1, [0] * (n + 1), d)),
        ("counts that are none", UNEVEN, 3 * n, ([1.5] * n, d)),
        ("a list is no pair", UNEVEN, 4 * n, ([2, [0] * n], d)),
    ]


def _own(r, count):
    return 100.0 * (r + 1) + np.arange(count)


def _ids(spellings):
    return [f"{'v, ' * vector}{name}" for name, vector, *_ in spellings(2)]


def _spelled(memory, behind):
    return [memory, *behind] if behind else memory


@pytest.mark.parametrize("at", range(len(_spellings(2))), ids=_ids(_spellings))
def test_a_buffer_is_read_as_mpi_fills_and_sends_it(comm, at):
    _, vector, room, behind = _spellings(comm.size)[at]
    memory = np.full(room, BEFORE)
    buffer = _spelled(memory, behind)
    blocks = blocks_of(buffer, comm.size, vector=vector)
    gather = comm.Allgatherv if vector else comm.Allgather
    gather(_own(comm.rank, blocks.counts[comm.rank]), buffer)
    expected = np.full(room, BEFORE)
    for r, (place, count) in enumerate(zip(blocks.places, blocks.counts, strict=True)):
        expected[place : place + count] = _own(r, count)
    np.testing.assert_array_equal(memory, expected)
    # The same buffer at its root, and each rank's share of it.
    memory[:] = np.arange(room)
    got = np.empty(blocks.counts[comm.rank])
    (comm.Scatterv if vector else comm.Scatter)(buffer, got, 0)
    np.testing.assert_array_equal(got, blocks.parts()[comm.rank])
    # And in checked calls.
    checked = spimpi.checked(comm)
    memory[:] = BEFORE
    name = "Allgatherv" if vector else "Allgather"
    getattr(checked, name)(_own(comm.rank, got.size), buffer)
    assert checked.verdict
    np.testing.assert_array_equal(memory, expected)


@pytest.mark.parametrize("at", range(len(_wrong_spellings(2))), ids=_ids(_wrong_spellings))
def test_what_mpi4py_refuses_is_no_buffer(comm, at):
    _, vector, room, behind = _wrong_spellings(comm.size)[at]
    buffer = _spelled(np.full(room, BEFORE), behind)
    with pytest.raises(Exception):  # of one kind or another
        (comm.Allgatherv if vector else comm.Allgather)(np.zeros(0), buffer)
    with pytest.raises((spimpi.UsageError, TypeError, ValueError, LookupError)):
        blocks_of(buffer, comm.size, vector=vector)


def test_blocks_beyond_the_buffer_are_refused_by_name(comm):
    for behind in ((3, MPI.DOUBLE), (2, 1, MPI.DOUBLE)):
        with pytest.raises(spimpi.UsageError, match="not within the buffer's 2"):
            block_of([np.ones(2), *behind])
    with pytest.raises(spimpi.UsageError, match="displacement -1 is not within"):
        blocks_of([np.ones(2), [1], [-1], MPI.DOUBLE], 1, vector=True)


def _messages():
    """(name, a buffer, its elements)."""
    six = np.arange(6.0)
    unaligned = bytearray(1) + bytearray(np.arange(4, dtype=np.int32).tobytes())
    return [
        ("list pair", [six, [2, 1], MPI.DOUBLE], six[1:3]),
        ("displacement alone", [six, None, 4, MPI.DOUBLE], six[4:]),
        ("of another datatype", [six, MPI.INT64_T], six.view(np.int64)),
        ("of smaller elements", [six, (3, 2), MPI.INT32_T], six.view(np.int32)[2:5]),
        ("of larger ones", [np.arange(4, dtype=np.int32), 1, 1, "d"],
         np.arange(4, dtype=np.int32).view(float)[1:]),
        ("bytes", [b"abcdefgh", 2, MPI.INT16_T], np.frombuffer(b"abcd", np.int16)),
        ("characters", [bytearray(b"abc"), MPI.CHAR], np.frombuffer(b"abc", np.uint8)),
        ("numpy's character", np.array([b"a", b"b"]), np.frombuffer(b"ab", np.uint8)),
        ("wide", [np.arange(2, dtype=np.uint32), MPI.WCHAR], np.arange(2, dtype=np.uint32)),
        ("array", array.array("l", [1, 2, 3]), np.arange(1, 4)),
        ("unaligned", [memoryview(unaligned)[1:], 4, MPI.INT32_T], np.arange(4, dtype=np.int32)),
        ("columns", np.asfortranarray(six.reshape(2, 3)), six.reshape(2, 3).T.ravel()),
        ("bool", [np.array([True, False]), MPI.C_BOOL], np.array([True, False])),
        ("Fortran", [six, MPI.DOUBLE_PRECISION], six),
        ("nothing", [None, 0, MPI.DOUBLE], six[:0]),
        ("the bottom", [MPI.BOTTOM, 0, "d"], six[:0]),
    ]  # fmt: skip


@pytest.mark.parametrize("at", range(len(_messages())), ids=[name for name, *_ in _messages()])
def test_a_message_is_read_as_mpi_sends_it(comm, at):
    _, buffer, elements = _messages()[at]
    alone = MPI.COMM_SELF
    got = np.zeros_like(elements)
    request = alone.Isend(buffer, 0, 5)
    alone.Recv([got.view(np.uint8), MPI.BYTE], 0, 5)
    request.Wait()
    found = block_of(buffer)
    assert found.dtype == elements.dtype and found.flags.aligned
    assert found.tobytes() == elements.tobytes() == got.tobytes()
    assert not elements_of(buffer)[1]


def _misaligned(n, values=()):
    """Room for ``n`` doubles that begins at an odd address."""
    raw = np.zeros(8 * n + 1, np.uint8)
    room = raw[1 - raw.ctypes.data % 2 :][: 8 * n]
    room[: 8 * len(values)] = np.asarray(values, float).view(np.uint8)
    return room


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "name", ["Allreduce", "Reduce", "Reduce_scatter", "Reduce_scatter_block", "MAX"]
)
def test_sums_into_a_buffer_at_an_odd_address_are_checked_as_they_arrived(comm, name, in_place):
    """Such a buffer's elements are read from a copy: one made before the call holds no sum."""
    n, root = 2 * comm.size, comm.size - 1
    x = np.arange(float(n)) + comm.rank
    every = np.arange(float(n)) * comm.size + sum(range(comm.size))
    shard = every[2 * comm.rank :][:2]
    call, more, expected = {
        "Allreduce": ("Allreduce", (), every),
        "MAX": ("Allreduce", (MPI.MAX,), np.arange(float(n)) + root),
        "Reduce": ("Reduce", (MPI.SUM, root), every if comm.rank == root else every[:0]),
        "Reduce_scatter": ("Reduce_scatter", ([2] * comm.size,), shard),
        "Reduce_scatter_block": ("Reduce_scatter_block", (), shard),
    }[name]
    room = _misaligned(n if in_place else max(len(expected), 1), x if in_place else ())
    sent, got = x, [room, MPI.DOUBLE]
    if in_place and call == "Reduce" and comm.rank != root:
        sent = got  # elsewhere than at the root nothing is in place
    elif in_place:
        sent = MPI.IN_PLACE
    checked = spimpi.checked(comm)
    for prefix in ("", "I"):
        if prefix and in_place:
            room[:] = _misaligned(n, x)
        request = getattr(checked, prefix + (call.lower() if prefix else call))(sent, got, *more)
        if prefix:
            request.Wait()
        assert checked.verdict and bool(checked.verdict.established) == (comm.size > 1)
        if comm.rank == root or call != "Reduce":
            assert room[: 8 * len(expected)].tobytes() == expected.tobytes()


def test_a_sum_is_of_the_datatype_not_of_the_arrays_dtype(comm):
    """Floats in an array of integers: MPI adds floats."""
    checked, own = spimpi.checked(comm), np.arange(8.0) + comm.rank
    total = np.zeros(8, np.int64)
    checked.Allreduce([own.view(np.int64), MPI.DOUBLE], [total, MPI.DOUBLE])
    assert checked.verdict
    expected = comm.size * np.arange(8.0) + sum(range(comm.size))
    np.testing.assert_array_equal(total.view(float), expected)


@pytest.mark.parametrize("in_place", [MPI.IN_PLACE, None], ids=["IN_PLACE", "None"])
def test_none_is_in_place_too(comm, in_place):
    checked, size, rank = spimpi.checked(comm), comm.size, comm.rank
    whole = np.zeros(2 * size)
    whole[2 * rank : 2 * rank + 2] = _own(rank, 2)
    everyone = np.concatenate([_own(r, 2) for r in range(size)])
    checked.Allgather(in_place, whole)
    assert checked.verdict and (whole == everyone).all()
    checked.Scatter(*((whole, in_place) if rank == 0 else (None, whole[:2])), 0)
    assert checked.verdict and (whole[:2] == _own(rank, 2)).all()
    checked.Gather(*((in_place, whole) if rank == 0 else (whole[:2], None)), 0)
    assert checked.verdict
    checked.Allreduce(in_place, whole[:1])
    assert checked.verdict and whole[0] == sum(_own(r, 1)[0] for r in range(size))
    checked.Reduce(*((in_place, whole[:1]) if rank == 0 else (whole[:1], None)))
    assert checked.verdict
    checked.Alltoall(in_place, whole)
    assert checked.verdict


def test_blocks_in_place_are_of_the_count_that_is_given(comm):
    size, rank = comm.size, comm.rank
    for count in (1, size, 4):
        x = np.arange(1.0 * count * size) + rank
        total = (size * np.arange(1.0 * count * size) + sum(range(size)))[rank * count :][:count]
        checked, buffer = spimpi.checked(comm), x.copy()
        checked.Reduce_scatter_block(MPI.IN_PLACE, [buffer, count, MPI.DOUBLE])
        assert checked.verdict
        np.testing.assert_array_equal(buffer[:count], total)
        request = checked.Ireduce_scatter_block(MPI.IN_PLACE, [x, count, "d"])
        request.Wait()
        assert request.verdict


@pytest.mark.mpi(min_size=2)
def test_a_wrong_element_of_a_strided_block_is_seen(comm):
    """Also among zeros, and on the rank that has it."""
    for value in (0.0, 3.0):
        got = np.zeros(4 * comm.size)

        class Wrong:
            def Allgatherv(self, sent, received):
                comm.Allgatherv(sent, received)
                if comm.rank == 1:
                    received[0][4 * (comm.size - 1) + 1] = 7

        checked = spimpi.checked(comm)
        checked.comm = Wrong()
        with pytest.raises(spimpi.CorruptionError) as caught:
            checked.Allgatherv(np.full(2, value), [got, 2, 4, MPI.DOUBLE])
        assert caught.value.verdict.where.rank == 1
