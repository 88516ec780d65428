"""Arrays of libraries that are not there: how they offer their memory, and nothing else."""

import ctypes
from ctypes import POINTER, c_int64

import ml_dtypes
import numpy as np

from spimpi.fingerprint.dlpack import _Tensor, _Versioned

CODES = {"b": 6, "i": 0, "u": 1, "f": 2, "c": 5}
EXTRA = {
    "bfloat16": 4, "float8_e3m4": 7, "float8_e4m3": 8, "float8_e4m3b11fnuz": 9,
    "float8_e4m3fn": 10, "float8_e4m3fnuz": 11, "float8_e5m2": 12, "float8_e5m2fnuz": 13,
    "float8_e8m0fnu": 14,
}  # fmt: skip

_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

NAMES = (b"dltensor", b"dltensor_versioned")
_MEMORY = {}  # what producers have out, by the address of the capsule's structure


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _destroy(capsule):
    """As producers do: an unconsumed capsule gives its tensor back itself."""
    for name in NAMES:
        if _is_valid(capsule, name):
            address = _pointer(capsule, name)
            del _MEMORY.pop(address)[address]


class _Legacy(ctypes.Structure):
    _fields_ = [
        ("tensor", _Tensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class _PyBuffer(ctypes.Structure):
    """Py_buffer (Python's stable ABI)."""

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


class Producer:
    """A library of DLPack capsules over numpy's memory, which counts those that are out.

    ``lie``: fields of the capsule that are other than the array's (code, bits, lanes, data, major).
    """

    def __init__(self, x, versioned=True, device=(1, 0), flags=0, plain_strides=False, **lie):
        self.x, self.versioned, self.device, self.flags = x, versioned, device, flags
        self.plain_strides, self.lie = plain_strides, lie
        self.alive = {}
        self.asked = []

    @property
    def shape(self):
        return self.x.shape

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **asked):
        if not self.versioned and asked:
            msg = "unexpected keyword arguments"
            raise TypeError(msg)
        self.asked.append(asked)
        x, managed = self.x, _Versioned() if self.versioned else _Legacy()
        shape = (c_int64 * max(1, x.ndim))(*x.shape)
        strides = (c_int64 * max(1, x.ndim))(*(s // x.itemsize for s in x.strides))
        tensor = managed.tensor
        # a byte offset, as MLX's slices have
        tensor.data, tensor.byte_offset = x.ctypes.data - 64, 64
        tensor.device_type, tensor.device_id = self.lie.get("capsule_device", self.device)
        tensor.code = EXTRA.get(x.dtype.name, CODES.get(x.dtype.kind))
        tensor.bits, tensor.lanes, tensor.ndim = 8 * x.itemsize, 1, x.ndim
        tensor.shape = ctypes.cast(shape, POINTER(c_int64))
        if not self.plain_strides:
            tensor.strides = ctypes.cast(strides, POINTER(c_int64))
        for name in ("code", "bits", "lanes", "data", "byte_offset"):
            if name in self.lie:
                setattr(tensor, name, self.lie[name])
        if self.versioned:
            managed.major, managed.minor = self.lie.get("major", 1), 1
            managed.flags = self.flags
        address = ctypes.addressof(managed)
        self.alive[address] = (managed, shape, strides, x)
        _MEMORY[address] = self.alive
        return _new(address, NAMES[self.versioned], ctypes.cast(_destroy, ctypes.c_void_p))


class FakeGpuArray:
    """An array in a GPU's memory: says so, and gives no pointer that the host could read."""

    def __init__(self, device=(2, 3), shape=(4, 4)):
        self.device, self.shape, self.dtype = device, shape, np.dtype("f4")
        self.__cuda_array_interface__ = {"data": (0xDEAD0000, False)}

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if dl_device not in (None, self.device):
            msg = "cannot move between devices without a copy"
            raise BufferError(msg)
        tensor = Producer(np.zeros(self.shape, "f4"), device=self.device, data=0xDEAD0000)
        return tensor.__dlpack__()


class Interface:
    """Only ``__array_interface__``, that of a numpy array; other entries may be given."""

    def __init__(self, x, dtype=None, **entries):
        self.owner = x
        self.__array_interface__ = dict(x.__array_interface__) | entries
        if dtype is not None:
            self.dtype = dtype


FORMATS = {"F": "Zf", "D": "Zd"}  # PEP 3118's, where they are not numpy's


class _Slot(ctypes.Structure):
    _fields_ = [("slot", ctypes.c_int), ("function", ctypes.c_void_p)]


class _Spec(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("basicsize", ctypes.c_int),
        ("itemsize", ctypes.c_int),
        ("flags", ctypes.c_uint),
        ("slots", POINTER(_Slot)),
    ]


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, POINTER(_PyBuffer), ctypes.c_int)
def _getbuffer(self, view, flags):
    x, view = self.x, view[0]
    self.n_views += 1
    self.shape_kept = (ctypes.c_ssize_t * max(1, x.ndim))(*x.shape)
    self.strides_kept = (ctypes.c_ssize_t * max(1, x.ndim))(*x.strides)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
    view.obj, view.buf = id(self), x.ctypes.data
    view.len, view.itemsize, view.ndim = x.nbytes, x.itemsize, x.ndim
    view.readonly, view.format = not x.flags.writeable, self.format
    view.shape = ctypes.addressof(self.shape_kept)
    view.strides = ctypes.addressof(self.strides_kept)
    view.suboffsets = view.internal = None
    return 0


@ctypes.PYFUNCTYPE(None, ctypes.py_object, POINTER(_PyBuffer))
def _releasebuffer(self, view):
    self.n_views -= 1


_SLOTS = (_Slot * 3)(
    _Slot(1, ctypes.cast(_getbuffer, ctypes.c_void_p)),  # Py_bf_getbuffer
    _Slot(2, ctypes.cast(_releasebuffer, ctypes.c_void_p)),  # Py_bf_releasebuffer
    _Slot(0, None),
)
_BASETYPE = 1 << 10
_from_spec = ctypes.PYFUNCTYPE(ctypes.py_object, POINTER(_Spec))(
    ("PyType_FromSpec", ctypes.pythonapi)
)
_Exporter = _from_spec(_Spec(b"tests.Exporter", 0, 0, _BASETYPE, _SLOTS))


class Buffer(_Exporter):
    """Only the buffer protocol, with a format of one's own; counts the views that are out."""

    n_views = 0

    def __init__(self, x, format_=None, dtype=None):
        self.x = x
        self.format = format_ or FORMATS.get(x.dtype.char, x.dtype.char).encode()
        if dtype is not None:
            self.dtype = dtype


class MlxDtype:
    """MLX's dtypes are no numpy's: only their text tells their name."""

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return f"mlx.core.{self.name}"


class MlxLike(Buffer):
    """MLX's array on Apple silicon, as far as its protocols show (mlx/python/src, 0.30).

    DLPack says Metal, where the pointer is a handle of the GPU's that the host must not read; the
    buffer protocol gives the host's address. bfloat16 has the format "bfloat16" there, in older
    versions "B" with items of 2 bytes; numpy takes neither.
    """

    def __init__(self, x, bfloat16_format=b"bfloat16"):
        is_bfloat16 = x.dtype == ml_dtypes.bfloat16
        super().__init__(x, bfloat16_format if is_bfloat16 else None, MlxDtype(x.dtype.name))

    def __dlpack_device__(self):
        return (8, 0)

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return Producer(self.x, device=(8, 0), data=0xDEAD0000).__dlpack__()
