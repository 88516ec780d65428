"""What one part of a check alone can see: each test goes red where that part is left out."""

from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import GROUPED, OLMO, quick_fabric, verify
from reference_models import random_tensors, tiny_config, write

import spimpi
from spimpi import Tag
from spimpi.bench.runtime_faults.clock import clock
from spimpi.bench.runtime_faults.hooks import Now, patched
from spimpi.checks import fabric
from spimpi.context import DistributedContext
from spimpi.errors import CorruptionError, UsageError
from spimpi.fingerprint.tag import Tag as RunTag
from spimpi.inference import kernels
from spimpi.topology.grid import parse
from spimpi.trace.schema import Stage
from spimpi.verification import run

pytestmark = pytest.mark.mpi
two = pytest.mark.mpi(min_size=2)

TAG = Tag(name="edge", layer=2)
IDS = ("3,14,1,25,9,2,31", "36,5", "35,8,19,7", "12,24,30,3,17")


def struck(comm, monkeypatch, listeners, **wishes):
    """The outcome of a run without a golden one, with listeners (hooks.patched) on its calls."""
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    now = Now()
    heard = {place: [one] for place, one in clock(now).items()}
    for place, one in listeners.items():
        heard.setdefault(place, []).append(one)
    with patched(now, heard):
        return verify(comm, **({"prompt_ids": IDS, "tokens": 2} | wishes))


def once(strike, only=lambda call: True):
    """A listener that strikes the first call for which ``only`` holds; ``seen``: whether it did."""
    seen = []

    def listen(call):
        if not seen and only(call):
            seen.append(True)
            strike(call)
        else:
            call.proceed()

    listen.seen = seen
    return listen


def in_layer(layer, step=0):
    return lambda call: (call.now.layer, call.now.step) == (layer, step)


# Products


def test_a_wrong_element_in_the_last_chunk_of_a_product_is_named(comm):
    """More than 65,536 elements are taken in chunks, of which the last is a partial one."""
    rng = np.random.default_rng(1)
    x, w = rng.integers(-9, 9, (300, 256)), rng.integers(-9, 9, (256, 3))
    y = x @ w
    assert spimpi.verify_matmul(comm, x, w, y, TAG)
    y[299, 1] += comm.rank == 0
    with pytest.raises(CorruptionError) as caught:
        spimpi.verify_matmul(comm, x, w, y, TAG)
    assert [e.index for e in caught.value.verdict.where.elements] == [(299, 1)]


def test_a_weight_is_projected_to_its_last_partial_chunk(comm):
    rng = np.random.default_rng(2)
    w = rng.integers(-9, 9, (300, 256))
    x = np.zeros((2, 300), np.int64)
    x[:, -1] = 3  # the last row of w alone counts
    assert spimpi.verify_matmul(comm, x, w, x @ w, TAG)


def test_floats_that_may_round_by_a_little_are_refused(comm):
    """Σ|x|·|w| of 2**53 is exact, a little more may not be."""
    half, x = 2.0**52, np.ones((1, 2))
    assert spimpi.verify_matmul(comm, x, np.full((2, 1), half), np.full((1, 1), 2 * half), TAG)
    with pytest.raises(UsageError, match="round"):
        w = np.full((2, 1), half + 2)
        spimpi.verify_matmul(comm, x, w, x @ w, TAG)


def test_the_largest_weight_of_any_chunk_counts(comm):
    w = np.ones((300, 256))
    w[0, 0] = 2.0**52  # in the first of two chunks
    x = np.full((1, 300), 4.0)
    with pytest.raises(UsageError, match="round"):
        spimpi.verify_matmul(comm, x, w, x @ w, TAG)


@two
@pytest.mark.parametrize("tensor", ["qkv", "attn_out", "gate_up", "ffn_out"])
def test_errors_that_cancel_over_two_rows_of_a_product_are_seen(comm, model, monkeypatch, tensor):
    """The sum of all rows' words is what it should be."""
    columns = {"qkv": "qkv", "attn_out": "o", "gate_up": "gate_up", "ffn_out": "down"}

    def of_tensor(call):
        layers = call.now.stage.part.layers if in_layer(1)(call) else None
        return layers and call["wq"] is getattr(layers[1], columns[tensor]).values

    def cancelling(call):
        call.proceed()
        call["out"][0, 2] += 1
        call["out"][3, 2] -= 1

    strike = once(cancelling, of_tensor) if comm.rank == 0 else once(lambda call: call.proceed())
    outcome = struck(
        comm, monkeypatch, {"spimpi.inference.exact:matmul": strike},
        model=str(model("grouped", **GROUPED)), topology=f"tp={comm.size}",
    )  # fmt: skip
    where = outcome.verdict.where
    assert (where.check, where.tensor, where.layer, where.rank) == ("matmul", tensor, 1, 0)


@pytest.mark.parametrize("name", ["gate_proj", "o_proj"])
def test_a_fraction_where_a_product_is_zero_is_seen(comm, shared_folder, monkeypatch, name):
    """As an integer it is 0, which is right: only the count of what is no integer tells."""
    config = tiny_config(name="zeros", **GROUPED)
    if comm.rank == 0:
        tensors = random_tensors(config)
        part = "mlp" if name == "gate_proj" else "self_attn"
        tensors[f"model.layers.1.{part}.{name}.weight"][3] = 0
        write(shared_folder / f"zeros-{name}", config, tensors)
    comm.Barrier()
    matrix = "gate_up" if name == "gate_proj" else "o"

    def zero_here(call):
        stage = call.now.stage
        return in_layer(1)(call) and call["wq"] is getattr(stage.part.layers[1], matrix).values

    def fraction(call):
        call.proceed()
        assert call["out"][0, 3] == 0
        call["out"][0, 3] = 0.5

    strike = once(fraction, zero_here) if comm.rank == 0 else once(lambda call: call.proceed())
    outcome = struck(
        comm, monkeypatch, {"spimpi.inference.exact:matmul": strike},
        model=str(shared_folder / f"zeros-{name}"), topology=f"tp={comm.size}",
    )  # fmt: skip
    where = outcome.verdict.where
    assert strike.seen and (where.check, where.layer, where.rank) == ("matmul", 1, 0)


# Sums


@two
def test_one_element_just_above_what_its_bound_explains_is_seen(comm):
    """Sums of these numbers do not round, so that all of the bound is left for the error; the
    least coefficient of a projection is a half."""
    rng = np.random.default_rng(3)
    shape = (64, 64)
    for i in range(24):
        parts = rng.integers(1, 1 << 12, (comm.size, *shape)) / np.float32(1 << 10)
        parts = (parts + np.float32(2**-10)).astype(np.float32)
        result = parts.sum(axis=0, dtype=np.float64).astype(np.float32)
        tag = Tag(name="edge", step=i)
        clean = spimpi.verify_allreduce(comm, parts[comm.rank], result, tag)
        stated = float(clean.strength.split("off by more than ")[1].split(")")[0])
        wrong = result.copy()
        wrong[i, 7] += np.float32(0.62 * stated)
        verdict = spimpi.verify_allreduce(comm, parts[comm.rank], wrong, tag, check=False)
        assert not verdict, i


@two
@pytest.mark.parametrize("facts", [GROUPED, OLMO], ids=["llama", "olmo"])
def test_a_contribution_counted_twice_names_its_rank(comm, model, monkeypatch, facts):
    culprit = comm.size - 1

    def twice(call):
        call[0] = 2 * call[0]
        call.proceed()

    def a_sum(call):
        return in_layer(1)(call) and call.kwargs.get("op") == MPI.SUM

    strike = once(twice, a_sum) if comm.rank == culprit else once(lambda call: call.proceed())
    name = facts.get("model_type", "grouped")
    outcome = struck(
        comm, monkeypatch, {"tensor.Allreduce": strike}, model=str(model(name, **facts)),
        topology=f"tp={comm.size}",
    )  # fmt: skip
    where = outcome.verdict.where
    assert where.check == "allreduce sum" and where.layer == 1 and where.rank == culprit


# Maxima


@pytest.mark.parametrize("beyond", [0, 1, 1 << 20])
def test_a_maximum_that_names_no_rank_is_wrong_on_every_rank(beyond):
    """Larger than all, with an owner outside the ranks: nobody's own value contradicts it."""
    n_ranks = 3
    maxima = [np.array([5, 1 << 20], np.uint32) + np.uint32(rank) for rank in range(n_ranks)]
    for rank, own in enumerate(maxima):
        packed = np.empty(2, np.uint64)
        kernels.pack_maxima(own, np.uint64(rank), packed)
        owner = np.uint64(0xFFFFFFFF - (n_ranks + beyond))
        reduced = np.array([9 << 32, 1 << 60], np.uint64) | owner
        words = np.zeros(1, np.uint64)
        arguments = packed, reduced, own.copy(), np.uint64(rank), np.uint64(n_ranks)
        assert kernels.unpack_maxima(*arguments, np.uint64(1), 0, words, 0) == 2


@two
def test_a_weight_maximum_too_high_on_one_rank_is_seen_by_agreement(comm, model, monkeypatch):
    """Its owner is another rank, so that nothing on this one contradicts it."""

    def too_high(call):
        reduced = call["reduced"]
        owner = 1 if comm.rank == 0 else 0
        reduced[0] = ((reduced[0] >> np.uint64(32)) + np.uint64(1 << 23)) << np.uint64(32)
        reduced[0] |= np.uint64(0xFFFFFFFF - owner)
        call.proceed()

    strike = once(too_high) if comm.rank == 0 else once(lambda call: call.proceed())
    outcome = struck(
        comm, monkeypatch, {"spimpi.inference.weights:unpack_maxima": strike},
        model=str(model("grouped", **GROUPED)), topology=f"tp={comm.size}",
    )  # fmt: skip
    where = outcome.verdict.where
    assert strike.seen and outcome.exit_status == 1
    assert (where.check, where.tensor) == ("allreduce max", "model.layers.0.self_attn.o_proj.weight")


# Hand-offs


RECORD_FIELDS = ("sequence", "step", "microbatch", "first_layer", "last_layer", "first_row",
                 "n_rows", "n_cols", "itemsize")  # fmt: skip


@two
@pytest.mark.parametrize("name", RECORD_FIELDS)
def test_a_run_sees_a_record_that_is_wrong_in_one_field(comm, model, monkeypatch, name):
    def wrong(call):
        _, record = call.proceed()
        record[name] += 1

    def of_hidden(call):
        return call.now.step == 1 and call.owner.slots[0].buffer.dtype == np.float32

    strike = once(wrong, of_hidden) if comm.rank == 1 else once(lambda call: call.proceed())
    topology = {2: "pp=2", 3: "pp=3", 4: "tp=2,pp=2"}.get(comm.size, "pp=2")
    if topology == "tp=2,pp=2":
        strike = once(wrong, of_hidden) if comm.rank == 2 else once(lambda call: call.proceed())
    outcome = struck(
        comm, monkeypatch, {"spimpi.checks.handoff:Receiver.take": strike},
        model=str(model("grouped", **GROUPED)), topology=topology,
    )  # fmt: skip
    where = outcome.verdict.where
    assert (where.check, where.tensor, where.step) == ("handoff", "hidden", 1)
    assert name in where.detail


@two
@pytest.mark.parametrize(
    ("sent", "received", "word"),
    [
        (dict(sequence=3), dict(sequence=4), "sequence 3 (expected 4)"),
        (dict(shape=(4, 5)), dict(shape=(5, 4)), "shape"),
        (dict(shape=(4, 5)), dict(shape=(4, 6)), "shape"),
        (dict(dtype="float32"), dict(dtype="int32"), "dtype"),
        (dict(dtype="float32"), dict(dtype="float64"), "dtype"),
        (dict(layers=(0, 3)), dict(layers=(0, 4)), "last_layer"),
        (dict(microbatch=1), dict(microbatch=2), "microbatch"),
    ],
)
def test_ends_of_a_link_that_differ_in_one_thing_alone_are_told(comm, sent, received, word):
    """The data are zeros, the same at both ends."""
    if comm.rank > 1:
        return
    own = dict(sent if comm.rank == 0 else received)
    x = np.zeros(own.pop("shape", (4, 5)), own.pop("dtype", "float32"))
    tag = Tag(name=f"link {word} {sent}")
    with pytest.raises((CorruptionError, UsageError)) as caught:
        spimpi.verify_pipeline_handoff(comm, x, 0, 1, tag, **own)
    assert word in str(caught.value)


# The head, and tokens


def test_a_row_that_is_not_finite_at_the_head_alone_is_not_verified(comm, shared_folder, monkeypatch):
    """A last norm that overflows: all before it is finite, and every check's words agree."""
    config = tiny_config(name="overflowing", **GROUPED)
    folder = shared_folder / "overflowing"
    if comm.rank == 0:
        tensors = random_tensors(config)
        tensors["model.norm.weight"][:] = 3e38
        write(folder, config, tensors)
    comm.Barrier()
    try:
        outcome = struck(comm, monkeypatch, {}, model=str(folder), topology=f"tp={comm.size}")
    except UsageError:
        return  # refused, by name
    assert outcome.exit_status in (1, 3) and not outcome.verdict


@two
@pytest.mark.parametrize("axis", ["data", "sequence"])
def test_tokens_gathered_wrong_alike_on_all_ranks_are_seen(comm, model, monkeypatch, axis):
    if comm.size > 3:
        pytest.skip("of four prompts")

    def wrong(call):
        call.proceed()
        call[1][0].reshape(-1)[1] ^= 1

    def of_tokens(call):
        return call[1][0].dtype == np.int64

    name = "dp" if axis == "data" else "sp"
    outcome = struck(
        comm, monkeypatch, {f"{axis}.Allgatherv": once(wrong, of_tokens)},
        model=str(model("grouped", **GROUPED)), topology=f"{name}={comm.size}",
    )  # fmt: skip
    where = outcome.verdict.where
    assert outcome.exit_status == 1 and where.tensor == "tokens"
    assert outcome.totals[Stage[axis.upper()]].failed  # the gather's own check saw it


# The fabric


class Silent:
    """A communicator whose collectives write nothing into the caller's buffer."""

    def __init__(self, comm):
        self.comm = comm

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def Allreduce(self, sent, received, op=MPI.SUM):
        self.comm.Allreduce(sent, np.empty_like(received), op=op)

    def Allgatherv(self, sent, received):
        self.comm.Allgatherv(sent, [np.empty_like(received[0]), *received[1:]])

    def Bcast(self, buffer, root=0):
        self.comm.Bcast(np.array(buffer), root=root)


@two
@pytest.mark.parametrize("axis", ["tensor", "sequence", "data", "pipeline"])
def test_a_collective_that_writes_nothing_fails_the_preflight(comm, axis):
    """Although the buffer held the right result before."""
    name = {"tensor": "tp", "sequence": "sp", "data": "dp", "pipeline": "pp"}[axis]
    with DistributedContext(comm, parse(f"{name}={comm.size}", comm.size, 12, 12)) as ctx:
        tried = 0
        for probe in fabric.probes(ctx):
            if probe.name.endswith((".records", ".handoff")):
                continue
            tag = RunTag(ctx.seed, probe.name, -1, 1)
            send, result = np.empty(96, np.uint64), np.empty(96, np.uint64)
            found, expected = probe.run(probe.comm, tag, send, result)
            assert found == expected, probe.name
            silent = replace(probe, comm=Silent(probe.comm))
            found, expected = silent.run(silent.comm, tag, send, result)
            assert found != expected or (comm.rank == 0 and "broadcast" in probe.name), probe.name
            tried += 1
        assert tried >= 2
