"""Manifests made and checked by all ranks of a communicator, which share the reading.

Rank 0 reads the headers. Each rank then reads an equal range of all bytes; 8 bytes a tensor are
reduced. An error on one rank is raised on all of them, after the others have read their part.
"""

from dataclasses import replace

from spimpi.manifest.agreed import from_rank_0, patiently
from spimpi.manifest.check import Findings, findings, in_common
from spimpi.manifest.format import Manifest
from spimpi.manifest.make import manifest_of
from spimpi.manifest.read import default_threads, fingerprint_shares
from spimpi.manifest.source import Source, survey
from spimpi.reduction import reduce_fingerprints, together


def make_over(
    comm, model, *, seed: int, threads: int | None = None, progress=None, derived=False
) -> Manifest:
    """As make_manifest, the bytes shared over the ranks of ``comm``; collective. All ranks get it.

    ``progress``: of this rank's share.
    """

    def whole():
        source = survey(model)
        source.require_whole()
        return source, _matrices(source) if derived else None

    source, rows = from_rank_0(comm, whole)
    words = _words(comm, fingerprint_shares, source, seed, threads, progress)
    with together(comm):
        manifest = manifest_of(source, seed, words)
    if derived:
        from spimpi.manifest.derive import derived_of, derived_shares

        words = _words(comm, derived_shares, rows, seed, threads, progress)
        manifest = replace(manifest, derived=derived_of(rows, words))
    return manifest


def _matrices(source: Source) -> Source:
    from spimpi.manifest.derive import matrices

    return matrices(source)


def check_over(
    comm, manifest: Manifest, model, *, threads: int | None = None, progress=None
) -> Findings:
    """As check_files, the bytes shared over the ranks of ``comm``; collective."""

    def both():
        source = survey(model)
        return source, in_common(manifest, source, model)

    source, wanted = from_rank_0(comm, both)
    words = _words(comm, fingerprint_shares, wanted, manifest.seed, threads, progress)
    return findings(manifest, source, wanted, words)


def _words(comm, shares_in, source: Source, seed, threads, progress) -> dict[str, int]:
    def work():
        return shares_in(
            source, seed, part=comm.rank, n_parts=comm.size,
            threads=threads or default_threads(), progress=progress,
        )  # fmt: skip

    shares = patiently(comm, work)
    return dict(zip(shares, reduce_fingerprints(comm, list(shares.values()))))
