"""HDF5 files of others: nothing outside the file is read, nothing is larger than its bytes allow.

A file can lead its reader to other files (external links, external storage, the sources of virtual
datasets), and declare shapes and strings of which it holds no byte. What is read goes through
here. Everything raises ValueError, with what is wrong; whoever reads says which file it is.
"""

import h5py

# Filters that a dataset may have passed, and how many bytes one stored byte can become.
_DEFLATE = 1032  # zlib's own limit
_RATIOS = {
    h5py.h5z.FILTER_DEFLATE: _DEFLATE, h5py.h5z.FILTER_SHUFFLE: 1, h5py.h5z.FILTER_FLETCHER32: 1,
}  # fmt: skip


def own_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset at a path of the file, whose data lie in the file itself. Local.

    Refused: links but hard ones, external storage, virtual datasets, elements of variable
    length, filters but deflate, shuffle and Fletcher-32, shapes of more bytes than are stored.
    """
    found = _linked(file, name)
    if not isinstance(found, h5py.Dataset):
        msg = f"{name} is no dataset"
        raise ValueError(msg)
    facts = found.id.get_create_plist()
    if facts.get_layout() == h5py.h5d.VIRTUAL:
        msg = f"{name} is a virtual dataset, made of others"
        raise ValueError(msg)
    if facts.get_external_count():
        msg = f"{name} has its data in another file"
        raise ValueError(msg)
    if found.dtype.hasobject:
        msg = f"{name} has elements of variable length"
        raise ValueError(msg)
    _require_stored(file, name, found, facts)
    return found


def own_attribute(holder, name: str):
    """The value of an attribute that is one number or one string. Local.

    KeyError where there is none. Refused: arrays, and strings longer than the file.
    """
    if name not in holder.attrs:
        raise KeyError(name)
    attribute = holder.attrs.get_id(name)
    if attribute.shape not in ((), (1,)):
        msg = f"the attribute {name} is an array of shape {attribute.shape}"
        raise ValueError(msg)
    if attribute.get_storage_size() > holder.file.id.get_filesize():
        msg = f"the attribute {name} is longer than the file"
        raise ValueError(msg)
    return holder.attrs[name]


def _linked(file, name: str):
    """What hard links alone lead to."""
    holder = file
    for part in name.split("/"):
        link = holder.get(part, getlink=True) if isinstance(holder, h5py.Group) else None
        if link is None:
            raise KeyError(name)
        if not isinstance(link, h5py.HardLink):
            msg = f"{name} is a link to another place"
            raise ValueError(msg)
        holder = holder[part]
    return holder


def _require_stored(file, name, found, facts) -> None:
    """The dataset's bytes are there, and no more than can come of what is stored."""
    ratio = 1
    for i in range(facts.get_nfilters()):
        code = facts.get_filter(i)[0]
        if code not in _RATIOS or (code == h5py.h5z.FILTER_DEFLATE and ratio > 1):
            msg = f"{name} is stored through a filter that is not expected (number {code})"
            raise ValueError(msg)
        ratio *= _RATIOS[code]
    declared, stored = found.nbytes, found.id.get_storage_size()
    if stored > file.id.get_filesize() or declared > stored * ratio:
        msg = (
            f"{name} of shape {list(found.shape)} would have {declared:,} bytes, and "
            f"{stored:,} are stored in a file of {file.id.get_filesize():,}"
        )
        raise ValueError(msg)
