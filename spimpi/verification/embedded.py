"""The embedded model's own files: they must be those that the package's fingerprints were made of."""

from pathlib import Path

from spimpi.checks.verdict import Verdict, Where
from spimpi.errors import CorruptionError, UsageError
from spimpi.inference import golden as golden_runs
from spimpi.inference.config import CONFIG_FILE, EMBEDDED_MODEL
from spimpi.inference.prompts import TOKENIZER_FILE
from spimpi.manifest.check import check_files
from spimpi.manifest.format import read_manifest
from spimpi.trace.schema import Established

MANIFEST = "manifest.json"


def is_embedded(directory: Path | None) -> bool:
    """Whether a model directory is the one in this package, by whatever path it is named."""
    return directory is not None and directory.resolve() == EMBEDDED_MODEL.resolve()


def require_intact(rank: int = 0) -> None:
    """Every byte of the embedded model's weights against the package's manifest. Local.

    CorruptionError with the tensor where they differ: what this package computes with them would
    be another model's, for which nothing known beforehand holds. UsageError where the package
    lacks a file or a tensor, or has a tokenizer, which would make other prompts.
    """
    if (EMBEDDED_MODEL / TOKENIZER_FILE).exists():
        msg = (
            f"the embedded model in {EMBEDDED_MODEL} takes bytes, found {TOKENIZER_FILE} there, "
            "which is not of this package: remove it"
        )
        raise UsageError(msg)
    found = check_files(read_manifest(EMBEDDED_MODEL / MANIFEST), EMBEDDED_MODEL, threads=1)
    if found.corrupted:
        first, n = found.corrupted[0], len(found.corrupted)
        more = f"; {n - 1} other tensors of it differ too" if n > 1 else ""
        _refuse(first.tensor, f"{first.expected:016x}", f"{first.found:016x}", more, rank)
    for problem in (*found.broken.values(), *found.absent.values(), *found.missing):
        msg = f"the embedded model is not whole: {problem}; install spimpi again"
        raise UsageError(msg)


def shipped_golden(workload: golden_runs.Workload, rank: int = 0) -> golden_runs.Golden:
    """The golden run in the package. CorruptionError where it is of other facts of the model. Local.

    The weights are known to be the package's (``require_intact``): what is left is config.json.
    """
    golden = golden_runs.read(golden_runs.EMBEDDED_GOLDEN, shipped=True)
    theirs = golden.workload.identity
    if workload.identity != theirs:
        _refuse(CONFIG_FILE, theirs, workload.identity, "", rank)
    return golden


def _refuse(what: str, expected: str, found: str, more: str, rank: int):
    detail = (
        f"the embedded model in {EMBEDDED_MODEL} is not the one that this package was made with: "
        f"its files were changed or damaged; install spimpi again{more}"
    )
    where = Where("manifest", what, 0, -1, -1, None, "", rank, expected, found, detail)
    raise CorruptionError(Verdict(False, Established(0), where, check="manifest"))
