"""The dtypes of safetensors files: bytes a word, words an element, numpy's names."""

from dataclasses import dataclass

import numpy as np

from spimpi.errors import UsageError
from spimpi.printable import one_line


@dataclass(frozen=True)
class StoredType:
    """A dtype as safetensors names it: ``words`` words of ``wordsize`` bytes an element, and the
    name of the numpy (or ml_dtypes) dtype."""

    name: str
    wordsize: int
    words: int
    numpy_name: str


# https://github.com/huggingface/safetensors: enum Dtype, of version 0.8
STORED_TYPES = {
    t.name: t
    for t in (
        StoredType("BOOL", 1, 1, "bool"),
        StoredType("U8", 1, 1, "uint8"),
        StoredType("I8", 1, 1, "int8"),
        StoredType("F8_E4M3", 1, 1, "float8_e4m3fn"),
        StoredType("F8_E5M2", 1, 1, "float8_e5m2"),
        StoredType("F8_E8M0", 1, 1, "float8_e8m0fnu"),
        StoredType("F8_E4M3FNUZ", 1, 1, "float8_e4m3fnuz"),
        StoredType("F8_E5M2FNUZ", 1, 1, "float8_e5m2fnuz"),
        StoredType("U16", 2, 1, "uint16"),
        StoredType("I16", 2, 1, "int16"),
        StoredType("F16", 2, 1, "float16"),
        StoredType("BF16", 2, 1, "bfloat16"),
        StoredType("U32", 4, 1, "uint32"),
        StoredType("I32", 4, 1, "int32"),
        StoredType("F32", 4, 1, "float32"),
        StoredType("U64", 8, 1, "uint64"),
        StoredType("I64", 8, 1, "int64"),
        StoredType("F64", 8, 1, "float64"),
        StoredType("C64", 4, 2, "complex64"),
    )
}


def stored_type(name) -> StoredType:
    """UsageError, by name, for a dtype that has no fingerprint (items of less than a byte)."""
    found = STORED_TYPES.get(name) if isinstance(name, str) else None
    if found is None:
        msg = f"no fingerprint for dtype {one_line(name, 60)}: expected one of {', '.join(STORED_TYPES)}"
        raise UsageError(msg)
    return found


def carries(dtype: np.dtype, stored: StoredType) -> bool:
    """Whether an array of this dtype holds the stored bits: the same type, or plain words."""
    return dtype.name == stored.numpy_name or (
        dtype.kind == "u" and stored.words == 1 and dtype.itemsize == stored.wordsize
    )
