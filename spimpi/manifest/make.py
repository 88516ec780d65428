"""A manifest of a checkpoint's files."""

from dataclasses import replace

from spimpi.errors import UsageError
from spimpi.fingerprint.tag import DEFAULT_SEED
from spimpi.manifest.format import Manifest
from spimpi.manifest.read import default_threads, fingerprint_shares
from spimpi.manifest.source import Source, survey


def make_manifest(
    model, *, seed: int = DEFAULT_SEED, threads: int | None = None, progress=None, derived=False
) -> Manifest:
    """The manifest of a directory of safetensors (docs/manifest.md: what MODEL may be).

    Reads every byte, in constant memory, on ``threads`` threads (default: this process's share of
    the cores); ``progress(done, total)``, in bytes, is called after each block. ``derived``: with
    the scaled integers and exponents of exact arithmetic, for which the matrices are read again.
    Raises UsageError where a file is missing, broken or of a dtype without fingerprints, and where
    nothing can be derived. Not collective.
    """
    source = survey(model)
    source.require_whole()
    threads = threads or default_threads()
    words = fingerprint_shares(source, seed, threads=threads, progress=progress)
    made = manifest_of(source, seed, words)
    if derived:
        from spimpi.manifest.derive import derived_of, derived_shares, matrices

        rows = matrices(source)
        words = derived_shares(rows, seed, threads=threads, progress=progress)
        made = replace(made, derived=derived_of(rows, words))
    return made


def manifest_of(source: Source, seed: int, words: dict[str, int]) -> Manifest:
    """The manifest of what was read, without what can be derived from it."""
    tensors = {
        name: replace(place.facts, fingerprint=words[name])
        for name, place in source.tensors.items()
    }
    if not tensors:
        msg = f"the files hold no tensors: {', '.join(source.files)}"
        raise UsageError(msg)
    return Manifest(tensors, seed)
