"""Which files of a model directory hold its weights, which tensor is read from which, and what else
lies there."""

from dataclasses import dataclass
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.inference.safetensors_header import Header, read_header
from spimpi.json_file import read_json_object
from spimpi.printable import one_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
# Ends of the names of files that hold weights, or say where they are.
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".gguf", ".ggml", ".msgpack", ".onnx", ".npz", "tf_model.h5",
)  # fmt: skip
_SHOWN = 8


@dataclass(frozen=True)
class WeightFiles:
    """The files that are read and, by tensor, the one that it is read from.

    copies: (tensor, file) of copies that are not read; left_out: files beside those.
    """

    headers: list[Header]
    homes: dict[str, Header]
    copies: list[tuple[str, str]]
    left_out: list[str]


def not_read(files: list[str], copies, homes) -> list[str]:
    """What of a folder is not read, in lines for people: files, and copies of tensors.

    ``copies``: (tensor, file); ``homes``: by tensor, something with the path that it is read from.
    """
    lines = []
    if files:
        more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
        lines.append(one_line(f"files: {', '.join(files[:_SHOWN])}{more}"))
    if copies:
        name, file = copies[0]
        more = f", and {len(copies) - 1} other copies" if len(copies) > 1 else ""
        home = homes[name].path.name
        lines.append(one_line(f"copies: {name} in {file}, the index places it in {home}{more}"))
    return lines


def find_weights(directory: Path) -> WeightFiles:
    """model.safetensors, or all the files that the index names; their headers alone are read.

    As transformers, a single file wins over an index. Where several files hold a tensor, it is
    read from the one in which the index places it. Raises UsageError, with the file and what was
    expected and found, where a file is broken, absent, or not as long as its header says, the
    index misplaces a tensor, or an adapter changes the model.
    """
    there = names_in(directory)
    if ADAPTER_FILE in there:
        msg = (
            f"{one_line(directory, 200)} has an adapter ({ADAPTER_FILE}), which changes what the "
            "model computes: adapters are not supported, merge it into the weights or take it away"
        )
        raise UsageError(msg)
    if SINGLE_FILE in there:
        headers, placed, read = [read_header(directory / SINGLE_FILE)], {}, {SINGLE_FILE}
    else:
        headers, placed = _sharded(directory, there)
        read = {INDEX_FILE, *placed.values()}
    homes, copies = place(headers, placed)
    return WeightFiles(headers, homes, copies, left_out(there, read))


def names_in(directory: Path) -> list[str]:
    """The names in a directory, sorted."""
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError as error:
        msg = f"{one_line(directory)} cannot be read: {error.strerror}"
        raise UsageError(msg) from None


def left_out(names, read) -> list[str]:
    """Those of a directory's files that look like weights, or an index of weights, and are not
    ``read``."""
    return [name for name in names if name.endswith(_WEIGHTS) and name not in read]


def read_weight_map(index: Path, missing: str) -> dict[str, str]:
    """Tensor → file of an index; UsageError, the text ``missing`` where there is none.

    Every file is a name in the index's own folder.
    """
    values = read_json_object(index, missing)
    placed = values.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        found = one_line(repr(sorted(values)), 200)
        msg = f"{one_line(index, 200)} must hold a weight_map from tensors to files, found {found}"
        raise UsageError(msg)
    for file in placed.values():
        if not isinstance(file, str):
            found = one_line(repr(file), 100)
            msg = f"{one_line(index, 200)}: expected the name of a file, found {found}"
            raise UsageError(msg)
    return placed


def is_there(directory: Path, file: str) -> bool:
    """Whether an index's word is the name of an ordinary file in its own folder."""
    try:
        return Path(file).name == file and (directory / file).is_file()
    except (OSError, ValueError):  # too long, or no name at all
        return False


def place(headers, placed: dict[str, str]):
    """(tensor → the header that it is read from, copies elsewhere), by an index's word.

    UsageError where several files hold a tensor and no index says which is meant.
    """
    holders: dict[str, list[Header]] = {}
    for header in headers:
        for name in header.entries:
            holders.setdefault(name, []).append(header)
    homes, copies = {}, []
    for name, where in holders.items():
        home = next((h for h in where if h.path.name == placed.get(name)), None)
        if home is None and len(where) > 1:
            files = ", ".join(header.path.name for header in where)
            msg = (
                f"tensor {one_line(name, 100)} is in {len(where)} files of {where[0].path.parent}: "
                f"{one_line(files, 200)}; a name must be in one file only"
            )
            raise UsageError(msg)
        homes[name] = home or where[0]
        copies += [(name, h.path.name) for h in where if h is not homes[name]]
    return homes, copies


def _sharded(directory: Path, there: list[str]):
    """The headers of all shards, and the index's placement."""
    index = directory / INDEX_FILE
    shown = one_line(", ".join(there), 200) or "nothing"
    placed = read_weight_map(
        index,
        f"no weights in {one_line(directory, 150)}: expected {SINGLE_FILE} or {INDEX_FILE}, "
        f"found {shown}",
    )
    for file in sorted(set(placed.values())):
        if not is_there(directory, file):
            msg = (
                f"{one_line(index, 150)} names the file {one_line(repr(file), 100)}, which is not in "
                f"{one_line(directory, 150)}"
            )
            raise UsageError(msg)
    headers = {file: read_header(directory / file) for file in sorted(set(placed.values()))}
    for name, file in placed.items():
        if name not in headers[file].entries:
            msg = (
                f"{one_line(index, 150)} places tensor {one_line(name, 100)} in {file}, which does "
                "not hold it"
            )
            raise UsageError(msg)
    return list(headers.values()), placed
