"""The safetensors files of a checkpoint of any architecture: their tensors and where they lie.

Only headers are read. Neither config.json nor the names of tensors matter. What is wrong with a
file is kept as a problem of that file, so that a check can go on with the others.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.json_file import read_json_object
from spimpi.inference.safetensors_header import SINGLE_FILE, Header, TensorRecord, read_header
from spimpi.manifest.format import TensorFacts, is_shape, require_text

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
    ``lost``: tensors that are not where the index places them, and why."""

    tensors: dict[str, Place]
    files: tuple[str, ...]
    absent: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

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

    Raises UsageError where there are no safetensors, a dtype has no fingerprint, or two files
    hold a tensor of one name. Files that are absent or broken are problems of the Source.
    """
    model = Path(model)
    folder, names, index, _ = _files(model)
    absent, broken, headers = {}, {}, []
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            absent[name] = f"{index or model} names the file {name!r}, which is not in {folder}"
            continue
        try:
            header = read_header(path)
            entries = {name: _entry(header, name) for name in header.entries}
            _require_no_holes(header, entries)
        except UsageError as error:
            broken[name] = str(error)
            continue
        headers.append((header, entries))
    lost = _lost(index, headers, absent, broken) if index else {}
    return Source(_tensors(headers), tuple(names), absent, broken, lost)


def left_out(model) -> list[str]:
    """Safetensors files beside those that are read."""
    return _files(Path(model))[3]


def _files(model: Path):
    """(folder, names of the files to read, the index or None, safetensors left out)."""
    if model.is_file():
        if model.name.endswith(INDEX_SUFFIX):
            return model.parent, _shards(model), model, []
        if model.name.endswith(SUFFIX):
            return model.parent, [model.name], None, []
        msg = f"{model} is not a checkpoint: expected a directory, *{SUFFIX} or *{INDEX_SUFFIX}"
        raise UsageError(msg)
    if not model.is_dir():
        msg = f"no model in {model}: expected a directory with *{SUFFIX}, found nothing"
        raise UsageError(msg)
    try:
        there = sorted(path.name for path in model.iterdir())
    except OSError as error:
        msg = f"{model} cannot be read: {error.strerror}"
        raise UsageError(msg) from None
    weights = [name for name in there if name.endswith(SUFFIX)]
    indexes = [name for name in there if name.endswith(INDEX_SUFFIX)]
    if SINGLE_FILE in weights:
        names, index = [SINGLE_FILE], None
    elif len(indexes) > 1:
        msg = f"{model} has several indexes: {', '.join(indexes)}; name the one that is meant"
        raise UsageError(msg)
    elif indexes:
        index = model / indexes[0]
        names = _shards(index)
    elif weights:
        names, index = weights, None
    else:
        shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        msg = f"no weights in {model}: expected *{SUFFIX}, found {shown or 'nothing'}"
        raise UsageError(msg)
    return model, names, index, [name for name in weights if name not in names]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → file of an index."""
    values = read_json_object(index, f"no index {index}")
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        msg = f"{index} must hold a weight_map from tensors to files, found {sorted(values)}"
        raise UsageError(msg)
    return {name: str(file) for name, file in weight_map.items()}


def _shards(index: Path) -> list[str]:
    return sorted(set(_weight_map(index).values()))


def _lost(index: Path, headers, absent, broken) -> dict[str, str]:
    """Tensors that are not in the file in which the index places them, and why."""
    held = {header.path.name: entries for header, entries in headers}
    why = dict.fromkeys(absent, "is not there") | dict.fromkeys(broken, "is broken")
    return {
        tensor: f"placed by {index.name} in {file}, which {why.get(file, 'does not hold it')}"
        for tensor, file in _weight_map(index).items()
        if tensor not in held.get(file, ())
    }


def _tensors(headers) -> dict[str, Place]:
    """All tensors in the order in which they lie in the files."""
    homes = Counter(name for _, entries in headers for name in entries)
    twice = [name for name, n in homes.items() if n > 1]
    if twice:
        files = [header.path.name for header, entries in headers if twice[0] in entries]
        msg = (
            f"tensor {twice[0]} is in {len(files)} files of {headers[0][0].path.parent}: "
            f"{', '.join(files)}; a name must be in one file only"
        )
        raise UsageError(msg)
    tensors = {}
    for header, entries in headers:
        for name, (facts, start) in sorted(entries.items(), key=lambda entry: entry[1][1]):
            tensors[name] = Place(facts, header.path, header.data_start + start, header.n_bytes)
            try:
                facts.stored  # noqa: B018  it raises for a dtype without fingerprints
            except UsageError as error:
                msg = f"{header.path}: tensor {name}: {error}"
                raise UsageError(msg) from None
    return tensors


def _entry(header: Header, name: str) -> tuple[TensorFacts, int]:
    """A tensor's facts and the offset of its bytes in the file's data, strictly read."""
    require_text(name, header.path)
    entry = header.entries[name]
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
        msg = (
            f"{header.path} has a broken safetensors header, tensor {name}: expected a shape and "
            f"two offsets, found {shape!r} and {offsets!r}"
        )
        raise UsageError(msg)
    facts = TensorFacts(str(entry.get("dtype")), tuple(shape))
    start, stop = offsets
    try:
        needed = facts.n_bytes
    except UsageError:
        return facts, start  # refused by name once it is known that the file is whole
    if stop - start != needed:
        msg = (
            f"{header.path}: tensor {name} of shape {shape} and dtype {facts.dtype} needs "
            f"{needed} bytes, its header entry gives {stop - start}"
        )
        raise UsageError(msg)
    return facts, start


def _require_no_holes(header: Header, entries) -> None:
    """Every byte after the header must belong to one tensor, as the format demands: what lies in
    a hole would be in no fingerprint."""
    at = 0
    spans = (header.entries[name]["data_offsets"] for name in entries)
    for start, stop in sorted(map(tuple, spans)):
        if start != at:
            what = "a gap" if start > at else "an overlap"
            msg = (
                f"{header.path} has a broken safetensors header: {what} between tensors at byte "
                f"{min(at, start)} of its data"
            )
            raise UsageError(msg)
        at = stop
