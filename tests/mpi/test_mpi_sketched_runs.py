"""``verify --sketch``: sketches of a run's tensors are the same whatever the split, up to rounding."""

import numpy as np
import pytest
from mpi_helpers import GROUPED, IDS, OLMO, first_ranks, named, on_rank_0, quick_fabric

from spimpi import Tag, sketch
from spimpi.inference.layers import Layers
from spimpi.inference.tensors import golden_columns
from spimpi.trace import open as open_trace
from spimpi.trace.reading.check import check
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import verify_distributed_inference
from spimpi.verification.tracing import Tracer

pytestmark = pytest.mark.mpi

SPLITS = [
    (1, "tp=1"), (2, "tp=2"), (2, "sp=2"), (3, "tp=3"), (3, "pp=3"), (3, "sp=3"), (3, "exo"),
    (4, "tp=2,sp=2"), (4, "tp=2,dp=2"), (4, "pp=2,dp=2"),
]  # fmt: skip
ROUNDING = 1e-14


def traced(comm, path, driver="gather", sketch=True, **wishes):
    """(outcome, sketches, names of tensors) of a traced run. Collective over ``comm``."""
    job = prepare(Request(sketch=sketch, **wishes), comm.size)
    tracer = Tracer(comm.rank, path, driver, True, "test", "run-1")
    outcome = verify_distributed_inference(comm, job, tracer=tracer)
    with open_trace(path) as trace:
        found, names = trace.sketches(), [tensor.name for tensor in trace.tensors]
    comm.Barrier()
    return outcome, found, names


def alone(comm, path, **wishes):
    """The sketches of a run on one rank, on every rank."""
    from mpi4py import MPI

    return on_rank_0(comm, lambda: traced(MPI.COMM_SELF, path, **wishes)[1])


def distance(a, b) -> np.ndarray:
    """Relative distance of each pair of sketches, as docs/sketches.md estimates it."""
    squares = ((a["projections"] - b["projections"]) ** 2).mean(axis=1)
    return np.sqrt(squares / a["sumsq"])


def places(found, names) -> list[tuple]:
    return [(int(s["step"]), names[s["tensor"]], int(s["layer"])) for s in found]


@pytest.mark.parametrize(
    ("facts", "arith", "splits"),
    [(GROUPED, "exact", SPLITS), (OLMO, "exact", SPLITS), (GROUPED, "blas", SPLITS[3:9:2])],
    ids=["llama", "olmo", "blas"],
)
def test_every_split_gives_the_sketches_of_one_rank(
    comm, model, mpi_tmp_path, monkeypatch, facts, arith, splits
):
    quick_fabric(monkeypatch)
    wishes = dict(model=named(model, facts), prompt_ids=IDS, tokens=3, arith=arith)
    expected = alone(comm, mpi_tmp_path / "alone.h5", **wishes)
    rounding = ROUNDING if arith == "exact" else 1e-4  # of float32, through three layers
    columns = golden_columns(facts["n_layers"])[:-1]  # without tokens
    for n, topology in splits:
        if n > comm.size:
            continue
        with first_ranks(comm, n) as part:
            if not part:
                continue
            more = {"memory": ",".join("1" * n)} if topology == "exo" else {}
            path = mpi_tmp_path / "run.h5"
            outcome, found, names = traced(part, path, topology=topology, **wishes, **more)
            assert outcome.exit_status == 0, topology
            assert places(found, names) == [(s, *column) for s in range(3) for column in columns]
            for name in ("size", "nonfinite"):
                assert np.array_equal(found[name], expected[name]), (topology, name)
            assert distance(found, expected).max() < rounding, topology
            for name in ("absmax", "sumsq"):
                assert np.allclose(found[name], expected[name], rtol=rounding, atol=0), topology


@pytest.mark.parametrize("facts", [GROUPED, OLMO], ids=["llama", "olmo"])
def test_they_are_the_library_s_sketches_of_the_whole_tensors(
    comm, model, mpi_tmp_path, monkeypatch, facts
):
    quick_fabric(monkeypatch)
    tensors, made = {}, Layers._made

    def seen(self, tensor, layer, array, b):
        made(self, tensor, layer, array, b)
        if self.sketcher is not None:
            tensors[b.step, tensor, layer] = array.copy()

    monkeypatch.setattr(Layers, "_made", seen)
    wishes = dict(model=named(model, facts), prompt_ids=IDS, tokens=2)
    with first_ranks(comm, 1) as part:
        if part:
            _, found, names = traced(part, mpi_tmp_path / "run.h5", topology="tp=1", **wishes)
            by_place = dict(zip(places(found, names), found))
            assert len(tensors) == 2 * 5 * facts["n_layers"]
            for (step, name, layer), whole in tensors.items():
                one = by_place[step, name, layer]
                expected = sketch(whole, Tag(1069, name, layer, step))
                assert one["size"] == expected.n_elements and one["absmax"] == expected.absmax
                assert np.allclose(one["projections"], expected.projections, rtol=0, atol=1e-12)
                assert np.isclose(one["sumsq"], expected.sum_squares, rtol=1e-14)


def test_exact_and_blas_differ_by_rounding_that_grows_with_the_layers(
    comm, mpi_tmp_path, monkeypatch
):
    quick_fabric(monkeypatch)
    wishes = dict(tokens=3, topology=f"tp={comm.size}" if comm.size <= 8 else None)
    _, exact, names = traced(comm, mpi_tmp_path / "exact.h5", **wishes)
    _, blas, _ = traced(comm, mpi_tmp_path / "blas.h5", arith="blas", **wishes)
    apart = distance(exact, blas)
    embed = [name == "embed" for _, name, _ in places(exact, names)]
    first = (exact["layer"] == 0) & (exact["step"] == 0)
    assert apart[embed].max() < ROUNDING
    assert 1e-8 < apart[first].min() and apart[first].max() < 5e-6
    assert apart.max() < 1e-4


@pytest.mark.parametrize(
    ("tensor", "layer", "step", "split"),
    [("attn", 2, 1, "tp"), ("ffn", 0, 0, "tp"), ("hidden", 1, 1, "pp"), ("qkv", 1, 0, "dp")],
)
def test_a_planted_flip_shows_first_in_the_sketch_of_its_tensor(
    comm, model, mpi_tmp_path, monkeypatch, tensor, layer, step, split
):
    quick_fabric(monkeypatch)
    wishes = dict(model=named(model, GROUPED), prompt_ids=IDS, tokens=2)
    expected = alone(comm, mpi_tmp_path / "alone.h5", **wishes)
    n = min(comm.size, 3)
    # Of stages, the one that has the layer.
    rank = min(layer, n - 1) if split == "pp" and n == 3 else (0 if split == "pp" else n - 1)
    fault = f"bitflip:tensor={tensor},layer={layer},step={step},rank={rank},bit=22"
    with first_ranks(comm, n) as part:
        if part:
            outcome, found, names = traced(
                part, mpi_tmp_path / "run.h5", topology=f"{split}={n}", faults=(fault,), **wishes
            )
            assert outcome.exit_status == 1
            first = np.flatnonzero(distance(expected, found) > ROUNDING)[0]
            assert places(found, names)[first] == (step, tensor, layer)


def test_only_the_first_run_of_several_is_sketched(comm, model, mpi_tmp_path, monkeypatch):
    quick_fabric(monkeypatch)
    wishes = dict(model=named(model, GROUPED), prompt_ids=IDS, tokens=2, repeat=2)
    _, found, _ = traced(comm, mpi_tmp_path / "run.h5", "parts", **wishes)
    assert set(found["repeat"]) == {0} and len(found) == 2 * (5 * 3 + 2)
    assert check(mpi_tmp_path / "run.h5").state == "intact"


def test_no_sketches_are_taken_unless_asked_for(comm, model, mpi_tmp_path, monkeypatch):
    quick_fabric(monkeypatch)
    wishes = dict(model=named(model, GROUPED), prompt_ids=IDS, tokens=2)
    outcome, found, _ = traced(comm, mpi_tmp_path / "run.h5", sketch=False, **wishes)
    assert outcome.exit_status == 0 and len(found) == 0
