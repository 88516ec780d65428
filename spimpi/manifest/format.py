"""The manifest file: versioned JSON with a checksum of its own (docs/manifest.md)."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.fingerprint.tag import CONTENT, DEFAULT_SEED, MASK, Tag
from spimpi.json_file import LONGEST, is_shape, parse_json
from spimpi.manifest.dtypes import StoredType, stored_type
from spimpi.printable import one_line
from spimpi.regular_file import read_at_most
from spimpi.whole_file import whole_file

FORMAT_VERSION = 1
FINGERPRINT_VERSION = 1
_WORD = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class TensorFacts:
    """A tensor as it is stored: safetensors' name of its dtype, global shape, content fingerprint
    (None where it is not known yet)."""

    dtype: str
    shape: tuple[int, ...]
    fingerprint: int | None = None

    @property
    def stored(self) -> StoredType:
        return stored_type(self.dtype)

    @property
    def word_shape(self) -> tuple[int, ...]:
        """The shape in words: a complex number is two, along a new last axis."""
        words = self.stored.words
        return self.shape if words == 1 else (*self.shape, words)

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return prod(self.word_shape) * self.stored.wordsize

    def same_kind(self, other: "TensorFacts") -> bool:
        """Whether both have one dtype and shape; only then can fingerprints be compared."""
        return (self.dtype, self.shape) == (other.dtype, other.shape)

    def __str__(self):
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Derived:
    """The fingerprints of what an arithmetic derives from the tensors, by names of their own."""

    arithmetic: str
    tensors: dict[str, TensorFacts]


@dataclass(frozen=True)
class Manifest:
    """The fingerprints of a checkpoint's tensors, by name, taken with one seed; on request also
    those of what exact arithmetic derives from them."""

    tensors: dict[str, TensorFacts]
    seed: int = DEFAULT_SEED
    derived: Derived | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors, without derived ones."""
        return sum(facts.n_bytes for facts in self.tensors.values())

    @cached_property
    def all_tensors(self) -> dict[str, TensorFacts]:
        """The tensors, then the derived ones."""
        return self.tensors | (self.derived.tensors if self.derived else {})

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the manifest without this, in 64 hex digits."""
        return _checksum(self._facts())

    def tag(self, name: str) -> Tag:
        """The tag of a tensor's fingerprint."""
        return Tag(self.seed, name)

    def key(self, name: str) -> int:
        """The key of a tensor's content stream."""
        return content_key(self.seed, name, self.all_tensors[name])

    def dumps(self) -> str:
        """The file's text, one line a tensor."""
        return _written(self._facts() | {"checksum": self.checksum}) + "\n"

    def _facts(self) -> dict:
        facts = {
            "spimpi_manifest": FORMAT_VERSION,
            "fingerprint": FINGERPRINT_VERSION,
            "seed": self.seed,
            "tensors": _as_lists(self.tensors),
        }
        if self.derived:
            tensors = _as_lists(self.derived.tensors)
            facts["derived"] = {"arithmetic": self.derived.arithmetic, "tensors": tensors}
        return facts


def _as_lists(tensors: dict[str, TensorFacts]) -> dict:
    return {
        name: [facts.dtype, list(facts.shape), f"{facts.fingerprint:016x}"]
        for name, facts in tensors.items()
    }


def _written(value: dict) -> str:
    """JSON with a line for each member of an object."""
    lines = (
        f"{json.dumps(k)}: {_written(v) if isinstance(v, dict) else json.dumps(v)}"
        for k, v in value.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}"


def content_key(seed: int, name: str, facts: TensorFacts) -> int:
    """The key of a tensor's content stream, for its shape in words."""
    return Tag(seed, name).key(CONTENT, facts.word_shape, facts.stored.wordsize)


def read_manifest(path) -> Manifest:
    """The manifest in a file.

    Raises UsageError where there is none, it is of a newer version, or its checksum does not fit.
    """
    path = Path(path)
    try:
        text = read_at_most(path, LONGEST)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        msg = f"the manifest {one_line(path, 300)} cannot be read: {why}"
        raise UsageError(msg) from None
    return parse(text, path)


def parse(text: bytes | str, path="the manifest") -> Manifest:
    """The manifest in a text; ``path`` names it in errors."""
    path = one_line(path, 200)
    try:
        values = parse_json(text)
    except ValueError as error:
        msg = (
            f"{path} is not a manifest, or cut short: expected JSON as `spimpi manifest make` "
            f"writes it, found {one_line(error, 150)}"
        )
        raise UsageError(msg) from None
    if not isinstance(values, dict) or "spimpi_manifest" not in values:
        msg = f"{path} is not a manifest: expected a JSON object with the field spimpi_manifest"
        raise UsageError(msg)
    version = values["spimpi_manifest"]
    if not _is_number(version) or version < 1:
        msg = f"{path}: expected a version from 1 on in spimpi_manifest, found {_told(version)}"
        raise UsageError(msg)
    if version > FORMAT_VERSION:
        msg = (
            f"{path} is a manifest of version {_told(version)}, this spimpi reads version "
            f"{FORMAT_VERSION}: update spimpi"
        )
        raise UsageError(msg)
    found = values.pop("checksum", None)
    expected = _checksum(values)
    if found != expected:
        msg = (
            f"the manifest {path} is damaged: its checksum is {_told(found)}, that of its content "
            f"{expected}; copy it again"
        )
        raise UsageError(msg)
    return _manifest(values, path)


def _manifest(values: dict, path) -> Manifest:
    """From facts whose checksum fits: what is wrong now was made wrong."""
    if values.get("fingerprint") != FINGERPRINT_VERSION:
        msg = (
            f"{path} holds fingerprints of version {_told(values.get('fingerprint'))}, this spimpi "
            f"takes version {FINGERPRINT_VERSION}: update spimpi, or make the manifest again"
        )
        raise UsageError(msg)
    seed, tensors = values.get("seed"), values.get("tensors")
    if not _is_number(seed) or not 0 <= seed <= MASK or not isinstance(tensors, dict):
        msg = f"{path}: expected a seed of 64 bits and an object of tensors, found seed {_told(seed)}"
        raise UsageError(msg)
    derived = _derived(values["derived"], path) if "derived" in values else None
    return Manifest(_tensors(tensors, path), seed, derived)


def _derived(value, path) -> Derived:
    fits = isinstance(value, dict) and isinstance(value.get("tensors"), dict)
    if not fits or not isinstance(value.get("arithmetic"), str):
        msg = f"{path}: expected the name of an arithmetic and an object of tensors in derived"
        raise UsageError(msg)
    return Derived(value["arithmetic"], _tensors(value["tensors"], path))


def _tensors(values: dict, path) -> dict[str, TensorFacts]:
    return {name: _tensor(name, value, path) for name, value in values.items()}


def _tensor(name, value, path) -> TensorFacts:
    require_text(name, path)
    fits = isinstance(value, list) and len(value) == 3
    dtype, shape, word = value if fits else (None, None, None)
    fits = fits and isinstance(dtype, str) and is_shape(shape, product=False)
    if not fits or not isinstance(word, str) or not _WORD.fullmatch(word):
        msg = (
            f"{path}: tensor {one_line(name, 100)}: expected [dtype, shape, 16 hex digits], found "
            f"{_told(value)}"
        )
        raise UsageError(msg)
    facts = TensorFacts(dtype, tuple(shape), int(word, 16))
    try:
        facts.stored  # noqa: B018  it raises for an unknown dtype
    except UsageError as error:
        msg = f"{path}: tensor {one_line(name, 100)}: {error}"
        raise UsageError(msg) from None
    return facts


def require_text(name: str, path) -> None:
    """UsageError for a tensor's name that is no text (JSON can hold half a character)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        msg = f"{path}: the tensor name {one_line(ascii(name), 100)} is not valid Unicode"
        raise UsageError(msg) from None


def _is_number(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _told(value) -> str:
    """A value of the file in an error."""
    return one_line(json.dumps(value) if not isinstance(value, str) else value, 100)


def _checksum(facts: dict) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(path, manifest: Manifest, overwrite: bool = False) -> None:
    """Write a manifest so that the file is there as a whole or not at all.

    Raises UsageError where it cannot be written, or exists and is not to be replaced.
    """
    with whole_file(path, overwrite) as file:
        file.write(manifest.dumps().encode())
