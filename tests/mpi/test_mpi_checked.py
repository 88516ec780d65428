"""The wrapper: collectives as mpi4py has them, with the check that follows."""

import numpy as np
import pytest
from mpi4py import MPI
from planted import corruption, data, memory_of, refused, spoilt, worlds

import spimpi
from spimpi import Tag

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)


def calls(comm):
    """name -> (the call, with its arguments made anew, what its receive buffer must hold)."""
    size, rank = comm.size, comm.rank
    counts = [(2 - r) % 3 for r in range(size)]
    gaps = [sum(counts[:r]) + r for r in range(size)]
    own = np.arange(3.0) + 10 * rank
    everyone = np.concatenate([np.arange(3.0) + 10 * r for r in range(size)])
    uneven = [np.arange(float(n)) + 10 * r for r, n in enumerate(counts)]
    spaced = np.full(sum(counts) + size, -1.0)
    for place, block in zip(gaps, uneven):
        spaced[place : place + block.size] = block
    pieces = np.arange(2.0 * size) + 100 * rank
    exchanged = np.concatenate([np.arange(2 * rank, 2 * rank + 2) + 100.0 * r for r in range(size)])
    send_counts = [(rank + r) % 3 for r in range(size)]
    root = size - 1
    whole = data((3 * size,), np.float64)
    at_root = rank == root

    def empty(n):
        return np.full(n, -1.0)

    def v(buffer, n, places=None):
        places = [sum(n[:r]) for r in range(len(n))] if places is None else places
        return [buffer, n, places, MPI.DOUBLE]

    sent_v = np.concatenate([np.full(n, 10.0 * rank + r) for r, n in enumerate(send_counts)])
    got_v = np.concatenate([np.full((rank + r) % 3, 10.0 * r + rank) for r in range(size)])
    spread = [np.arange(float(n)) + 10 * r for r, n in enumerate(counts)]
    total = size * np.arange(2.0 * size) + 100 * sum(range(size))
    sums = size * np.arange(3.0) + 10 * sum(range(size))
    return {
        "Allgather": ((own, empty(3 * size)), everyone),
        "Iallgather": (([own, MPI.DOUBLE], [empty(3 * size), 3, MPI.DOUBLE]), everyone),
        "Allgatherv": ((uneven[rank], v(empty(spaced.size), counts, gaps)), spaced),
        "Iallgatherv": ((uneven[rank], v(empty(sum(counts)), counts)), np.concatenate(uneven)),
        "Bcast": ((whole.copy() if at_root else empty(whole.size), root), whole),
        "Ibcast": (([whole.copy() if at_root else empty(whole.size), MPI.DOUBLE], root), whole),
        "Gather": ((own, empty(3 * size) if at_root else None, root), everyone),
        "Igather": ((own, empty(3 * size) if at_root else None, root), everyone),
        "Igatherv": ((uneven[rank], v(empty(sum(counts)), counts) if at_root else None, root),
                     np.concatenate(uneven)),
        "Gatherv": ((uneven[rank], v(empty(spaced.size), counts, gaps) if at_root else None, root),
                    spaced),
        "Scatter": ((whole if at_root else None, empty(3), root), whole[3 * rank :][:3]),
        "Iscatter": ((whole if at_root else None, empty(3), root), whole[3 * rank :][:3]),
        "Iscatterv": ((v(np.concatenate(spread), counts) if at_root else None,
                       empty(counts[rank]), root), spread[rank]),
        "Scatterv": ((v(np.concatenate(spread), counts) if at_root else None,
                      empty(counts[rank]), root), spread[rank]),
        "Alltoall": ((pieces, empty(2 * size)), exchanged),
        "Ialltoall": ((pieces, empty(2 * size)), exchanged),
        "Alltoallv": ((v(sent_v, send_counts), v(empty(got_v.size), send_counts)), got_v),
        "Ialltoallv": ((v(sent_v, send_counts), v(empty(got_v.size), send_counts)), got_v),
        "Allreduce": ((own, empty(3)), sums),
        "Iallreduce": ((own, empty(3), MPI.SUM), sums),
        "Reduce": ((own, empty(3) if at_root else None, MPI.SUM, root), sums),
        "Ireduce": ((own, empty(3) if at_root else None, MPI.SUM, root), sums),
        "Ireduce_scatter": ((pieces, empty(2), [2] * size), total[2 * rank :][:2]),
        "Ireduce_scatter_block": ((pieces, empty(2)), total[2 * rank :][:2]),
    }  # fmt: skip


NAMES = list(calls(MPI.COMM_SELF))
TO_ROOT = ("Gather", "Gatherv", "Igather", "Igatherv", "Reduce", "Ireduce")


def _target(name, args):
    return args[0] if "cast" in name else args[1]


@pytest.mark.parametrize("name", NAMES)
def test_clean_calls_give_what_mpi_gives_and_hold(comm, name):
    for part in worlds(comm):
        checked = spimpi.checked(part)
        for _ in range(2):
            args, expected = calls(part)[name]
            request = getattr(checked, name)(*args)
            if name.startswith("I"):
                request.Wait()
            verdict = request.verdict if name.startswith("I") else checked.verdict
            assert verdict, str(verdict)
            target = _target(name, args)
            if target is not None:
                np.testing.assert_array_equal(memory_of(target), expected)


@two
@pytest.mark.parametrize("name", NAMES)
def test_a_spoilt_receive_buffer_is_found_on_the_rank_that_has_it(comm, name):
    for part in worlds(comm, 2):
        victim = part.size - 1 if name in TO_ROOT else 0
        checked = spoilt(spimpi.checked(part), victim)
        args, _ = calls(part)[name]
        with pytest.raises(spimpi.CorruptionError) as caught:
            request = getattr(checked, name)(*args)
            request.Wait()
        if "reduce" not in name.lower():
            where = caught.value.verdict.where
            assert where.tensor == name
            # Where one rank's data differ at one other, nothing tells which of the two has changed.
            both = where.rank is None and "nothing tells which" in where.detail
            assert where.rank == victim or both, str(caught.value)
            assert f"rank {victim}" in where.detail
        texts = part.allgather(str(caught.value))
        assert len(set(texts)) == 1


def test_in_place_calls_are_checked_against_what_was_there_before(comm):
    for part in worlds(comm):
        size, rank = part.size, part.rank
        for faulty in (False, True):
            checked = spimpi.checked(part)
            if faulty:
                spoilt(checked, 0)
            whole = data((2 * size,), np.float64)
            calls_in_place = []
            for name in ("Allgather", "Alltoall"):
                buffer = np.zeros(2 * size)
                if name == "Alltoall":
                    buffer[:] = np.arange(2 * size) + 100 * rank
                buffer[2 * rank : 2 * rank + 2] = whole[2 * rank : 2 * rank + 2]
                calls_in_place.append((name, (MPI.IN_PLACE, buffer)))
            gathered = np.zeros(2 * size)
            gathered[:2] = whole[:2]
            own = whole[2 * rank : 2 * rank + 2].copy()
            calls_in_place.append(
                ("Gather", (MPI.IN_PLACE, gathered, 0) if rank == 0 else (own, None, 0))
            )
            for name, args in calls_in_place:
                if not faulty:
                    getattr(checked, name)(*args)
                    assert checked.verdict
                    continue
                with corruption(part, 0, name):
                    getattr(checked, name)(*args)
        checked = spimpi.checked(part)
        received = np.zeros(2)
        if rank == 0:
            checked.Scatter(whole, MPI.IN_PLACE, 0)
        else:
            checked.Scatter(None, received, 0)
            np.testing.assert_array_equal(received, whole[2 * rank :][:2])
        assert checked.verdict
        total = np.arange(4.0) + rank
        checked.Allreduce(MPI.IN_PLACE, total)
        assert checked.verdict
        counts = [1] * size
        for call in (
            lambda c, b: c.Reduce_scatter(MPI.IN_PLACE, b, counts),
            lambda c, b: c.Reduce_scatter_block(MPI.IN_PLACE, b),
        ):
            call(checked, np.arange(float(size)) + rank)
            assert checked.verdict


def test_reduce_scatters_are_checked(comm):
    for part in worlds(comm):
        size, rank = part.size, part.rank
        counts = [r + 1 for r in range(size)]
        for faulty in (False, True):
            checked = spimpi.checked(part, check=False)
            if faulty:
                spoilt(checked, 0)
            own = np.arange(float(sum(counts))) + rank
            out = np.zeros(counts[rank])
            checked.Reduce_scatter(own, out, counts)
            assert bool(checked.verdict) is not faulty
            checked.Reduce_scatter(own, out)
            assert bool(checked.verdict) is not faulty
            out = np.zeros(2)
            checked.Reduce_scatter_block(np.arange(2.0 * size) * rank, out)
            assert bool(checked.verdict) is not faulty


@two
def test_calls_name_their_tensors_by_kind_and_number_or_by_tag(comm):
    checked = spimpi.checked(comm, check=False)
    start = checked._session.calls
    victim = comm.size - 1
    spoilt(checked, victim)

    def where():
        checked.Allgather(np.ones(2), np.zeros(2 * comm.size))
        return checked.verdict.where

    found = [where(), where()]
    assert [w.tensor for w in found] == ["Allgather"] * 2
    assert [w.step for w in found] == [start + 1, start + 2]
    with checked.tagged(Tag(name="kv", layer=2, step=7)):
        found = [where(), where()]
    assert [(w.tensor, w.layer, w.step) for w in found] == [("kv", 2, 7), ("kv", 2, 8)]
    checked.Bcast(np.ones(3), tag=Tag(name="mine", step=4))
    assert (checked.verdict.where.tensor, checked.verdict.where.step) == ("mine", 4)
    assert where().tensor == "Allgather"


def test_derived_datatypes_are_refused_by_name_on_all_ranks(comm):
    pairs = MPI.DOUBLE.Create_contiguous(2).Commit()
    checked, last = spimpi.checked(comm), comm.rank == comm.size - 1
    out = np.zeros(2 * comm.size)
    own = [np.ones(2), 1, pairs] if last else np.ones(2)
    with refused(comm, f"rank {comm.size - 1}: checked collectives take predefined datatypes"):
        checked.Allgather(own, out)
    pairs.Free()
    checked.Allgather(np.ones(2), out)
    assert checked.verdict


def test_calls_in_a_batch_are_pending(comm):
    with spimpi.DistributedContext(comm) as ctx:
        checked = spimpi.checked(comm, ctx)
        with ctx.batch():
            checked.Allgather(np.ones(2), np.zeros(2 * comm.size))
            first = checked.verdict
            checked.Bcast(np.ones(2))
            with pytest.raises(spimpi.UsageError, match="pending"):
                bool(first)
        assert first and checked.verdict
        spoilt(checked, 0)
        with corruption(comm, 0, "Allgather"):
            with ctx.batch():
                checked.Allgather(np.ones(2), np.zeros(2 * comm.size))
                checked.Bcast(np.ones(2))


class OnlyDlpack:
    """An array of another library: DLPack, and nothing else of numpy's."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **wishes):
        return self._array.__dlpack__(**wishes)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def kinds_of_arrays():
    """name -> a function that makes an array of the library over a numpy array's memory."""
    kinds = {"numpy": lambda x: x, "buffer": memoryview, "dlpack": OnlyDlpack}
    try:
        import torch
    except ImportError:
        return kinds
    return kinds | {"torch": torch.from_numpy}


@pytest.mark.parametrize("kind", ["numpy", "buffer", "dlpack", "torch"])
def test_arrays_of_any_library_are_taken_as_mpi4py_takes_them(comm, kind):
    make = kinds_of_arrays().get(kind)
    if make is None:
        pytest.skip("torch is not installed")
    checked, size, rank = spimpi.checked(comm), comm.size, comm.rank
    for faulty in (False, True):
        if faulty:
            spoilt(checked, size - 1)
            checked.check = False
        own, total = data((3,), np.float32, rank), np.zeros(3, np.float32)
        out = np.zeros(3 * size, np.float32)
        checked.Allgather(make(own), make(out))
        assert bool(checked.verdict) is not faulty
        assert checked.Iallgather([make(own), MPI.FLOAT], make(out)).Wait()
        checked.Allreduce(make(own), make(total))
        assert bool(checked.verdict) is not faulty
        checked.Bcast(make(own), size - 1)
    checked = spimpi.checked(comm)
    box = np.zeros(3, np.float32)
    checked.Sendrecv(make(own), (rank + 1) % size, 1, make(box), (rank - 1) % size, 1)
    assert checked.verdict


def test_torchs_bfloat16_is_checked_bit_by_bit(comm):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    checked, size = spimpi.checked(comm), comm.size
    own = torch.arange(4, dtype=torch.bfloat16) + comm.rank
    out = torch.zeros(4 * size, dtype=torch.bfloat16)
    words = MPI.UINT16_T
    checked.Allgather([own, words], [out, words])
    assert checked.verdict and (out[:4] == torch.arange(4)).all()
    spoilt(checked, 0)
    with corruption(comm, 0, "Allgather"):
        checked.Allgather([own, words], [out, words])
