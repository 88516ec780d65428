"""DLPack tensors in host memory as numpy arrays, without a copy and without their library.

numpy imports no bfloat16 or float8 from DLPack, older ones no bool, and it makes an array of random
memory from a tensor that has none (PyTorch's fake and distributed ones). So the capsule is read
here. It is not consumed: it keeps its name and is kept alive by the array, and its own destructor
then gives the tensor back; no function pointer is ever called.

Structures and rules: the DLPack C API and its Python specification, version 1
(https://dmlc.github.io/dlpack/latest/).
"""

import ctypes
from ctypes import POINTER, Structure, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64

import numpy as np

from spimpi.errors import UsageError

CPU, METAL = 1, 8
HOST = {CPU, 3, 11}  # ordinary memory, and that which CUDA or ROCm pinned for their transfers
DEVICES = {
    1: "CPU", 2: "CUDA", 3: "CUDA host", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "VPI",
    10: "ROCm", 11: "ROCm host", 12: "extension", 13: "CUDA managed", 14: "oneAPI", 15: "WebGPU",
    16: "Hexagon", 17: "MAIA", 18: "Trainium",
}  # fmt: skip
MAJOR_VERSION = 1
READ_ONLY, IS_COPIED = 1, 2

# (type code, bits): the words as they lie in memory, and ml_dtypes' name for them
_NUMPYS = {(code, bits): f"{kind}{bits // 8}"
           for code, kind, sizes in ((0, "i", (8, 16, 32, 64)), (1, "u", (8, 16, 32, 64)),
                                     (2, "f", (16, 32, 64)), (5, "c", (64, 128)), (6, "b", (8,)))
           for bits in sizes}  # fmt: skip
_ML_DTYPES = {
    (4, 16): "bfloat16", (7, 8): "float8_e3m4", (8, 8): "float8_e4m3",
    (9, 8): "float8_e4m3b11fnuz", (10, 8): "float8_e4m3fn", (11, 8): "float8_e4m3fnuz",
    (12, 8): "float8_e5m2", (13, 8): "float8_e5m2fnuz", (14, 8): "float8_e8m0fnu",
}  # fmt: skip


class _Tensor(Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class _Versioned(Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", c_uint64),
        ("tensor", _Tensor),
    ]


# Prototypes of our own: argument types set on ctypes.pythonapi itself would be everybody's.
_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Memory:
    """Memory at an address as numpy sees it; keeps its owner alive as long as an array uses it."""

    def __init__(self, owner, address, typestr, shape, strides, read_only):
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": typestr,
            "shape": shape,
            "strides": strides,
            "data": (address, read_only),
        }


def device_of(x) -> tuple[int, int]:
    """(device type, number) of an array that offers DLPack."""
    kind, number = x.__dlpack_device__()
    return int(kind), int(number)


def describe_device(kind: int, number: int) -> str:
    return f"{DEVICES.get(kind, f'DLPack device type {kind}')} device {number}"


def from_dlpack(x) -> np.ndarray:
    """The array of a producer whose memory is the host's, or that can show it to the host.

    Raises UsageError where there is no such view without a copy, and lets the producer's own
    exceptions pass.
    """
    kind, number = device_of(x)
    capsule = _ask(x, kind in HOST)
    name = type(x).__name__
    tensor, flags = _read(capsule, name)
    if tensor.device_type not in HOST:
        found = describe_device(tensor.device_type, tensor.device_id)
        msg = f"asked for host memory, {name} gave {found}"
        raise UsageError(msg)
    if flags & IS_COPIED:
        msg = f"asked for a view, {name} gave a copy (on {describe_device(kind, number)})"
        raise UsageError(msg)
    dtype, typestr = _dtype(tensor, name)
    shape = tuple(tensor.shape[: tensor.ndim])
    if 0 in shape:
        return np.empty(shape, dtype)
    if not tensor.data:
        msg = (
            f"{name} of shape {shape} has no memory of its own (a fake, meta or distributed "
            "tensor): pass the local tensor that holds the data, such as x.to_local()"
        )
        raise UsageError(msg)
    strides = None
    if tensor.strides:
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides[: tensor.ndim])
    address = tensor.data + tensor.byte_offset
    memory = Memory(capsule, address, typestr, shape, strides, bool(flags & READ_ONLY))
    return np.asarray(memory).view(dtype)


def _ask(x, is_on_host: bool):
    """A capsule of x; of a version with flags, if the producer knows them."""
    newest = {"max_version": (MAJOR_VERSION, 0), "copy": False}
    if not is_on_host:
        return x.__dlpack__(**newest, dl_device=(CPU, 0))
    try:
        return x.__dlpack__(**newest)
    except TypeError:  # from before DLPack 1.0
        return x.__dlpack__()


def _read(capsule, name: str) -> tuple[_Tensor, int]:
    """(tensor, flags) in a capsule; a capsule without flags counts as read-only."""
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        address = _capsule_pointer(capsule, b"dltensor_versioned")
        managed = _Versioned.from_address(address)
        if managed.major != MAJOR_VERSION:  # nothing else in it may then be looked at
            msg = f"{name} gives DLPack version {managed.major}, expected {MAJOR_VERSION}"
            raise UsageError(msg)
        return managed.tensor, managed.flags
    if _capsule_is_valid(capsule, b"dltensor"):
        return _Tensor.from_address(_capsule_pointer(capsule, b"dltensor")), READ_ONLY
    msg = f"{name}.__dlpack__ gave no unused DLPack capsule, found {capsule!r}"
    raise UsageError(msg)


def words_of(dtype: np.dtype) -> str:
    """numpy's own type of the same size, under which memory of ml_dtypes' types is looked at."""
    return np.dtype(f"u{dtype.itemsize}").str


def _dtype(tensor: _Tensor, name: str) -> tuple[np.dtype, str]:
    """(dtype, the type under which the memory is looked at)."""
    kind = (tensor.code, tensor.bits)
    if tensor.lanes == 1 and kind in _NUMPYS:
        return np.dtype(_NUMPYS[kind]), np.dtype(_NUMPYS[kind]).str
    if tensor.lanes == 1 and kind in _ML_DTYPES:
        import ml_dtypes

        if hasattr(ml_dtypes, _ML_DTYPES[kind]):  # some came with its later versions
            dtype = np.dtype(getattr(ml_dtypes, _ML_DTYPES[kind]))
            return dtype, words_of(dtype)
    msg = (
        f"{name} has a DLPack type that is not known here: code {tensor.code}, {tensor.bits} bits, "
        f"{tensor.lanes} lanes"
    )
    raise UsageError(msg)
