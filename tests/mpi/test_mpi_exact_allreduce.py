"""``exact_allreduce``: one result for any split, as near as stated, checked with zero tolerance."""

from math import fsum

import numpy as np
import pytest
from mpi4py import MPI
from numpy.lib.stride_tricks import as_strided
from planted import refused, worlds
from sums_data import FLOATS, TAG, dtype_of

from spimpi import CorruptionError, UsageError, checked
from spimpi.exact_sum import exact_allreduce, rounded_back

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]


def _ragged(name, n_addends, shape=(11, 17), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_addends, *shape)) * 2.0 ** rng.integers(-9, 9, (n_addends, *shape))
    if dtype_of(name).kind == "c":
        x = x * (1 - 0.3j)
    return list(x.astype(dtype_of(name)))


@pytest.mark.parametrize("name", FLOATS)
def test_an_exact_sum_depends_on_the_addends_alone(comm, name):
    for part in worlds(comm):
        for seed in range(4):
            n_addends = part.size + 3 * seed
            xs = _ragged(name, n_addends, seed=seed)
            expected = exact_allreduce(MPI.COMM_SELF, xs)
            rng = np.random.default_rng(seed)
            owner = np.concatenate(
                [np.arange(part.size), rng.integers(0, part.size, n_addends - part.size)]
            )
            owner = rng.permutation(owner)
            mine = [x for x, rank in zip(xs, owner) if rank == part.rank]
            found = exact_allreduce(part, mine[::-1], tag=TAG)
            assert found.dtype == xs[0].dtype and found.shape == xs[0].shape
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_an_exact_sum_is_as_near_as_stated(comm, name):
    unit = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    for seed in range(5):
        xs = _ragged(name, 7 * comm.size, seed=seed)
        found = exact_allreduce(comm, xs[comm.rank :: comm.size]).astype(float)
        wide = [x.astype(float) for x in xs]
        largest = np.max(np.abs(wide), axis=(0, 2))
        for row in range(11):
            for column in range(17):
                exact = fsum(x[row, column] for x in wide)
                bound = len(xs) * 2.0**-52 * largest[row] + 1.001 * unit[name] * abs(exact)
                assert abs(found[row, column] - exact) <= bound + 2.0**-24 * (name == "float16")


def test_an_exact_sum_is_rounded_once():
    """Against rational numbers: halves between two numbers of the dtype, and just beside them."""
    for name in ("float64", "float32", "float16", "bfloat16"):
        dtype = dtype_of(name)
        digits = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}[name]
        top = 61
        values = []
        for low in (0, 1, -1, 3, 1 << 9):
            for lead in (1 << digits, (1 << digits) + 1, (1 << digits) + 2, (1 << digits) + 3):
                for tail in (0, 1 << (top - digits - 2), 1 << (top - digits - 1)):
                    values.append((lead << (top - digits - 1)) + tail + low)
        q = np.array([*values, *(-v for v in values), 0], np.int64).reshape(1, -1)
        found = rounded_back(q, np.array([0]), 52, dtype)
        for value, one in zip(q[0].tolist(), found[0]):
            spacing = 1 << max(0, abs(value).bit_length() - digits)
            quotient, rest = divmod(abs(value), spacing)
            up = rest * 2 > spacing or (rest * 2 == spacing and quotient % 2 == 1)
            nearest = (quotient + up) * spacing * (1 if value >= 0 else -1)
            assert float(one) == nearest * 2.0**-52
        assert not np.signbit(found[0, -1].astype(float))


def test_exact_sums_in_place_and_of_odd_shapes(comm):
    for shape in [(), (5,), (3, 0), (2, 3, 4)]:
        x = np.full(shape, 0.1 * (comm.rank + 1))
        expected = exact_allreduce(comm, x)
        assert exact_allreduce(comm, x, x) is x
        assert x.tobytes() == expected.tobytes()
    tiny = np.array([[5e-324, -5e-324], [2.0**-1022, 0.0]])
    assert exact_allreduce(comm, tiny).tolist() == (tiny * comm.size).tolist()
    huge = np.array([1e308, 1.0])
    assert exact_allreduce(comm, huge)[0] == (1e308 if comm.size == 1 else np.inf)


def test_exact_sums_refuse_what_has_no_exact_sum(comm):
    x = np.ones((3, 4))
    for value in (np.nan, np.inf):
        bad = x.copy()
        if comm.rank == comm.size - 1:
            bad[1, 2] = value
        with pytest.raises(UsageError, match=f"row 1, given by rank {comm.size - 1}"):
            exact_allreduce(comm, bad)
    with pytest.raises(UsageError, match="an exact sum is of float64"):
        exact_allreduce(comm, np.arange(3))
    with pytest.raises(UsageError, match="one shape"):
        exact_allreduce(comm, [x, x[:1]])
    with pytest.raises(UsageError, match="at least one addend"):
        exact_allreduce(comm, [])
    if comm.size > 1:
        with pytest.raises(UsageError, match="do not add the same"):
            exact_allreduce(comm, x[: 2 + (comm.rank == 1)])


@pytest.mark.parametrize("everywhere", [True, False])
def test_arguments_of_another_kind_are_refused_on_every_rank(comm, everywhere):
    x, bad = np.arange(4.0), everywhere or comm.rank == comm.size - 1
    with refused(comm, "expected a spimpi.Tag, found str"):
        exact_allreduce(comm, x, tag="x" if bad else TAG)
    with refused(comm, "ctx= is a DistributedContext, or None, found int"):
        exact_allreduce(comm, x, tag=TAG, ctx=3 if bad else None)
    own = as_strided(np.zeros(1), (4,), (0,)) if bad else np.zeros(4)
    with refused(comm, "elements of an array of shape .* share memory"):
        exact_allreduce(comm, x, own, TAG)
    assert not own.any()
    with refused(comm, "a Producer of no arrays"):
        exact_allreduce(comm, Producer() if bad else x)
    assert (exact_allreduce(comm, x, np.zeros((4, 2))[:, 0], TAG) == comm.size * x).all()


class Producer:
    @property
    def __array_interface__(self):
        raise ZeroDivisionError("a Producer of no arrays")


def test_what_is_no_communicator_of_this_rank_is_refused(comm):
    for bad, found in (
        (MPI.COMM_NULL, "MPI.COMM_NULL"), ("x", "str"), (checked(comm), "CheckedComm"),
    ):  # fmt: skip
        with refused(comm, f"communicator.*found {found}"):
            exact_allreduce(bad, np.arange(4.0))
    if comm.size > 1:
        half = comm.Split(comm.rank == 0, comm.rank)
        between = half.Create_intercomm(0, comm, 1 if comm.rank == 0 else 0, 7)
        with refused(comm, "intracommunicator, found Intercomm"):
            exact_allreduce(between, np.arange(4.0))
        between.Free()
        half.Free()


@pytest.mark.parametrize("fault", ["flip", "missing", "replica", "maximum"])
def test_a_faulty_mpi_cannot_spoil_an_exact_sum(comm, fault, monkeypatch):
    if comm.size < 2:
        pytest.skip("needs two ranks")

    class Faulty:
        rank, size = comm.rank, comm.size

        def __getattr__(self, name):
            return getattr(comm, name)

        def Allreduce(self, send, receive, op):
            comm.Allreduce(send, receive, op=op)
            if op == MPI.MAX and fault == "maximum":
                receive += 1 << 32
            if op == MPI.SUM and send is not MPI.IN_PLACE:
                if fault == "flip":
                    receive.reshape(-1)[3] ^= 1 << 40
                if fault == "missing":
                    receive -= comm.bcast(send, 1)
                if fault == "replica" and comm.rank == 1:
                    receive.reshape(-1)[0] += 1

    class Session:
        def judge_requests(self):
            pass

    session = Session()
    session.comm = Faulty()
    monkeypatch.setattr("spimpi.exact_sum.session_of", lambda comm, ctx: session)
    x = np.random.default_rng(comm.rank).standard_normal((4, 9))
    words = {"flip": "not the sum", "missing": "rank 1 is missing", "replica": "not the sum",
             "maximum": "maxima of the rows"}  # fmt: skip
    with pytest.raises(CorruptionError, match=words[fault]) as caught:
        exact_allreduce(comm, x, tag=TAG)
    if fault == "replica":
        assert caught.value.verdict.where.rank == 1
