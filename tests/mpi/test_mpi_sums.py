"""Checks of allreduce and reduce-scatter on real MPI sums, clean and with planted faults."""

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from planted import worlds
from sums_data import FLOATS, INTEGERS, TAG, added, own_of

import spimpi
from spimpi import CorruptionError, Tag, TensorPartition, UsageError
from spimpi.checks.session import session_of
from spimpi.checks.sums.verify import verify_allreduce, verify_reduce_scatter
from spimpi.partition import balanced_sizes
from spimpi.trace.schema import Established

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]


@pytest.mark.parametrize("name", FLOATS + INTEGERS)
def test_clean_sums_hold_and_say_how_strongly(comm, name):
    for part in worlds(comm):
        for seed, shape in enumerate([(13, 21), (700,), (2, 3, 5), (), (4, 0), (1, 9)]):
            xs = own_of(part, name, shape, seed)
            verdict = verify_allreduce(part, xs[part.rank], added(xs), TAG)
            assert verdict and verdict.check == "allreduce"
            covers = part.size > 1 and xs[0].size > 0
            kinds = Established.AGREED | Established.COMPUTED
            assert verdict.established == (kinds if covers else 0)
            assert bool(verdict.missing) != covers
            exact = part.size == 1 or name in INTEGERS
            assert verdict.strength.startswith("exact" if exact else "bound")
            assert ("agreement" in verdict.strength) == covers


@pytest.mark.parametrize("name", ["float64", "float32", "complex128", "int64", "int32"])
def test_what_mpi_sums_holds(comm, name):
    for part in worlds(comm):
        for n in (1, 1000, 200000):
            xs = own_of(part, name, (n,), n)
            if name.startswith("int"):
                xs = [x // 1000 for x in xs]
            total = np.empty_like(xs[0])
            part.Allreduce(xs[part.rank], total, op=MPI.SUM)
            assert verify_allreduce(part, xs[part.rank], total, TAG)
            counts = balanced_sizes(n, part.size)
            shard = np.empty(counts[part.rank], total.dtype)
            part.Reduce_scatter(xs[part.rank], shard, list(counts), op=MPI.SUM)
            cut = TensorPartition(0, part.size, part.rank, n)
            assert verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG)


@pytest.mark.parametrize("name", FLOATS + INTEGERS)
def test_one_wrong_element_on_all_ranks_is_found_and_shown(comm, name):
    for part in worlds(comm, 2):
        xs = own_of(part, name)
        right = added(xs)
        wrong = right.copy()
        wrong[5, 7] += np.asarray(60).astype(wrong.dtype)
        with pytest.raises(CorruptionError) as caught:
            verify_allreduce(part, xs[part.rank], wrong, TAG)
        verdict = caught.value.verdict
        assert not verdict and not verdict.established and verdict.where.rank is None
        (element,) = verdict.where.elements
        assert element.index[:2] == (5, 7)
        item = wrong.real if wrong.dtype.kind == "c" else wrong
        assert element.found == item[5, 7].tobytes()
        assert len(set(part.allgather(str(verdict)))) == 1
        assert verify_allreduce(part, xs[part.rank], right, TAG)


@pytest.mark.parametrize("name", ["float64", "bfloat16", "int32"])
def test_a_wrong_replica_is_named(comm, name):
    for part in worlds(comm, 2):
        for culprit in range(part.size):
            xs = own_of(part, name)
            result = added(xs)
            if part.rank == culprit:
                result[3, 4] += np.asarray(60).astype(result.dtype)
            verdict = verify_allreduce(part, xs[part.rank], result, TAG, check=False)
            assert not verdict and verdict.where.rank == culprit
            assert [e.index for e in verdict.where.elements] == [(3, 4)]


def test_replicas_that_differ_within_the_bound_do_not_agree(comm):
    for part in worlds(comm, 2):
        xs = own_of(part, "float64")
        result = added(xs)
        if part.rank == part.size - 1:
            result[3, 4] = np.nextafter(result[3, 4], np.inf)
        verdict = verify_allreduce(part, xs[part.rank], result, TAG, check=False)
        assert not verdict and verdict.strength == "agreement"
        assert verdict.where.rank == (part.size - 1 if part.size > 2 else None)


@pytest.mark.parametrize("name", ["float64", "float32", "complex64", "int64", "int32"])
@pytest.mark.parametrize("doubled", [False, True])
def test_a_missing_or_doubled_contribution_names_its_rank(comm, name, doubled):
    for part in worlds(comm, 2):
        for culprit in range(part.size):
            xs = own_of(part, name, seed=culprit)
            if name.startswith("int"):
                xs = [x // 1000 for x in xs]
            others = xs[:culprit] + xs[culprit + 1 :]
            wrong = added([*xs, xs[culprit]] if doubled else others).copy()
            verdict = verify_allreduce(part, xs[part.rank], wrong, TAG, check=False)
            assert not verdict and verdict.where.rank == culprit
            said = "counted twice" if doubled else "missing"
            assert f"contribution of rank {culprit} is {said}" in str(verdict)


@pytest.mark.parametrize("name", ["float64", "float16", "complex128", "int64", "int8"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_wrong_shard_is_named_with_its_element(comm, name, dim):
    for part in worlds(comm, 2):
        xs = own_of(part, name, (13, 21))
        total = added(xs)
        cut = TensorPartition(dim, part.size, part.rank, total.shape[dim])
        place = slice(cut.start, cut.stop)
        shard = (total[place] if dim == 0 else total[:, place]).copy()
        verdict = verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG)
        assert verdict.established == Established.COMPUTED
        assert "agreement" not in verdict.strength
        culprit = part.size - 1
        if part.rank == culprit:
            shard[1, 2] += np.asarray(60).astype(shard.dtype)
        verdict = verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG, check=False)
        assert not verdict and verdict.where.rank == culprit
        (element,) = verdict.where.elements
        start = TensorPartition(dim, part.size, culprit, total.shape[dim]).start
        assert element.index[:2] == ((start + 1, 2) if dim == 0 else (1, start + 2))


def test_weighted_and_empty_shards(comm):
    for part in worlds(comm, 2):
        sizes = (0,) * (part.size - 1) + (9,)
        xs = own_of(part, "float64", (9, 4))
        cut = TensorPartition(0, part.size, part.rank, 9, sizes)
        shard = added(xs)[cut.start : cut.stop]
        assert verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG)
        if part.rank == part.size - 1:
            shard = shard + 1
        assert not verify_reduce_scatter(part, xs[part.rank], shard, cut, TAG, check=False)


# Bad input


def _refused(comm, words, contribution, result, **more):
    with pytest.raises(UsageError, match=words) as caught:
        verify_allreduce(comm, contribution, result, more.pop("tag", TAG), **more)
    assert len(set(comm.allgather(str(caught.value)))) == 1


def _twice(x):
    """Two arrays, for what is given and what is got."""
    return x, x.copy()


def test_bad_input_is_refused_on_every_rank(comm):
    x = np.ones((4, 6))
    last = comm.rank == comm.size - 1
    _refused(comm, "BAND", x, x, op=MPI.BAND)
    _refused(comm, "no check of MPI.PROD is known", x, x, op=MPI.PROD)
    _refused(comm, "no check of 'sum' is known: expected one of MPI.SUM", x, x, op="sum")
    _refused(comm, "no check is known for allreduce of bool", x > 0, x > 0)
    _refused(comm, "complex128 by MPI.MAX", x + 1j, x + 1j, op=MPI.MAX)
    _refused(comm, "float8", *2 * (x.astype(ml_dtypes.float8_e5m2),))
    _refused(comm, "one shape", x, x[:2])
    _refused(comm, "one dtype", x, x.astype("f4"))
    _refused(comm, "spimpi.Tag", x, x, tag="hidden")
    _refused(comm, "expected a numpy array", [1.0], x)
    if comm.size > 1:
        _refused(comm, f"rank {comm.size - 1}: contribution and result", x, x[:2] if last else x)
        _refused(comm, "ranks differ in shape", *_twice(x[:2] if last else x))
        _refused(comm, "ranks differ in dtype", *_twice(x.astype("f4") if last else x))
        _refused(comm, "ranks differ in tag", *_twice(x), tag=Tag(name="b") if last else TAG)
        words = "ranks differ in settings: rank.* gave op MPI.SUM; rank.* gave op MPI.MAX"
        _refused(comm, words, *_twice(x), op=MPI.MAX if last else MPI.SUM)
        cut = TensorPartition(0, comm.size, 0, 4)
        with pytest.raises(UsageError, match="one shard a rank"):
            verify_reduce_scatter(comm, x, x[: cut.size], cut, TAG)
    with pytest.raises(UsageError, match="reduce_scatter of float64 by MPI.MAX"):
        cut = TensorPartition(0, comm.size, comm.rank, 4)
        verify_reduce_scatter(comm, x, x[cut.start : cut.stop], cut, TAG, op=MPI.MAX)


def test_layouts_and_threads_change_no_verdict(comm):
    for part in worlds(comm, 2):
        xs = own_of(part, "float64", (60, 70))
        total = added(xs)
        layouts = [np.asfortranarray, np.ascontiguousarray, lambda a: a[::-1].copy()[::-1]]
        own = layouts[part.rank % 3](xs[part.rank])
        result = layouts[(part.rank + 1) % 3](total)
        own.flags.writeable = result.flags.writeable = False
        assert verify_allreduce(part, own, result, TAG, threads=1 + part.rank % 2)


def test_no_clean_sum_alarms_over_many_seeds(comm):
    for seed in range(150):
        name = ["float64", "float32", "float16", "bfloat16"][seed % 4]
        xs = own_of(comm, name, (1 + seed % 5, 40), seed)
        order = np.random.default_rng(seed).permutation(comm.size)
        assert verify_allreduce(comm, xs[comm.rank], added([xs[i] for i in order]), TAG)


def test_two_collectives_of_fixed_size_are_made_where_all_is_well(comm, monkeypatch):
    calls = []

    class Counting:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            if name[0].isupper() or name in ("allgather", "bcast", "allreduce"):
                calls.append(name)
            return getattr(self.inner, name)

    session = session_of(comm)
    monkeypatch.setattr(session, "comm", Counting(session.comm))
    xs = own_of(comm, "float64", (300, 300))
    assert verify_allreduce(comm, xs[comm.rank], added(xs), TAG)
    assert calls == ["Iallreduce", "Allgather"]


def test_ranks_that_make_different_checks_all_learn_it(comm):
    if comm.size < 2:
        pytest.skip("needs two ranks")
    x = np.arange(8.0)
    with pytest.raises(UsageError, match="allreduce"):
        if comm.rank == 0:
            verify_allreduce(comm, x, x * comm.size, TAG)
        elif comm.rank == 1:
            spimpi.verify_colors(comm, x, TAG)
        else:
            spimpi.verify_replicas(comm, x, TAG)


def test_the_names_are_spimpis():
    for name in ("verify_allreduce", "verify_reduce_scatter", "exact_allreduce", "sketch"):
        assert callable(getattr(spimpi, name))
