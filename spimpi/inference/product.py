"""What follows a matmul in a layer: its check, the way back to float32, fingerprints.

One kernel does all of it. Between two matmuls of decoding the caches are full of weights, and a
call of its own for every check would cost more than the check. ``found``, ``expected`` and
``bad`` are [layers, products]; ``keys`` is Keys.of_step; ``i`` is the layer of the stage and
``index`` the product (tensors.PRODUCTS).

A product is checked against the tensor that the layer holds, not against what the matmul was
given: the norm, the row's maximum, the exponent and the integers are made once more, so that a
change of any of them between that tensor and the matmul shows as a wrong product. Each element of
a product is read once, for its check and for what is made of it.
"""

import numpy as np

from spimpi.fingerprint.words import linear_weight
from spimpi.inference.elementary import power_of_two, rounded
from spimpi.inference.exact import NOT_FINITE, exponent_of, is_sum, scale_back, scaled_back
from spimpi.inference.kernels import (
    TOGETHER, block_words, held_on, maxima_word, norm_scales, normed_row, segment_words,
)  # fmt: skip
from spimpi.inference.tensors import ATTN, ATTN_MAX, ATTN_OUT, FFN, QKV, REST
from spimpi.jit import inlined, kernel

# Where nothing is fingerprinted:
NO_WORDS = np.empty((0, 0), np.uint64)
NO_SEGMENTS = np.empty((0, 3), np.int64)
NO_NORM = np.empty(0, np.float32)
NOT_HELD = -1  # as a place in ``held``

REST_ATTN, REST_FFN, REST_ATTN_OUT = (REST.index(name) for name in ("attn", "ffn", "attn_out"))


@inlined
def _largest(row):
    """The largest |x| of a row, as integer bits."""
    words, largest = row.view(np.uint32), np.uint32(0)
    for i in range(words.size):
        largest = max(largest, np.uint32(words[i] & 0x7FFFFFFF))
    return largest


@inlined
def _exponent_of_row(largest):
    """As quantize_rows takes it: 0 where nothing is scaled."""
    return exponent_of(largest) if 0 < largest < NOT_FINITE else 0


@inlined
def _input_side(row, largest, b, wr):
    """row (W^T r) mod 2**64, of the integers that quantize_rows makes of a row."""
    total = 0
    if 0 < largest < NOT_FINITE:
        scale = power_of_two(b - exponent_of(largest))
        for i in range(row.size):
            total += np.int64(rounded(np.float64(row[i]) * scale)) * wr[i]
    return total


@kernel(
    "void(f4[:,::1], f4[::1], f8, i8[::1], f8[:,::1], i8[::1], i4[::1], i4[::1], i8, f4[:,::1], b1,"
    " i8, i8, u8[:,::1], u8[:,::1], i8[:,::1], u8[:,::1], i8, i8[:,::1], i8, u8[:,::1], u4[::1],"
    " u8[:,::1], i8)"
)
def finish_projection(
    x, norm, eps, wr, y, r, ex, ew, b, out, checked, i, index, found, expected, bad, keys,
    first_row, segments, n_cols, made, weights, held, slot,
):  # fmt: skip
    """Check y = norm(x) W^T, scale it back into out (exact.scale_back) and fingerprint out.

    ``norm``: empty where x has none. ex: the rows' exponents, as quantize_rows left them, which
    are made once more where y is checked. made[i] gets the words of out's column segments; none
    where ``segments`` is empty. held[i, slot] gets out's word (kernels.hold), unless NOT_HELD.
    """
    if not checked:
        scale_back(y, ex, ew, b, out)
        return
    n_bad, all_left, all_right, whole = 0, 0, 0, np.uint64(0)
    normed, scales = np.empty(norm.shape[0], np.float32), np.empty(TOGETHER)
    for row in range(y.shape[0]):
        values, result, source = y[row], out[row], x[row]
        if norm.shape[0] > 0:
            if row % TOGETHER == 0:
                norm_scales(x, row, eps, scales)
            normed_row(source, scales[row % TOGETHER], norm, normed)
            source = normed
        largest = _largest(source)
        right = _input_side(source, largest, b, wr)
        own = np.int64(_exponent_of_row(largest)) - 2 * b
        left, n_wrong = 0, 0
        for j in range(values.size):
            v = values[j]
            good = is_sum(v)
            left += np.int64(v if good else 0.0) * r[j]
            n_wrong += not good
            result[j] = scaled_back(v, own + ew[j])
        n_bad += left != right or n_wrong > 0
        all_left += left
        all_right += right
        if slot >= 0:
            whole = held_on(whole, result.view(np.uint32), weights)
    found[i, index], expected[i, index] = np.uint64(all_left), np.uint64(all_right)
    bad[i, index] = n_bad
    if slot >= 0:
        held[i, slot] = whole
    bits = out.view(np.uint32)
    for s in range(segments.shape[0]):
        made[i, s] = segment_words(bits, keys[i + 1, QKV], first_row, segments[s], n_cols)


@kernel(
    "void(f4[:,::1], u8[::1], u4[::1], i8[::1], f8[:,::1], i8[::1], i8, i8[:,::1], b1, i8, i8,"
    " u8[:,::1], u8[:,::1], i8[:,::1], u8[:,::1], i8, i8, u8[:,::1])"
)
def finish_partial(
    x, packed, maxima, wr, y, r, b, sent, checked, i, index, found, expected, bad, keys, first_row, which,
    made,
):  # fmt: skip
    """Check y = x W^T, a partial sum, and carry it as int64 for MPI_SUM.

    packed: the maxima of x as this rank gave them to their reduction (kernels.pack_maxima), which
    must be those of x; maxima: those of the GLOBAL rows, which x must not exceed. made[i] gets the linear
    fingerprint of ``sent`` (which 0: attn_out, 1: ffn_out), rows first_row… of a global tensor of
    as many columns. y must hold integers of at most 2**53 (the check counts others).
    """
    if not checked:
        for row in range(y.shape[0]):
            for j in range(y.shape[1]):
                sent[row, j] = np.int64(y[row, j])
        return
    key, total = keys[i + 1, ATTN_OUT + which], np.uint64(0)
    n_bad, all_left, all_right = 0, 0, 0
    for row in range(y.shape[0]):
        values, result = y[row], sent[row]
        right = _input_side(x[row], maxima[row], b, wr)
        left, n_wrong = 0, 0
        first = np.uint64((first_row + row) * values.size)
        for j in range(values.size):
            v = values[j]
            good = is_sum(v)
            q = np.int64(v if good else 0.0)
            left += q * r[j]
            n_wrong += not good
            result[j] = q
            total += linear_weight(key, first + np.uint64(j)) * np.uint64(q)
        largest = _largest(x[row])
        differs = largest > maxima[row] or packed[row] >> np.uint64(32) != np.uint64(largest)
        n_bad += left != right or n_wrong > 0 or differs
        all_left += left
        all_right += right
    found[i, index], expected[i, index] = np.uint64(all_left), np.uint64(all_right)
    bad[i, index] = n_bad
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
    "void(u4[:,::1], i8[:,::1], i8[:,::1], u4[::1], i4[::1], i8, f4[:,::1], b1, i8, i8, i8, i8,"
    " i8, u8[:,::1], u8[:,::1], u8[:,::1], u8[:,::1], i8[:,::1], u4[::1], u8[:,::1])"
)
def finish_sum(
    x, sent, summed, maxima, ew, b, out, checked, i, which, first_row, first_col, n_cols, keys,
    found, sums, max_words, max_bad, weights, held,
):  # fmt: skip
    """Scale the sum over the ranks back into out; fingerprint what went in and what came out.

    which 0: attn and attn_out, 1: ffn and ffn_out. x: the matmul's input as bits, at column
    first_col of n_cols; sent: this rank's contribution; both had their last use, and so had the
    reduced maxima, whose word max_words[i, which] was taken when they arrived. held[i, which] gets
    out's word (kernels.hold).
    """
    key = keys[i + 1, ATTN_OUT + which]
    own = total = whole = np.uint64(0)
    for row in range(summed.shape[0]):
        values, mine, result = summed[row], sent[row], out[row]
        scale = np.int64(_exponent_of_row(maxima[row])) - 2 * b
        first = np.uint64((first_row + row) * values.size)
        for j in range(values.size):
            v = values[j]
            result[j] = scaled_back(np.float64(v), scale + ew[j])
            if checked:
                weight = linear_weight(key, first + np.uint64(j))
                own += weight * np.uint64(mine[j])
                total += weight * np.uint64(v)
        if checked:
            whole = held_on(whole, result.view(np.uint32), weights)
    if not checked:
        return
    rest = REST_ATTN if which == 0 else REST_FFN
    at = ATTN if which == 0 else FFN
    found[i, rest] = block_words(x, keys[i + 1, at], first_row, first_col, n_cols)
    found[i, REST_ATTN_OUT + which], sums[i, REST_ATTN_OUT + which] = own, total
    held[i, which] = whole
    word = maxima_word(maxima, keys[i + 1, ATTN_MAX + which], first_row)
    max_bad[i, which] += word != max_words[i, which]
