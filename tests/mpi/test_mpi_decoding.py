"""However the rows of a prompt come to the model, its logits have the same bits.

The truth is one prompt alone on one rank, as a single prefill. What is compared with it: prefill
and token-by-token decoding with a cache, chunks cut anywhere (microbatches), other prompts beside.
"""

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import GROUPED, OLMO, first_ranks, topologies

from spimpi.context import DistributedContext
from spimpi.inference.checkpoint import open_checkpoint
from spimpi.inference.config import load_config
from spimpi.inference.model import Stage
from spimpi.inference.weights import Loader
from spimpi.topology.grid import choose, parse

pytestmark = pytest.mark.mpi

SEQUENCES = [
    np.array(ids, np.int64)
    for ids in ([3, 1, 4, 1, 5, 9, 2, 6], [35, 8, 9, 7, 9], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4])
]
VOCABULARY = 37


def _logits(comm, grid, directory, prefilled, rest, exact=True):
    """This rank's logits after the prefill of some tokens and after each token fed later.

    prefilled: ids a prompt; rest: ids to feed one by one, the same number a prompt. A list of
    (first prompt, first column, float32 [prompts, columns]), or none off the last stage.
    """
    config = load_config(directory)
    found = []
    with DistributedContext(comm, grid) as ctx:
        part = Loader(ctx, config, open_checkpoint(directory, config), exact).load()
        n_steps = 1 + len(rest[0])
        stage = Stage(ctx, config, part, [len(p) for p in prefilled], n_steps, exact, None)
        first = stage.facts.first_prompt
        own = slice(first, first + stage.facts.n_prompts)
        tokens = np.concatenate(prefilled[own])
        for step in range(n_steps):
            stage.step(step, tokens)
            if ctx.is_last_stage:
                columns = part.shard.vocabulary()
                found.append((first, columns.start, stage.head.logits.copy()))
            if step < n_steps - 1:
                tokens = np.array([ids[step] for ids in rest[own]])
    return found


def _truth(directory, ids):
    """Logits after the last of the ids, of this prompt alone, on this rank alone."""
    [(_, _, logits)] = _logits(MPI.COMM_SELF, choose(1, 6, 3), directory, [ids], [[]])
    return logits[0]


@pytest.fixture(scope="module", params=["llama", "olmo"])
def directory(model, request):
    """OLMo's windows are shorter than the sequences, so that decoding leaves keys behind."""
    return model("grouped", **GROUPED) if request.param == "llama" else model("olmo3", **OLMO)


@pytest.fixture(scope="module")
def truth(directory):
    """Logits after every prefix of every sequence."""
    return [[_truth(directory, s[: n + 1]) for n in range(len(s))] for s in SEQUENCES]


@pytest.mark.wheels
def test_prefill_chunks_and_decoding_give_the_same_bits(comm, directory, truth):
    for n in range(1, comm.size + 1):
        with first_ranks(comm, n) as part:
            for split in topologies(n, 6, 3, 3) if part else ():
                if "memory" in split:
                    continue
                grid = parse(split["topology"], n, 6, 3)
                for n_later in (0, 1, 4):
                    prefilled = [s[: len(s) - n_later] for s in SEQUENCES]
                    rest = [s[len(s) - n_later :] for s in SEQUENCES]
                    steps = _logits(part, grid, directory, prefilled, rest)
                    for step, (first, column, logits) in enumerate(steps):
                        for i, row in enumerate(logits):
                            ids = SEQUENCES[first + i]
                            whole = truth[first + i][len(ids) - n_later + step - 1]
                            own = whole[column : column + row.size]
                            assert row.tobytes() == own.tobytes(), (split, n_later, step, i)


def test_the_truth_sees_every_token_of_the_prompt(directory, truth):
    """The comparison above would be empty if the logits did not depend on all that came before."""
    for position in range(4):
        changed = SEQUENCES[0][:4].copy()
        changed[position] = (changed[position] + 1) % VOCABULARY
        assert (_truth(directory, changed) != truth[0][3]).any()


@pytest.mark.mpi(min_size=2)
def test_float32_sums_would_not_pass_this_test(comm, directory, truth):
    """Plain float32 over two tensor ranks gives other bits than the truth, nearly its values."""
    with first_ranks(comm, 2) as part:
        if part:
            grid = parse("tp=2", 2, 6, 3)
            whole = _logits(part, grid, directory, SEQUENCES, [[]] * 3, exact=False)
            [(_, column, logits)] = whole
            exact = np.stack([t[-1][column : column + logits.shape[1]] for t in truth])
            assert (logits != exact).any()
            assert np.abs(logits - exact).max() < 1e-2 * np.abs(exact).max()
