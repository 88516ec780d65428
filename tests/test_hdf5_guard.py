"""HDF5 files from elsewhere: what leads out of the file, or is more than the file holds, is refused."""

import os

import numpy as np
import pytest

h5py = pytest.importorskip("h5py", reason="needs h5py")

from spimpi.hdf5_guard import (  # noqa: E402
    open_hdf5, own_attribute, own_numbers, own_texts, shown_dataset, sources,
)  # fmt: skip

N = 50


@pytest.fixture
def made(tmp_path):
    """``made(edit)``: a file with sound data and whatever ``edit(file)`` adds, opened guarded."""
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = np.arange(N)
    (tmp_path / "secret").write_bytes(b"secret--" * N)

    def make(edit=lambda file: None):
        path = tmp_path / "file.h5"
        with h5py.File(path, "w") as file:
            file["group/x"] = np.arange(N)
            file["group/words"] = ["a", "bc"] * N
            file.attrs["text"], file.attrs["number"] = "hello", 7
            edit(file)
        return open_hdf5(path)

    make.folder, make.other = tmp_path, other
    return make


def test_what_lies_in_the_file_is_read(made):
    file = made(lambda f: f.create_dataset("group/summed", data=np.arange(N), fletcher32=True))
    assert np.array_equal(own_numbers(file, "group/x", "iu")[:], np.arange(N))
    assert np.array_equal(own_numbers(file, "group/summed")[:], np.arange(N))
    assert own_texts(file, "group/words") == ["a", "bc"] * N
    assert own_attribute(file, "text") == "hello" and own_attribute(file, "number") == 7


def external_storage(made, file):
    file.create_dataset("bad", (N,), "i8", external=[(str(made.folder / "secret"), 0, 8 * N)])


def external_link(made, file):
    file["bad"] = h5py.ExternalLink(str(made.other), "x")


def soft_link(made, file):
    file["bad"] = h5py.SoftLink("/group/x")


def soft_link_to_itself(made, file):
    file["bad"] = h5py.SoftLink("/bad")


def virtual_source(made, file):
    layout = h5py.VirtualLayout((N,), "i8")
    layout[:] = h5py.VirtualSource(str(made.other), "x", (N,), "i8")
    file.create_virtual_dataset("bad", layout)


def never_written(made, file):
    file.create_dataset("bad", (1 << 40,), "i8")


def never_written_chunks(made, file):
    file.create_dataset("bad", (1 << 40,), "i8", chunks=(1 << 20,))


def compressed(made, file):
    file.create_dataset("bad", data=np.zeros(1 << 16, "i8"), compression="gzip")


def a_chunk_beyond_the_file(made, file):
    file.create_dataset("bad", (4,), "i8", chunks=(1 << 28,), maxshape=(None,))


def compound(made, file):
    file["bad"] = np.zeros(N, [("a", "i4"), ("b", "i4")])


def ragged(made, file):
    file.create_dataset("bad", (N,), h5py.vlen_dtype("i8"))


def references(made, file):
    file.create_dataset("bad", (N,), h5py.ref_dtype)


def a_named_type(made, file):
    file["kind"] = np.dtype("i8")
    file.create_dataset("bad", data=np.arange(N), dtype=file["kind"])


def an_enumeration(made, file):
    file.create_dataset("bad", (N,), h5py.enum_dtype({"a": 1}))


def text(made, file):
    file["bad"] = ["a"] * N


def a_group(made, file):
    file.create_group("bad")


def a_type(made, file):
    file["bad"] = np.dtype("i8")


@pytest.mark.parametrize("edit", [
    external_storage, external_link, soft_link, soft_link_to_itself, virtual_source, never_written,
    never_written_chunks, compressed, a_chunk_beyond_the_file, compound, ragged, references,
    a_named_type, an_enumeration, text, a_group, a_type,
])  # fmt: skip
def test_other_numbers_are_refused(made, edit):
    file = made(lambda f: edit(made, f))
    with pytest.raises(ValueError, match="bad"):
        own_numbers(file, "bad")
    

def test_a_virtual_dataset_is_named_as_one(made):
    with pytest.raises(ValueError, match="bad is a virtual dataset"):
        own_numbers(made(lambda f: virtual_source(made, f)), "bad")


def test_a_linked_group_is_not_followed(made):
    def edit(file):
        file["bad"] = h5py.SoftLink("/group")

    with pytest.raises(ValueError, match="bad/x is a link"):
        own_numbers(made(edit), "bad/x")


@pytest.mark.parametrize("kinds, most", [("f", 8), ("iu", 4)])
def test_numbers_of_another_kind_are_refused(made, kinds, most):
    with pytest.raises(ValueError, match="group/x holds int64, expected"):
        own_numbers(made(), "group/x", kinds, most)


@pytest.mark.parametrize("edit", [
    lambda f: f.create_dataset("bad", (1,), "S1500000000", chunks=(1,), compression="gzip"),
    lambda f: f.create_dataset("bad", (1 << 40,), h5py.string_dtype()),
    lambda f: f.__setitem__("bad", "a scalar"),
    lambda f: f.__setitem__("bad", np.arange(N)),
])  # fmt: skip
def test_other_texts_are_refused(made, edit):
    with pytest.raises(ValueError):
        own_texts(made(edit), "bad")


def test_a_text_that_says_it_is_longer_than_the_file_is_refused(made):
    file = made()
    place = file["group/words"].id.get_offset()
    file.close()
    with open(made.folder / "file.h5", "r+b") as raw:
        raw.seek(place)
        raw.write((1 << 31).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="would have 2,147,"):
        own_texts(open_hdf5(made.folder / "file.h5"), "group/words")


@pytest.mark.parametrize("value", [
    np.arange(3), np.zeros(1, [("a", "i4")])[0], h5py.Empty("f"), np.bool_(True)
])  # fmt: skip
def test_attributes_that_are_no_plain_value_are_refused(made, value):
    file = made(lambda f: f.attrs.__setitem__("bad", value))
    with pytest.raises(ValueError, match="attribute bad is"):
        own_attribute(file, "bad")


def test_sources_are_told_as_they_are_written(made):
    def edit(file):
        layout = h5py.VirtualLayout((2 * N,), "i8")
        for i in range(2):
            layout[i * N : (i + 1) * N] = h5py.VirtualSource(f"p{i}", "x", (N,), "i8")
        file.create_virtual_dataset("shown", layout)

    found = shown_dataset(made(edit), "shown")
    assert sources(found) == [("p0", "x", 0, N), ("p1", "x", N, N)]


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no ordinary file"):
        open_hdf5(tmp_path / "pipe")


@pytest.mark.parametrize("locking", [None, True, False, "best-effort"])
def test_a_file_that_this_process_has_open_opens_again(made, locking):
    made().close()
    settings = {} if locking is None else {"locking": locking}
    with h5py.File(made.folder / "file.h5", "r", **settings) as held:
        with open_hdf5(made.folder / "file.h5") as file:
            assert len(own_numbers(file, "group/x")) == N
        assert held["group/x"][N - 1] == N - 1


@pytest.mark.parametrize("name", ["sound", "bomb"])
def test_what_is_compressed_is_refused_whatever_it_becomes(made, name):
    def edit(file):
        file.create_dataset("sound", data=np.arange(N), compression="gzip")
        file.create_dataset("bomb", (1 << 30,), "i8", chunks=(1 << 16,), compression="gzip")
        file["bomb"][:10] = 1

    with pytest.raises(ValueError, match=f"{name} is stored through a filter that is not expected"):
        own_numbers(made(edit), name)
