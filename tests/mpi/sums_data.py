"""Addends for the tests of sums, made on every rank without communication."""

import ml_dtypes
import numpy as np

from spimpi import Tag

TAG = Tag(name="hidden", layer=2, step=1)
FLOATS = ["float64", "float32", "float16", "bfloat16", "complex128", "complex64"]
INTEGERS = ["int64", "uint64", "int32", "uint16", "int8"]


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def own_of(comm, name, shape=(13, 21), seed=0):
    """Everybody's contributions, made without communication."""
    dtype, rng = dtype_of(name), np.random.default_rng(seed)
    x = rng.standard_normal((comm.size, *shape))
    if dtype.kind == "c":
        x = x + 1j * rng.standard_normal(x.shape)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        x = rng.integers(info.min, info.max, x.shape, dtype, endpoint=True)
    return list(x.astype(dtype))


def added(xs):
    total = xs[0]
    with np.errstate(over="ignore"):  # integers wrap
        for x in xs[1:]:
            total = (total + x).astype(total.dtype)
    return total


def disagreement(size, odd=None):
    """What is said of a result that differs, the last rank's unless ``odd`` is another's: of two
    there are no others."""
    odd = size - 1 if odd is None else odd
    return (
        f"the result of rank {odd} differs from the others'" if size > 2
        else "the results of ranks 0, 1 differ, and no majority"
    )  # fmt: skip
