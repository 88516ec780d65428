"""Smaller worlds inside the one that a test runs in, and jobs whose expected result is known."""

import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from spimpi.checks.fabric import SIZES, check_fabric
from spimpi.inference.config import FULL, SLIDING, YarnScaling
from spimpi.verification import run
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import make_golden, verify_distributed_inference

# Six query heads that share two key/value heads: tensor ranks that number 3, 4, 5 or 6 cut them
# unevenly, and share key/value heads.
GROUPED = dict(
    vocab_size=37, hidden_size=24, intermediate_size=22, n_layers=3, n_heads=6, n_kv_heads=2,
    head_dim=4,
)  # fmt: skip
# OLMo 3: a norm of queries and keys that tensor ranks cut unevenly (3 ranks: 3, 3 and 2 of 8 heads;
# two key/value heads, so that some ranks own none), windows shorter than the prompts.
OLMO = dict(
    vocab_size=37, hidden_size=24, intermediate_size=22, n_layers=3, n_heads=8, n_kv_heads=2,
    head_dim=4, model_type="olmo3", layer_types=(SLIDING, FULL, SLIDING), sliding_window=3,
    rope_scaling=YarnScaling(4.0, 8.0, 1.0, 1.25, 8),
)  # fmt: skip
IDS = ("3,1,4,1,5,9,2", "6,5", "35,8,9,7,9,3,2,3,8,4,6", "2,6,4,3", "3,8,32", "7,9,5,0", "2", "8,8")


both_families = pytest.mark.parametrize("facts", [GROUPED, OLMO], ids=["llama", "olmo"])


def named(model, facts):
    """The directory of the random model of these facts."""
    return str(model("grouped" if facts is GROUPED else "olmo3", **facts))


@contextmanager
def first_ranks(comm, n):
    """A communicator of the first ``n`` ranks; None on the others, which sleep until it is done.

    A failure of the first ranks is a failure of all, so that none goes on to the next test.
    """
    inside = comm.rank < n
    part = comm.Split(0 if inside else 1, comm.rank)
    failed = 1
    try:
        yield part if inside else None
        failed = 0
    finally:
        if _anywhere(comm, failed) and not failed:
            pytest.fail("failed on another rank")
    part.Free()


def on_rank_0(comm, work):
    """What ``work()`` gives on rank 0, on every rank."""
    made = work() if comm.rank == 0 else None
    _anywhere(comm, 0)
    return comm.bcast(made)


def _anywhere(comm, flag):
    """The flags of all ranks added up, waited for asleep: a rank that waits in a blocking call
    spins, and takes the core from one that works."""
    own, total = np.array([flag]), np.zeros(1, int)
    request = comm.Iallreduce(own, total)
    while not request.Test():
        time.sleep(0.002)
    return int(total[0])


def golden_of(comm, **wishes):
    """The golden run of a request, made by one rank, on every rank."""
    return on_rank_0(comm, lambda: make_golden(prepare(Request(**wishes), 1)))


def verify(comm, golden=None, **wishes):
    """The outcome of a request on ``comm``, its tensors compared with a golden run."""
    job = prepare(Request(**wishes), comm.size)
    if golden is not None:
        job = replace(job, golden=golden)
    return verify_distributed_inference(comm, job)


def quick_fabric(monkeypatch):
    """Preflight with as many payloads as ever, but small ones: it has tests of its own."""
    sizes = range(1, 1 + len(SIZES))
    monkeypatch.setattr(run, "check_fabric", partial(check_fabric, sizes=tuple(sizes)))


def topologies(n, n_heads, n_layers, n_prompts):
    """Wishes for every topology of ``n`` ranks that fits: grids, and rings with two memories."""
    for tp in range(1, n + 1):
        for pp in range(1, n // tp + 1):
            dp = n // (tp * pp)
            if tp * pp * dp == n and tp <= n_heads and pp <= n_layers and dp <= n_prompts:
                yield {"topology": f"tp={tp},pp={pp},dp={dp}"}
    if 1 < n <= n_layers:
        yield {"topology": "exo"}
        yield {"topology": "exo", "memory": ",".join(str(3 * i + 2) for i in range(n))}
