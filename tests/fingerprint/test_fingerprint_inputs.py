"""What has no fingerprint is refused by name, and what is light stays light."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import spimpi.fingerprint as fp
from spimpi.errors import UsageError
from spimpi.fingerprint import Tag
from spimpi.partition import Slab, TensorPartition

TAG = Tag(name="x")


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        (object, "dtype object"),
        ([("a", "f4"), ("b", "i4")], "'a'"),
        ("U3", "<U3"),
        ("S4", r"S4"),
        ("V4", "V4"),
        ("M8[s]", "datetime64"),
        ("m8[s]", "timedelta64"),
        (np.longdouble, "longdouble|float128"),
        (np.clongdouble, "clongdouble|complex256"),
        (">f4", ">f4.*newbyteorder"),
        (">i8", ">i8.*newbyteorder"),
        (">c8", ">c8.*newbyteorder"),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [0, 3])
def test_a_dtype_without_fingerprint_is_refused_by_name(dtype, named, n):
    with pytest.raises(UsageError, match=named):
        fp.fingerprint(np.zeros(n, dtype), TAG)


def test_items_of_three_bytes_are_refused():
    with pytest.raises(UsageError, match="3 bytes"):
        fp.fingerprint(np.zeros(4, "V3"), TAG)
    with pytest.raises(UsageError, match="1, 2, 4 or 8 bytes, found 3"):
        fp.colour_field_fingerprint(TAG, (4,), 3)
    with pytest.raises(UsageError, match="found 16"):
        fp.linear_fingerprint(np.zeros(4, np.int64), TAG, itemsize=16)


@pytest.mark.parametrize("x", [[1.0, 2.0], 3.5, b"abc", None])
def test_what_is_no_array_is_refused_and_told_how_to_become_one(x):
    with pytest.raises(UsageError, match=f"found {type(x).__name__}: convert"):
        fp.fingerprint(x, TAG)
    with pytest.raises(UsageError, match="convert"):
        fp.linear_fingerprint(x, TAG)
    with pytest.raises(UsageError, match="convert"):
        fp.xor_flat(x, 0, 0)


def test_a_block_that_leaves_its_tensor_is_refused():
    x = np.zeros((4, 4), np.float32)
    with pytest.raises(UsageError, match=r"\(4, 4\) at offset \(1, 0\).*\(4, 4\)"):
        fp.fingerprint(x, TAG, Slab((4, 4), (1, 0)))
    with pytest.raises(UsageError, match="must have 2 entries along axis 1"):
        fp.fingerprint(x, TAG, TensorPartition(1, 2, 0, 4))
    with pytest.raises(UsageError, match="does not lie"):
        fp.linear_fingerprint(x.astype(int), TAG, Slab((4,), (0,)))
    with pytest.raises(UsageError, match="does not lie"):
        fp.colour_field_fingerprint(TAG, (5, 4), 4, Slab((4, 4), (0, 0)))


@pytest.mark.parametrize("where", [(4, 4), [0, 0], 0])
def test_a_place_of_another_kind_is_refused(where):
    with pytest.raises(UsageError, match=f"Slab, found {type(where).__name__}"):
        fp.fingerprint(np.zeros((4, 4)), TAG, where)
    with pytest.raises(UsageError, match="Slab, found"):
        fp.linear_fingerprint(np.zeros((4, 4)), TAG, where)
    with pytest.raises(UsageError, match="Slab, found"):
        fp.colour_field_fingerprint(TAG, (4, 4), 8, where)


def test_a_tag_takes_numpys_integers_and_no_others():
    plain = Tag(seed=2**63, name="é", layer=-1, step=3)
    numpys = Tag(np.uint64(2**63), "é", np.int64(-1), np.int32(3))
    assert numpys.key(0, np.array([2, 3]), np.int64(4)) == plain.key(0, (2, 3), 4)
    with pytest.raises(TypeError):
        Tag(step=1.5)
    with pytest.raises(UsageError, match="-1"):
        Tag(seed=-1)


@pytest.mark.parametrize("name", [3, None, b"x", "\ud800", Tag(), np.array(["x"])], ids=repr)
def test_a_tag_takes_a_name_of_text_alone(name):
    with pytest.raises(UsageError, match="a tag's name is text.*, found .") as caught:
        Tag(name=name)
    assert isinstance(caught.value, TypeError) or isinstance(name, str)


@pytest.mark.parametrize(
    ("field", "value"), [("layer", "a"), ("step", 1.5), ("seed", "x"), ("layer", None), ("step", [1])]
)
def test_a_tags_field_of_another_kind_is_named(field, value):
    with pytest.raises(UsageError, match=f"a tag's {field} is a whole number, found") as caught:
        Tag(**{field: value})
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_threads_than_one_are_refused(threads):
    with pytest.raises(UsageError, match=f"threads={threads}"):
        fp.fingerprint(np.zeros(3), TAG, threads=threads)


@pytest.mark.parametrize("threads", ["x", 1.5, None])
def test_threads_of_another_kind_are_refused(threads):
    with pytest.raises(UsageError, match=f"a whole number of 1 or more, found {threads!r}"):
        fp.fingerprint(np.zeros(3), TAG, threads=threads)


def test_flat_entries_take_contiguous_words_only():
    words = np.zeros(8, np.uint32)
    for bad in (words[::2], words.view(np.float32), words.reshape(2, 4)):
        with pytest.raises(UsageError, match="contiguous array with one axis"):
            fp.xor_flat(bad, 0, 0)
    with pytest.raises(UsageError, match="contiguous"):
        fp.linear_flat(words, 0, 0)
    with pytest.raises(UsageError, match="contiguous"):
        fp.fill_colours(words, 0, 0)


def test_linear_fingerprints_of_complex_and_bfloat16_are_refused():
    import ml_dtypes

    for dtype in (np.complex64, ml_dtypes.bfloat16):
        with pytest.raises(UsageError, match=np.dtype(dtype).name):
            fp.linear_fingerprint(np.zeros(3, dtype), TAG)


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_combine_takes_64_bit_fingerprints_only(bad):
    with pytest.raises(UsageError, match=str(bad)):
        fp.combine([1, bad])
    assert fp.combine([]) == 0


def test_an_unknown_dtype_name_and_a_backward_range_are_refused():
    with pytest.raises(UsageError, match="bfloat17"):
        fp.expected_fingerprint(1, 2, 3, dtype="bfloat17")
    with pytest.raises(UsageError, match="5..4"):
        fp.colours(TAG, (9,), 4, 5, 4)
    with pytest.raises(UsageError, match=r"\(-1, 3\)"):
        fp.expected_fingerprint(1, -1, 3)


def test_a_fingerprint_is_a_plain_int():
    x = np.ones(3, np.float32)
    found = [
        fp.fingerprint(x, TAG),
        fp.linear_fingerprint(x, TAG),
        fp.expected_fingerprint(1, 2, 3),
        fp.combine(np.ones(2, np.uint64)),
        fp.xor_flat(x.view(np.uint32), np.uint64(2**64 - 1), np.int64(3)),
    ]
    assert [type(value) for value in found] == [int] * len(found)


def test_importing_the_package_imports_neither_numba_nor_mpi():
    code = (
        "import sys, spimpi.fingerprint as f, spimpi.fingerprint.reference; "
        "bad = {'numba', 'mpi4py'} & set(sys.modules); sys.exit(f'imported: {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, timeout=60)


def test_threads_work_again_in_a_forked_child():
    """Threads do not survive a fork: a child that waited for its parent's would hang."""
    words = np.arange(1 << 19, dtype=np.uint64)
    expected = fp.xor_flat(words, 1, 0, threads=2)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        os._exit(fp.xor_flat(words, 1, 0, threads=2) != expected)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
