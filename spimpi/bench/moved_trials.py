"""Trials of the checks that compare fingerprints of moved or stored data and replicas; painting.

Each takes a Scene and gives (call, callers): ``call(comm, ctx)`` is the public check as one rank
calls it, ``callers`` the ranks that do, None for all. The fault is in what arrived.
"""

import json
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import spimpi
from spimpi.bench.planted import SHAPE
from spimpi.bench.scenes import RECORD, Scene, shards
from spimpi.checks import weights as weights_check
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.painting import color_hidden_states
from spimpi.manifest.check import check_files
from spimpi.manifest.dtypes import STORED_TYPES
from spimpi.manifest.format import Manifest, TensorFacts
from spimpi.manifest.make import make_manifest
from spimpi.manifest.over_ranks import check_over
from spimpi.manifest.slices import judge


def allgather(s: Scene):
    wrong, who = s.wrong_whole(), s.who()

    def call(comm, ctx):
        r = comm.rank
        gathered = wrong if r in who else s.whole
        return spimpi.verify_allgather(
            comm, s.shard(r).copy(), gathered, s.parts[r], s.tag, check=False, ctx=ctx
        )

    return call, None


def broadcast(s: Scene):
    root = int(s.rng.integers(s.n))
    wrong, who = s.wrong_whole(), s.who([r for r in range(s.n) if r != root])

    def call(comm, ctx):
        array = wrong if comm.rank in who else s.whole
        return spimpi.verify_broadcast(comm, array, s.tag, root, check=False, ctx=ctx)

    return call, None


def gather(s: Scene):
    root, wrong = int(s.rng.integers(s.n)), s.wrong_whole()

    def call(comm, ctx):
        r = comm.rank
        gathered = wrong if r == root else None
        return spimpi.verify_gather(
            comm, s.shard(r), gathered, s.parts[r], s.tag, root, check=False, ctx=ctx
        )

    return call, None


def scatter(s: Scene):
    root, wrong = int(s.rng.integers(s.n)), s.wrong_shard()

    def call(comm, ctx):
        r = comm.rank
        whole, part = s.whole if r == root else None, wrong if r == s.hit else s.shard(r)
        return spimpi.verify_scatter(
            comm, whole, part, s.parts[r], s.tag, root, check=False, ctx=ctx
        )

    return call, None


def alltoall(s: Scene):
    """Columns to rows."""
    wrong, columns = s.wrong_shard(), shards(s.dtype, s.number, s.n, 1)
    before = [spimpi.TensorPartition(1, s.n, r, SHAPE[1]) for r in range(s.n)]

    def call(comm, ctx):
        r = comm.rank
        received = wrong if r == s.hit else s.shard(r)
        return spimpi.verify_alltoall(
            comm, columns[r], received, before[r], s.parts[r], s.tag, check=False, ctx=ctx
        )

    return call, None


def ring(s: Scene):
    wrong = s.wrong_shard()

    def call(comm, ctx):
        before = (comm.rank - 1) % s.n
        received = wrong if before == s.hit else s.shard(before)
        return spimpi.verify_ring(
            comm, s.shard(comm.rank), received, s.tag, check=False, ctx=ctx
        )

    return call, None


def handoff(s: Scene):
    ends = tuple(int(r) for r in s.rng.choice(s.n, 2, replace=False))
    wrong, sent = s.wrong_shard(), {"microbatch": s.hit, "layers": (0, 7)}
    waited = dict(sent)
    if s.fault == RECORD:
        waited |= ({"microbatch": s.hit + 1}, {"layers": (8, 15)})[int(s.rng.integers(2))]

    def call(comm, ctx):
        receives = comm.rank == ends[1]
        buffer, told = (wrong, waited) if receives else (s.shard(s.hit), sent)
        return spimpi.verify_pipeline_handoff(
            comm, buffer, *ends, s.tag, where=s.parts[s.hit], check=False, ctx=ctx, **told
        )

    return call, ends


def at_rest(s: Scene):
    wrong = s.wrong_shard()

    def call(comm, ctx):
        array = s.shard(comm.rank).copy()
        watch = spimpi.at_rest(array, s.tag, s.parts[comm.rank])
        if comm.rank == s.hit:
            array[...] = wrong
        return watch.verify(comm, check=False, ctx=ctx)

    return call, None


def replicas(s: Scene):
    wrong, who = s.wrong_whole(), s.who(agreement=True)

    def call(comm, ctx):
        array = wrong if comm.rank in who else s.whole
        return spimpi.verify_replicas(comm, array, s.tag, check=False, ctx=ctx)

    return call, None


def colors(s: Scene):
    """Painted, then moved: ``whole`` and ``earlier`` are painted here."""
    s.whole = color_hidden_states(s.whole.copy(), s.tag)
    s.earlier = color_hidden_states(s.earlier.copy(), replace(s.tag, step=s.tag.step - 1))
    wrong = s.wrong_shard()
    s.rounds = 2

    def call(comm, ctx):
        slab = wrong if comm.rank == s.hit else s.shard(comm.rank)
        return spimpi.verify_colors(
            comm, slab, s.tag, s.parts[comm.rank], check=False, ctx=ctx
        )

    return call, None


# Weights and manifests: many tensors in one look

_STORED = {t.numpy_name: t.name for t in STORED_TYPES.values()}


def _manifest(scenes) -> Manifest:
    """Of the intact tensors, each named by its number."""
    empty = TensorFacts(_STORED[scenes[0].dtype], SHAPE)
    names = [f"layers.{i}.weight" for i in range(len(scenes))]
    tags = Manifest(dict.fromkeys(names, empty))
    return Manifest({
        name: replace(empty, fingerprint=fingerprint(s.whole, tags.tag(name)))
        for name, s in zip(names, scenes)
    })  # fmt: skip


def _held(s: Scene):
    """``held(rank)``: (array, where) of a rank; replicas where one of them is to be wrong."""
    if s.fault == "a wrong replica":
        wrong, who = s.wrong_whole(), s.who()
        return lambda rank: (wrong if rank in who else s.whole, None)
    wrong = s.wrong_shard()
    return lambda rank: (wrong if rank == s.hit else s.shard(rank), s.parts[rank])


def weights(s: Scene):
    manifest, held = _manifest([s]), _held(s)
    (name,) = manifest.tensors

    def call(comm, ctx):
        own = {name: held(comm.rank)}
        return spimpi.verify_weights(comm, own, manifest, check=False, ctx=ctx)

    return call, None


def weights_hold(scenes, ranks=None) -> list[bool]:
    """As ``verify_weights`` decides of each tensor; who judges which is not played."""
    manifest, held = _manifest(scenes), [_held(s) for s in scenes]
    slices = {name: [] for name in manifest.tensors}
    for rank in range(scenes[0].n):
        own = {name: held_(rank) for name, held_ in zip(slices, held)}
        for name, one in weights_check._own_slices(own, manifest, 1):
            slices[name].append(replace(one, rank=rank))
    judged = [judge(name, manifest.tensors[name], slices[name]) for name in slices]
    return [not (j.failed or j.uncovered or j.refused) for j in judged]


def _wrong_file(s: Scene) -> np.ndarray:
    array = s.whole.copy()
    array[s.rows] = s.wrong_shard()
    return array


def files_hold(scenes, ranks=None) -> list[bool]:
    """What ``check_files`` says of each tensor of a checkpoint in so many files as ranks."""
    return _hold(scenes, [_wrong_file(s) for s in scenes])


def files(s: Scene):
    """What ``check_over`` says, the bytes shared over the ranks."""
    wrong = _wrong_file(s)
    return lambda comm, ctx: _hold([s], [wrong], comm)[0], None


def _hold(scenes, wrong, comm=None) -> list[bool]:
    names = [f"layers.{i}.weight" for i in range(len(scenes))]
    with tempfile.TemporaryDirectory() as folder:
        _write(folder, names, [s.whole for s in scenes], scenes[0])
        manifest = make_manifest(folder, threads=1)
        _write(folder, names, wrong, scenes[0])
        if comm is None:
            found = check_files(manifest, folder, threads=1)
        else:
            found = check_over(comm, manifest, comm.bcast(folder), threads=1)
    failed = {mismatch.tensor for mismatch in found.corrupted}
    return [name not in failed for name in names]


def _write(folder, names, arrays, s: Scene) -> None:
    """safetensors files, as many as the scene has ranks."""
    for i in range(s.n):
        header, at = {}, 0
        chosen = list(zip(names, arrays))[i :: s.n]
        for name, array in chosen:
            header[name] = {
                "dtype": _STORED[s.dtype], "shape": SHAPE, "data_offsets": [at, at + array.nbytes],
            }  # fmt: skip
            at += array.nbytes
        text = json.dumps(header).encode()
        data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in chosen)
        path = Path(folder) / f"model-{i + 1:05}-of-{s.n:05}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
