"""How many checks a run makes: a closed form of model, topology and steps.

Nothing is sampled, so the number of events in a trace must equal this number; a run whose trace
differs is reported as incomplete. The count shares no code with what records the events.
"""

from spimpi.checks.fabric import RECORD_SIZES, SIZES
from spimpi.topology.data import rows_of
from spimpi.topology.pipeline import n_microbatches
from spimpi.topology.tensor import TensorShard

TENSORS_OF_A_LAYER, NORMS_OF_A_LAYER, MATRICES_OF_A_LAYER = 9, 2, 7
MATRICES_HERE = 4  # as they are multiplied: q, k and v are one, gate and up are one
QK_NORMS = 2  # tensors more, of which the keys' has shared heads


def expected_events(ctx, job, n_runs: int, has_golden: bool) -> int:
    """Events that the rank ``ctx.place`` records in ``n_runs`` complete runs. Local."""
    grid, config = ctx.grid, job.config
    shard = TensorShard(
        ctx.place.t, grid.tp, config.n_heads, config.n_kv_heads,
        config.intermediate_size, config.vocab_size,
    )  # fmt: skip
    shared = [h for h in range(config.n_kv_heads) if len(shard.holders(h)) > 1]
    count = _fabric(grid) + _weights(ctx, job, shard, shared)
    if job.has_derived:
        count += 2 * _derived(ctx, shard, shared)  # after loading, after the last step
    steps = range(job.n_tokens)
    held = sum(head in shard.kv_heads for head in shared)
    count += n_runs * sum(_step(ctx, job, held, step) for step in steps)
    if ctx.is_first_stage:
        # The prompts' ids, and each step's tokens, as they were embedded; the tokens, gathered.
        count += n_runs * (job.n_tokens + (grid.sp > 1) + (grid.dp > 1))
    if ctx.rank == 0:
        count += n_runs * job.n_tokens  # the tokens that are handed out
    count += n_runs * _standing(ctx, job)
    if ctx.is_last_stage and grid.sp > 1:
        count += n_runs  # the prefill's last rows, gathered
    if ctx.rank == 0 and has_golden:
        count += n_runs * job.n_tokens * (5 * config.n_layers + 3)
    return count


def _fabric(grid) -> int:
    several = grid.dp * grid.sp > 1 and grid.tp * grid.pp > 1
    probes = 4 * (grid.tp > 1) + (grid.sp > 1) + (grid.pp > 1) + (grid.dp > 1)
    probes += several + 2 * (grid.size > 1)
    records = (grid.tp > 1) + (grid.sp > 1) + (grid.dp > 1) + (grid.size > 1)
    return probes * len(SIZES) + records * RECORD_SIZES


def _weights(ctx, job, shard, shared) -> int:
    layers, tied = len(ctx.layers), job.config.tie_word_embeddings
    qk = job.config.qk_norm
    tensors = layers * (TENSORS_OF_A_LAYER + QK_NORMS * qk) + ctx.is_first_stage + ctx.is_last_stage
    if ctx.is_last_stage and not (tied and ctx.is_first_stage):
        tensors += 1  # the head: a tensor of its own, or the copy of a tied embedding
    if ctx.grid.tp == 1:
        return tensors
    held = sum(head in shard.kv_heads for head in shared)
    copies = layers * (NORMS_OF_A_LAYER + (2 + qk) * held) + ctx.is_last_stage
    maxima = 2 * layers if job.exact else 0
    return tensors + copies + maxima


def _standing(ctx, job) -> int:
    """What is looked at again after a run: norms, exponents, embedding, rotary tables."""
    layers = len(ctx.layers)
    count = layers * (NORMS_OF_A_LAYER + job.config.qk_norm + MATRICES_HERE * job.exact)
    return count + ctx.is_first_stage + ctx.is_last_stage * (1 + job.exact) + 1


def _derived(ctx, shard, shared) -> int:
    layers = len(ctx.layers)
    count = 2 * (MATRICES_OF_A_LAYER * layers + ctx.is_last_stage)  # integers and exponents
    if ctx.grid.tp > 1:
        held = sum(head in shard.kv_heads for head in shared)
        count += layers * (2 + 2 * 2 * held)  # exponents of o and down; both of keys and of values
    return count


def _step(ctx, job, n_shared, step) -> int:
    grid = ctx.grid
    rows = rows_of(job.lengths, grid.dp, ctx.place.d, step)
    if grid.sp == 1:
        n = n_microbatches(rows.size, grid.pp, step)
    elif step == 0:
        n = len(set(rows.sequence.tolist()))  # one a prompt
    else:
        n = min(-(-rows.size // grid.sp), 2 if grid.pp > 1 else 1)
    many = grid.tp > 1
    # A layer: five tensors at rest; exact: six products; over tensor ranks: two partial sums at
    # rest, two sums, agreement after attention and of the output; exact: the shared heads that
    # this rank holds, two maxima; else: the two sums' agreement beside their bound.
    layer = 5 + 6 * job.exact + many * (6 + (n_shared + 2) * job.exact + 2 * (not job.exact))
    layer += grid.sp > 1  # keys and values, gathered
    # A QK norm: what it makes, at rest; over tensor ranks its sum at rest and summed; exact: its
    # maximum; else the sum's agreement beside its bound.
    layer += job.config.qk_norm * (1 + many * 3)
    # Each microbatch: layers, the stage's output at rest, and the embedding's reduction or the
    # hand-off that came in.
    count = n * (len(ctx.layers) * layer + 1 + (many if ctx.is_first_stage else 1))
    if ctx.is_last_stage:
        # The head's rows at rest; logits: product, at rest; tokens at rest; gathered.
        count += 1 + job.exact + 1 + 1 + 2 * many
    if ctx.is_first_stage and grid.pp > 1:
        count += 1  # the closing hop
    return count
