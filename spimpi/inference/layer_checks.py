"""The checks of the decoder layers: which are made, and how their results become events.

The events of all layers of a group of steps (ledger.py) are made at once.
"""

from dataclasses import dataclass

import numpy as np

from spimpi.inference.ledger import QK, Columns, LayerResults
from spimpi.inference.tensors import LAYER_TENSORS, NONFINITE, PRODUCTS, REST
from spimpi.reduction import minority
from spimpi.trace.schema import EVENT, Established, Op, Stage, Status

ACROSS = ("sums", "maxima", "resid", "hidden", "heads")  # compared over the tensor ranks


@dataclass(frozen=True)
class LayerCheck:
    """One check of each layer of each microbatch."""

    tensor: str
    op: Op
    stage: Stage
    established: Established
    source: tuple[str, int]


def layer_plan(exact: bool, n_tensor_ranks: int, held, qk_norm: bool = False):
    """The checks of one layer in program order, for exact or BLAS arithmetic.

    ``held``: which of the key/value heads that several tensor ranks hold this rank holds;
    ``qk_norm``: whether the model normalises queries and keys.
    """
    moved, agreed, computed = Established.MOVED, Established.AGREED, Established.COMPUTED
    many = n_tensor_ranks > 1
    checks = []

    def product(tensor):
        if exact:
            at = ("product", PRODUCTS.index(tensor))
            checks.append(LayerCheck(tensor, Op.MATMUL, Stage.COMPUTE, computed, at))

    def at_rest(tensor):
        at = ("rest", REST.index(tensor))
        checks.append(LayerCheck(tensor, Op.AT_REST, Stage.COMPUTE, moved, at))

    def across(tensor, op, established, source, index):
        if many:
            checks.append(LayerCheck(tensor, op, Stage.TENSOR, established, (source, index)))

    def maxima(tensor, index):
        if exact:
            established = moved | agreed | computed
            across(tensor, Op.ALLREDUCE_MAX, established, "maxima", index)

    def summed(tensor, index):
        if not many:
            return
        at_rest(tensor)
        if exact:
            across(tensor, Op.ALLREDUCE_SUM, moved | agreed | computed, "sums", index)
        else:
            across(tensor, Op.ALLREDUCE_SUM, moved, "bounds", index)
            across(tensor, Op.AGREEMENT, agreed, "sums", index)

    at_rest("input")
    product("qkv")
    at_rest("qkv")
    # BLAS may give a shared head other bits on each rank that computes it, so only exact copies
    # can be compared.
    for i in held if exact else ():
        across("qkv", Op.AGREEMENT, agreed, "heads", i)
    if qk_norm:
        maxima("qk_max", QK)
        summed("qk_sum", QK)
        at_rest("qk_normed")
    product("scores")
    product("attn")
    at_rest("attn")
    maxima("attn_max", 0)
    product("attn_out")
    summed("attn_out", 0)
    across("resid", Op.AGREEMENT, agreed, "resid", 0)
    at_rest("resid")
    product("gate_up")
    at_rest("ffn")
    maxima("ffn_max", 1)
    product("ffn_out")
    summed("ffn_out", 1)
    across("hidden", Op.AGREEMENT, agreed, "hidden", 0)
    return tuple(checks)


class EventWriter:
    """Turns a group's LayerResults into events; holds all that is the same for every microbatch."""

    def __init__(self, ctx, plan, layers: range, tensor_index: dict, block_bytes: dict):
        self.ctx, self.plan = ctx, plan
        self.template = np.zeros((len(layers), len(plan)), EVENT)
        rows = self.template
        rows["layer"] = np.arange(layers.start, layers.stop)[:, None]
        rows["peer"] = rows["element"] = -1
        self.bytes_per_row = np.zeros(len(plan), np.int64)
        for i, check in enumerate(plan):
            column = rows[:, i]
            name = "hidden" if check.tensor == "input" else check.tensor
            column["tensor"] = tensor_index[name]
            column["op"], column["stage"] = check.op, check.stage
            column["established"] = check.established
            self.bytes_per_row[i] = block_bytes[check.tensor]
            if check.tensor == "input":
                column["layer"] -= 1
                if layers.start == 0:
                    column["tensor"][0] = tensor_index["embed"]
        self.columns = Columns.of(any(check.tensor == "qk_normed" for check in plan))
        # (place in the plan, kind, column of the records) of what is compared over the ranks
        self.across = [
            (i, kind, self.columns.at(kind, index))
            for i, (kind, index) in enumerate(check.source for check in plan)
            if kind in ACROSS
        ]
        self.order = np.array([self._position(*check.source) for check in plan])
        self.exact = any(c.op == Op.MATMUL for c in plan)

    def _position(self, kind, index) -> int:
        """Where ``_compare`` puts a result, before it brings them into the plan's order."""
        if kind == "bounds":  # of sums of floats, in place of the products
            return len(REST) + index
        if kind in ACROSS:
            return len(REST) + len(PRODUCTS) + self.columns.at(kind, index)
        return index + (len(REST) if kind == "product" else 0)

    def write(self, ledger, repeat, float_sums=None) -> np.ndarray:
        """The events of a group, [layers × checks]. Collective where a check failed.

        ``float_sums``: float_sums.FloatSums of the group, in BLAS arithmetic over tensor ranks.
        """
        results, merged = ledger.results, ledger.merged
        n_slots, n_layers = ledger.n_slots, len(self.template)
        step, microbatch, n_rows = np.repeat(ledger.places[:n_slots], n_layers, axis=0).T
        events = np.tile(self.template, (n_slots, 1))
        events["step"], events["microbatch"] = step[:, None], microbatch[:, None]
        events["repeat"] = repeat
        events["bytes"] = n_rows[:, None] * self.bytes_per_row
        events["t_start"], events["t_end"] = results.times[:, :1], results.times[:, 1:]
        found, expected, bad = self._compare(results, merged)
        events["fingerprint"], events["expected"] = found, expected
        self._count_nonfinite(events, results)
        if bad.any():
            events["verdict"][bad] = Status.FAILED
            events["peer"][bad] = self.ctx.rank
        if float_sums is not None:
            self._bounds(events, results, float_sums)
        if merged is not None and self._wrong_records(merged).any():
            self._name_culprits(events, ledger, bad)
        return events.ravel()

    def _compare(self, r: LayerResults, merged):
        """(found, expected, failed) of every check, [layers × checks], in the plan's order."""
        found, expected = [r.rest_found, r.product_found], [r.rest_expected, r.product_expected]
        bad = [r.rest_found != r.rest_expected, r.product_bad > 0]
        if merged is not None:
            found.append(self.columns.words(r))
            agreed = merged["every"].copy()
            if self.exact:
                agreed[:, self.columns.sums] = merged["total"][:, self.columns.sums]
            expected.append(agreed)
            bad.append(self._wrong_records(merged))
        return [np.concatenate(parts, axis=1)[:, self.order] for parts in (found, expected, bad)]

    def _wrong_records(self, merged) -> np.ndarray:
        """Which records failed, [layers × records]; the same on every tensor rank."""
        wrong = merged["every"] != ~merged["none"]
        wrong |= merged["count"] > 0
        if self.exact:
            sums = self.columns.sums
            wrong[:, sums] |= merged["total"][:, sums] != merged["every"][:, sums]
        else:
            wrong[:, self.columns.heads :] = False  # compared in exact arithmetic alone
        return wrong

    def _bounds(self, events, results, float_sums):
        """Sums of floats by what rounding explains: no word is known of what they should be. It says
        nothing of rows with NaN or Inf: they fail as ``_count_nonfinite``'s do."""
        for column, check in enumerate(self.plan):
            if check.source[0] != "bounds":
                continue
            index = check.source[1]
            bad, peers = float_sums.bad[:, index], float_sums.peers[:, index]
            rows = np.where(bad, 0, float_sums.nonfinite[:, index])
            failed, own = bad | (rows > 0), events[:, column]
            own["fingerprint"] = results.sums[:, index]
            own["expected"] = np.where(bad, 0, own["fingerprint"])
            own["nonfinite"] = np.minimum(rows, 0xFFFF)
            own["verdict"] = np.where(failed, Status.FAILED, Status.VERIFIED)
            world = [self.ctx.grid.rank_of(*self.ctx.place[:3], t) for t in range(self.ctx.tensor.size)]
            own["peer"] = np.where(failed & (peers >= 0), np.array(world)[peers], -1)

    def _count_nonfinite(self, events, results):
        """Rows with NaN or Inf fail the check of the tensor in which they were met."""
        if not results.nonfinite.any():
            return
        for column, tensor in enumerate(NONFINITE):
            if not results.nonfinite[:, column].any():
                continue
            i = next(k for k, c in enumerate(self.plan) if (c.tensor, c.op) == (tensor, Op.AT_REST))
            counts = results.nonfinite[:, column]
            events["nonfinite"][:, i] = np.minimum(counts, 0xFFFF)
            events["verdict"][counts > 0, i] = Status.FAILED
            events["peer"][counts > 0, i] = self.ctx.rank

    def _name_culprits(self, events, ledger, bad):
        """Name the rank behind each failed reduction. Collective: all ranks saw it fail."""
        ctx = self.ctx
        n_ranks, own = ctx.tensor.size, ledger.records
        gathered = np.empty(n_ranks * own.nbytes, np.uint8)
        ctx.tensor.Allgather(own.reshape(-1).view(np.uint8), gathered)
        records = gathered.view(own.dtype).reshape(n_ranks, *own.shape)
        for column, kind, at in self.across:
            for layer in np.flatnonzero(bad[:, column]):
                rank = culprit(records[:, layer, at], ledger.merged[layer, at], kind, self.exact)
                if rank >= 0:
                    world = ctx.grid.rank_of(*ctx.place[:3], rank)
                    events["peer"][layer, column] = world
                else:
                    events["peer"][layer, column] = -1


def culprit(everyone: np.ndarray, merged, kind: str, exact: bool) -> int:
    """The one rank that a failed record points at, or -1 where it points at none or several.

    A dropped contribution is the one whose linear fingerprint is missing from the result's; a
    doubled one is there once too often.
    """
    wrong = np.flatnonzero(everyone["count"])
    if wrong.size == 1:
        return int(wrong[0])
    holders = np.flatnonzero(everyone["every"] == ~everyone["none"])
    odd = minority(everyone["every"][holders])
    if len(odd) == 1:
        return int(holders[odd[0]])
    if odd or kind != "sums" or not exact:
        return -1
    missing = merged["total"] - everyone["every"][:1]
    suspects = np.flatnonzero((everyone["total"] == missing) | (everyone["total"] == -missing))
    return int(suspects[0]) if suspects.size == 1 else -1


assert set(REST[1:]) <= set(LAYER_TENSORS)
