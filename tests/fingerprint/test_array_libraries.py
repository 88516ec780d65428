"""The arrays of PyTorch, MLX and JAX themselves, where they are installed."""

import numpy as np
import pytest

import spimpi.fingerprint as fp
from spimpi.errors import UsageError
from spimpi.fingerprint import Tag, as_array
from spimpi.fingerprint.arrays import dtype_of
from spimpi.fingerprint.painting import color_fingerprint, color_hidden_states

TAG = Tag(name="x")
VIEWS = {
    "whole": lambda t: t,
    "transposed": lambda t: t.T,
    "strided": lambda t: t[1:, ::2],
    "empty": lambda t: t[:0],
    "scalar": lambda t: t[2, 3],
}


def data_of(shape, dtype, seed=0) -> np.ndarray:
    """Small numbers that every dtype here holds exactly."""
    return np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)


def address(x) -> int:
    return x.__array_interface__["data"][0]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs PyTorch")


TORCH = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
         "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_a_torch_tensor_is_the_same_memory_and_has_the_same_fingerprint(torch, name, view):
    dtype = dtype_of(name)
    x = data_of((6, 8), dtype)
    words = np.dtype(f"i{dtype.itemsize}") if dtype.kind != "c" else dtype
    words = np.dtype("u1") if dtype == np.bool_ else words
    tensor = view(torch.from_numpy(x.view(words)).view(getattr(torch, name)))
    seen = as_array(tensor)
    assert seen.dtype == dtype
    assert seen.shape == tuple(tensor.shape)
    if seen.size:
        assert address(seen) == tensor.data_ptr()
    copy = np.asarray(view(torch.from_numpy(x.view(words)))).view(dtype)
    assert fp.fingerprint(tensor, TAG) == fp.fingerprint(np.array(copy), TAG)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_a_torch_tensor_is_painted_in_place(torch, name):
    tensor = torch.randn(16, 8).to(getattr(torch, name))
    assert color_hidden_states(tensor, TAG) is tensor
    moved = tensor.clone().T.contiguous().T
    size = tensor.element_size()
    assert color_fingerprint(moved, TAG) == fp.colour_field_fingerprint(TAG, (16, 8), size)
    with pytest.raises(UsageError, match="Inf and NaN"):
        color_hidden_states(tensor / 0, TAG)


def test_a_tensor_that_requires_grad_is_read_but_painted_only_when_detached(torch):
    tensor = torch.nn.Parameter(torch.ones(4, 4))
    before = tensor.detach().clone()
    assert fp.fingerprint(tensor, TAG) == fp.fingerprint(np.ones((4, 4), "f4"), TAG)
    with pytest.raises(UsageError, match=r"requires grad.*x.detach\(\)"):
        color_hidden_states(tensor, TAG)
    assert (tensor == before).all()
    out = torch.empty(4, 4)
    assert color_hidden_states(tensor, TAG, out=out) is out
    color_hidden_states(tensor.detach(), TAG)
    assert (tensor == out).all()


def test_torch_tensors_whose_memory_is_not_their_value_are_refused(torch):
    z = torch.view_as_complex(torch.ones(3, 2))
    for lazy, cure in ((z.conj(), "resolve_conj"), (z.conj().imag, "resolve_neg")):
        with pytest.raises(UsageError, match=cure):
            fp.fingerprint(lazy, TAG)
        assert fp.fingerprint(getattr(lazy, cure)(), TAG)
    for tensor in (torch.eye(3).to_sparse(), torch.ones(3, device="meta")):
        with pytest.raises(UsageError, match="cannot be read in place|no backend"):
            fp.fingerprint(tensor, TAG)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_fake_torch_tensor_is_refused(torch):
    fake = pytest.importorskip("torch._subclasses").FakeTensorMode()
    with fake:
        tensor = torch.ones(3)
    with pytest.raises(UsageError, match="no memory of its own|cannot be read"):
        fp.fingerprint(tensor, TAG)


@pytest.fixture(scope="module")
def mx():
    return pytest.importorskip("mlx.core")


MLX = ["float32", "float16", "bfloat16", "int64", "uint32", "int16", "uint8", "bool", "complex64"]


@pytest.mark.parametrize("name", MLX)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_an_mlx_array_has_the_fingerprint_of_its_values_and_is_evaluated_first(mx, name, view):
    dtype = dtype_of(name)
    x = data_of((6, 8), np.float32)
    lazy = view(mx.array(x) + 1).astype(getattr(mx, "bool_" if name == "bool" else name))
    seen = as_array(lazy)
    expected = np.array(view(x + 1).astype(dtype))
    assert (seen.dtype, seen.shape) == (dtype, expected.shape)
    assert fp.fingerprint(lazy, TAG) == fp.fingerprint(expected, TAG)
    if seen.size:
        assert address(seen) == address(as_array(lazy))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_an_mlx_array_is_painted_in_place(mx, name):
    x = mx.array(data_of((16, 8), np.float32)).astype(getattr(mx, name))
    assert color_hidden_states(x, TAG) is x
    size = x.itemsize
    assert color_fingerprint(mx.array(x), TAG) == fp.colour_field_fingerprint(TAG, (16, 8), size)


@pytest.fixture(scope="module")
def jnp():
    return pytest.importorskip("jax.numpy")


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int32", "bool", "complex64"])
def test_a_jax_array_is_read_and_never_written(jnp, name):
    expected = data_of((6, 8), dtype_of(name))
    x = jnp.array(expected)
    assert address(as_array(x)) == x.unsafe_buffer_pointer()
    assert fp.fingerprint(x, TAG) == fp.fingerprint(expected, TAG)
    if name in ("float32", "float16", "bfloat16"):
        with pytest.raises(UsageError, match="read-only"):
            color_hidden_states(x, TAG)
        assert (np.asarray(x) == expected).all()
