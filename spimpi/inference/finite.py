"""NaN and Inf in weights, and the largest of them: what arithmetic cannot start from."""

from math import prod

import ml_dtypes
import numpy as np

# The bits of a number's exponent: all set in NaN and Inf alone.
EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
_BLOCK = 1 << 20  # elements that are looked at together


def first_not_finite(array: np.ndarray) -> int:
    """The flat index of the first NaN or Inf of weights as they are stored, -1 where none is. Local."""
    flat = array.reshape(-1)
    words, mask = flat.view(f"u{flat.itemsize}"), EXPONENT[flat.dtype.name]
    for first in range(0, words.size, _BLOCK):
        bad = (words[first : first + _BLOCK] & mask) == mask
        if bad.any():
            return first + int(np.argmax(bad))
    return -1


def holds_not_finite(part) -> bool:
    """Whether what a rank holds of embedding and norms, which no scaling looks at, has NaN or Inf.
    Local; ``part``: a weights.Part."""
    norms = [norm for a in part.layers for norm in (a.attn_norm, a.ffn_norm, a.qk_norm)]
    return any(a is not None and first_not_finite(a) >= 0 for a in (*norms, part.norm, part.embed))


def named_not_finite(checkpoint, part: int, n_parts: int) -> str:
    """The first tensor with NaN or Inf in a share of the checkpoint's bytes, in words; "" where
    there is none. Reads that share. Local."""
    for name, first, values in _stored(checkpoint, part, n_parts):
        at = first_not_finite(values)
        if at >= 0:
            shape = checkpoint.tensors[name].shape
            place = [int(i) for i in np.unravel_index(first + at, shape)]
            return (
                f"the checkpoint's tensor {name} holds {float(values[at])} in element {place}: "
                "weights must be finite numbers"
            )
    return ""


def largest_weight(checkpoint, last_layer: int) -> tuple[str, float]:
    """(tensor, |w|) of the largest weight up to a layer, -1: of all. Reads them. Local."""
    found, largest = "", 0.0
    for name, _, values in _stored(checkpoint, 0, 1):
        layer = name.split(".")[2] if name.startswith("model.layers.") else "-1"
        if last_layer >= 0 and int(layer) > last_layer:
            break
        value = float(np.abs(values.astype(np.float32)).max(initial=0))
        if value > largest:
            found, largest = name, value
    return found, largest


def _stored(checkpoint, part, n_parts):
    """(tensor, flat index of the first element, elements) of a share of the checkpoint's bytes."""
    dtypes = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
    for name, first, words in checkpoint.pieces(part, n_parts):
        record = checkpoint.tensors[name]
        if prod(record.shape):
            yield name, first, words.view(dtypes.get(record.dtype, record.dtype))
