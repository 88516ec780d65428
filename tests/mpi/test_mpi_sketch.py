"""Sketches of sharded tensors."""

import ml_dtypes
import numpy as np
import pytest
from mpi_helpers import first_ranks

from spimpi import Tag, TensorPartition, UsageError, compare_sketches, reduce_sketch, sketch

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]

TAG = Tag(name="logits", step=4)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "complex64"])
def test_shards_reduce_to_the_sketch_of_the_whole(comm, dim, name):
    x = np.random.default_rng(3).standard_normal((17, 29))
    x = (x + (1j * x[::-1] if name == "complex64" else 0)).astype(getattr(ml_dtypes, name, name))
    whole = sketch(x, TAG)
    for n in range(1, comm.size + 1):
        with first_ranks(comm, n) as part:
            if not part:
                continue
            cut = TensorPartition(dim, n, part.rank, x.shape[dim])
            place = slice(cut.start, cut.stop)
            found = reduce_sketch(part, sketch(x[place] if dim == 0 else x[:, place], TAG, cut))
            assert len(set(part.allgather(found))) == 1
            assert found.fingerprint == whole.fingerprint
            assert (found.absmax, found.n_elements) == (whole.absmax, whole.n_elements)
            np.testing.assert_allclose(found.projections, whole.projections, rtol=0, atol=1e-13)
            assert str(compare_sketches(found, whole)) == "same bits"


def test_a_shard_that_differs_shows_with_its_size(comm):
    x = np.random.default_rng(3).standard_normal((40, 50))
    cut = TensorPartition(0, comm.size, comm.rank, 40)
    shard = x[cut.start : cut.stop]
    right = reduce_sketch(comm, sketch(shard, TAG, cut))
    wrong = reduce_sketch(comm, sketch(shard * (1.5 if comm.rank == 0 else 1.0), TAG, cut))
    true = 0.5 * np.linalg.norm(x[: TensorPartition(0, comm.size, 0, 40).size]) / np.linalg.norm(x)
    found = compare_sketches(right, wrong)
    assert true / 2.5 < found.relative < true * 2.5
    not_finite = shard.copy()
    if comm.rank == comm.size - 1:
        not_finite[0, 0] = np.nan
    other = reduce_sketch(comm, sketch(not_finite, TAG, cut))
    assert other.nonfinite == 1
    assert compare_sketches(right, other).verdict == "different"


def test_sketches_of_different_tensors_do_not_add_up(comm):
    if comm.size < 2:
        pytest.skip("needs two ranks")
    tag = Tag(name="other") if comm.rank == 1 else TAG
    with pytest.raises(UsageError, match="rank 1"):
        reduce_sketch(comm, sketch(np.ones(4), tag))
