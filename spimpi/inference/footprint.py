"""How much memory a rank needs, told before anything is loaded."""

import os
from pathlib import Path

from mpi4py import MPI

from spimpi.errors import UsageError
from spimpi.inference.attention import Cache
from spimpi.topology.tensor import TensorShard

CGROUP_LIMIT = "/sys/fs/cgroup/memory.max"
CGROUP_USED = "/sys/fs/cgroup/memory.current"


def rank_bytes(ctx, config, itemsize: int, n_prompts: int, n_positions: int, n_rows: int) -> int:
    """Bytes that this rank will hold: weights, their check vectors, cache, activations.

    Beyond the interpreter and the libraries, which are there already when memory is looked at.

    itemsize: of the stored weights (embedding rows stay as stored); n_prompts and n_rows: this
    rank's; n_positions: longest prompt and new tokens.
    """
    shard = TensorShard(
        ctx.place.t, ctx.grid.tp, config.n_heads, config.n_kv_heads,
        config.intermediate_size, config.vocab_size,
    )  # fmt: skip
    hidden, d = config.hidden_size, config.head_dim
    attn, kv, ffn = shard.heads.size * d, len(shard.kv_heads) * d, shard.ffn().size
    layer = (attn + 2 * kv) * hidden + attn * hidden + 3 * ffn * hidden
    vectors = 16 * (2 * hidden + attn + ffn) + 12 * (attn + 2 * kv + 2 * ffn + 2 * hidden)
    # While a matrix is scaled, the raw slice and its float32 copies exist beside the integers.
    loading = 3 * 4 * max(2 * ffn * hidden, (attn + 2 * kv) * hidden)
    cache = len(shard.kv_heads) * n_prompts * n_positions * Cache.bytes_per_position(d)
    total = len(ctx.layers) * (4 * layer + vectors + cache) + loading
    vocabulary = shard.vocabulary().size
    if ctx.is_first_stage:
        total += vocabulary * hidden * itemsize
    if ctx.is_last_stage:
        total += vocabulary * hidden * 4 + 12 * n_prompts * config.vocab_size
    activations = 4 * (8 * hidden + 3 * attn + 4 * kv + 6 * ffn) + 32 * hidden
    return total + n_rows * activations


def available_bytes() -> int:
    """Memory that this node can still give: MemAvailable, or less where a cgroup limits it."""
    with open("/proc/meminfo") as file:
        facts = dict(line.split(":") for line in file)
    available = int(facts["MemAvailable"].split()[0]) << 10
    try:
        limit = Path(CGROUP_LIMIT).read_text().strip()
        if limit != "max":
            available = min(available, int(limit) - int(Path(CGROUP_USED).read_text()))
    except OSError:
        pass  # no cgroup v2 here
    return available


def require_memory(ctx, wanted: int) -> None:
    """Raise UsageError, with the numbers, where a node's ranks need more than it has.

    Collective over ctx.node; the caller agrees on the error over the world.
    """
    together = ctx.node.allreduce(wanted, op=MPI.SUM)
    available = ctx.node.bcast(available_bytes() if ctx.node.rank == 0 else None)
    if together <= available:
        return
    msg = (
        f"the model does not fit: {ctx.node.size} ranks on {os.uname().nodename} need "
        f"{together / 2**30:.1f} GiB (rank {ctx.rank}: {wanted / 2**30:.2f} GiB), "
        f"{available / 2**30:.1f} GiB are available; use more nodes, fewer data ranks (dp), or "
        "fewer layers"
    )
    raise UsageError(msg)
