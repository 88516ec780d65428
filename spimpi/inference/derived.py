"""What exact arithmetic derives from a stored matrix: two more tensors, which no split changes.

A matrix [N, K] gives integers float32 [N, K] and exponents int32 [N]. Each row depends on the
global row and the global K alone, so slices of the matrix give slices of both.
"""

import numpy as np

from spimpi.inference import exact
from spimpi.inference.checkpoint import float32

STORED = ("bfloat16", "float16", "float32")  # dtypes of matrices that can be scaled


def derived_names(name: str) -> tuple[str, str]:
    """The names of a matrix's integers and of its exponents."""
    return f"{name} {exact.ARITHMETIC} integers", f"{name} {exact.ARITHMETIC} exponents"


def is_matrix(shape, dtype: str) -> bool:
    """Whether a stored tensor has derived ones."""
    return len(shape) == 2 and 0 not in shape and dtype in STORED


def scaled(raw: np.ndarray, n_inputs: int, reduce_maxima=None):
    """(integers float32 [n, k], exponents int32 [n], rows with NaN or Inf, the first or -1).

    raw [n, k]: rows as stored, or the columns of them that one rank has; n_inputs: the global K.
    ``reduce_maxima(maxima)``: the rows' maxima (uint32, bits of |x|) over all ranks that have
    columns; None where the rows are whole.
    """
    values = float32(raw)
    maxima = exact.weight_absmax(values)
    if reduce_maxima:
        maxima = reduce_maxima(maxima)
    return exact.quantize_weights(values, maxima, exact.bits(n_inputs))
