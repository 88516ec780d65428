"""The safetensors files of a checkpoint of any architecture: their tensors and where they lie.

Only headers are read. Neither config.json nor the names of tensors matter. What is wrong with a
file is kept as a problem of that file, so that a check can go on with the others.
"""

from dataclasses import dataclass, field
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.inference.safetensors_header import BrokenFile, Header, TensorRecord, read_header
from spimpi.inference.weight_files import (
    SINGLE_FILE, is_there, left_out as beside, names_in, not_read, place, read_weight_map,
)  # fmt: skip
from spimpi.manifest.format import TensorFacts
from spimpi.printable import one_line

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """A stored tensor: its facts, its file, the offset of its first byte there, the file's size."""

    facts: TensorFacts
    path: Path
    offset: int
    file_bytes: int

    @property
    def record(self) -> TensorRecord:
        """The tensor in words, as byte_share cuts it."""
        stored = self.facts.stored
        return TensorRecord(self.facts.word_shape, stored.numpy_name, stored.wordsize)


@dataclass(frozen=True)
class Source:
    """What a MODEL holds. ``absent`` and ``broken``: file names and what is wrong with them;
    ``lost``: tensors that are not where the index places them, and why; ``copies``: (tensor, file)
    of copies in another file than the index says, which are not read."""

    tensors: dict[str, Place]
    files: tuple[str, ...]
    absent: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    copies: tuple[tuple[str, str], ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors that can be read."""
        return sum(place.facts.n_bytes for place in self.tensors.values())

    def require_whole(self) -> None:
        """Raise UsageError where a file is absent or broken."""
        lost = (f"tensor {name} is {why}" for name, why in self.lost.items())
        for problem in (*self.broken.values(), *self.absent.values(), *lost):
            raise UsageError(problem)


def survey(model) -> Source:
    """The tensors of a directory, a .safetensors file or a .safetensors.index.json.

    Raises UsageError where there are no safetensors, a file cannot be read, a dtype has no
    fingerprint, or two files hold a tensor of one name and no index says which is meant. Files
    that are absent or broken are problems of the Source.
    """
    model = Path(model)
    folder, names, index, _ = _files(model)
    absent, broken, headers = {}, {}, []
    for name in names:
        path = folder / name
        if not is_there(folder, name):
            told, shown = one_line(index or model, 150), one_line(repr(name), 100)
            absent[name] = f"{told} names the file {shown}, which is not in {one_line(folder, 150)}"
            continue
        try:
            header = read_header(path)
            _require_whole(header)
        except BrokenFile as error:
            broken[name] = str(error)
            continue
        headers.append(header)
    placed = _weight_map(index) if index else {}
    lost = _lost(index, placed, headers, absent, broken) if index else {}
    homes, copies = place(headers, placed)
    return Source(_tensors(headers, homes), tuple(names), absent, broken, lost, tuple(copies))


def left_out(model) -> list[str]:
    """Files of weights beside those that are read."""
    return _files(Path(model))[3]


def unread(model) -> list[str]:
    """What of a MODEL is not read, in lines for people."""
    _, _, index, files = _files(Path(model))
    if index is None:  # then a copy is refused
        return not_read(files, (), {})
    source = survey(model)
    return not_read(files, source.copies, source.tensors)


def _files(model: Path):
    """(folder, names of the files to read, the index or None, files of weights left out)."""
    try:
        is_file, is_folder = model.is_file(), model.is_dir()
    except OSError as error:
        msg = f"{one_line(model)} cannot be read: {error.strerror}"
        raise UsageError(msg) from None
    if is_file:
        if model.name.endswith(INDEX_SUFFIX):
            return model.parent, _shards(model), model, []
        if model.name.endswith(SUFFIX):
            return model.parent, [model.name], None, []
        msg = (
            f"{one_line(model)} is not a checkpoint: expected a directory, *{SUFFIX} or "
            f"*{INDEX_SUFFIX}"
        )
        raise UsageError(msg)
    if not is_folder:
        msg = f"no model in {one_line(model)}: expected a directory with *{SUFFIX}, found nothing"
        raise UsageError(msg)
    there = names_in(model)
    weights = [name for name in there if name.endswith(SUFFIX)]
    indexes = [name for name in there if name.endswith(INDEX_SUFFIX)]
    index = None
    if SINGLE_FILE in weights:
        names = [SINGLE_FILE]
    elif len(indexes) > 1:
        shown = one_line(", ".join(indexes), 200)
        msg = f"{one_line(model, 150)} has several indexes: {shown}; name the one that is meant"
        raise UsageError(msg)
    elif indexes:
        index = model / indexes[0]
        names = _shards(index)
    elif weights:
        names = weights
    else:
        shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        found = one_line(shown, 250) or "nothing"
        msg = f"no weights in {one_line(model, 150)}: expected *{SUFFIX}, found {found}"
        raise UsageError(msg)
    return model, names, index, beside(there, {*names, *([index.name] if index else [])})


def _weight_map(index: Path) -> dict[str, str]:
    return read_weight_map(index, f"no index {one_line(index)}")


def _shards(index: Path) -> list[str]:
    return sorted(set(_weight_map(index).values()))


def _lost(index: Path, placed, headers, absent, broken) -> dict[str, str]:
    """Tensors that are not in the file in which the index places them, and why."""
    held = {header.path.name: header.entries for header in headers}
    why = dict.fromkeys(absent, "is not there") | dict.fromkeys(broken, "is broken")
    return {
        tensor: f"placed by {index.name} in {file}, which {why.get(file, 'does not hold it')}"
        for tensor, file in placed.items()
        if tensor not in held.get(file, ())
    }


def _tensors(headers, homes) -> dict[str, Place]:
    """All tensors in the order in which they lie in the files."""
    tensors = {}
    for header in headers:
        for name, entry in sorted(header.entries.items(), key=lambda item: item[1].start):
            if homes[name] is not header:
                continue
            facts = _facts(entry)
            tensors[name] = Place(
                facts, header.path, header.data_start + entry.start, header.n_bytes
            )
            try:
                facts.stored  # noqa: B018  it raises for a dtype without fingerprints
            except UsageError as error:
                msg = f"{header.path}: tensor {one_line(name, 100)}: {error}"
                raise UsageError(msg) from None
    return tensors


def _facts(entry) -> TensorFacts:
    return TensorFacts(entry.dtype, entry.shape)


def _require_whole(header: Header) -> None:
    """BrokenFile unless each tensor has the bytes that it needs, and each byte is a tensor's."""
    for name, entry in header.entries.items():
        try:
            needed = _facts(entry).n_bytes
        except UsageError:
            continue  # an unknown dtype is refused by name once it is known that the file is whole
        header.require_bytes(name, needed)
    header.require_no_holes()
