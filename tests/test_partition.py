"""Partitions and sharded tensors: which global elements a shard holds."""

import numpy as np
import pytest

import spimpi
from spimpi.errors import UsageError


@pytest.mark.parametrize(("size", "n"), [(8, 3), (7, 7), (2, 5), (0, 2)])
def test_balanced_blocks_cover_the_axis_the_longer_ones_first(size, n):
    parts = [spimpi.TensorPartition(0, n, i, size) for i in range(n)]
    assert [e for p in parts for e in range(p.start, p.stop)] == [*range(size)]
    sizes = [p.size for p in parts]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


def test_a_sharded_tensor_knows_its_global_indices_and_its_share():
    whole = np.arange(15, dtype=np.float32).reshape(3, 5)
    tag = spimpi.Tag(name="hidden", layer=2)
    total = 0
    for rank in range(3):
        part = spimpi.TensorPartition(1, 3, rank, 5, sizes=(2, 0, 3))
        shard = spimpi.ShardedTensor(whole[:, part.start : part.stop], part, tag)
        total ^= shard.fingerprint()
        for index in np.ndindex(shard.array.shape):
            assert whole.reshape(-1)[shard.global_index(*index)] == shard.array[index]
    assert total == spimpi.fingerprint(whole, tag)
    whole[1, 4] += 1
    assert total != spimpi.fingerprint(whole, tag)


@pytest.mark.parametrize(
    "wrong", [dict(shard_id=3), dict(sizes=(1, 1, 1)), dict(sizes=(6, -1, 0)), dict(dim=-1)]
)
def test_partitions_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError):
        spimpi.TensorPartition(**(dict(dim=0, n_shards=3, shard_id=0, global_size=5) | wrong))
