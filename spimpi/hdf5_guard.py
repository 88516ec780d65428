"""HDF5 files of others: nothing outside the file is read, nothing is larger than its bytes allow.

A file can lead its reader to other files (external links, external storage, the sources of virtual
datasets), and declare shapes and strings of which it holds no byte. What is read goes through
here. Everything raises ValueError (KeyError where a name is not there), with what is wrong; whoever
reads says which file it is.

One thing HDF5 does not tell beforehand: how long the text of an attribute is that says it is of any
length. Who reads files of strangers bounds the process's memory (cli/apart.py).
"""

import numpy as np

from spimpi.regular_file import open_regular

_FILTERS = (2, 3)  # that make no byte of less than one: HDF5's numbers of shuffle, Fletcher-32
# Who has a file open in this process decides about its locks: HDF5 refuses another opinion.
_LOCKING = (False, "best-effort", True)
_KINDS = {"i": "integers", "u": "integers", "f": "floats"}
_REFERENCE = np.dtype([("length", "<u4"), ("collection", "<u8"), ("index", "<u4")])  # of a text


def open_hdf5(path):
    """An ordinary HDF5 file, open for reading, also where this process has it open already.

    OSError where it is no ordinary file, or no sound HDF5 file.
    """
    import h5py

    open_regular(path).close()  # HDF5 would wait for whoever writes to a FIFO
    for locking in _LOCKING:
        try:
            return h5py.File(path, "r", locking=locking)
        except OSError as error:
            if "flag values don't match" not in str(error) or locking == _LOCKING[-1]:
                raise


def own_group(file, name: str):
    """A group of the file, to which a hard link leads: what is read of many names in it goes
    through it faster. Local."""
    import h5py

    _require_hard_link(file.id, name.encode(), name)
    return h5py.Group(h5py.h5g.open(file.id, name.encode()))


def own_numbers(file, name: str, kinds: str = "iuf", most_bytes: int = 8):
    """The dataset of plain numbers at a path of the file, stored there byte by byte. Local.

    ``kinds`` as numpy's ("iu", "f"), of at most ``most_bytes`` an item.
    """
    found = _linked(file, name)
    _require_numbers(name, found, kinds, most_bytes)
    _require_stored(file, name, found)
    return found


def own_texts(file, name: str) -> list[str]:
    """The texts of a one-dimensional dataset, together no longer than the file. Local."""
    import h5py

    found = _linked(file, name)
    kind = found.id.get_type()
    if kind.get_class() != h5py.h5t.STRING or kind.committed() or len(found.shape) != 1:
        msg = f"{name} is no list of texts"
        raise ValueError(msg)
    _require_stored(file, name, found)
    if kind.is_variable_str() and len(found):
        _require_lengths(file, name, found)
    return found.asstr()[:].tolist()


def own_attribute(holder, name: str):
    """The value of an attribute that is one number or one string. Local.

    KeyError where there is none. Refused: arrays, and strings longer than the file.
    """
    import h5py

    try:
        attribute = holder.attrs.get_id(name)
    except KeyError:
        raise KeyError(name) from None
    kind = attribute.get_type()
    if attribute.shape not in ((), (1,)):
        msg = f"the attribute {name} is an array of shape {attribute.shape}"
        raise ValueError(msg)
    if kind.get_class() not in (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT):
        msg = f"the attribute {name} is no number and no text"
        raise ValueError(msg)
    if attribute.get_storage_size() > _size_of(holder):
        msg = f"the attribute {name} is longer than the file"
        raise ValueError(msg)
    return holder.attrs[name]


def shown_dataset(file, name: str, kinds: str = "iuf", most_bytes: int = 8):
    """As ``own_numbers``, of a dataset that may show others': the caller judges its ``sources``."""
    found = _linked(file, name)
    _require_numbers(name, found, kinds, most_bytes)
    return found


def sources(found) -> list[tuple[str, str, int, int]]:
    """What a dataset of one dimension shows of others: (file, dataset, first row, rows) of each.

    Names as they are written in the file, which HDF5 reads as formats ("%%" is a "%").
    """
    import h5py

    facts, shown = found.id.get_create_plist(), []
    n_sources = facts.get_virtual_count() if facts.get_layout() == h5py.h5d.VIRTUAL else 0
    for i in range(n_sources):
        (first,), (last,) = facts.get_virtual_vspace(i).get_select_bounds()
        place = facts.get_virtual_filename(i), facts.get_virtual_dsetname(i).lstrip("/")
        shown.append((*place, first, last - first + 1))
    return shown


def _linked(file, name: str):
    """The dataset that hard links alone lead to."""
    import h5py

    holder = file.id
    *groups, last = name.encode().split(b"/")
    for group in groups:
        _require_hard_link(holder, group, name)
        holder = h5py.h5o.open(holder, group)
        if not isinstance(holder, h5py.h5g.GroupID):
            raise KeyError(name)
    _require_hard_link(holder, last, name)
    found = h5py.h5o.open(holder, last)
    if not isinstance(found, h5py.h5d.DatasetID):
        msg = f"{name} is no dataset"
        raise ValueError(msg)
    return h5py.Dataset(found)


def _size_of(holder) -> int:
    """Bytes of the file that a file or a group is of."""
    import h5py

    return h5py.h5i.get_file_id(holder.id).get_filesize()


def _require_hard_link(holder, link: bytes, name: str) -> None:
    import h5py

    try:
        kind = holder.links.get_info(link).type
    except KeyError:
        raise KeyError(name) from None
    if kind != h5py.h5l.TYPE_HARD:
        msg = f"{name} is a link to another place"
        raise ValueError(msg)


def _require_numbers(name: str, found, kinds: str, most_bytes: int) -> None:
    import h5py

    kind, dtype = found.id.get_type(), found.dtype
    plain = kind.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) and not kind.committed()
    if not plain or dtype.kind not in kinds or dtype.itemsize > most_bytes:
        expected = " or ".join(dict.fromkeys(_KINDS[kind] for kind in kinds))
        msg = f"{name} holds {dtype}, expected {expected} of at most {most_bytes} bytes"
        raise ValueError(msg)


def _require_stored(file, name: str, found) -> None:
    """The dataset's bytes are in the file, each of them."""
    import h5py

    facts = found.id.get_create_plist()
    kind = facts.get_layout()
    if kind == h5py.h5d.VIRTUAL:
        msg = f"{name} is a virtual dataset, made of others"
        raise ValueError(msg)
    if facts.get_external_count():
        msg = f"{name} has its data in another file"
        raise ValueError(msg)
    for i in range(facts.get_nfilters()):
        code = facts.get_filter(i)[0]
        if code not in _FILTERS:
            msg = f"{name} is stored through a filter that is not expected (number {code})"
            raise ValueError(msg)
    declared, stored, size = found.nbytes, found.id.get_storage_size(), _size_of(file)
    if declared and kind == h5py.h5d.CHUNKED:
        # A chunk is read as a whole, however little of it the shape leaves.
        declared = max(declared, int(np.prod(facts.get_chunk(), dtype=object)) * found.dtype.itemsize)
    if stored > size or declared > stored:
        msg = (
            f"{name} of shape {list(found.shape)} would have {declared:,} bytes, and "
            f"{stored:,} are stored in a file of {size:,}"
        )
        raise ValueError(msg)


def _require_lengths(file, name: str, found) -> None:
    """Texts of any length: a dataset holds how long each of them is said to be."""
    place, size = found.id.get_offset(), file.id.get_filesize()
    if place is None or file.id.get_create_plist().get_sizes() != (8, 8):
        msg = f"the texts of {name} are not stored as spimpi stores them"
        raise ValueError(msg)
    with open_regular(file.filename) as raw:
        raw.seek(place)
        there = np.frombuffer(raw.read(len(found) * _REFERENCE.itemsize), _REFERENCE)
    length = int(there["length"].sum(dtype=np.uint64))
    if len(there) != len(found) or length > size:
        msg = f"the texts of {name} would have {length:,} bytes in a file of {size:,}"
        raise ValueError(msg)
