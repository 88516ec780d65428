"""What changes in one rank's memory between two kernels, or stands there and changes, is noticed.

Without a golden run. The struck rank is named, and the tensor where it shows first.
"""

import numpy as np
import pytest
from mpi_helpers import GROUPED, IDS, OLMO, both_families, named, quick_fabric, verify

from spimpi.errors import UsageError
from spimpi.inference import blas_layers, exact, kernels, layers
from spimpi.inference.weights import Loader
from spimpi.verification import run

pytestmark = pytest.mark.mpi

LAYER, STEP = 1, 2


class Struck:
    """Where the program is: the layer that runs, on the rank that is struck, at the step."""

    def __init__(self, monkeypatch, rank):
        self.patch, self.rank, self.there, self.done = monkeypatch.setattr, rank, False, False
        forward = layers.Layers.forward

        def watched(layer, i, x, out, b):
            here = layer.ctx.rank == rank and (layer.ctx.layers[i], b.step) == (LAYER, STEP)
            self.there = here
            self.layer = layer
            forward(layer, i, x, out, b)
            self.there = False

        self.patch(layers.Layers, "forward", watched)

    def once(self) -> bool:
        if self.there and not self.done:
            self.done = True
            return True
        return False

    def after(self, module, name, change):
        """Once: ``change(arguments)`` of a function when it has run."""
        original = getattr(module, name)

        def struck(*args):
            result = original(*args)
            if self.once():
                change(*args)
            return result

        self.patch(module, name, struck)

    def before(self, module, name, change):
        original = getattr(module, name)

        def struck(*args):
            if self.once():
                change(*args)
            return original(*args)

        self.patch(module, name, struck)


def larger(array):
    array.reshape(-1)[0] *= 1.25


def normed(struck):
    struck.after(kernels, "rmsnorm", lambda x, weight, eps, out: larger(out))


def maxima(struck):
    def double(x, out):
        out[0] += 1 << 23

    struck.after(exact, "row_absmax", double)


def scaled(struck):
    def add(x, absmax, b, out, exps):
        out[0, 1] += 1

    struck.after(exact, "quantize_rows", add)


def exponents_of_rows(struck):
    """Nothing is made of them where a product is checked."""

    def add(x, absmax, b, out, exps):
        exps[0] += 1

    struck.after(exact, "quantize_rows", add)


def delta(struck):
    struck.before(kernels, "add_residual", lambda x, delta, *more: larger(delta))


def gate_up(struck):
    struck.before(kernels, "swiglu", lambda gate_up, *more: larger(gate_up))


def position(struck):
    def earlier(qkv, sequences, positions, *more):
        positions[0] -= 1

    struck.before(layers, "attend", earlier)


def rotary(struck):
    def change(*args):
        larger(args[3][1:])

    struck.before(layers, "attend", change)


def window(struck):
    def change(*args):
        args[6][9] = 2

    struck.before(layers, "attend", change)


def norm_weights(struck):
    struck.before(kernels, "rmsnorm", lambda x, weight, *more: larger(weight))


def exponents(struck):
    def change(*args):
        struck.layer.part.layers[LAYER].gate_up.exponents[3] += 1

    struck.before(kernels, "swiglu", change)


def embedding(struck):
    def change(*args):
        if struck.layer.part.embed is not None:
            struck.layer.part.embed[1, 1] += 1

    struck.before(kernels, "swiglu", change)


NAMES = "model.layers.1."
IN_BOTH = {
    maxima: ("qkv", LAYER, STEP), scaled: ("qkv", LAYER, STEP), delta: ("attn_out", LAYER, STEP),
    gate_up: ("gate_up", LAYER, STEP), position: ("scores", LAYER, STEP),
    rotary: ("rotary", -1, 3), window: ("rotary", -1, 3),
    exponents: (NAMES + "mlp.gate_proj.weight", LAYER, 3),
    embedding: ("model.embed_tokens.weight", -1, 3),
}  # fmt: skip
IN_LLAMA = {normed: ("qkv", LAYER, STEP),
            norm_weights: (NAMES + "input_layernorm.weight", LAYER, 3)}  # fmt: skip


def run_struck(comm, model, monkeypatch, facts, strike, topology):
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    struck = Struck(monkeypatch, comm.size - 1)
    strike(struck)
    outcome = verify(
        comm, model=named(model, facts), prompt_ids=IDS, tokens=4, topology=topology
    )
    assert comm.allreduce(struck.done) == 1
    return outcome


@both_families
@pytest.mark.parametrize("strike", [*IN_BOTH, *IN_LLAMA], ids=lambda strike: strike.__name__)
def test_the_rank_and_the_tensor_are_named(comm, model, monkeypatch, facts, strike):
    if "model_type" in facts and strike in IN_LLAMA:
        pytest.skip("Llama's norms")
    outcome = run_struck(comm, model, monkeypatch, facts, strike, f"tp={comm.size}")
    where = outcome.verdict.where
    assert outcome.exit_status == 1
    found = where.tensor, where.layer, where.step, where.rank
    assert found == (*(IN_BOTH | IN_LLAMA)[strike], comm.size - 1), str(where)


def test_exponents_that_nothing_is_made_of_change_nothing(comm, model, monkeypatch):
    assert run_struck(
        comm, model, monkeypatch, GROUPED, exponents_of_rows, f"tp={comm.size}"
    ).verdict


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("alike", [False, True])
def test_a_maximum_of_a_rank_that_is_reduced_wrong(comm, model, monkeypatch, alike):
    """Before the reduction (on one rank); after it (alike on all)."""
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    name = "unpack_maxima" if alike else "pack_maxima"
    original = getattr(kernels, name)

    def struck(*args):
        maxima = args[2] if alike else args[0]
        if not alike and comm.rank == 1:
            maxima[0] += 1 << 23
        result = original(*args)
        if alike:
            maxima[0] += 1 << 23
        return result

    monkeypatch.setattr(kernels, name, struck)
    outcome = verify(comm, model=named(model, GROUPED), prompt_ids=IDS, tokens=2,
                     topology=f"tp={comm.size}")  # fmt: skip
    where = outcome.verdict.where
    assert outcome.exit_status == 1
    assert where.tensor == ("attn_max" if alike else "attn_out")
    assert where.rank == (None if alike else 1)


def _of_matrix(change):
    def strike(monkeypatch, rank):
        quantise = exact.quantize_weights

        def struck(w, absmax, b):
            result = quantise(w, absmax, b)
            if rank():
                change(*result)
            return result

        monkeypatch.setattr(exact, "quantize_weights", struck)

    return strike


def _integers(integers, exponents, *more):
    integers[1, 2] += 1


def _exponents(integers, exponents, *more):
    exponents[1] += 1


def _maxima(monkeypatch, rank):
    absmax = exact.weight_absmax

    def struck(w):
        largest = absmax(w)
        largest[0] += (1 << 23) * rank()
        return largest

    monkeypatch.setattr(exact, "weight_absmax", struck)


def _slices(monkeypatch, rank):
    matrix = Loader._matrix

    def struck(self, name, layer, slices, *more, **options):
        if rank():
            slices[0].raw.setflags(write=True)
            slices[0].raw.reshape(-1)[5] += 1
        return matrix(self, name, layer, slices, *more, **options)

    monkeypatch.setattr(Loader, "_matrix", struck)


def _reduced(monkeypatch, rank):
    reduced = Loader._global_maxima

    def struck(self, *args):
        largest = np.array(reduced(self, *args))
        largest[0] += (1 << 23) * rank()
        return largest

    monkeypatch.setattr(Loader, "_global_maxima", struck)


@pytest.mark.parametrize(
    "strike", [_of_matrix(_integers), _of_matrix(_exponents), _maxima, _slices, _reduced],
    ids=["integers", "exponents", "maxima", "slices", "reduced"],
)  # fmt: skip
def test_what_is_derived_wrong_while_weights_are_loaded(comm, model, monkeypatch, strike):
    if strike is _reduced and comm.size == 1:
        pytest.skip("nothing is reduced")
    quick_fabric(monkeypatch)
    monkeypatch.setattr(run, "GOLDEN_BYTES", 0)
    directory = named(model, GROUPED)
    calls = []

    def here():
        """The first call on the last rank."""
        calls.append(comm.rank == comm.size - 1 and not any(calls))
        return calls[-1]

    strike(monkeypatch, here)
    outcome = verify(comm, model=directory, prompt_ids=IDS, tokens=2, topology=f"tp={comm.size}")
    where = outcome.verdict.where
    assert outcome.exit_status == 1 and where.layer == 0
    assert where.rank == comm.size - 1, str(where)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("tensor", ["attn_out", "ffn_out", "qk_sum"])
@pytest.mark.parametrize("wrong", ["dropped", "doubled", "off alike"])
def test_a_wrong_sum_of_floats_is_noticed(comm, model, monkeypatch, tensor, wrong):
    quick_fabric(monkeypatch)
    add = layers.Layers.sum_over_ranks

    def struck(self, name, i, sent, summed, b):
        add(self, name, i, sent, summed, b)
        if name != tensor or self.exact or (i, b.step) != (LAYER, 1):
            return
        last = np.array(sent)
        self.ctx.tensor.Bcast(last, root=comm.size - 1)
        summed += {"dropped": -last, "doubled": last, "off alike": np.abs(summed).max()}[wrong]

    monkeypatch.setattr(layers.Layers, "sum_over_ranks", struck)
    wishes = dict(model=named(model, OLMO), prompt_ids=IDS, tokens=3, arith="blas")
    outcome = verify(comm, topology=f"tp={comm.size}", **wishes)
    where = outcome.verdict.where
    assert outcome.exit_status == 1
    assert (where.tensor, where.layer, where.step) == (tensor, LAYER, 1), str(where)
    assert where.check == "allreduce sum" and "where rounding explains" in where.detail
    assert where.rank == (None if wrong == "off alike" else comm.size - 1), str(where)


class Numpy:
    """numpy, whose products with ``out`` hold ``value`` in their first column while it is set."""

    value = None

    def __getattr__(self, name):
        return getattr(np, name)

    def matmul(self, a, b, out):
        np.matmul(a, b, out=out)
        if self.value is not None:
            out[:, 0] = self.value


def _partial_products(monkeypatch, ranks, value):
    """From step 1 on these ranks' partial products of ffn_out hold the value, in one layer."""
    numpy, reduce = Numpy(), blas_layers.BlasLayers._reduce

    def struck(self, tensor, which, i, x, matrix, b):
        here = (tensor, i) == ("ffn_out", LAYER) and b.step >= 1 and self.ctx.rank in ranks
        numpy.value = value if here else None
        reduce(self, tensor, which, i, x, matrix, b)
        numpy.value = None

    monkeypatch.setattr(blas_layers, "np", numpy)
    monkeypatch.setattr(blas_layers.BlasLayers, "_reduce", struck)


def _blas(comm, model, **more):
    wishes = dict(model=named(model, GROUPED), prompt_ids=IDS, tokens=3, arith="blas", **more)
    return verify(comm, topology=f"tp={comm.size}", **wishes)


@pytest.mark.mpi(min_size=2)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", ["given by one", "given by all", "overflow"])
def test_sums_of_floats_that_are_not_finite_are_not_verified(comm, model, monkeypatch, case):
    """Nothing tells a model that leaves float32 from a fault in a product that is not checked."""
    quick_fabric(monkeypatch)
    last = comm.size - 1
    ranks, value, said = {
        "given by one": ({last}, np.nan, f"NaN or Inf given by rank {last};"),
        "given by all": (range(comm.size), np.inf, "NaN or Inf given by ranks 0, 1"),
        "overflow": (range(comm.size), np.float32(3e38), "may have overflowed"),
    }[case]
    _partial_products(monkeypatch, ranks, value)
    with pytest.raises(UsageError) as caught:
        _blas(comm, model)
    assert "leaves float32 at step 1, layer 1, tensor ffn_out" in str(caught.value)
    assert said in str(caught.value) and "rows with NaN or Inf" in str(caught.value)


@pytest.mark.mpi(min_size=2)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_that_is_not_in_the_sum_of_floats_is_a_failure(comm, model, monkeypatch):
    quick_fabric(monkeypatch)
    _partial_products(monkeypatch, {0}, np.nan)
    add = layers.Layers.sum_over_ranks

    def struck(self, name, i, sent, summed, b):
        add(self, name, i, sent, summed, b)
        np.nan_to_num(summed, copy=False)

    monkeypatch.setattr(layers.Layers, "sum_over_ranks", struck)
    outcome = _blas(comm, model)
    where = outcome.verdict.where
    assert outcome.exit_status == 1 and "of rank 0 are not in the sum" in where.detail
    assert (where.check, where.tensor, where.step) == ("allreduce sum", "ffn_out", 1)


@both_families
def test_sums_of_floats_give_no_alarm(comm, model, monkeypatch, facts):
    quick_fabric(monkeypatch)
    for seed in (1, 2):
        outcome = verify(
            comm, model=named(model, facts), prompt_ids=IDS, tokens=8, arith="blas", seed=seed,
            repeat=2, topology=f"tp={comm.size}",
        )  # fmt: skip
        assert outcome.verdict and outcome.verdict.kinds == ["moved", "agreed"][: comm.size], seed
