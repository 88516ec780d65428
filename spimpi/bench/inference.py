"""What checking adds to an inference, and what exact arithmetic costs over BLAS."""

import tempfile
from dataclasses import replace
from time import perf_counter

import numpy as np
from mpi4py import MPI

from spimpi.checks.recorder import Recorder
from spimpi.context import DistributedContext
from spimpi.inference.checkpoint_seeded import SeededCheckpoint
from spimpi.inference.config import published
from spimpi.inference.model import Stage
from spimpi.inference.tensors import PROGRAM
from spimpi.inference.weights import Loader
from spimpi.topology.grid import choose
from spimpi.trace.journals.journal import Journal

PROMPT, DECODED, ROUNDS = 128, 32, 31
# A round: there and back, so that a machine that gets slower meanwhile slows both sides alike.
ORDER = ("exact", "checked", "checked", "exact", "blas")
CONFIG = replace(
    published("llama-3.2-1b"), name="bench", vocab_size=4096, hidden_size=1024,
    intermediate_size=2816, n_layers=8, n_heads=16, n_kv_heads=8, head_dim=64,
    max_position_embeddings=2048, rope_scaling=None,
)  # fmt: skip


def measure(comm) -> dict:
    """Prefill of 128 tokens and 32 decoded ones: unchecked, checked, BLAS, in turn. Collective."""
    grid = choose(comm.size, CONFIG.n_heads, CONFIG.n_layers)
    checkpoint = SeededCheckpoint(CONFIG)
    prompt = [np.arange(PROMPT, dtype=np.int64) % CONFIG.vocab_size]
    kinds = {"exact": (True, False), "checked": (True, True), "blas": (False, False)}
    with DistributedContext(comm, grid) as ctx:
        parts = {e: Loader(ctx, CONFIG, checkpoint, e).load() for e in (True, False)}
        stages = {}
        for name, (exact, checked) in kinds.items():
            index = {tensor: i for i, tensor in enumerate(PROGRAM)}
            recorder = None
            if checked:
                folder = ctx.world.bcast(tempfile.mkdtemp())
                recorder = Recorder(index, ctx.rank, Journal(folder, ctx.rank, {}))
            stages[name] = Stage(
                ctx, CONFIG, parts[exact], [PROMPT], DECODED + 1, exact, recorder
            )
        times = {name: np.zeros((ROUNDS, 2)) for name in kinds}
        for i in range(ROUNDS):
            for name in ORDER:
                times[name][i] += _run(ctx.world, stages[name], prompt) / ORDER.count(name)
    return _figures(comm, times)


def _run(comm, stage, prompt):
    """(prefill, decode) seconds of one run, the slowest rank's."""
    marks = [0.0]

    def progress(step):
        if step == 1:
            marks[0] = perf_counter()

    comm.Barrier()
    start = perf_counter()
    stage.run(prompt, 0, progress)
    comm.Barrier()
    end = perf_counter()
    own = np.array([marks[0] - start, end - marks[0]])
    comm.Allreduce(MPI.IN_PLACE, own, op=MPI.MAX)
    return own


def _figures(comm, times) -> dict:
    """Medians of the ratios round by round, and the best absolute times."""
    rounds = {name: values[1:] for name, values in times.items()}  # the first warms up
    layer = CONFIG.hidden_size * CONFIG.head_dim * 2 * (CONFIG.n_heads + CONFIG.n_kv_heads)
    layer += 3 * CONFIG.hidden_size * CONFIG.intermediate_size
    flops = 2 * (CONFIG.n_layers * layer)
    head = 2 * CONFIG.hidden_size * CONFIG.vocab_size
    whole = {name: values.sum(axis=1) for name, values in rounds.items()}
    figures = {
        "ranks": comm.size,
        "checking adds, % of the inference": _percent(whole["checked"] / whole["exact"]),
        "checking adds, % of the prefill": _percent(rounds["checked"][:, 0] / rounds["exact"][:, 0]),
        "checking adds, % of decoding": _percent(rounds["checked"][:, 1] / rounds["exact"][:, 1]),
    }
    for column, part, work in ((0, "prefill", flops * PROMPT + head), (1, "decode", (flops + head) * DECODED)):
        ratio = rounds["exact"][:, column] / rounds["blas"][:, column]
        figures[f"exact / blas, {part}"] = round(float(np.median(ratio)), 3)
        for name in ("exact", "blas"):
            best = rounds[name][:, column].min()
            figures[f"{name}, {part}, GFLOP/s"] = round(work / best / 1e9, 1)
            figures[f"{name}, {part}, ms"] = round(1e3 * float(best), 1)
    return figures


def _percent(ratios) -> str:
    low, middle, high = (100 * (float(np.quantile(ratios, q)) - 1) for q in (0, 0.5, 1))
    return f"{middle:.2f} (median; {low:.2f} to {high:.2f})"
