"""Strong parallelism invariance: the split changes no bit of any tensor, at any world size."""

from dataclasses import replace

import numpy as np
import pytest
from mpi_helpers import (
    GROUPED, IDS, OLMO, first_ranks, golden_of, quick_fabric, topologies, verify,
)  # fmt: skip

from spimpi.inference.tensors import golden_columns
from spimpi.trace.schema import Established, Stage

pytestmark = pytest.mark.mpi

MOVED, AGREED, COMPUTED, EXPECTED = Established


def _every_topology_gives(comm, golden, n_heads, n_layers, n_prompts, **wishes):
    """Run every topology of 1 to comm.size ranks; returns how many there were."""
    cells = golden.table.size
    count = 0
    for n in range(1, comm.size + 1):
        with first_ranks(comm, n) as part:
            for split in topologies(n, n_heads, n_layers, n_prompts) if part else ():
                outcome = verify(part, golden, **wishes, **split)
                assert outcome.verdict, (split, str(outcome.verdict))
                assert outcome.exit_status == 0
                assert outcome.totals[Stage.GOLDEN].checks == cells, split
                kinds = MOVED | COMPUTED | EXPECTED
                if "exo" not in split["topology"] and "tp=1" not in split["topology"]:
                    kinds |= AGREED
                assert outcome.verdict.established == kinds, split
                if part.rank == 0:
                    assert np.array_equal(outcome.tokens, golden.tokens), split
                count += 1
    return count


def test_every_split_of_the_embedded_model_gives_the_same_bits(comm, monkeypatch):
    quick_fabric(monkeypatch)
    golden = golden_of(comm, tokens=4)
    assert golden.table.shape == (4, 5 * 8 + 3)
    assert np.unique(golden.table).size == golden.table.size
    _every_topology_gives(comm, golden, 8, 8, 8, tokens=4)


@pytest.mark.wheels
def test_every_split_of_uneven_heads_gives_the_same_bits(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    wishes = dict(model=str(model("grouped", **GROUPED)), prompt_ids=IDS, tokens=4)
    golden = golden_of(comm, **wishes)
    _every_topology_gives(comm, golden, 6, 3, 8, **wishes)


@pytest.mark.wheels
@pytest.mark.parametrize("model_type", ["olmo2", "olmo3"])
def test_every_split_of_a_sharded_qk_norm_gives_the_same_bits(comm, model, monkeypatch, model_type):
    quick_fabric(monkeypatch)
    facts = OLMO
    if model_type == "olmo2":
        none = dict(layer_types=(), sliding_window=None, rope_scaling=None)
        facts = OLMO | none | dict(model_type="olmo2", n_kv_heads=8, n_layers=2)
    n_layers = facts["n_layers"]
    wishes = dict(model=str(model(model_type, **facts)), prompt_ids=IDS[:6], tokens=4)
    golden = golden_of(comm, **wishes)
    _every_topology_gives(comm, golden, 8, n_layers, 6, **wishes)


@pytest.mark.wheels
def test_every_split_of_tied_embeddings_gives_the_same_bits(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    facts = GROUPED | dict(tie_word_embeddings=True, dtype="bfloat16", n_layers=2)
    wishes = dict(model=str(model("tied", seed=3, **facts)), prompt_ids=IDS[:5], tokens=3)
    golden = golden_of(comm, **wishes)
    _every_topology_gives(comm, golden, 6, 2, 5, **wishes)


@pytest.mark.wheels
def test_one_wrong_bit_of_the_golden_table_is_found_where_it_is(comm, model, monkeypatch):
    """The comparison that the tests above rely on sees one bit, in any tensor of any step."""
    quick_fabric(monkeypatch)
    wishes = dict(model=str(model("grouped", **GROUPED)), prompt_ids=IDS, tokens=2)
    golden = golden_of(comm, **wishes)
    columns = golden_columns(3)
    for step, column in ((0, 0), (1, 7), (0, len(columns) - 1)):
        table = golden.table.copy()
        table[step, column] ^= np.uint64(1) << np.uint64(63)
        outcome = verify(comm, replace(golden, table=table), **wishes)
        where = outcome.verdict.where
        assert outcome.exit_status == 1
        assert outcome.n_failed == 1
        assert (where.step, (where.tensor, where.layer)) == (step, columns[column])
        assert where.check == "content"
        assert where.expected == f"{int(table[step, column]):016x}"
        assert where.found == f"{int(golden.table[step, column]):016x}"
