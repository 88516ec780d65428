"""A rank reads its share of a checkpoint, holds its share of it, and refuses what will not fit."""

import gc
import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from spimpi.checks.recorder import Recorder
from spimpi.context import DistributedContext
from spimpi.errors import UsageError
from spimpi.inference import exact, footprint
from spimpi.inference.checkpoint import open_checkpoint
from spimpi.inference.config import load_config
from spimpi.inference.derived import derived_names
from spimpi.inference.derived_check import check_derived, multiplied
from spimpi.inference.footprint import rank_bytes
from spimpi.inference.weight_check import second_read
from spimpi.inference.weights import Loader
from spimpi.manifest.over_ranks import make_over
from spimpi.topology.grid import parse
from spimpi.trace.schema import Stage
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import verify_distributed_inference

pytestmark = pytest.mark.mpi

MIB = 1 << 20
# 17 million weights: 34 MB in bfloat16, of which one layer's are 5.8 MB.
LARGE = dict(
    vocab_size=2048, hidden_size=512, intermediate_size=1536, n_layers=5, n_heads=8, n_kv_heads=4,
    head_dim=64, dtype="bfloat16", max_position_embeddings=512,
)  # fmt: skip


def _kernel_says(file, key):
    text = Path(f"/proc/self/{file}").read_text()
    return int(re.search(rf"^{key}:\s+(\d+)", text, re.MULTILINE).group(1))


def _private():
    """Bytes of private memory now: pages of a mapped file can be taken back at any time."""
    gc.collect()
    return 1024 * _kernel_says("status", "RssAnon")


def _peak():
    return 1024 * _kernel_says("status", "VmHWM")


@contextmanager
def _most_private(monkeypatch, checkpoint):
    """Yields a list of the private memory in use where loading uses most: after each slice was
    read, and after each was scaled. (VmHWM also counts pages of the mapped file, and how many the
    kernel maps around those that are read differs between kernels.)"""
    most = []

    def watched(function):
        def call(*args, **options):
            result = function(*args, **options)
            most.append(1024 * _kernel_says("status", "RssAnon"))
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read", watched(checkpoint.read))
        patch.setattr(exact, "quantize_weights", watched(exact.quantize_weights))
        yield most
    assert len(most) > 2 * checkpoint.config.n_layers


@pytest.fixture(scope="module")
def large(model):
    return model("large", **LARGE)


@pytest.mark.mpi(min_size=4)
def test_a_tensor_rank_reads_and_holds_a_quarter(comm, large, monkeypatch):
    if comm.size != 4:
        pytest.skip("tp=4")
    config = load_config(large)
    checkpoint = open_checkpoint(large, config)
    with DistributedContext(comm, parse("tp=4", 4, config.n_heads, config.n_layers)) as ctx:
        total = checkpoint.total_bytes
        norms = (2 * config.n_layers + 1) * config.hidden_size * 2
        assert total > 32 * MIB
        small = Loader(ctx, config, checkpoint, True)  # a first use allocates what is kept anyway
        small._layer(0)
        del small
        checkpoint.bytes_read = 0
        read, held = _kernel_says("io", "rchar"), _private()
        with _most_private(monkeypatch, checkpoint) as most:
            part = Loader(ctx, config, checkpoint, True).load()
        shares = second_read(ctx, checkpoint)
        growth, peak = _private() - held, max(most) - held
        read = _kernel_says("io", "rchar") - read

        # Every matrix splits in four exactly; norms are read by all.
        assert checkpoint.bytes_read == (total - norms) // 4 + norms
        # The second read is cut by bytes; what the kernel counted beyond it are headers (the
        # first read maps the file: the kernel doesn't count that).
        assert abs(checkpoint.bytes_reread - total // 4) <= 8
        assert checkpoint.bytes_reread <= read < total // 4 + MIB
        assert set(shares) == set(checkpoint.tensors)

        # Held: four bytes a weight, two of the embedding's, and vectors for the checks.
        weights = (total - norms) // 2 // 4
        assert part.n_bytes < 4 * weights + 8 * norms + MIB // 2
        assert part.n_bytes > 3 * weights
        # Beside them the allocator keeps room of slices that were freed, and a block of 4 MiB.
        assert growth < part.n_bytes + 12 * MIB < 4 * weights * 2
        # At no time more than what is asked for before loading, and what the allocator rounds up
        # (huge pages have 2 MiB).
        promised = rank_bytes(ctx, config, 2, 1, 2, 1)
        assert peak < promised + 4 * MIB
        assert promised < 2 * total  # a whole model would take 4 bytes a weight


@pytest.mark.mpi(min_size=2)
def test_what_was_derived_is_checked_where_it_lies(comm, large):
    """Nothing is copied or gathered: not a slice where all is well, one where it is not."""
    config = load_config(large)
    checkpoint = open_checkpoint(large, config)
    names = [n for name in multiplied(config) for n in derived_names(name)]
    tp = f"tp={comm.size}"
    with DistributedContext(comm, parse(tp, comm.size, config.n_heads, config.n_layers)) as ctx:
        loader = Loader(ctx, config, checkpoint, True)
        part = loader.load()
        expected = make_over(comm, large, seed=ctx.seed, derived=True).derived.tensors
        words = {name: expected[name].fingerprint for name in names}
        recorder = Recorder({name: i for i, name in enumerate(names)}, ctx.rank)

        def grown_by_a_check():
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            at_first = _peak()
            check_derived(ctx, config, loader, words, recorder)
            return _peak() - at_first

        grown_by_a_check()  # a first use allocates what is kept anyway
        read = checkpoint.bytes_read
        assert grown_by_a_check() < MIB // 2
        assert checkpoint.bytes_read == read
        assert recorder.totals[Stage.WEIGHTS].failed == 0
        if ctx.rank == comm.size - 1:
            part.layers[2].down.values[0, 0] += 1
        slice_bytes = 4 * part.layers[2].down.values.size
        assert grown_by_a_check() < 3 * slice_bytes + MIB // 2
        assert checkpoint.bytes_read == read + slice_bytes // 2
        assert recorder.totals[Stage.WEIGHTS].failed == 1
        assert recorder.all_failures()["peer"].tolist() == [comm.size - 1]


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(comm, large, monkeypatch):
    monkeypatch.setattr(footprint, "available_bytes", lambda: 60 * MIB)
    topology = f"dp={comm.size}"
    wishes = Request(model=str(large), prompt_ids=("1,2",) * comm.size, topology=topology)
    job = prepare(wishes, comm.size)
    with pytest.raises(UsageError, match="does not fit") as caught:
        verify_distributed_inference(comm, job)
    said = str(caught.value)
    assert comm.allgather(said) == [said] * comm.size
    needed, rank_0, available = (float(n) for n in re.findall(r"([\d.]+) GiB", said))
    assert available == 0.1
    assert needed == pytest.approx(comm.size * rank_0, abs=0.1)
    assert f"{comm.size} ranks on {os.uname().nodename}" in said
    assert job.checkpoint.bytes_read == job.checkpoint.bytes_reread == 0
