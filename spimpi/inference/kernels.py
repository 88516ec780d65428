"""The row-wise kernels of the decoder and the fingerprints taken between them.

Rows are tokens. Each kernel computes a row from that row alone, in strict float64, in index
order, so that a result does not depend on how many rows there are or how they were cut
(docs/exact-arithmetic.md). ``words`` is a uint64 array in which checks leave their results;
``slot`` is where.
"""

import numpy as np

from spimpi.fingerprint.tag import GOLDEN as _GOLDEN
from spimpi.fingerprint.words import GOLDEN, ONE, close, element, element8, mix, mix_open
from spimpi.inference.elementary import exp, sincos
from spimpi.inference.tensors import FFN, HIDDEN, PRODUCTS, REST, RESID
from spimpi.jit import inlined, kernel

REST_INPUT, REST_RESID, REST_FFN = (REST.index(name) for name in ("input", "resid", "ffn"))
ATTN_OUT_PRODUCT, GATE_UP_PRODUCT, FFN_OUT_PRODUCT = (
    PRODUCTS.index(name) for name in ("attn_out", "gate_up", "ffn_out")
)
HELD_DELTA, HELD_GATE_UP = 0, 2  # in ``held``: what is added after attention, after the FFN; gate_up
_HELD_ROWS = np.uint64(_GOLDEN)


TOGETHER = 4  # rows whose sums of squares are made side by side: each is a chain of additions


@inlined
def norm_scales(x, first, eps, scales):
    """scales[j] = 1 / sqrt(mean(row²) + eps) of x's row first + j, of TOGETHER rows or what is left.

    Each row's squares are added in index order, whatever rows are beside it.
    """
    n, width = min(TOGETHER, x.shape[0] - first), x.shape[1]
    if n == TOGETHER:
        a, b, c, d = x[first], x[first + 1], x[first + 2], x[first + 3]
        s0 = s1 = s2 = s3 = 0.0
        for i in range(width):
            v0, v1, v2, v3 = np.float64(a[i]), np.float64(b[i]), np.float64(c[i]), np.float64(d[i])
            s0 += v0 * v0
            s1 += v1 * v1
            s2 += v2 * v2
            s3 += v3 * v3
        scales[0], scales[1], scales[2], scales[3] = s0, s1, s2, s3
    else:
        for j in range(n):
            row, total = x[first + j], 0.0
            for i in range(width):
                value = np.float64(row[i])
                total += value * value
            scales[j] = total
    for j in range(n):
        scales[j] = 1.0 / np.sqrt(scales[j] / width + eps)


@inlined
def normed_row(row, scale, weight, out):
    """out = row · scale · weight."""
    for i in range(row.shape[0]):
        out[i] = np.float32(np.float64(row[i]) * scale * np.float64(weight[i]))


@kernel("void(f4[:,::1], f4[::1], f8, f4[:,::1])")
def rmsnorm(x, weight, eps, out):
    """out = x / sqrt(mean(x²) + eps) · weight, row by row (Zhang and Sennrich 2019)."""
    scales = np.empty(TOGETHER)
    for row in range(x.shape[0]):
        at = row % TOGETHER
        if at == 0:
            norm_scales(x, row, eps, scales)
        normed_row(x[row], scales[at], weight, out[row])


# What one kernel of a rank hands to its next in memory is held by a word of its own: a sum of
# products of 32 bits, several times as fast as a fingerprint, and as sure to see one element.


@inlined
def held_row(bits, weights):
    """Word of a row of 4-byte words; ``weights``: odd uint32, one a column."""
    total = np.uint64(0)
    for i in range(bits.shape[0]):
        total += np.uint64(bits[i]) * np.uint64(weights[i])
    return total


@inlined
def held_on(total, bits, weights):
    """The word of the rows so far and of one row more."""
    return total * _HELD_ROWS + held_row(bits, weights)


@inlined
def held_words(bits, weights):
    total = np.uint64(0)
    for row in range(bits.shape[0]):
        total = held_on(total, bits[row], weights)
    return total


@kernel("void(u4[:,::1], u4[::1], u8[:,::1], i8, i8)")
def hold(bits, weights, held, i, slot):
    """held[i, slot] = the word of an array that the next kernel takes."""
    held[i, slot] = held_words(bits, weights)


@kernel("void(f4[::1], f4[:,::1], f4[:,::1])")
def rope_table(inverse_frequencies, cosines, sines):
    """Cosine and sine of position × frequency; the angle is rounded to float32, as in training."""
    for position in range(cosines.shape[0]):
        for i in range(cosines.shape[1]):
            angle = np.float32(position) * inverse_frequencies[i]
            s, c = sincos(np.float64(angle))
            cosines[position, i] = np.float32(c)
            sines[position, i] = np.float32(s)


@inlined
def row_words(row, key, first):
    """XOR of the shares of a contiguous run of 4-byte words; ``first``: its first element."""
    share = np.uint64(0)
    own = key + (first + ONE) * GOLDEN
    for i in range(row.shape[0]):
        share ^= mix_open((own + np.uint64(i) * GOLDEN) ^ np.uint64(row[i]))
    return close(share)


@inlined
def block_words(x, key, first_row, first_col, n_cols):
    """Share of a block of 4-byte words in the fingerprint of a two-dimensional tensor."""
    share = np.uint64(0)
    for row in range(x.shape[0]):
        first = np.uint64((first_row + row) * n_cols + first_col)
        share ^= row_words(x[row], key, first)
    return share


@inlined
def segment_words(x, key, first_row, segment, n_cols):
    share = np.uint64(0)
    local, first_col, width = segment[0], segment[1], segment[2]
    for row in range(x.shape[0]):
        first = np.uint64((first_row + row) * n_cols + first_col)
        share ^= row_words(x[row, local : local + width], key, first)
    return share


@kernel("void(u4[:,::1], u8[::1], i8, i8, i8, i8, u8[::1], i8)")
def fingerprint_block(x, keys, which, first_row, first_col, n_cols, words, slot):
    """words[slot] = share of the block x, placed at (first_row, first_col) of n_cols columns."""
    words[slot] = block_words(x, keys[which], first_row, first_col, n_cols)


@kernel("void(u4[:,::1], u8[::1], i8, i8, i8[:,::1], i8, u8[::1], i8)")
def fingerprint_segments(x, keys, which, first_row, segments, n_cols, words, slot):
    """words[slot + s] = share of column segment s = (local column, global column, width)."""
    for s in range(segments.shape[0]):
        words[slot + s] = segment_words(x, keys[which], first_row, segments[s], n_cols)


@kernel("void(u4[:,::1], i8[::1], u8[::1], i8, u8[::1], i8)")
def fingerprint_rows(x, rows, keys, which, words, slot):
    """words[slot] = share of whole rows; row i of x is row rows[i] of the tensor."""
    share = np.uint64(0)
    for i in range(x.shape[0]):
        share ^= row_words(x[i], keys[which], np.uint64(rows[i] * x.shape[1]))
    words[slot] = share


@kernel("void(u4[:,::1], i8[::1], i8, u8[::1], i8, u8[::1], i8)")
def fingerprint_some_rows(x, rows, first_row, keys, which, words, slot):
    """words[slot] ^= share of those rows of a tensor that x holds, its rows first_row…"""
    share = np.uint64(0)
    for i in range(rows.shape[0]):
        row = rows[i] - first_row
        if 0 <= row < x.shape[0]:
            share ^= row_words(x[row], keys[which], np.uint64(rows[i] * x.shape[1]))
    words[slot] ^= share


@inlined
def token_words(tokens, key, first):
    share = np.uint64(0)
    for i in range(tokens.shape[0]):
        share ^= element8(key, np.uint64(first + i), np.uint64(tokens[i]))
    return share


@kernel("void(i8[::1], u8[::1], i8, i8, u8[::1], i8)")
def fingerprint_tokens(tokens, keys, step, first, words, slot):
    """words[slot] = share of tokens first, first + 1, … in the fingerprint of a step's tokens."""
    words[slot] = token_words(tokens, keys[step], first)


@inlined
def _larger(value, best):
    """Whether a logit replaces the best so far; the first NaN does, as in numpy's argmax."""
    return value > best or (value != value and best == best)


@kernel("void(f4[:,::1], f4[::1], i8[::1], i8[::1], u8[:,::1], i8, i8, i8, u8[::1], u8[::1])")
def check_sampled(logits, gathered, starts, own, keys, step, first_row, part, found, tokens):
    """found = (…, what was gathered, this rank's part of it again), tokens[0] = the tokens.

    gathered holds the parts [rows, columns] of all ranks one after the other; part p has columns
    starts[p] to starts[p + 1] and this rank's is ``part``; it is empty where there is one part.
    keys[step]: of logits and of tokens. The tokens are chosen here once more, into ``own``, each
    the lowest id of the largest logit: what Head chose must have their fingerprint.
    """
    n_rows, n_parts = logits.shape[0], starts.shape[0] - 1
    n_cols, key = starts[n_parts], keys[step, 0]
    found[2] = block_words(logits.view(np.uint32), key, first_row, starts[part], n_cols)
    total, bits = np.uint64(0), gathered.view(np.uint32)
    for row in range(n_rows):
        best, at = np.float32(-np.inf), 0
        for p in range(n_parts):
            width = starts[p + 1] - starts[p]
            if gathered.shape[0] > 0:
                begin = n_rows * starts[p] + row * width
                values = gathered[begin : begin + width]
                first = np.uint64((first_row + row) * n_cols + starts[p])
                total ^= row_words(bits[begin : begin + width], key, first)
            else:
                values = logits[row]
            for j in range(width):
                if _larger(values[j], best):
                    best, at = values[j], starts[p] + j
        own[row] = at
    found[1] = total
    tokens[0] = token_words(own, keys[step, 1], first_row)


@kernel("void(u4[::1], u8, u8[::1])")
def pack_maxima(maxima, rank, packed):
    """Maximum and owner in one word, so that one MPI_MAX gives both; ties to the lowest rank."""
    for row in range(maxima.shape[0]):
        packed[row] = (np.uint64(maxima[row]) << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - rank)


@inlined
def maxima_word(maxima, key, first_row):
    """Fingerprint of reduced maxima, as unpack_maxima takes it."""
    share = np.uint64(0)
    for row in range(maxima.shape[0]):
        share ^= element(key, np.uint64(first_row + row), np.uint64(maxima[row]))
    return share


@kernel("i8(u8[::1], u8[::1], u4[::1], u8, u8, u8, i8, u8[::1], i8)")
def unpack_maxima(sent, reduced, maxima, rank, n_ranks, key, first_row, words, slot):
    """Take the reduced maxima apart and check them; returns the number of wrong rows.

    A row is wrong where what was sent is no longer this rank's maximum, where the result is below
    it, where it names this rank as its owner but is not this rank's value, or where it names no
    rank at all. Over all ranks that leaves only the true maximum. ``maxima`` receives the result;
    words[slot] = its fingerprint, for agreement.
    """
    bad = 0
    for row in range(maxima.shape[0]):
        value = reduced[row] >> np.uint64(32)
        owner = np.uint64(0xFFFFFFFF) - (reduced[row] & np.uint64(0xFFFFFFFF))
        mine = np.uint64(maxima[row])
        low = value < mine or sent[row] >> np.uint64(32) != mine
        if low or owner >= n_ranks or (owner == rank and value != mine):
            bad += 1
        maxima[row] = np.uint32(value)
    words[slot] = maxima_word(maxima, key, first_row)
    return bad


@kernel(
    "void(f4[:,::1], f4[:,::1], f4[::1], f8, f4[:,::1], u8[:,::1], i8, i8, i8, b1, u8[:,::1],"
    " u8[:,::1], u8[::1], u4[::1], u8[:,::1], u8[:,::1], i8[:,::1])"
)
def add_residual(
    x, delta, norm, eps, out, keys, i, first_row, half, checked, found, made, hidden, weights, held,
    product_found, product_bad,
):  # fmt: skip
    """out = x + delta in float32, for layer i; half 0: after attention, 1: after the FFN.

    ``norm``: that of delta (OLMo), else empty. This is the last use of x and makes out, so both
    are fingerprinted: found[i] gets the input's (half 0) or resid's word, made[i] resid's (half
    0), hidden[i] the output's (half 1). ``keys``: Keys.of_step. A delta that is no longer as its
    product left it (held[i, half]; ``weights``: hold's) fails that product.
    """
    n_rows, width = x.shape
    normed, scales = np.empty(norm.shape[0], np.float32), np.empty(TOGETHER)
    for row in range(n_rows):
        if norm.shape[0] > 0:
            at = row % TOGETHER
            if at == 0:
                norm_scales(delta, row, eps, scales)
            normed_row(delta[row], scales[at], norm, normed)
            for j in range(width):
                out[row, j] = x[row, j] + normed[j]
        else:
            for j in range(width):
                out[row, j] = x[row, j] + delta[row, j]
    if not checked:
        return
    before, after = x.view(np.uint32), out.view(np.uint32)
    if half == 0:
        found[i, REST_INPUT] = block_words(before, keys[i, HIDDEN], first_row, 0, width)
        made[i, REST_RESID] = block_words(after, keys[i + 1, RESID], first_row, 0, width)
    else:
        found[i, REST_RESID] = block_words(before, keys[i + 1, RESID], first_row, 0, width)
        hidden[i] = block_words(after, keys[i + 1, HIDDEN], first_row, 0, width)
    off = held_words(delta.view(np.uint32), weights) - held[i, half]
    product = ATTN_OUT_PRODUCT if half == 0 else FFN_OUT_PRODUCT
    product_found[i, product] += off
    product_bad[i, product] += off != 0


@kernel(
    "void(f4[:,::1], f4[:,::1], u8[:,::1], i8, i8, i8, i8, b1, u8[:,::1], u4[::1], u8[:,::1],"
    " u8[:,::1], i8[:,::1])"
)
def swiglu(
    gate_up, out, keys, i, first_row, first_col, n_cols, checked, made, weights, held,
    product_found, product_bad,
):  # fmt: skip
    """out = silu(gate) · up; ``gate_up`` holds the gate's columns first (Shazeer 2020).

    made[i] gets the fingerprint of out, at column first_col of n_cols. A gate_up that is no longer
    as its product left it (held[i, HELD_GATE_UP]; ``weights``: hold's) fails that product.
    """
    n_rows, width = out.shape
    for row in range(n_rows):
        for j in range(width):
            gate = np.float64(gate_up[row, j])
            activated = gate / (1.0 + exp(-gate)) * np.float64(gate_up[row, width + j])
            out[row, j] = np.float32(activated) + np.float32(0.0)
    if checked:
        bits = out.view(np.uint32)
        made[i, REST_FFN] = block_words(bits, keys[i + 1, FFN], first_row, first_col, n_cols)
        off = held_words(gate_up.view(np.uint32), weights) - held[i, HELD_GATE_UP]
        product_found[i, GATE_UP_PRODUCT] += off
        product_bad[i, GATE_UP_PRODUCT] += off != 0


@inlined
def _absorb(key, word):
    return mix((key ^ word) + GOLDEN)


@kernel("void(u8[::1], i8[::1], i8, i8[:,::1], u8[:,::1])")
def stream_keys(prefixes, layers, step, shapes, keys):
    """keys[l, n]: stream key of tensor n in layer l at this step (docs/fingerprint.md).

    ``prefixes[n]`` is the key after the tensor's name; a row of ``shapes`` is (item size, number
    of axes, dim 0, dim 1).
    """
    for i in range(layers.shape[0]):
        for n in range(prefixes.shape[0]):
            key = _absorb(prefixes[n], np.uint64(layers[i]))
            key = _absorb(key, np.uint64(step))
            for j in range(2 + shapes[n, 1]):
                key = _absorb(key, np.uint64(shapes[n, j]))
            keys[i, n] = key
