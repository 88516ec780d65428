"""What follows a matmul in a layer: its check, the way back to float32, fingerprints.

One kernel does all of it. Between two matmuls of decoding the caches are full of weights, and a
call of its own for every check would cost more than the check. ``found``, ``expected`` and
``bad`` are [layers, products]; ``keys`` is Keys.of_step; ``i`` is the layer of the stage and
``index`` the product (layer_checks.PRODUCTS).
"""

import numpy as np

from spimpi.fingerprint.words import linear_weight
from spimpi.inference.exact import check_product, scale_back
from spimpi.inference.kernels import block_words, segment_words
from spimpi.inference.tensors import ATTN, ATTN_OUT, FFN, QKV, REST
from spimpi.jit import inlined, kernel

# Where nothing is fingerprinted:
NO_KEYS = NO_WORDS = np.empty((0, 0), np.uint64)
NO_SEGMENTS = np.empty((0, 3), np.int64)

REST_ATTN, REST_FFN, REST_ATTN_OUT = (REST.index(name) for name in ("attn", "ffn", "attn_out"))


@inlined
def _check(xq, wr, y, r, i, index, found, expected, bad):
    n_bad, _, _, left, right = check_product(xq, wr, y, r)
    found[i, index], expected[i, index], bad[i, index] = left, right, n_bad


@kernel(
    "void(f8[:,::1], i8[::1], f8[:,::1], i8[::1], i4[::1], i4[::1], i8, f4[:,::1], b1, i8, i8,"
    " u8[:,::1], u8[:,::1], i8[:,::1], u8[:,::1], i8, i8[:,::1], i8, u8[:,::1])"
)
def finish_projection(
    xq, wr, y, r, ex, ew, b, out, checked, i, index, found, expected, bad, keys, first_row,
    segments, n_cols, made,
):  # fmt: skip
    """Check y = xq W^T, scale it back into out (exact.scale_back) and fingerprint out.

    made[i] gets the words of qkv's column segments; none where ``segments`` is empty.
    """
    if checked:
        _check(xq, wr, y, r, i, index, found, expected, bad)
    scale_back(y, ex, ew, b, out)
    if checked:
        bits = out.view(np.uint32)
        for s in range(segments.shape[0]):
            made[i, s] = segment_words(bits, keys[i + 1, QKV], first_row, segments[s], n_cols)


@kernel(
    "void(f8[:,::1], i8[::1], f8[:,::1], i8[::1], i8[:,::1], b1, i8, i8, u8[:,::1], u8[:,::1],"
    " i8[:,::1], u8[:,::1], i8, i8, u8[:,::1])"
)
def finish_partial(
    xq, wr, y, r, sent, checked, i, index, found, expected, bad, keys, first_row, which, made
):
    """Check y = xq W^T, a partial sum, and carry it as int64 for MPI_SUM.

    made[i] gets the linear fingerprint of ``sent`` (which 0: attn_out, 1: ffn_out), rows
    first_row… of a global tensor of as many columns. y must hold integers of at most 2**53 (the
    check counts others).
    """
    if not checked:
        for row in range(y.shape[0]):
            for j in range(y.shape[1]):
                sent[row, j] = np.int64(y[row, j])
        return
    _check(xq, wr, y, r, i, index, found, expected, bad)
    key, total = keys[i + 1, ATTN_OUT + which], np.uint64(0)
    for row in range(y.shape[0]):
        values, result = y[row], sent[row]
        first = np.uint64((first_row + row) * values.size)
        for j in range(values.size):
            q = np.int64(values[j])
            result[j] = q
            total += linear_weight(key, first + np.uint64(j)) * np.uint64(q)
    made[i, REST_ATTN_OUT + which] = total


@inlined
def linear_words(sent, summed, key, first_row):
    """Linear fingerprints of two integer tensors of one stream, whole rows."""
    own = total = np.uint64(0)
    for row in range(sent.shape[0]):
        a, b = sent[row], summed[row]
        first = np.uint64((first_row + row) * a.size)
        for j in range(a.size):
            weight = linear_weight(key, first + np.uint64(j))
            own += weight * np.uint64(a[j])
            total += weight * np.uint64(b[j])
    return own, total


@kernel(
    "void(u4[:,::1], i8[:,::1], i8[:,::1], i4[::1], i4[::1], i8, f4[:,::1], b1, i8, i8, i8, i8,"
    " i8, u8[:,::1], u8[:,::1], u8[:,::1])"
)
def finish_sum(
    x, sent, summed, ex, ew, b, out, checked, i, which, first_row, first_col, n_cols, keys, found,
    sums,
):  # fmt: skip
    """Scale the sum over the ranks back into out; fingerprint what went in and what came out.

    which 0: attn and attn_out, 1: ffn and ffn_out. x: the matmul's input as bits, at column
    first_col of n_cols; sent: this rank's contribution; both had their last use.
    """
    scale_back(summed, ex, ew, b, out)
    if not checked:
        return
    rest, key = (REST_ATTN, ATTN) if which == 0 else (REST_FFN, FFN)
    found[i, rest] = block_words(x, keys[i + 1, key], first_row, first_col, n_cols)
    own, total = linear_words(sent, summed, keys[i + 1, ATTN_OUT + which], first_row)
    found[i, REST_ATTN_OUT + which] = own
    sums[i, REST_ATTN_OUT + which] = total
