"""The preflight passes on a sound fabric, and names the collective and the size that is not."""

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import first_ranks

from spimpi.checks.fabric import SIZES, check_fabric, probes, tensor_names
from spimpi.checks.recorder import Recorder
from spimpi.context import DistributedContext
from spimpi.inference.kernels import pack_maxima
from spimpi.topology.grid import parse

pytestmark = pytest.mark.mpi

BAD_STEP = 2  # the third size: 64 KiB


class Corrupted:
    """A communicator of which one collective is wrong on one rank, for results of one size."""

    def __init__(self, comm, method, op, rank, n):
        self._comm, self._method, self._op, self._n = comm, method, op, n
        self._here = comm.rank == rank

    def __getattr__(self, name):
        real = getattr(self._comm, name)
        if name != self._method or not self._here:
            return real

        def wrong(*args, op=None, **options):
            if op is not None:
                options["op"] = op
            if name == "Send":
                own = np.array(args[0])
                self._flip(own)
                return real(own, *args[1:], **options)
            if name == "Iallreduce":
                records, *rest = args[0]
                self._sent = records.copy()  # a request does not keep what it sends
                self._flip(self._sent)
                return real([self._sent, *rest], *args[1:], **options)
            done = real(*args, **options)
            if self._op is None or op == self._op:
                result = args[0] if name == "Bcast" else args[1]
                self._flip(result[0] if isinstance(result, list) else result)
            return done

        return wrong

    def _flip(self, array):
        words = array.view(np.uint64)
        if words.size in (self._n, self._n // 6 * 6):  # a record has six words, the first is XORed
            words[words.size // 12 * 6] ^= np.uint64(1)


def _context(comm):
    topology = {1: "tp=1", 2: "tp=2", 3: "tp=3", 4: "tp=2,pp=2"}.get(comm.size)
    return DistributedContext(comm, parse(topology, comm.size, 8, 8))


def _recorder(comm):
    return Recorder({name: i for i, name in enumerate(tensor_names())}, comm.rank)


@pytest.mark.wheels
@pytest.mark.mpi(min_size=2)
def test_a_sound_fabric_passes_at_every_size(comm):
    for n in range(2, min(comm.size, 4) + 1):
        for topology in (f"tp={n}", f"pp={n}", f"dp={n}"):
            with first_ranks(comm, n) as part:
                if part is None:
                    continue
                with DistributedContext(part, parse(topology, n, 8, 8)) as ctx:
                    recorder = _recorder(part)
                    assert check_fabric(ctx, recorder) == 0
                    assert recorder.n_events == sum(p.n_sizes for p in probes(ctx)) > 0


def _faulty():
    """(communicator, method, op's name or None, the check that must fail) of every probe."""
    return [
        ("tensor", "Allreduce", "SUM", "fabric.tensor.sum"),
        ("tensor", "Allreduce", "MAX", "fabric.tensor.max"),
        ("tensor", "Allreduce", "BOR", "fabric.tensor.bor"),
        ("tensor", "Allgatherv", None, "fabric.tensor.allgather"),
        ("tensor", "Iallreduce", None, "fabric.tensor.records"),
        ("data", "Iallreduce", None, "fabric.data.records"),
        ("world", "Iallreduce", None, "fabric.world.records"),
        ("pipeline", "Send", None, "fabric.pipeline.handoff"),
        ("data", "Allgatherv", None, "fabric.data.allgather"),
        ("world", "Allreduce", "BXOR", "fabric.world.bxor"),
        ("world", "Bcast", None, "fabric.world.broadcast"),
    ]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("axis", "method", "op", "name"), _faulty())
def test_one_wrong_bit_of_a_collective_is_found(comm, axis, method, op, name):
    topology = {"pipeline": "pp", "data": "dp"}.get(axis, "tp") + f"={comm.size}"
    if comm.size > 8:
        pytest.skip("eight heads, eight layers")
    with DistributedContext(comm, parse(topology, comm.size, 8, 8)) as ctx:
        real, culprit = getattr(ctx, axis), comm.size - 1
        n = SIZES[BAD_STEP]
        wrong = Corrupted(real, method, getattr(MPI, op) if op else None, culprit, n)
        setattr(ctx, axis, wrong)
        recorder = _recorder(comm)
        sizes = SIZES[: BAD_STEP + 2]
        failures = check_fabric(ctx, recorder, sizes=sizes)
        setattr(ctx, axis, real)
        # A hand-off that was sent wrong is wrong where it arrives, at the next rank of the ring; a
        # record that was sent wrong makes the result wrong everywhere.
        seen_by = {"Send": [0], "Iallreduce": range(comm.size)}.get(method, [culprit])
        assert failures == (comm.rank in seen_by)
        for event in recorder.all_failures():
            assert tensor_names()[event["tensor"]] == name
            assert event["step"] == BAD_STEP


def test_maxima_never_need_the_top_bit_of_a_word():
    """Debian's Open MPI 4.1.4 compares 64-bit words as if they were signed, so MPI_MAX is only
    given words below 2^63: those of the preflight, and row maxima with their owner, NaN too."""
    largest = np.array([0x7FFFFFFF, 0, 0x7F800000], np.uint32)  # |NaN|, 0, |Inf|
    packed = np.empty(3, np.uint64)
    pack_maxima(largest, np.uint64(63), packed)
    assert (packed < np.uint64(1 << 63)).all()
