"""Manifests over ranks: made and checked together; weights in memory under any split."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import first_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "manifest"))

from manifest_samples import (  # noqa: E402
    MIXED, brute_word, finite, flip, tensors, write_file, write_shards,
)  # fmt: skip

import spimpi  # noqa: E402
from spimpi.context import DistributedContext  # noqa: E402
from spimpi.errors import CorruptionError, IncompleteError, UsageError  # noqa: E402
from spimpi.fingerprint import fingerprint  # noqa: E402
from spimpi.inference.derived import derived_names  # noqa: E402
from spimpi.manifest import (  # noqa: E402
    Derived, Manifest, TensorFacts, derive, read, read_manifest, write_manifest,
)  # fmt: skip
from spimpi.manifest.over_ranks import check_over, make_over  # noqa: E402
from spimpi.partition import Slab, TensorPartition  # noqa: E402
from spimpi.topology.tensor import TensorShard  # noqa: E402
from spimpi.trace.schema import Established  # noqa: E402

pytestmark = [pytest.mark.mpi, pytest.mark.wheels]

CONTENT = tensors(MIXED)
LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN, FFN, VOCAB = 4, 6, 2, 4, 24, 20, 37


def worlds(comm):
    for n in range(1, comm.size + 1):
        with first_ranks(comm, n) as part:
            if part:
                yield part


def raises_alike(comm, kind, words, work):
    """``work`` raises the same error on every rank; returns it."""
    with pytest.raises(kind, match=words) as caught:
        work()
    said = comm.allgather((type(caught.value), str(caught.value)))
    assert len(set(said)) == 1, said
    return caught.value


# A small model, its manifest, and what tensor rank t of tp holds of stage p of pp.


def whole_model() -> dict:
    rng = np.random.default_rng(5)
    shapes = {"embed": (VOCAB, HIDDEN), "norm": (HIDDEN,), "scale": ()}
    for i in range(LAYERS):
        shapes |= {
            f"{i}.norm": (HIDDEN,), f"{i}.q": (HEADS * WIDTH, HIDDEN),
            f"{i}.k": (KV_HEADS * WIDTH, HIDDEN), f"{i}.o": (HIDDEN, HEADS * WIDTH),
            f"{i}.up": (FFN, HIDDEN), f"{i}.down": (HIDDEN, FFN),
        }  # fmt: skip
    return {
        name: rng.standard_normal(shape).astype(np.float32).astype(ml_dtypes.bfloat16)
        if shape else np.float64(rng.standard_normal()).reshape(())
        for name, shape in shapes.items()
    }  # fmt: skip


MODEL = whole_model()


def manifest_of(model, seed=1069) -> Manifest:
    names = {"bfloat16": "BF16", "float64": "F64"}
    return Manifest(
        {
            name: TensorFacts(
                names[x.dtype.name], x.shape, fingerprint(x, spimpi.Tag(seed, name))
            )
            for name, x in model.items()
        },
        seed,
    )


MANIFEST = manifest_of(MODEL)


def held_by(rank, tp, pp, model=MODEL) -> dict:
    """name → (copy of a slice, where): tied embeddings on two stages, norms on every tensor rank,
    key/value heads shared where tp is more than they are."""
    p, t = divmod(rank, tp)
    shard = TensorShard(t, tp, HEADS, KV_HEADS, FFN, VOCAB)
    held = {}

    def give(name, where):
        slab = where.slab(shape_of(name, where)) if isinstance(where, TensorPartition) else where
        if slab is None:
            block = model[name]
        else:
            shape = shape_of(name, where)
            block = model[name][tuple(slice(a, a + n) for a, n in zip(slab.offset, shape))]
        held.setdefault(name, []).append((np.array(block), where))

    def shape_of(name, where):
        if isinstance(where, Slab):
            return (WIDTH, HIDDEN)
        shape = list(model[name].shape)
        shape[where.dim] = where.size
        return tuple(shape)

    if p in (0, pp - 1):
        give("embed", shard.vocabulary())
    if p == pp - 1:
        give("norm", None)
        give("scale", None)
    for i in range(LAYERS * p // pp, LAYERS * (p + 1) // pp):
        give(f"{i}.norm", None)
        give(f"{i}.q", shard.q(WIDTH))
        for head in shard.kv_heads:
            give(f"{i}.k", Slab((KV_HEADS * WIDTH, HIDDEN), (head * WIDTH, 0)))
        give(f"{i}.o", shard.q(WIDTH, 1))
        give(f"{i}.up", shard.ffn())
        give(f"{i}.down", shard.ffn(1))
    return held


def grids(comm):
    """(part of comm, tp, pp) for all splits of all smaller worlds."""
    for part in worlds(comm):
        for tp in range(1, part.size + 1):
            if part.size % tp == 0 and part.size // tp <= LAYERS and tp <= HEADS:
                yield part, tp, part.size // tp


def test_any_split_in_memory_is_verified(comm):
    for part, tp, pp in grids(comm):
        verdict = spimpi.verify_weights(part, held_by(part.rank, tp, pp), MANIFEST)
        assert verdict and verdict.check == "weights" and not verdict.missing
        copied = tp > 1 or pp > 1  # norms, heads; tied embeddings on two stages
        expected = Established.EXPECTED | (Established.AGREED if copied else Established(0))
        assert verdict.established == expected


def test_a_flipped_bit_in_any_slice_of_any_rank_is_found(comm):
    """Named: the tensor; the rank where it is the tensor's only one, or its copy is the odd one."""
    for part, tp, pp in grids(comm):
        if part.size < min(2, comm.size):
            continue
        for culprit in range(part.size):
            names = sorted(held_by(culprit, tp, pp))
            for name in names[culprit % 3 :: 3]:
                held = held_by(part.rank, tp, pp)
                if part.rank == culprit:
                    array = held[name][-1][0]
                    array.reshape(-1).view(f"u{array.itemsize}")[array.size // 2] ^= 1
                error = raises_alike(
                    part, CorruptionError, f"tensor {name},",
                    lambda held=held: spimpi.verify_weights(part, held, MANIFEST),
                )  # fmt: skip
                where = error.verdict.where
                assert (where.check, where.tensor) == ("weights", name)
                assert where.expected == f"{MANIFEST.tensors[name].fingerprint:016x}"
                assert where.expected != where.found
                assert where.rank in (None, culprit)
                places = [
                    (getattr(w, "offset", None) or getattr(w, "start", 0), r)
                    for r in range(part.size)
                    for _, w in held_by(r, tp, pp).get(name, [])
                ]
                mine = [at for at, r in places if r == culprit][-1]
                copies = [r for at, r in places if at == mine]
                if len(copies) > 1 or part.size == 1:
                    assert where.rank == culprit, (name, error)


def test_without_raising_the_verdict_is_falsy_on_every_rank(comm):
    held = held_by(comm.rank, 1, comm.size) if comm.size <= LAYERS else {}
    if comm.size > LAYERS:
        held = held_by(comm.rank, comm.size, 1) if comm.size <= HEADS else held_by(0, 1, 1)
    if comm.rank == comm.size - 1:
        held["norm"][0][0][3] = 9
    verdict = spimpi.verify_weights(comm, held, MANIFEST, check=False)
    assert not verdict and verdict.where.tensor == "norm" and not verdict.established
    assert verdict.expected == MANIFEST.tensors["norm"].fingerprint != verdict.actual


def test_a_swap_of_two_equal_slices_between_ranks_is_found(comm):
    for part in worlds(comm):
        if part.size < 2 or part.size > HEADS:
            continue
        held = held_by(part.rank, part.size, 1)
        swapped = {0: 1, 1: 0}.get(part.rank, part.rank)
        array, where = held["2.up"][0]
        other = held_by(swapped, part.size, 1)["2.up"][0][0]
        if other.shape == array.shape:
            held["2.up"] = (other, where)
        sizes = part.allgather(array.shape)
        if sizes[0] == sizes[1]:
            raises_alike(
                part, CorruptionError, "tensor 2.up",
                lambda held=held: spimpi.verify_weights(part, held, MANIFEST),
            )  # fmt: skip


def test_all_failing_tensors_are_told(comm):
    held = held_by(0, 1, 1)
    for name in ("0.q", "1.q", "2.q", "3.q", "3.o"):
        held[name][0][0][0, 0] = 100
    words = r"tensor 0\.q.*also 1\.q, 2\.q, 3\.q and 1 more|also .* and 1 more"
    raises_alike(
        comm, CorruptionError, words, lambda: spimpi.verify_weights(comm, held, MANIFEST)
    )  # fmt: skip


def test_tensors_on_no_rank_are_not_verified(comm):
    held = held_by(comm.rank, 1, 1) if comm.rank == 0 else {}
    for name in ("1.up", "norm"):
        held.pop(name, None)
    if comm.rank == 0:
        half = TensorPartition(0, 2, 1, HEADS * WIDTH)
        held["3.q"] = (MODEL["3.q"][HEADS * WIDTH // 2 :], half)
    verdict = spimpi.verify_weights(comm, held, MANIFEST, check=False)
    assert not verdict and verdict.where is None and not verdict.established
    assert sorted(verdict.missing) == [
        "of tensor 3.q 288 of 576 elements are on no rank", "tensor 1.up is on no rank",
        "tensor norm is on no rank",
    ]  # fmt: skip
    raises_alike(
        comm, IncompleteError, "incomplete: .*1.up is on no rank",
        lambda: spimpi.verify_weights(comm, held, MANIFEST),
    )  # fmt: skip
    if comm.rank == 0:
        held["0.o"][0][0][0, 0] = 100  # corruption goes before what is missing
    raises_alike(
        comm, CorruptionError, "tensor 0.o", lambda: spimpi.verify_weights(comm, held, MANIFEST)
    )


def test_slices_that_overlap_are_refused_on_every_rank(comm):
    if comm.size < 2:
        return
    held = held_by(0, 1, 1) if comm.rank == 0 else {}
    if comm.rank == comm.size - 1:
        held = {"2.up": (MODEL["2.up"][3:], Slab(MODEL["2.up"].shape, (3, 0)))}
    other = rf"the slice \[3\.\.20, 0\.\.24\] of rank {comm.size - 1}"
    words = rf"tensor 2\.up: .* of rank 0 and {other} overlap but are not the same"
    raises_alike(comm, UsageError, words, lambda: spimpi.verify_weights(comm, held, MANIFEST))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lm_head", (MODEL["embed"], None), "'lm_head' is not in the manifest"),
        ("norm", (MODEL["norm"].astype(np.float32), None), "norm: the manifest has BF16, found"),
        ("norm", (MODEL["norm"].view(np.int16), None), "norm: the manifest has BF16, found"),
        ("norm", (MODEL["norm"][1:], None), r"norm: the manifest has shape \[24\], found \[23\]"),
        ("norm", MODEL["norm"], "norm: expected .array, where. or a list"),
        ("norm", (MODEL["norm"].tolist(), None), "norm: expected a numpy array"),
        ("norm", (MODEL["norm"], 3), "norm: where must be None, a TensorPartition or a Slab"),
        ("0.q", (MODEL["0.q"], TensorPartition(0, 2, 0, 24)), "0.q: shard 0 of 2 must have 12"),
        ("0.q", (MODEL["0.q"], Slab((24, 24), (1, 0))), "0.q: an array of shape .* does not lie"),
    ],
)
def test_bad_input_on_one_rank_is_refused_on_all(comm, name, value, words):
    for culprit in {0, comm.size - 1}:
        held = {"norm": (MODEL["norm"], None)}
        if comm.rank == culprit:
            held[name] = value
        raises_alike(
            comm, UsageError, words, lambda held=held: spimpi.verify_weights(comm, held, MANIFEST)
        )
    raises_alike(
        comm, UsageError, "must map names",
        lambda: spimpi.verify_weights(comm, [] if comm.rank == comm.size - 1 else {}, MANIFEST),
    )  # fmt: skip


def test_words_may_carry_the_bits_and_layouts_do_not_matter(comm):
    held = held_by(0, 1, 1)
    for name in ("0.q", "1.q", "norm"):
        held[name] = (held[name][0][0].view(np.uint16), None)
    held["2.q"] = (np.asfortranarray(MODEL["2.q"]), None)
    held["scale"][0][0].flags.writeable = False
    assert spimpi.verify_weights(comm, held, MANIFEST, threads=2)


def test_ranks_with_different_manifests_are_refused(comm):
    if comm.size > 1:
        mine = manifest_of(MODEL, 1069 + (comm.rank == comm.size - 1))
        raises_alike(
            comm, UsageError, "all ranks must give the same manifest",
            lambda: spimpi.verify_weights(comm, {}, mine),
        )  # fmt: skip


def test_a_manifest_may_be_a_file_which_rank_0_reads(comm, shared_folder):
    path = shared_folder / "memory.spi.json"
    if comm.rank == 0:
        write_manifest(path, MANIFEST, overwrite=True)
        assert read_manifest(path) == MANIFEST
    comm.Barrier()
    given = path if comm.rank == 0 else "not looked at"
    assert spimpi.verify_weights(comm, held_by(0, 1, 1), given)
    raises_alike(
        comm, UsageError, "nosuch.json cannot be read",
        lambda: spimpi.verify_weights(comm, {}, shared_folder / "nosuch.json"),
    )  # fmt: skip
    raises_alike(
        comm, UsageError, "expected a Manifest or the name of its file, found int",
        lambda: spimpi.verify_weights(comm, {}, 7.0 if comm.rank else 7),
    )  # fmt: skip


def test_a_context_gives_its_communicator(comm):
    with DistributedContext(comm, seed=3) as ctx:
        held = held_by(0, 1, 1) if comm.rank == 0 else {}
        assert spimpi.verify_weights(ctx.world, held, MANIFEST, ctx=ctx)
        assert spimpi.verify_weights(comm, held, MANIFEST, ctx=ctx)


def test_an_empty_manifest_holds_of_nothing(comm):
    assert spimpi.verify_weights(comm, {}, Manifest({}))


# Derived tensors, which are checked where some rank gives them.

WEIGHTS = {name: MODEL[name].astype(np.float32) for name in ("0.q", "1.o")}


def derived_of(name):
    """(integers float32, exponents int32) of a matrix, by ldexp and frexp."""
    w = WEIGHTS[name].astype(float)
    exponents = np.frexp(np.abs(w).max(1))[1].astype(np.int32)
    return np.rint(np.ldexp(w, 24 - exponents[:, None])).astype(np.float32), exponents


def with_derived() -> Manifest:
    facts = {}
    for name in WEIGHTS:
        for derived, array in zip(derived_names(name), derived_of(name)):
            word = fingerprint(array, spimpi.Tag(1069, derived))
            dtype = "F32" if array.ndim == 2 else "I32"
            facts[derived] = TensorFacts(dtype, array.shape, word)
    return Manifest(MANIFEST.tensors, 1069, Derived("exact-1", facts))


def test_derived_tensors_are_checked_where_they_are_given(comm):
    manifest = with_derived()
    integers, exponents = derived_names("0.q")
    part = TensorPartition(0, comm.size, comm.rank, HEADS * WIDTH)
    rows = slice(part.start, part.stop)
    for array in (None, 0, 1):
        held = held_by(0, 1, 1) if comm.rank == 0 else {}
        assert spimpi.verify_weights(comm, held, manifest)  # none is missed
        given = [np.array(x[rows]) for x in derived_of("0.q")]
        held |= {integers: (given[0], part), exponents: (given[1], part)}
        if array is None:
            assert spimpi.verify_weights(comm, held, manifest)
            continue
        if comm.rank == comm.size - 1:
            given[array][-1] += 1
        raises_alike(
            comm, CorruptionError, f"tensor {(integers, exponents)[array]}",
            lambda held=held: spimpi.verify_weights(comm, held, manifest),
        )  # fmt: skip
    only = {exponents: (derived_of("0.q")[1][:5], Slab((HEADS * WIDTH,), (0,)))}
    verdict = spimpi.verify_weights(comm, only, manifest, check=False)
    assert f"of tensor {exponents} 19 of 24 elements are on no rank" in verdict.missing
    assert not any(integers in one for one in verdict.missing)


# Files, shared over the ranks.


@pytest.fixture(scope="module")
def shards(comm, shared_folder):
    folder = shared_folder / "shards"
    if comm.rank == 0:
        folder.mkdir()
        write_shards(folder, CONTENT, 3)
    comm.Barrier()
    return folder


def test_ranks_that_share_the_reading_make_the_same_manifest(comm, shards, monkeypatch):
    monkeypatch.setattr(read, "BLOCK_BYTES", 64)
    expected = {name: brute_word(name, *facts, 4) for name, facts in CONTENT.items()}
    for part in worlds(comm):
        done = []
        made = make_over(part, shards, seed=4, threads=2, progress=lambda *at: done.append(at))
        assert {n: f.fingerprint for n, f in made.tensors.items()} == expected
        read_here = part.allgather(max(done)[0] if done else 0)
        assert sum(read_here) == made.n_bytes  # each byte by one rank
        assert max(read_here) - min(read_here) <= 16
        assert check_over(part, made, shards, threads=1).exit_status == 0


def test_ranks_that_share_the_rows_derive_the_same(comm, shared_folder, monkeypatch):
    path = shared_folder / "finite.safetensors"
    if comm.rank == 0:
        write_file(path, finite(CONTENT))
    comm.Barrier()
    alone = make_over(MPI.COMM_SELF, path, seed=4, derived=True)
    monkeypatch.setattr(derive, "BLOCK_BYTES", 64)
    for part in worlds(comm):
        done = []
        made = make_over(
            part, path, seed=4, threads=2, derived=True, progress=lambda *at: done.append(at)
        )
        assert made == alone and len(made.derived.tensors) == 4
        assert done or part.rank


def test_a_row_that_is_not_finite_is_named_on_every_rank(comm, shared_folder):
    path = shared_folder / "inf.safetensors"
    if comm.rank == 0:
        x = np.ones((9, 4), np.float32)
        x[8, 1] = np.inf
        write_file(path, {"w": ("F32", x.shape, x.tobytes())})
    comm.Barrier()
    raises_alike(
        comm, UsageError, "row 8 of tensor w holds NaN or Inf",
        lambda: make_over(comm, path, seed=1, derived=True),
    )  # fmt: skip


def test_every_rank_learns_what_is_corrupted(comm, shards):
    made = make_over(comm, shards, seed=1)
    for byte in (-1, -40):
        if comm.rank == 0:
            flip(shards / "model-00002-of-00003.safetensors", byte)
        comm.Barrier()
        found = check_over(comm, made, shards)
        assert len(set(comm.allgather(str(found)))) == 1
        assert found.exit_status == 1 and len(found.corrupted) == 1
        assert found.corrupted[0].file == "model-00002-of-00003.safetensors"
        comm.Barrier()
        if comm.rank == 0:
            flip(shards / "model-00002-of-00003.safetensors", byte)
        comm.Barrier()


def test_a_rank_that_cannot_read_ends_the_work_of_all(comm, shards, monkeypatch):
    """Though the others need longer than the patience of reduction.together."""
    monkeypatch.setattr("spimpi.reduction.PATIENCE", 0.05)
    original = read._Files.read

    def slow_or_broken(self, block):
        if comm.rank == comm.size - 1:
            raise OSError(5, "Input/output error")
        import time

        time.sleep(0.05)
        return original(self, block)

    monkeypatch.setattr(read._Files, "read", slow_or_broken)
    raises_alike(comm, UsageError, "Input/output error", lambda: make_over(comm, shards, seed=1))


def test_errors_of_rank_0_are_raised_on_all(comm, shared_folder):
    words = "no model in .*nosuch"
    raises_alike(
        comm, UsageError, words, lambda: make_over(comm, shared_folder / "nosuch", seed=1)
    )  # fmt: skip
