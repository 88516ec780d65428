"""A manifest of a checkpoint's files."""

from dataclasses import replace

from spimpi.errors import UsageError
from spimpi.fingerprint.tag import DEFAULT_SEED
from spimpi.manifest.format import Manifest
from spimpi.manifest.read import default_threads, fingerprint_shares
from spimpi.manifest.source import Source, survey


def make_manifest(
    model, *, seed: int = DEFAULT_SEED, threads: int | None = None, progress=None
) -> Manifest:
    """The manifest of a directory of safetensors (docs/manifest.md: what MODEL may be).

    Reads every byte, in constant memory, on ``threads`` threads (default: this process's share of
    the cores); ``progress(done, total)``, in bytes, is called after each block. Raises UsageError
    where a file is missing, broken or of a dtype without fingerprints. Not collective.
    """
    source = survey(model)
    source.require_whole()
    words = fingerprint_shares(
        source, seed, threads=threads or default_threads(), progress=progress
    )
    return manifest_of(source, seed, words)


def manifest_of(source: Source, seed: int, words: dict[str, int]) -> Manifest:
    """The manifest of what was read."""
    tensors = {
        name: replace(place.facts, fingerprint=words[name])
        for name, place in source.tensors.items()
    }
    if not tensors:
        msg = f"the files hold no tensors: {', '.join(source.files)}"
        raise UsageError(msg)
    return Manifest(tensors, seed)
