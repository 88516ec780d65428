"""How much memory a rank needs, told before anything is loaded."""

import os
from pathlib import Path

from mpi4py import MPI

from spimpi.errors import UsageError
from spimpi.inference.attention import Cache
from spimpi.topology.tensor import TensorShard

CGROUPS = Path("/sys/fs/cgroup")


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
    layer += (attn + kv) * config.qk_norm
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
    return total + n_rows * (activations + 72)  # 72: maxima and sums of a QK norm


def available_bytes() -> int | None:
    """Memory that this node can still give: MemAvailable, or less where a cgroup (a Slurm job's,
    a container's) limits it. None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":") for line in file)
        available = int(facts["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None
    return min([available, *_cgroup_rooms()])


def _cgroup_rooms():
    """What each cgroup (version 2) above this process leaves, from its own up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.split(":", 2)[2] for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    folder = CGROUPS / own.strip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(CGROUPS):
            return
        try:
            limit = (place / "memory.max").read_text().strip()
            used = int((place / "memory.current").read_text())
        except (OSError, ValueError):
            continue
        if limit != "max":
            yield int(limit) - used


def require_memory(ctx, wanted: int) -> None:
    """Raise UsageError, with the numbers, where a node's ranks need more than it has.

    Collective over ctx.node, whose ranks all raise or none; the caller agrees over the world.
    """
    available = ctx.node.bcast(available_bytes() if ctx.node.rank == 0 else None)
    together = ctx.node.allreduce(wanted, op=MPI.SUM)
    if available is None or together <= available:
        return
    msg = (
        f"the model does not fit: {ctx.node.size} ranks on {os.uname().nodename} need "
        f"{together / 2**30:.1f} GiB (rank {ctx.rank}: {wanted / 2**30:.2f} GiB), "
        f"{available / 2**30:.1f} GiB are available; use more nodes, fewer data ranks (dp), or "
        "fewer layers"
    )
    raise UsageError(msg)
