"""Anybody's arrays: the same memory, the same fingerprint, and no pointer that must not be read."""

import array
import ctypes
import gc
import mmap
import subprocess
import sys
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest
from fingerprint_oracle import LAYOUTS, read_only
from foreign_arrays import EXTRA, Buffer, FakeGpuArray, Interface, MlxDtype, MlxLike, Producer
from hypothesis import given, settings
from hypothesis import strategies as st

import spimpi.fingerprint as fp
from spimpi.errors import UsageError
from spimpi.fingerprint import Tag, as_array
from spimpi.fingerprint.painting import (
    color_fingerprint, color_hidden_states, colors_of, corrupted_elements,
)  # fmt: skip
from spimpi.partition import Slab

TAG = Tag(name="x")
NUMPYS = [
    np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64,
    np.float16, np.float32, np.float64, np.complex64, np.complex128,
]  # fmt: skip
FLOAT8 = [name for name in EXTRA if name.startswith("float8") and hasattr(ml_dtypes, name)]
DTYPES = [np.dtype(t) for t in NUMPYS] + [
    np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", *FLOAT8)
]
KINDS = {
    "dlpack": Producer,
    "dlpack without version": lambda x: Producer(x, versioned=False),
    "array interface": lambda x: Interface(x, x.dtype),
    "buffer": lambda x: Buffer(x, x.dtype.name.encode() if x.dtype.kind == "V" else None, x.dtype),
    "mlx": MlxLike,
}
LAID_OUT = sorted(set(LAYOUTS) - {"misaligned"})  # DLPack's strides count items

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def data_of(shape, dtype, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(n_bytes), dtype).reshape(shape).copy()


def address(x) -> int:
    return x.__array_interface__["data"][0]


@settings(max_examples=150, deadline=None)
@given(
    shapes, st.sampled_from(DTYPES), st.sampled_from(LAID_OUT), st.sampled_from(sorted(KINDS)),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_foreign_array_is_the_same_memory_and_has_the_same_fingerprint(
    shape, dtype, layout, kind, seed
):
    x = LAYOUTS[layout](data_of(shape, dtype, seed))
    x = np.asarray(x)
    seen = as_array(KINDS[kind](x))
    assert type(seen) is np.ndarray
    assert (seen.dtype, seen.shape) == (x.dtype, x.shape)
    if x.size:
        assert address(seen) == address(x)
        assert all(a == b for a, b, n in zip(seen.strides, x.strides, shape) if n > 1)
        assert not (seen.flags.writeable and not x.flags.writeable) or kind == "dlpack"
    assert fp.fingerprint(KINDS[kind](x), TAG) == fp.fingerprint(x, TAG)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 5)])
def test_every_dtype_comes_out_as_it_is(kind, dtype, shape):
    x = data_of(shape, dtype)
    seen = as_array(KINDS[kind](x))
    assert (seen.dtype, seen.shape, seen.tobytes()) == (dtype, shape, x.tobytes())


@pytest.mark.parametrize("kind", KINDS)
def test_all_public_functions_take_foreign_arrays(kind):
    make = KINDS[kind]
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    q = np.arange(24).reshape(4, 6)
    where = Slab((8, 6), (4, 0))
    assert fp.fingerprint(make(x), TAG, where) == fp.fingerprint(x, TAG, where)
    assert fp.linear_fingerprint(make(q), TAG, where) == fp.linear_fingerprint(q, TAG, where)
    assert fp.linear_fingerprint_counted(make(x), TAG) == fp.linear_fingerprint_counted(x, TAG)
    with pytest.raises(UsageError, match="found 1 elements of 24"):
        fp.linear_fingerprint(make(np.where(x == 3, 0.5, x)), TAG)
    words = np.arange(9, dtype=np.uint64)
    assert fp.xor_flat(make(words), 5, 2) == fp.xor_flat(words, 5, 2)
    assert fp.linear_flat(make(words), 5, 2) == fp.linear_flat(words, 5, 2)

    painted = color_hidden_states(make(x), TAG, where, out=np.empty_like(x))
    assert color_fingerprint(make(painted), TAG, where) == color_fingerprint(painted, TAG, where)
    painted[2, 1] += 1
    painted.view(np.uint32)[3, 5] ^= 1
    assert (colors_of(make(painted), TAG, where) == colors_of(painted, TAG, where)).all()
    assert [7, 5] in corrupted_elements(make(painted), TAG, where).tolist()
    if kind == "dlpack without version":  # nobody said that it may be written
        return
    host = x.copy()
    foreign = make(host)
    assert color_hidden_states(foreign, TAG) is foreign
    assert color_fingerprint(host, TAG) == fp.colour_field_fingerprint(TAG, (4, 6), 4)
    out = np.zeros(3, np.uint64)
    fp.fill_colours(make(out), 7, 1)
    assert out.all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_is_made(kind):
    x = np.ones(1 << 22, np.float32)
    foreign = KINDS[kind](x)
    fp.fingerprint(KINDS[kind](x[:8]), TAG)
    tracemalloc.start()  # numpy reports what it allocates
    fp.fingerprint(foreign, TAG)
    color_fingerprint(foreign, TAG)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 16


@pytest.mark.parametrize("kind", KINDS)
def test_what_owns_the_memory_lives_as_long_as_the_array(kind):
    x = np.arange(1000, dtype=np.float32)
    foreign = KINDS[kind](x)
    seen = as_array(foreign)[3:].reshape(1, -1).view(np.uint32)
    held = {"dlpack": "alive", "dlpack without version": "alive", "buffer": "n_views",
            "mlx": "n_views"}.get(kind)  # fmt: skip

    def out():
        return len(foreign.alive) if held == "alive" else getattr(foreign, held)

    gc.collect()
    if held:
        assert out() == 1
    assert seen[0, 0] == np.float32(3).view(np.uint32)
    del seen
    gc.collect()
    if held:
        assert out() == 0


def test_an_interfaces_owner_lives_as_long_as_the_array():
    foreign = Interface(np.arange(10.0))
    owner = weakref.ref(foreign)
    seen = as_array(foreign)
    del foreign
    gc.collect()
    assert owner() is not None
    del seen
    gc.collect()
    assert owner() is None


def test_an_array_outlives_its_producer():
    seen = as_array(Producer(np.arange(5000.0)))
    again = as_array(Interface(np.arange(5000.0)))
    third = as_array(Buffer(np.arange(5000.0)))
    gc.collect()
    assert seen.sum() == again.sum() == third.sum() == 4999 * 2500


def test_a_capsule_is_not_consumed_and_is_given_back_on_every_error():
    for lie, said in (
        ({"major": 2}, "DLPack version 2, expected 1"),
        ({"lanes": 4}, "4 lanes"), ({"code": 99}, "code 99"), ({"bits": 4}, "4 bits"),
        ({"code": 4, "bits": 32}, "code 4, 32 bits"),
        ({"data": None, "byte_offset": 0}, "has no memory of its own"),
        ({"capsule_device": (2, 1)}, "gave CUDA device 1"),
    ):  # fmt: skip
        producer = Producer(np.zeros(4, np.float32), **lie)
        with pytest.raises(UsageError, match=said):
            fp.fingerprint(producer, TAG)
        gc.collect()
        assert producer.alive == {}


def test_the_flags_of_a_capsule_are_heeded():
    x = np.zeros((3, 4), np.float32)
    for producer in (Producer(x, flags=1), Producer(x, versioned=False)):
        assert not as_array(producer).flags.writeable
        with pytest.raises(UsageError, match="read-only Producer"):
            color_hidden_states(producer, TAG)
    assert as_array(Producer(x)).flags.writeable
    with pytest.raises(UsageError, match="asked for a view, Producer gave a copy"):
        as_array(Producer(x, flags=2))
    assert not x.any()


def test_a_producer_is_asked_for_a_view_of_a_known_version():
    producer = Producer(np.zeros(3))
    as_array(producer)
    assert producer.asked == [{"max_version": (1, 0), "copy": False}]


def test_strides_left_out_mean_rows_one_after_the_other():
    x = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert (as_array(Producer(x, plain_strides=True)) == x).all()


@pytest.mark.parametrize("device", [(3, 0), (11, 1)])
def test_pinned_host_memory_is_read_in_place(device):
    x = np.arange(6.0)
    assert address(as_array(Producer(x, device=device))) == address(x)


@pytest.mark.parametrize(
    ("device", "named"),
    [
        ((2, 3), "CUDA device 3"), ((10, 0), "ROCm device 0"), ((8, 0), "Metal device 0"),
        ((13, 0), "CUDA managed"), ((14, 1), "oneAPI device 1"), ((77, 0), "device type 77"),
    ],
)  # fmt: skip
def test_an_array_on_a_device_without_backend_is_refused_with_what_to_do(device, named):
    for look in (fp.fingerprint, fp.linear_fingerprint, color_hidden_states, colors_of):
        with pytest.raises(UsageError, match=f"FakeGpuArray lies on .*{named}.* copy it to host"):
            look(FakeGpuArray(device), TAG)


def test_a_device_that_can_show_its_memory_to_the_host_is_read():
    class Managed(Producer):
        def __dlpack_device__(self):
            return (13, 0)

    x = np.arange(5.0)
    producer = Managed(x)
    assert address(as_array(producer)) == address(x)
    assert producer.asked[0]["dl_device"] == (1, 0)


def test_a_metal_array_without_a_buffer_is_asked_for_a_cpu_view():
    class Metal(Producer):
        def __dlpack_device__(self):
            return (8, 0)

    x = np.arange(5.0)
    assert address(as_array(Metal(x))) == address(x)
    with pytest.raises(UsageError, match="Producer lies on Metal device 0"):
        as_array(Producer(x, device=(8, 0)))


def test_where_dlpack_does_not_say_what_may_be_written_the_buffer_does():
    class Both(Buffer):  # as MLX on a CPU
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **asked):
            return Producer(self.x, versioned=False).__dlpack__()

    x = np.ones((3, 4), np.float32)
    assert color_hidden_states(Both(x), TAG)
    assert color_fingerprint(x, TAG) == fp.colour_field_fingerprint(TAG, (3, 4), 4)
    assert not as_array(Both(read_only(x))).flags.writeable
    assert as_array(Both(x, b"unknown")).tolist() == x.tolist()


@pytest.mark.parametrize("bfloat16_format", [b"bfloat16", b"B"])
@pytest.mark.parametrize("layout", LAID_OUT)
def test_mlx_bfloat16_is_read_from_its_buffer_never_from_its_metal_handle(bfloat16_format, layout):
    x = np.asarray(LAYOUTS[layout](data_of((5, 7), np.dtype(ml_dtypes.bfloat16))))
    seen = as_array(MlxLike(x, bfloat16_format))
    assert (seen.dtype, address(seen), seen.strides) == (x.dtype, address(x), x.strides)
    assert seen.flags.writeable == x.flags.writeable


def test_a_buffer_of_an_unknown_format_is_refused():
    with pytest.raises(UsageError, match="format 'bfloat16' with 2 bytes"):
        as_array(Buffer(np.zeros(3, "u2"), b"bfloat16"))
    with pytest.raises(UsageError, match="format 'quarter'"):
        as_array(Buffer(np.zeros(3, "u1"), b"quarter", MlxDtype("bfloat16")))


def test_the_standard_librarys_arrays_are_read_in_place(tmp_path):
    x = np.arange(10, dtype=np.float32)
    plain = array.array("f", x)
    matrix = (ctypes.c_float * 5 * 2)(*[(ctypes.c_float * 5)(*row) for row in x.reshape(2, 5)])
    assert fp.fingerprint(plain, TAG) == fp.fingerprint(x, TAG)
    assert fp.fingerprint(matrix, TAG) == fp.fingerprint(x.reshape(2, 5), TAG)
    assert fp.fingerprint(memoryview(x)[::2], TAG) == fp.fingerprint(x[::2], TAG)
    abc = np.array([97, 98, 99], np.uint8)
    assert fp.fingerprint(bytearray(b"abc"), TAG) == fp.fingerprint(abc, TAG)
    with (tmp_path / "f").open("wb+") as file:
        file.write(x.tobytes())
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert fp.fingerprint(mapped, TAG) == fp.fingerprint(x.view(np.uint8), TAG)
        mapped.close()  # nothing holds it any more
    color_hidden_states(plain, TAG)
    assert color_fingerprint(plain, TAG) == fp.colour_field_fingerprint(TAG, (10,), 4)


def test_interfaces_with_a_mask_or_without_a_pointer():
    x = np.arange(4.0)
    with pytest.raises(UsageError, match="Interface has a mask"):
        as_array(Interface(x, mask=np.zeros(4, bool)))
    assert (as_array(Interface(x, data=memoryview(x))) == x).all()
    with pytest.raises(UsageError, match="__array_interface__ of Interface cannot be read"):
        as_array(Interface(x, typestr="nonsense"))
    masked = np.ma.masked_array(x, [0, 1, 0, 0])
    with pytest.raises(UsageError, match="masked"):
        as_array(masked)


class OnlyArray:
    def __array__(self, dtype=None, copy=None):
        pytest.fail("__array__ may copy, and is not asked")


@pytest.mark.parametrize("x", [[1.0], (1, 2), 3.5, b"abc", "abc", None, OnlyArray(), np.array])
def test_what_offers_no_protocol_is_refused_and_told_how_to_become_an_array(x):
    with pytest.raises(UsageError, match=f"found {type(x).__name__}: convert"):
        as_array(x)


def test_a_producer_that_fails_is_named_with_what_it_said():
    class Failing(Producer):
        def __dlpack__(self, **asked):
            msg = "the tensor is a secret"
            raise RuntimeError(msg)

    with pytest.raises(UsageError, match="Failing cannot be read in place.*a secret"):
        fp.fingerprint(Failing(np.zeros(3)), TAG)


def test_no_library_is_imported_for_its_arrays():
    code = (
        "import sys, numpy as np, spimpi.fingerprint as f, spimpi.fingerprint.painting; "
        "f.as_array(memoryview(np.zeros(3))); "
        "bad = {'torch', 'mlx', 'jax', 'numba', 'mpi4py'} & set(sys.modules); "
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_read_only_arrays_are_read():
    x = read_only(np.arange(4.0))
    for make in KINDS.values():
        assert fp.fingerprint(make(x), TAG) == fp.fingerprint(x, TAG)
