"""Calls in which data would be compared with themselves, or nothing with nothing.

The first are refused on all ranks; the second hold, establish no word, and say why.
"""

import numpy as np
import pytest
from mpi4py import MPI
from planted import refused, same_on_all, worlds

import spimpi
from spimpi import HandoffChain, Manifest, Slab, Tag, TensorPartition
from spimpi.trace.schema import Established

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]
two = pytest.mark.mpi(min_size=2)

TAG = Tag(name="hidden", layer=1, step=2)


def _part(comm, size, rank=None, sizes=None):
    return TensorPartition(0, comm.size, comm.rank if rank is None else rank, size, sizes)


def _nothing(verdict, why):
    assert verdict and verdict.established == 0 and not verdict.kinds
    assert len(verdict.missing) == 1 and why in verdict.missing[0]
    assert str(verdict) == f"incomplete: {verdict.missing[0]}"


@two
def test_a_result_in_the_memory_of_its_contribution_is_refused_on_all_ranks(comm):
    n, last = comm.size, comm.rank == comm.size - 1
    part = _part(comm, 4 * n)
    whole = np.arange(4.0 * n)
    own = whole[part.start : part.stop]

    def apart(x):
        return x if last else x.copy()  # one rank's call is enough

    with refused(comm, f"rank {n - 1}: `local` and `gathered` share memory"):
        spimpi.verify_allgather(comm, apart(own), whole, part, TAG, check=False)
    rows = np.arange(2.0 * n) + comm.rank
    both = _part(comm, 2 * n * n)
    with refused(comm, f"rank {n - 1}: `sent` and `received` share memory"):
        spimpi.verify_alltoall(comm, apart(rows), rows, both, both, TAG)
    with refused(comm, "`sent` and `received` share memory"):
        spimpi.verify_ring(comm, apart(rows), rows, TAG)
    for op in (MPI.SUM, MPI.MAX, MPI.MIN):
        with refused(comm, "`contribution` and `result` share memory"):
            spimpi.verify_allreduce(comm, apart(rows), rows, TAG, op=op)
    words = np.arange(4 * n)
    for op in (MPI.SUM, MPI.BXOR):
        with refused(comm, "`contribution` and `result` share memory"):
            result = apart(words[part.start : part.stop])
            spimpi.verify_reduce_scatter(comm, words, result, part, TAG, op=op)
    # The communicator still works, and strides that interlock without a common byte are apart.
    pairs = np.zeros((4, 2))
    assert spimpi.verify_allreduce(comm, pairs[:, 0], pairs[:, 1], TAG)
    assert not spimpi.verify_allreduce(comm, pairs[:, 0] + 1, pairs[:, 1], TAG, check=False)


@two
@pytest.mark.parametrize("kind", ["strided", "reversed", "buffer", "torch"])
def test_memory_is_recognised_in_any_arrays(comm, kind):
    memory = np.arange(2.0 * comm.size, dtype=np.float32)
    gathered = memory
    if kind == "strided":
        gathered = np.zeros((2 * comm.size, 3), np.float32)[:, 1]
    own = gathered[2 * comm.rank :][:2]
    if kind == "reversed":
        gathered = gathered[::-1]
    if kind == "buffer":
        gathered = memoryview(gathered)
    if kind == "torch":
        gathered = pytest.importorskip("torch", reason="needs PyTorch").from_numpy(gathered)
    with refused(comm, "`local` and `gathered` share memory"):
        spimpi.verify_allgather(comm, own, gathered, _part(comm, 2 * comm.size), TAG)


@two
def test_the_roots_own_block_may_lie_in_place(comm):
    """It is no movement; what the others gave and got is."""
    part = _part(comm, 2 * comm.size)
    whole = np.arange(2.0 * comm.size)
    own = whole[part.start : part.stop]
    local = own if comm.rank == 0 else own.copy()
    at_root = whole if comm.rank == 0 else None
    assert spimpi.verify_gather(comm, local, at_root, part, TAG).kinds == ["moved"]
    assert spimpi.verify_scatter(comm, at_root, local, part, TAG).kinds == ["moved"]
    # Where nobody else has any, nothing moved.
    sizes = (2 * comm.size, *[0] * (comm.size - 1))
    part = _part(comm, 2 * comm.size, sizes=sizes)
    local = whole if comm.rank == 0 else whole[:0]
    for slab in (part, Slab(whole.shape, (0,))):
        _nothing(spimpi.verify_gather(comm, local, at_root, slab, TAG), "nothing was compared")
        _nothing(spimpi.verify_scatter(comm, at_root, local, slab, TAG), "nothing was compared")
    assert spimpi.verify_gather(comm, local.copy(), at_root, part, TAG).kinds == ["moved"]


def _empty_checks(comm, ctx=None):
    """A verdict of each check of tensors without elements."""
    x, wide = np.empty(0), np.empty((3, 0))
    part = _part(comm, 0)
    root = comm.rank == 0
    for array in (x, wide):
        p = part if array is x else TensorPartition(1, comm.size, comm.rank, 0)
        yield spimpi.verify_allgather(comm, array, array, p, _tag(0), ctx=ctx)
        yield spimpi.verify_broadcast(comm, array, _tag(1), ctx=ctx)
        yield spimpi.verify_gather(comm, array, array if root else None, p, _tag(2), ctx=ctx)
        yield spimpi.verify_scatter(comm, array if root else None, array, p, _tag(3), ctx=ctx)
        yield spimpi.verify_alltoall(comm, array, array, p, p, _tag(4), ctx=ctx)
        yield spimpi.verify_replicas(comm, array, _tag(5), ctx=ctx)
        yield spimpi.verify_allreduce(comm, array, array, _tag(6), ctx=ctx)
        yield spimpi.verify_reduce_scatter(comm, array, array, p, _tag(7), ctx=ctx)
        yield spimpi.at_rest(array, _tag(8)).verify(comm, ctx=ctx)
        if ctx is not None:
            return  # one tag stands for one tensor
    for op in (MPI.MAX, MPI.SUM, MPI.BXOR):
        yield spimpi.verify_allreduce(comm, np.empty(0, int), np.empty(0, int), TAG, op=op)
    yield spimpi.verify_ring(comm, x, x, TAG)
    yield spimpi.at_rest(x, TAG).verify()
    yield spimpi.verify_matmul(comm, np.empty((0, 3)), np.ones((3, 2)), np.empty((0, 2)), TAG)
    yield spimpi.verify_matmul(comm, np.ones((2, 3)), np.ones((3, 0)), np.empty((2, 0)), TAG)
    yield spimpi.verify_colors(comm, np.empty((0, 8)), TAG, part)
    yield spimpi.verify_colors(comm, np.empty((2, 0)), TAG, _part(comm, 2 * comm.size))
    yield spimpi.verify_weights(comm, {}, Manifest({}))


def _tag(i):
    return Tag(name=f"t{i}")


def test_without_elements_nothing_is_established(comm):
    for part in worlds(comm):
        for verdict in _empty_checks(part):
            _nothing(verdict, "there are no elements")
            same_on_all(part, str(verdict))
        with spimpi.DistributedContext(part) as ctx:
            with ctx.batch():
                verdicts = list(_empty_checks(part, ctx))
                full = spimpi.verify_ring(part, np.ones(2), np.ones(2), _tag(9), ctx=ctx)
            for verdict in verdicts:
                _nothing(verdict, "there are no elements")
            assert full.kinds == ["moved"]


def test_blocks_of_some_ranks_may_be_empty(comm):
    """In a batch the ranks then tell each other which checks compared anything."""
    rank, size = comm.rank, comm.size
    before = (rank - 1) % size
    with spimpi.DistributedContext(comm) as ctx:
        with ctx.batch():
            some = spimpi.verify_ring(
                comm, np.ones(2 * (rank == 0)), np.ones(2 * (before == 0)), _tag(0), ctx=ctx
            )
            none = spimpi.verify_ring(comm, np.ones(0), np.ones(0), _tag(1), ctx=ctx)
            all_ = spimpi.verify_broadcast(comm, np.ones(3), _tag(2), ctx=ctx)
        assert some.kinds == ["moved"] and not none.kinds
        assert all_.kinds == (["moved", "agreed"] if size > 1 else [])


def test_one_rank_agrees_with_nobody_and_sums_nothing(comm):
    alone = MPI.COMM_SELF.Dup()
    x, p = np.arange(4.0), TensorPartition(0, 1, 0, 4)
    for verdict in (
        spimpi.verify_replicas(alone, x, TAG),
        spimpi.verify_broadcast(alone, x, TAG),
    ):
        _nothing(verdict, "on one rank there is nobody to agree with: nothing was compared")
    for verdict in (
        spimpi.verify_allgather(alone, x, x, p, TAG),
        spimpi.verify_gather(alone, x, x, p, TAG),
        spimpi.verify_scatter(alone, x, x[:], p, TAG),
        spimpi.verify_alltoall(alone, x, x, p, p, TAG),
        spimpi.verify_ring(alone, x, x, TAG),
    ):
        _nothing(verdict, "the same memory")
    for op in (MPI.SUM, MPI.MAX):
        for result in (x, x.copy()):
            _nothing(spimpi.verify_allreduce(alone, x, result, TAG, op=op), "nothing is summed")
            _nothing(spimpi.verify_reduce_scatter(alone, x, result, p, TAG), "nothing is summed")
    assert not spimpi.verify_allreduce(alone, x, x + 1, TAG, check=False)
    # A copy to other memory moved something.
    assert spimpi.verify_alltoall(alone, x, x.copy(), p, p, TAG).kinds == ["moved"]
    gathered = spimpi.verify_allgather(alone, x, x.copy(), p, TAG)
    assert gathered.kinds == ["moved"] and "nobody to agree with" in str(gathered)
    assert not spimpi.verify_allgather(alone, x, x + 1, p, TAG, check=False)
    alone.Free()


@two
def test_handoffs_of_nothing(comm):
    if comm.rank > 1:
        return
    _nothing_handed(spimpi.verify_pipeline_handoff(comm, np.empty(0), 0, 1, TAG))
    _nothing(HandoffChain(comm, 0, 1, "none").close(), "no hand-off was made")
    with HandoffChain(comm, 0, 1, "empty") as chain:
        _nothing_handed(chain.verify(np.empty((2, 0))))
        _nothing_handed(chain.close())
    chain = HandoffChain(comm, 0, 1, "some")
    chain.verify(np.ones(2))
    assert chain.close().kinds == ["moved"]


@two
def test_messages_of_nothing(comm):
    checked, peer = spimpi.checked(comm), comm.rank ^ 1
    if peer >= comm.size:
        return
    kinds = {"some": 3, "none": 0}
    for name, n in kinds.items():
        for call in ("Recv", "Irecv", "Sendrecv"):
            sent, got = np.ones(n), np.zeros(n)
            if call == "Sendrecv":
                checked.Sendrecv(sent, peer, 0, got, peer, 0)
            else:
                request = checked.Isend(sent, peer)
                (checked.Recv(got, peer, 0) if call == "Recv" else checked.Irecv(got, peer, 0).Wait())
                request.Wait()
            if n:
                assert checked.verdict.kinds == ["moved"], (name, call)
            else:
                _nothing(checked.verdict, "there are no elements")
    checked.Recv(np.zeros(1), MPI.PROC_NULL)
    _nothing(checked.verdict, "from MPI.PROC_NULL nothing arrives")


def _nothing_handed(verdict):
    assert verdict and not verdict.kinds and "there are no elements" in str(verdict)


class Copies:
    """Shows a copy of its array at each look; ``keeps``: the last one lives on."""

    def __init__(self, keeps):
        self.array, self.keeps, self.last = np.ones(4), keeps, None

    @property
    def __array_interface__(self):
        copy = self.array.copy()
        if self.keeps:
            self.last = copy
        return copy.__array_interface__


def test_what_gives_a_copy_is_not_watched(comm):
    for copy in (np.float64(3), np.ones(3)[0], Copies(True), Copies(False)):
        with pytest.raises(spimpi.UsageError, match="gives a copy of its data"):
            spimpi.at_rest(copy, TAG)
    x = np.ones(3)
    for view in (x[0:1], x[0:1].reshape(()), memoryview(x)):
        watch = spimpi.at_rest(view, TAG)
        x[0] += 1
        assert not watch.verify(check=False)


def test_localisation_of_nothing_says_so(comm):
    found = spimpi.localise(comm, [], [], TAG)
    assert "nothing was compared" in str(found)
    assert str(spimpi.localise(comm, [], [(np.empty(0), Slab((0,), (0,)))], TAG)) == str(found)


def test_sketches_of_nothing_are_not_the_same(comm):
    def compared(a, b, **more):
        return spimpi.compare_sketches(spimpi.sketch(a, TAG), spimpi.sketch(b, TAG), **more)

    empty = compared(np.empty(0), np.empty(0))
    assert not empty.verdict and "there are no elements" in str(empty)
    nan, inf = np.full(5, np.nan), np.full(5, np.inf)
    addends = [spimpi.sketch(np.ones(5), TAG)] * 2
    beyond = compared(nan, inf, addends=addends)
    assert not beyond.verdict and "NaN or Inf" in str(beyond)
    assert compared(nan, nan).verdict == "same bits"
    nearly = np.array([1.0, np.nan, 2.0])
    part = compared(nearly, nearly * (1 + 2**-52), addends=[spimpi.sketch(nearly, TAG)] * 2)
    assert "1 element is NaN or Inf: not compared" in str(part)


def test_a_traced_program_that_compared_nothing_is_incomplete(comm, shared_folder):
    path = shared_folder / "nothing.h5"
    with spimpi.DistributedContext(comm, trace=path) as ctx:
        spimpi.verify_replicas(comm, np.empty(0), TAG, ctx=ctx)
    with spimpi.trace.open(path) as trace:
        assert trace.attributes["end_state"] == "incomplete"
    path = shared_folder / "some.h5"
    with spimpi.DistributedContext(comm, trace=path) as ctx:
        spimpi.verify_replicas(comm, np.empty(0), TAG, ctx=ctx)
        spimpi.at_rest(np.ones(2), TAG).verify(ctx=ctx)
    with spimpi.trace.open(path) as trace:
        assert trace.attributes["end_state"] == "verified"
        assert [int(e) for e in trace.events(0)["established"]] == [0, Established.MOVED]
