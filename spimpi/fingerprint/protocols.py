"""Anybody's arrays as numpy arrays, without a copy and without importing their libraries.

DLPack, which also says where the memory is, ``__array_interface__`` and the buffer protocol.
``__array__`` is not asked, for it may copy.
"""

import ctypes
from contextlib import suppress

import numpy as np

from spimpi.errors import UsageError
from spimpi.fingerprint.dlpack import (
    HOST,
    METAL,
    Memory,
    describe_device,
    device_of,
    from_dlpack,
    words_of,
)


def as_array(x, *, writable: bool = False) -> np.ndarray:
    """The numpy array that is ``x``: the same memory, shape, strides and dtype. Never a copy.

    Takes numpy arrays and scalars and whatever offers DLPack in host memory,
    ``__array_interface__`` or the buffer protocol; bfloat16 and float8 come out as ml_dtypes'
    types. The result keeps what owns the memory alive. ``writable``: also refuse what may not be
    written. Raises UsageError, by name, for all else: lists, bytes, arrays on other devices,
    tensors whose memory does not hold their values.
    """
    if type(x) is np.ndarray:
        array = x
    elif isinstance(x, np.ndarray):
        _refuse_masked(x)
        array = x.view(np.ndarray)
    elif isinstance(x, np.generic):
        array = np.asarray(x)
        array.flags.writeable = False  # it is a copy: scalars cannot be changed
    else:
        array = _foreign(x)
    if writable:
        _check_writable(x, array)
    return array


def as_memory(x) -> np.ndarray:
    """As ``as_array``, of what lasts: UsageError for what gives a copy of itself at each look.

    That is numpy's scalars, and arrays whose DLPack or ``__array_interface__`` shows other memory
    when it is asked again.
    """
    array = as_array(x)
    if isinstance(x, np.generic) or not isinstance(x, np.ndarray) and _moves(x, array):
        msg = (
            f"this {type(x).__name__} gives a copy of its data, which would never change: pass the "
            "array that holds them (of an element x[i] of an array, x[i : i + 1])"
        )
        raise UsageError(msg)
    return array


def _moves(x, array) -> bool:
    """Whether an object shows its data at another address when it is asked again."""
    if not array.size:
        return False
    first = None if hasattr(x, "__dlpack__") else getattr(x, "__array_interface__", {}).get("data")
    if not isinstance(first, tuple):
        return as_array(x).ctypes.data != array.ctypes.data
    # What was there may be gone already: nothing else is to be put in its place.
    held = np.empty(min(array.nbytes, 1 << 20), np.uint8)
    return x.__array_interface__.get("data") != first or np.may_share_memory(held, array)


def _foreign(x) -> np.ndarray:
    _refuse_lazy(x)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _of_dlpack(x)
    if hasattr(x, "__array_interface__"):
        return _of_interface(x)
    if isinstance(x, (bytes, str)) or (view := _memoryview(x)) is None:
        msg = (
            f"expected a numpy array, or one that offers DLPack, __array_interface__ or the buffer "
            f"protocol, found {type(x).__name__}: convert it first (np.asarray(x, dtype=...), "
            f"np.frombuffer(x, dtype=...), tensor.numpy())"
        )
        raise UsageError(msg)
    return _of_buffer(view, x)


def _of_dlpack(x) -> np.ndarray:
    name, device = type(x).__name__, None
    try:
        device = device_of(x)
        # A buffer, where there is one, says whether it may be written, which DLPack does only since
        # 1.0. On Metal DLPack's pointer is a handle of the GPU's: memory is unified, and the buffer
        # protocol gives the host's address of it. DLPack knows more types.
        reachable = device[0] in HOST or device[0] == METAL
        if reachable and (view := _memoryview(x)) is not None:
            with suppress(UsageError):
                return _of_buffer(view, x)
        return from_dlpack(_detached(x))
    except UsageError as said:
        if device[0] in HOST:
            raise
        refused = said
    except Exception as said:  # a producer's, of any kind
        refused = said
    if device is None or device[0] in HOST:
        msg = f"{name} cannot be read in place through DLPack: {refused}"
    else:
        msg = (
            f"{name} lies on {describe_device(*device)}, for which there is no backend: copy it to "
            f"host memory first (x.cpu(), x.get(), jax.device_get(x)); {refused}"
        )
    raise UsageError(msg)


def _of_interface(x) -> np.ndarray:
    interface = dict(x.__array_interface__)
    if interface.get("mask") is not None:
        msg = f"{type(x).__name__} has a mask: fill it first, its masked elements have no value"
        raise UsageError(msg)
    if interface.get("data") is None:
        interface["data"] = x  # then the object's buffer holds the data
    dtype = _dtype_by_name(x)
    # numpy writes raw items for ml_dtypes' ("<V2"), or what it does not take back ("<f1")
    if dtype is not None and interface["typestr"][1:] in (
        f"V{dtype.itemsize}", f"f{dtype.itemsize}",
    ):  # fmt: skip
        interface["typestr"] = words_of(dtype)
        interface.pop("descr", None)
    else:
        dtype = None
    memory = Memory.__new__(Memory)
    memory.owner, memory.__array_interface__ = x, interface
    try:
        array = np.asarray(memory)
    except (TypeError, ValueError, AttributeError) as refused:
        msg = f"__array_interface__ of {type(x).__name__} cannot be read: {refused}"
        raise UsageError(msg) from refused
    return array if dtype is None else array.view(dtype)


def _of_buffer(view: memoryview, x) -> np.ndarray:
    try:
        return np.asarray(view)
    except (ValueError, RuntimeError, NotImplementedError) as refused:
        # numpy does not know the format. MLX says "bfloat16", older ones "B" with 2-byte items.
        dtype = _dtype_by_name(x)
        if dtype is None or dtype.itemsize != view.itemsize:
            msg = (
                f"{type(x).__name__} has a buffer of format {view.format!r} with {view.itemsize} "
                f"bytes an item, which numpy does not know: {refused}"
            )
            raise UsageError(msg) from refused
    if 0 in view.shape:
        return np.empty(view.shape, dtype)
    memory = Memory(
        view, _address(view), words_of(dtype), view.shape, view.strides, view.readonly
    )
    return np.asarray(memory).view(dtype)


def _dtype_by_name(x) -> np.dtype | None:
    """The type of ml_dtypes that x says it has: numpy's own protocols have no word for them."""
    name = str(getattr(x, "dtype", "")).rpartition(".")[2]
    if not name.startswith(("bfloat", "float8_")):
        return None
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else None


def _memoryview(x) -> memoryview | None:
    try:
        return memoryview(x)
    except (TypeError, BufferError, ValueError):
        return None


class _PyBuffer(ctypes.Structure):
    """Py_buffer, part of Python's stable ABI since 3.11."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


_FULL_READ_ONLY = 0x011C  # PyBUF_FULL_RO: strided, indirect, with a format
_get_buffer = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int
)(("PyObject_GetBuffer", ctypes.pythonapi))
_release_buffer = ctypes.PYFUNCTYPE(None, ctypes.POINTER(_PyBuffer))(
    ("PyBuffer_Release", ctypes.pythonapi)
)


def _address(view: memoryview) -> int:
    """Where the first element lies; true as long as the view lives."""
    if view.suboffsets:
        msg = "a buffer of pointers to rows (suboffsets) cannot be read in place"
        raise UsageError(msg)
    buffer = _PyBuffer()
    _get_buffer(view, ctypes.byref(buffer), _FULL_READ_ONLY)
    address = buffer.buf
    _release_buffer(ctypes.byref(buffer))
    return address


def _detached(x):
    """A tensor without its gradient, whose memory is the same: reading it needs no autograd."""
    return x.detach() if getattr(x, "requires_grad", False) is True else x


def _refuse_lazy(x) -> None:
    """PyTorch's views that are negated or conjugated when they are read: DLPack shows what lies
    beneath."""
    for question, cure in (("is_neg", "resolve_neg"), ("is_conj", "resolve_conj")):
        ask = getattr(x, question, None)
        if hasattr(x, "__dlpack__") and callable(ask) and ask():
            msg = (
                f"the memory of this {type(x).__name__} does not hold its values "
                f"({question}() is true): pass x.{cure}()"
            )
            raise UsageError(msg)


def _refuse_masked(x) -> None:
    if isinstance(x, np.ma.MaskedArray):
        msg = "a masked array has elements without a value: pass x.filled(value) or x.data"
        raise UsageError(msg)


def _check_writable(x, array: np.ndarray) -> None:
    if getattr(x, "requires_grad", False) is True:
        msg = (
            f"{type(x).__name__} requires grad, and autograd would not see the change: "
            "pass x.detach(), or another array as out="
        )
        raise UsageError(msg)
    if not array.flags.writeable:
        msg = (
            f"expected an array that may be written, found a read-only {type(x).__name__} of "
            f"shape {array.shape}: pass another array as out="
        )
        raise UsageError(msg)
