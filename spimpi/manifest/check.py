"""A checkpoint's files against a manifest."""

from dataclasses import dataclass, replace

from spimpi.errors import UsageError
from spimpi.manifest.format import Manifest
from spimpi.manifest.read import default_threads, fingerprint_shares
from spimpi.manifest.source import Source, survey

_SHOWN = 3


@dataclass(frozen=True)
class Mismatch:
    """A tensor whose bits in ``file`` are not those that the manifest was made of."""

    tensor: str
    file: str
    expected: int
    found: int

    def __str__(self):
        return (
            f"{self.tensor} in {self.file}: expected {self.expected:016x}, found {self.found:016x}"
        )


@dataclass(frozen=True)
class Findings:
    """What a check found. ``corrupted``: tensors; ``broken`` and ``absent``: files, with what is
    wrong; ``missing``: tensors that are not where they should be, with why; ``extra``: tensors
    of the files that the manifest does not know; ``checked``: tensors that were compared."""

    corrupted: tuple[Mismatch, ...]
    broken: dict[str, str]
    absent: dict[str, str]
    missing: dict[str, str]
    extra: tuple[str, ...]
    checked: int
    n_bytes: int

    @property
    def exit_status(self) -> int:
        """1 corruption, 3 incomplete, 0 all equal."""
        if self.corrupted or self.broken:
            return 1
        return 3 if self.absent or self.missing or self.extra else 0


def check_files(
    manifest: Manifest, model, *, threads: int | None = None, progress=None
) -> Findings:
    """A checkpoint's files against a manifest, every tensor compared. Not collective.

    Reads every byte in constant memory on ``threads`` threads. Raises UsageError where MODEL
    holds no safetensors or is another model: tensors of other shapes or dtypes, or none in common.
    """
    source = survey(model)
    wanted = in_common(manifest, source, model)
    words = fingerprint_shares(
        wanted, manifest.seed, threads=threads or default_threads(), progress=progress
    )
    return findings(manifest, source, wanted, words)


def in_common(manifest: Manifest, source: Source, model) -> Source:
    """The source without tensors that the manifest does not know. UsageError: other model."""
    common = {n: place for n, place in source.tensors.items() if n in manifest.tensors}
    if not common and source.tensors:
        msg = (
            f"{model} is another model: none of its {len(source.tensors)} tensors is among the "
            f"{len(manifest.tensors)} of the manifest (it has {next(iter(source.tensors))}, the "
            f"manifest {next(iter(manifest.tensors), 'nothing')})"
        )
        raise UsageError(msg)
    others = [n for n, p in common.items() if not p.facts.same_kind(manifest.tensors[n])]
    if others:
        told = "; ".join(
            f"{n}: expected {manifest.tensors[n]}, found {common[n].facts}" for n in others[:_SHOWN]
        )
        more = f"; and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        msg = f"{model} is another model than the manifest's: {told}{more}"
        raise UsageError(msg)
    return replace(source, tensors=common)


def findings(manifest: Manifest, source: Source, wanted: Source, words) -> Findings:
    """The words that were read, compared with the manifest's."""
    corrupted = tuple(
        Mismatch(name, place.path.name, manifest.tensors[name].fingerprint, words[name])
        for name, place in wanted.tensors.items()
        if words[name] != manifest.tensors[name].fingerprint
    )
    missing = dict(source.lost)
    for name in manifest.tensors:
        if name not in source.tensors and name not in missing:
            missing[name] = "perhaps in a broken file" if source.broken else "in no file"
    extra = tuple(name for name in source.tensors if name not in manifest.tensors)
    return Findings(
        corrupted, source.broken, source.absent, missing, extra, len(wanted.tensors), wanted.n_bytes
    )
