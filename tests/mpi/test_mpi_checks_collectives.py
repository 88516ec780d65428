"""Checks of collectives that move data: what was planted is found, and the rank is named."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from planted import FAULTS, corruption, cut, data, refused, same_on_all, worlds

import spimpi
from spimpi import CorruptionError, Slab, Tag, TensorPartition, UsageError
from spimpi.trace.schema import Established

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)

MOVED, AGREED = Established.MOVED, Established.AGREED
SHAPE = (7, 6)
TAG = Tag(name="hidden", layer=3, step=2)


def _part(comm, dim, size, rank=None, sizes=None):
    rank = comm.rank if rank is None else rank
    return TensorPartition(dim, comm.size, rank, size, sizes)


def _uneven(comm, size):
    """All but an eighth on the last rank, nothing on the others but the first."""
    sizes = [0] * comm.size
    sizes[0] += size // 8
    sizes[-1] += size - size // 8
    return _part(comm, 0, size, sizes=tuple(sizes))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.float16, np.complex64])
@pytest.mark.parametrize("dim", [0, 1])
def test_clean_collectives_hold_and_their_fingerprint_is_that_of_the_whole(comm, dim, dtype):
    for part in worlds(comm):
        whole = data(SHAPE, dtype)
        p = _part(part, dim, SHAPE[dim])
        verdict = spimpi.verify_allgather(part, cut(whole, p), whole, p, TAG)
        kinds = MOVED | AGREED if part.size > 1 else MOVED
        assert verdict and verdict.established == kinds and verdict.check == "allgather"
        assert bool(verdict.missing) == (part.size == 1)
        assert verdict.expected == verdict.actual == spimpi.fingerprint(whole, TAG)
        same_on_all(part, str(verdict))
        root = part.size - 1
        verdict = spimpi.verify_broadcast(part, whole, TAG, root)
        assert verdict and verdict.expected == spimpi.fingerprint(whole, TAG)
        at_root = whole if part.rank == root else None
        assert spimpi.verify_gather(part, cut(whole, p), at_root, p, TAG, root)
        assert spimpi.verify_scatter(part, at_root, cut(whole, p), p, TAG, root)
        other = _part(part, 1 - dim, SHAPE[1 - dim])
        verdict = spimpi.verify_alltoall(part, cut(whole, p), cut(whole, other), p, other, TAG)
        assert verdict and verdict.established == MOVED


def test_uneven_and_empty_shards_and_slabs_hold(comm):
    for part in worlds(comm):
        whole = data((16, 3), np.int64)
        uneven, even = _uneven(part, 16), _part(part, 0, 16)
        own = cut(whole, uneven)
        assert spimpi.verify_allgather(part, own, whole, uneven, TAG)
        assert spimpi.verify_alltoall(part, own, cut(whole, even), uneven, even, TAG)
        slab = Slab((16, 3), (uneven.start, 0))
        assert spimpi.verify_allgather(part, own, whole, slab, TAG)
        assert spimpi.verify_allgather(part, whole[:0], whole[:0], _part(part, 0, 0), TAG)
        scalar = np.array(3.5)
        assert spimpi.verify_broadcast(part, scalar, TAG)


def test_strided_read_only_and_fortran_arrays_are_read_where_they_are(comm):
    for part in worlds(comm):
        whole = np.asfortranarray(data(SHAPE))
        whole.flags.writeable = False
        p = _part(part, 1, 6)
        view = whole[:, p.start : p.stop]
        assert spimpi.verify_allgather(part, view, whole.copy(order="F"), p, TAG)
        turned = data(SHAPE)[::-1]
        assert not spimpi.verify_allgather(part, view, turned, p, TAG, check=False)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_fault_in_one_ranks_result_of_an_allgather_names_it(comm, dim, name):
    for part in worlds(comm):
        whole, previous = data(SHAPE), data(SHAPE, seed=1)
        p = _part(part, dim, SHAPE[dim])
        victim = part.size // 2
        gathered = whole.copy()
        if part.rank == victim:
            FAULTS[name](gathered, previous)
        with corruption(part, victim, "allgather") as caught:
            spimpi.verify_allgather(part, cut(whole, p), gathered, p, TAG)
        verdict = caught.value.verdict
        assert verdict.expected == spimpi.fingerprint(whole, TAG) != verdict.actual
        assert (verdict.where.step, verdict.where.layer, verdict.where.tensor) == (2, 3, "hidden")
        again = spimpi.verify_allgather(part, cut(whole, p), gathered, p, TAG, check=False)
        assert not again and str(again) == str(caught.value)


@pytest.mark.mpi(min_size=3)
def test_a_shard_that_changed_at_its_owner_names_the_owner(comm):
    """Everybody else holds what was sent: the contribution is what differs."""
    for part in worlds(comm, 3):
        whole = data(SHAPE)
        p = _part(part, 0, 7)
        own = cut(whole, p)
        if part.rank == 1:
            FAULTS["flip"](own, None)
        with corruption(part, 1, "allgather"):
            spimpi.verify_allgather(part, own, whole, p, TAG)


@pytest.mark.mpi(min_size=2)
def test_misplaced_and_repeated_shards_are_found(comm):
    for part in worlds(comm, 2):
        n = part.size
        whole = data((2 * n, 3))
        p = _part(part, 0, 2 * n)
        for misplaced in (True, False):
            gathered = whole.copy()
            if part.rank == 0:
                gathered[2:4] = whole[:2]
                if misplaced:
                    gathered[:2] = whole[2:4]
            with corruption(part, 0, "allgather"):
                spimpi.verify_allgather(part, cut(whole, p), gathered, p, TAG)


def test_everybody_wrong_alike_is_found(comm):
    """Agreement alone would hold: a rank's contribution never arrived anywhere."""
    for part in worlds(comm):
        whole = data(SHAPE)
        p = _part(part, 0, 7)
        own = cut(whole, p)
        whole[p.starts[-2] :] = 0
        with corruption(part, part.size - 1, "allgather"):
            spimpi.verify_allgather(part, own, whole, p, TAG)


def _suspects(receiver, senders):
    """Who is named where a receiver differs from these senders: of a single other one, both."""
    return {receiver, *senders} if len(senders) == 1 else receiver


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_broadcast_names_the_receiver(comm, name):
    """A third rank has what the root has; of two, nothing tells which has changed."""
    for part in worlds(comm, 2):
        whole, previous = data(SHAPE), data(SHAPE, seed=1)
        root, victim = part.size - 1, 0
        if part.rank == victim:
            FAULTS[name](whole, previous)
        with corruption(part, victim if part.size > 2 else {0, 1}, "broadcast"):
            spimpi.verify_broadcast(part, whole, TAG, root)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_gather_and_scatter_name_the_receiver_or_both(comm, name):
    for part in worlds(comm):
        whole, previous = data((12, 5), np.float64), data((12, 5), np.float64, seed=1)
        p = _part(part, 0, 12)
        root, victim = 0, part.size - 1
        gathered = whole.copy() if part.rank == root else None
        wrong = whole.copy()
        FAULTS[name](wrong, previous)
        if part.rank == root:
            gathered[:] = wrong
        senders = _where_differ(part, whole, wrong)
        with corruption(part, _suspects(root, senders), "gather"):
            spimpi.verify_gather(part, cut(whole, p), gathered, p, TAG, root)
        own = cut(whole, p)
        if part.rank == victim:
            FAULTS[name](own, cut(previous, p))
        at_root = whole if part.rank == root else None
        with corruption(part, {victim, root}, "scatter"):
            spimpi.verify_scatter(part, at_root, own, p, TAG, root)


def _where_differ(comm, one, other, dim=0):
    """The ranks in whose shards along an axis two arrays differ."""
    def shard(x, rank):
        return cut(x, _part(comm, dim, x.shape[dim], rank))

    return [r for r in range(comm.size) if (shard(one, r) != shard(other, r)).any()]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_an_alltoall_names_the_receiver_or_both(comm, name):
    for part in worlds(comm):
        whole, previous = data((12, 10)), data((12, 10), seed=1)
        before, after = _part(part, 0, 12), _part(part, 1, 10)
        received, victim = cut(whole, after), part.size - 1
        right = cut(whole, _part(part, 1, 10, victim))
        wrong = right.copy()
        FAULTS[name](wrong, cut(previous, _part(part, 1, 10, victim)))
        if part.rank == victim:
            received[:] = wrong
        suspects = _suspects(victim, _where_differ(part, right, wrong))
        with corruption(part, suspects, "alltoall") as caught:
            spimpi.verify_alltoall(part, cut(whole, before), received, before, after, TAG)
        assert caught.value.verdict.expected == spimpi.fingerprint(whole, TAG)


@given(st.data())
@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_cut_of_any_shape_holds_and_any_flip_is_found(comm, draw):
    """Drawn alike on every rank: hypothesis is derandomized."""
    shape = draw.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dim = draw.draw(st.integers(0, len(shape) - 1))
    marks = draw.draw(st.lists(st.integers(0, shape[dim]), min_size=comm.size - 1,
                               max_size=comm.size - 1))  # fmt: skip
    edges = [0, *sorted(marks), shape[dim]]
    sizes = tuple(b - a for a, b in zip(edges, edges[1:]))
    dtype = draw.draw(st.sampled_from([np.uint8, np.float16, np.int32, np.float64]))
    whole = data(shape, dtype)
    p = _part(comm, dim, shape[dim], sizes=sizes)
    assert spimpi.verify_allgather(comm, cut(whole, p), whole, p, TAG)
    element, bit = draw.draw(st.integers(0, whole.size - 1)), draw.draw(st.integers(0, 7))
    victim = draw.draw(st.integers(0, comm.size - 1))
    gathered = whole.copy()
    if comm.rank == victim:
        gathered.view(f"u{whole.itemsize}").reshape(-1)[element] ^= 1 << bit
    with corruption(comm, victim, "allgather"):
        spimpi.verify_allgather(comm, cut(whole, p), gathered, p, TAG)


def test_bad_arrays_on_one_rank_are_refused_on_all(comm):
    whole = data(SHAPE)
    p = _part(comm, 0, 7)
    own, last = cut(whole, p), comm.rank == comm.size - 1
    at = f"rank {comm.size - 1}"
    for bad, match in (
        (own.astype(object), f"{at}.*dtype object"),
        (own.astype(np.longdouble), f"{at}.*longdouble|{at}.*float128"),
        (own.astype(">f4"), f"{at}.*big-endian"),
        (own[:, :3], f"{at}.*global shapes"),
        (own.astype(np.float64), f"{at}.*float64"),
        (None, f"{at}.*found NoneType"),
        ([1.0], f"{at}.*found list"),
    ):
        with refused(comm, match):
            spimpi.verify_allgather(comm, bad if last else own, whole, p, TAG, check=False)
    with refused(comm, f"{at}.*expected a spimpi.Tag"):
        spimpi.verify_allgather(comm, own, whole, p, "hidden" if last else TAG)
    with refused(comm, f"{at}.*TensorPartition or a Slab, found NoneType"):
        spimpi.verify_allgather(comm, own, whole, None if last else p, TAG)
    with refused(comm, "a root is a rank"):
        spimpi.verify_broadcast(comm, whole, TAG, root=comm.size)
    # The communicator still works.
    assert spimpi.verify_allgather(comm, own, whole, p, TAG)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_differ_are_told_which_gave_what(comm):
    whole = data(SHAPE)
    first = comm.rank == 0
    with refused(comm, "rank 0 gave dtype int32; rank.*gave dtype float32"):
        spimpi.verify_broadcast(comm, whole.astype(np.int32) if first else whole, TAG)
    with refused(comm, r"rank 0 gave blocks of global shape \(3, 6\).*\(7, 6\)"):
        spimpi.verify_broadcast(comm, whole[:3] if first else whole, TAG)
    with refused(comm, "rank 0 gave root 1"):
        spimpi.verify_broadcast(comm, whole, TAG, root=1 if first else 0)
    with refused(comm, "ranks differ in tag"):
        spimpi.verify_broadcast(comm, whole, Tag(name="other") if first else TAG)
    with refused(comm, "rank 0 called replicas"):
        if first:
            spimpi.verify_replicas(comm, whole, TAG)
        else:
            spimpi.verify_broadcast(comm, whole, TAG)
    sizes = (7, *[0] * (comm.size - 1))
    p = _part(comm, 0, 7, sizes=sizes if first else None)
    own = np.zeros((p.size, 6), np.float32)
    with refused(comm, "ranks differ in partition"):
        spimpi.verify_allgather(comm, own, whole, p, TAG)


@two
def test_numbers_of_numpy_are_the_same_as_pythons(comm):
    """Also where equal ones came before, on this rank alone."""
    own = np.arange(4.0)
    if comm.rank == 1:
        spimpi.verify_broadcast(MPI.COMM_SELF, own, Tag(name="q"), root=np.int64(0))
    for root in (0, np.int64(0), np.uint8(0)):
        given = root if comm.rank else 0
        assert spimpi.verify_broadcast(comm, own, Tag(name="b"), root=given)
        spimpi.checked(comm).Bcast(own, root=given)
        spimpi.checked(comm).Gather(own, np.zeros((comm.size, 4)), root=given)
    number = np.int64 if comm.rank else int
    for sizes in (None, [number(4)] * comm.size):
        part = TensorPartition(
            number(0), number(comm.size), number(comm.rank), number(4 * comm.size), sizes
        )
        assert spimpi.verify_allgather(comm, own, np.tile(own, comm.size), part, Tag(name="p"))
    for bad in (1.5, "4", None):
        with pytest.raises(UsageError, match="must be a whole number"):
            TensorPartition(0, 1, 0, bad)


@two
def test_a_scalar_that_differs_is_told(comm):
    """An array without axes."""
    for dtype in ("f8", "f2", "c16"):
        own = np.array(7, dtype)
        assert spimpi.verify_broadcast(comm, own, Tag(name="one"))
        if comm.rank == 1:
            own[()] = 8
        with pytest.raises(CorruptionError, match="rank 1 holds other data than rank 0"):
            spimpi.verify_broadcast(comm, own, Tag(name="one"))
    with refused(comm, "overlap"):
        spimpi.verify_allgather(comm, np.array(3.0), np.array(3.0), Slab((), ()), Tag(name="x"))


@two
def test_partitions_that_overlap_or_leave_out_are_refused(comm):
    whole = data((2 * comm.size, 3))
    p = _part(comm, 0, len(whole), rank=0)  # everybody says that it has the first block
    with refused(comm, "overlap: rank 0 has .0:2, 0:3., rank 1 has .0:2, 0:3."):
        spimpi.verify_allgather(comm, cut(whole, p), whole, p, TAG)
    slab = Slab(whole.shape, (2 * comm.rank, 0))
    block = whole[2 * comm.rank :][: 1 if comm.rank == 1 else 2]
    with refused(comm, f"do not cover the tensor: {whole.size - 3} of {whole.size}"):
        spimpi.verify_allgather(comm, block.copy(), whole, slab, TAG)
    with refused(comm, "received do not cover"):
        good = _part(comm, 0, len(whole))
        spimpi.verify_alltoall(comm, cut(whole, good), block, good, slab, TAG)


def test_three_equal_copies_are_no_partition(comm):
    """Their XOR is one copy's fingerprint: only the number of elements tells."""
    for part in worlds(comm):
        if part.size % 2 and part.size > 1:
            whole = data(SHAPE)
            with refused(part, "overlap"):
                alone = TensorPartition(0, 1, 0, 7)
                spimpi.verify_allgather(part, whole, whole.copy(), alone, TAG)


def test_what_is_no_communicator_is_refused(comm):
    with pytest.raises(spimpi.UsageError, match="intracommunicator, found int"):
        spimpi.verify_replicas(3, data(SHAPE), TAG)
    with pytest.raises(spimpi.UsageError, match="COMM_NULL"):
        spimpi.verify_replicas(MPI.COMM_NULL, data(SHAPE), TAG)
    for none in (None, MPI.COMM_NULL):
        with pytest.raises(spimpi.UsageError, match="a context.*COMM_NULL|found NoneType"):
            spimpi.DistributedContext(none)
        with pytest.raises(spimpi.UsageError, match="a run.*COMM_NULL|found NoneType"):
            spimpi.verify_distributed_inference(none, spimpi.Request())
    with pytest.raises(spimpi.UsageError, match="is a spimpi.Request.*, found NoneType"):
        spimpi.verify_distributed_inference(comm, None)


def test_user_messages_in_flight_do_not_meet_the_checks(comm):
    whole, box = data(SHAPE), np.zeros(1)
    receive = comm.Irecv(box, (comm.rank - 1) % comm.size, MPI.ANY_TAG)
    for step in range(3):
        assert spimpi.verify_broadcast(comm, whole, Tag(name="b", step=step))
    comm.Send(np.array([5.0]), (comm.rank + 1) % comm.size, 1)
    receive.Wait()
    assert box[0] == 5.0
