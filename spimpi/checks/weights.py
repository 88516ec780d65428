"""Weights in memory, under any split, against a manifest of the checkpoint.

Every rank fingerprints its slices. Their places and words go to one rank for each tensor, which
sees what covers the tensor, what is there twice and what is nowhere, and compares. So no rank
needs the others' places, and a rank's memory for them shrinks with the number of ranks.
"""

from collections.abc import Mapping
from math import prod

import numpy as np
from mpi4py import MPI

from spimpi.checks.check import Check, Rule
from spimpi.checks.pending import settle
from spimpi.checks.verdict import NO_ELEMENTS, Verdict, Where
from spimpi.errors import UsageError
from spimpi.fingerprint import arrays, as_array, fingerprint
from spimpi.fingerprint.tag import Tag
from spimpi.manifest.agreed import from_rank_0
from spimpi.manifest.dtypes import carries
from spimpi.manifest.format import Manifest, TensorFacts, read_manifest
from spimpi.manifest.slices import HeldSlice, Judged, judge
from spimpi.reduction import blocks, together
from spimpi.trace.schema import Established

_SHOWN = 3


def verify_weights(comm, tensors, manifest, *, check=True, ctx=None, threads=1) -> Verdict:
    """Check that the ranks' slices of weights together are the tensors of a manifest, bit for bit.

    ``tensors``: name in the checkpoint → (array, where), or a list of such pairs; ``where`` is a
    TensorPartition, a Slab, or None for the whole tensor. Arrays are raw slices, of the dtype that
    is stored (or unsigned words that carry its bits). A rank without slices gives {}.
    ``manifest``: a Manifest, or the file's name, which rank 0 reads (in a batch at its end, and the
    slices are fingerprinted then).

    Slices at the same place are replicas: they count once and are compared. Tensors that the
    slices do not cover are in the verdict's ``missing``: not verified; derived tensors are
    checked where some rank gives them. Establishes expected, and agreed where there were
    replicas. docs/manifest.md has what each outcome means.

    Collective over ``comm``. Raises on all ranks: UsageError for names, shapes and dtypes that
    are not the manifest's, and for slices that overlap without being the same; with ``check``
    CorruptionError where the check fails, IncompleteError where tensors are not covered.
    """
    c = Check("weights", Tag(name="checkpoint"), Rule.GATHERED, Established.EXPECTED, threads)
    c.words = np.zeros(1, np.uint64)

    def build(c):
        own = None
        if isinstance(manifest, Manifest):
            own = _own_slices(tensors, manifest, threads)
            c.words[0] = _word(manifest)
            c.n_bytes = sum(_n_bytes(manifest.all_tensors[name], held) for name, held in own)

        def conclude(session, everyone):
            given = everyone[:, 0]
            common, slices = manifest, own
            if not given.all() or np.ptp(given):
                common, slices = _common(session.comm, manifest, given, tensors, threads)
            verdict = _verdict(
                session.comm, common, [
                    judge(name, common.all_tensors[name], held)
                    for name, held in _exchanged(session.comm, common, slices)
                    if held or name in common.tensors
                ],
            )  # fmt: skip
            c.got = _word(common) if verdict else 0  # for a trace: what the slices are
            return verdict

        c.conclude = conclude

    return settle(comm, c, build, check, ctx)


def _word(manifest: Manifest) -> int:
    """A word of a manifest's checksum; 0 stands for no manifest."""
    return int(manifest.checksum[:16], 16) or 1


def _n_bytes(facts: TensorFacts, held: HeldSlice) -> int:
    return facts.stored.wordsize * facts.stored.words * prod(held.shape)


def _common(comm, manifest, given, tensors, threads):
    """Rank 0's manifest on all ranks, and this rank's slices. Collective.

    Refused where another rank holds another manifest; ``given``: everybody's word of it, or 0.
    """
    common = from_rank_0(
        comm, lambda: manifest if isinstance(manifest, Manifest) else _read(manifest)
    )
    with together(comm):
        if given[comm.rank] not in (0, _word(common)):
            msg = (
                f"all ranks must give the same manifest: rank 0's has the checksum "
                f"{common.checksum[:16]}, that of rank {comm.rank} {manifest.checksum[:16]}"
            )
            raise UsageError(msg)
        slices = _own_slices(tensors, common, threads)
    return common, slices


def _read(path) -> Manifest:
    try:
        return read_manifest(path)
    except TypeError:
        msg = f"expected a Manifest or the name of its file, found {type(path).__name__}"
        raise UsageError(msg) from None


def _own_slices(tensors, manifest: Manifest, threads: int) -> list[tuple[str, HeldSlice]]:
    """This rank's slices, fingerprinted. Local."""
    if not isinstance(tensors, Mapping):
        msg = f"tensors must map names to (array, where), found {type(tensors).__name__}"
        raise UsageError(msg)
    own, arrays_at = [], {}
    for name, held in tensors.items():
        facts = manifest.all_tensors.get(name)
        if facts is None:
            msg = (
                f"tensor {name!r} is not in the manifest, which has {len(manifest.tensors)} "
                f"tensors such as {next(iter(manifest.tensors), 'none')!r}: use the checkpoint's "
                "names, and for a tied copy the name of the tensor that it copies"
            )
            raise UsageError(msg)
        for pair in held if isinstance(held, list) else [held]:
            if not isinstance(pair, tuple) or len(pair) != 2:
                msg = (
                    f"tensor {name}: expected (array, where) or a list of such pairs, found "
                    f"{type(pair).__name__}"
                )
                raise UsageError(msg)
            try:
                one = _fingerprinted(manifest, name, facts, *pair, threads)
                there = arrays_at.setdefault((name, one.place), [])
                array = as_array(pair[0])
                # The same memory twice is no replica.
                if not any(arrays.share_memory(array, other) for other in there):
                    own.append((name, one))
                there.append(array)
            except UsageError as error:
                msg = f"tensor {name}: {error}"
                raise UsageError(msg) from None
    return own


def _fingerprinted(manifest, name, facts: TensorFacts, array, where, threads) -> HeldSlice:
    array = as_array(array)
    arrays.check_where(where)
    if not carries(array.dtype, facts.stored):
        msg = (
            f"the manifest has {facts.dtype}, found an array of {array.dtype}: give the raw "
            "slices, before they are converted"
        )
        raise UsageError(msg)
    slab = arrays.slab_of(array.shape, where)
    if slab.global_shape != facts.shape:
        msg = f"the manifest has shape {list(facts.shape)}, found {list(slab.global_shape)}"
        raise UsageError(msg)
    word = fingerprint(array, manifest.tag(name), slab, threads)
    return HeldSlice(-1, slab.offset, tuple(array.shape), word)


def _exchanged(comm, manifest: Manifest, own):
    """(tensor, all its slices) for the tensors that this rank judges. Collective.

    Tensor i is judged by rank i modulo the number of ranks. A slice travels as its tensor's
    number, its word, its offset and its shape, padded to the most axes that a tensor has.
    """
    names = list(manifest.all_tensors)
    number = {name: i for i, name in enumerate(names)}
    axes = max((len(facts.shape) for facts in manifest.all_tensors.values()), default=0)
    own = sorted(own, key=lambda one: number[one[0]] % comm.size)
    rows = np.zeros((len(own), 2 + 2 * axes), np.uint64)
    counts = np.zeros(comm.size, np.int64)
    for row, (name, one) in zip(rows, own):
        n = len(one.shape)
        row[:2] = number[name], one.word
        row[2 : 2 + n], row[2 + axes : 2 + axes + n] = one.offset, one.shape
        counts[number[name] % comm.size] += 1
    incoming = np.empty_like(counts)
    comm.Alltoall(counts, incoming)
    received = np.empty((int(incoming.sum()), rows.shape[1]), np.uint64)
    width = rows.shape[1]
    comm.Alltoallv(
        blocks(rows, [int(n) * width for n in counts]),
        blocks(received, [int(n) * width for n in incoming]),
    )
    slices = {name: [] for name in names[comm.rank :: comm.size]}
    for rank, row in zip(np.repeat(np.arange(comm.size), incoming).tolist(), received.tolist()):
        name = names[row[0]]
        n = len(manifest.all_tensors[name].shape)
        offset, shape = tuple(row[2 : 2 + n]), tuple(row[2 + axes : 2 + axes + n])
        slices[name].append(HeldSlice(rank, offset, shape, row[1]))
    return list(slices.items())


def _verdict(comm, manifest: Manifest, judged: list[Judged]) -> Verdict:
    """The verdict on all tensors, the same on all ranks. Collective."""
    problems = [j for j in judged if j.failed or j.uncovered or j.refused]
    everyone = comm.allgather((any(j.copied for j in judged), problems))
    order = {name: i for i, name in enumerate(manifest.all_tensors)}
    found = [(j, judge_) for judge_, (_, own) in enumerate(everyone) for j in own]
    found.sort(key=lambda one: order[one[0].name])
    refused = [j.refused for j, _ in found if j.refused]
    if refused:
        more = f" (and {len(refused) - 1} more tensors)" if len(refused) > 1 else ""
        raise UsageError(refused[0] + more)
    missing = tuple(_uncovered(manifest, j) for j, _ in found if j.uncovered)
    failed = [(j, judge_) for j, judge_ in found if j.failed]
    if failed:
        first = failed[0][0]
        where = _where(comm, failed)
        return Verdict(
            False, Established(0), where, missing, check="weights", expected=first.expected,
            actual=first.found,
        )  # fmt: skip
    if missing:
        return Verdict(False, Established(0), None, missing, check="weights")
    if not sum(facts.n_elements for facts in manifest.tensors.values()):
        # Derived tensors may be given alone: they are then what was compared.
        if not any(comm.allgather(any(manifest.all_tensors[j.name].n_elements for j in judged))):
            return Verdict(True, Established(0), missing=(NO_ELEMENTS,), check="weights")
    copied = any(flag for flag, _ in everyone)
    established = Established.EXPECTED | (Established.AGREED if copied else Established(0))
    return Verdict(True, established, check="weights")


def _uncovered(manifest: Manifest, j: Judged) -> str:
    total = manifest.all_tensors[j.name].n_elements
    if j.uncovered == total:
        return f"tensor {j.name} is on no rank"
    return f"of tensor {j.name} {j.uncovered} of {total} elements are on no rank"


def _where(comm, failed) -> Where:
    """The place of the first failure, the others named in its detail. Collective."""
    first, judge_ = failed[0]
    hosts = comm.allgather(MPI.Get_processor_name())
    rank = first.wrong[0] if len(first.wrong) == 1 else None
    others = [j.name for j, _ in failed[1 : 1 + _SHOWN]]
    more = len(failed) - 1 - len(others)
    also = f"also {', '.join(others)}" + (f" and {more} more" if more else "") if others else ""
    words = ["" if w is None else f"{w:016x}" for w in (first.expected, first.found)]
    return Where(
        "weights", first.name, 0, -1, -1, rank, "" if rank is None else hosts[rank], judge_,
        *words, "; ".join(filter(None, [first.detail, also])),
    )  # fmt: skip
