"""OLMo's norm of all queries and of all keys of a row, which tensor ranks shard.

In exact arithmetic a row's sum of squares is an integer: its elements are scaled by a power of two
that the global row's largest gives (one MPI_MAX), rounded to ``square_bits`` bits, squared and
added up as int64 (one MPI_SUM). Any split gives the same sum, and so the same norm
(docs/exact-arithmetic.md). Each key head counts once, where it is owned.

Arrays of maxima and sums are [rows, 2]: the queries', the keys'. Imported only for models that
have such a norm.
"""

import numpy as np

from spimpi.fingerprint.words import linear_weight
from spimpi.inference.elementary import power_of_two, rounded
from spimpi.inference.exact import NOT_FINITE, exponent_of
from spimpi.inference.kernels import maxima_word, segment_words
from spimpi.inference.ledger import QK, QK_NORMED, QK_SUM
from spimpi.inference.product import linear_words
from spimpi.inference.tensors import NONFINITE, QK_MAX, QKV, REST
from spimpi.inference.tensors import QK_NORMED as KEY_QK_NORMED
from spimpi.inference.tensors import QK_SUM as KEY_QK_SUM
from spimpi.jit import inlined, kernel

REST_QK_SUM, REST_QK_NORMED = REST.index("qk_sum"), REST.index("qk_normed")
NONFINITE_QKV = NONFINITE.index("qkv")


def square_bits(k: int) -> int:
    """Bits b of integers whose squares are summed over the GLOBAL width k: k·2**2b <= 2**62."""
    return (62 - (k - 1).bit_length()) // 2


# columns = (where the queries end, the first and last owned key column, where the keys end), here.


@kernel("void(f4[:,::1], i8[::1], u4[:,::1])")
def row_maxima(qkv, columns, maxima):
    """The largest |q| and the largest owned |k| of each row, as integer bits; NaN on top."""
    bits = qkv.view(np.uint32)
    for row in range(bits.shape[0]):
        for which in range(2):
            start, stop = (0, columns[0]) if which == 0 else (columns[1], columns[2])
            largest = np.uint32(0)
            for i in range(start, stop):
                largest = max(largest, np.uint32(bits[row, i] & 0x7FFFFFFF))
            maxima[row, which] = largest


@inlined
def _squares(values, largest, n_bits):
    """The sum of the squared integers of some values; 0 where they are not finite, or all zero."""
    total = np.int64(0)
    if 0 < largest < NOT_FINITE:
        scale = power_of_two(n_bits - exponent_of(largest))
        for i in range(values.shape[0]):
            q = np.int64(rounded(np.float64(values[i]) * scale))
            total += q * q
    return total


@kernel(
    "void(f4[:,::1], i8[::1], i8[::1], u4[:,::1], i8[:,::1], b1, u8[:,::1], i8, i8, u8[:,::1])"
)
def sum_squares(qkv, columns, n_bits, maxima, sent, checked, keys, layer, first_row, made):
    """sent = the sums of the squared integers of the queries and owned keys here.

    n_bits: of the queries' and the keys' integers; maxima: the GLOBAL rows'. A row that is not
    finite gives 0. made[layer] gets the linear fingerprint of ``sent``.
    """
    for row in range(qkv.shape[0]):
        for which in range(2):
            start, stop = (0, columns[0]) if which == 0 else (columns[1], columns[2])
            sent[row, which] = _squares(qkv[row, start:stop], maxima[row, which], n_bits[which])
    if checked:
        key, share = keys[layer + 1, KEY_QK_SUM], np.uint64(0)
        for row in range(qkv.shape[0]):
            for which in range(2):
                element = np.uint64((first_row + row) * 2 + which)
                share += linear_weight(key, element) * np.uint64(sent[row, which])
        made[layer, REST_QK_SUM] = share


@inlined
def _differs(qkv, columns, n_bits, maxima, sent, alone):
    """Whether maxima and sums are not those of these queries and keys; ``alone``: of whole rows."""
    bits = qkv.view(np.uint32)
    differs = False
    for row in range(qkv.shape[0]):
        for which in range(2):
            start, stop = (0, columns[0]) if which == 0 else (columns[1], columns[2])
            largest, given = np.uint32(0), maxima[row, which]
            for i in range(start, stop):
                largest = max(largest, np.uint32(bits[row, i] & 0x7FFFFFFF))
            differs |= largest > given or (alone and largest != given)
            differs |= sent[row, which] != _squares(qkv[row, start:stop], given, n_bits[which])
    return differs


@kernel(
    "i8(f4[:,::1], i8[::1], i8[::1], i8[::1], f4[::1], f8, u4[:,::1], i8[:,::1], i8[:,::1], b1,"
    " u8[:,::1], i8, i8, i8[:,::1], i8, u8[:,::1], u8[:,::1], u8[:,::1], u8[:,::1], b1, u8[:,::1],"
    " i8[:,::1])"
)
def normalise(
    qkv, columns, n_bits, widths, weight, eps, maxima, sent, summed, checked, keys, layer,
    first_row, segments, n_cols, segments_found, found, sums, made, alone, max_words, max_bad,
):  # fmt: skip
    """qkv = queries and keys / sqrt(mean square + eps) · weight, in place; values stay.

    widths: of the GLOBAL queries and keys; summed: their sums of squares. Queries or keys of a row
    that is not finite become zeros; returns the number of such rows. It is the last use of what
    qkv held, of ``sent`` and of ``summed``: segments_found[layer] gets the words of qkv's column
    segments, found[layer] and sums[layer] those of the sums, made[layer] that of the new qkv: none
    that it can have where maxima and sums are not those of qkv (``alone``: of one tensor rank).
    Reduced maxima that are no longer as they arrived (max_words[layer, QK]) count in max_bad.
    """
    bits = qkv.view(np.uint32)
    differs = False
    if checked:
        differs = _differs(qkv, columns, n_bits, maxima, sent, alone)
        if not alone:
            word = maxima_word(maxima.reshape(maxima.size), keys[layer + 1, QK_MAX], 2 * first_row)
            max_bad[layer, QK] += word != max_words[layer, QK]
        for s in range(segments.shape[0]):
            segments_found[layer, s] = segment_words(
                bits, keys[layer + 1, QKV], first_row, segments[s], n_cols
            )
        own, total = linear_words(sent, summed, keys[layer + 1, KEY_QK_SUM], first_row)
        found[layer, REST_QK_SUM], sums[layer, REST_QK_SUM] = own, total
    n_bad = 0
    for row in range(qkv.shape[0]):
        finite = True
        for which in range(2):
            start, stop = (0, columns[0]) if which == 0 else (columns[0], columns[3])
            largest = maxima[row, which]
            if largest >= NOT_FINITE:
                finite = False
                for i in range(start, stop):
                    qkv[row, i] = np.float32(0.0)
                continue
            exponent = exponent_of(largest) if largest > 0 else 0
            squares = np.float64(summed[row, which]) * power_of_two(2 * (exponent - n_bits[which]))
            scale = 1.0 / np.sqrt(squares / widths[which] + eps)
            for i in range(start, stop):
                value = np.float64(qkv[row, i]) * scale * np.float64(weight[i])
                qkv[row, i] = np.float32(value) + np.float32(0.0)
        n_bad += not finite
    if checked:
        share = np.uint64(0)
        for s in range(segments.shape[0]):
            share ^= segment_words(
                bits, keys[layer + 1, KEY_QK_NORMED], first_row, segments[s], n_cols
            )
        made[layer, REST_QK_NORMED] = ~share if differs else share
    return n_bad


class QKNorm:
    """The norm of one rank's queries and keys; ``layers`` is the Layers that it is part of."""

    def __init__(self, layers):
        self.layers, config, shard = layers, layers.config, layers.part.shard
        d, held, owned = config.head_dim, shard.kv_heads, shard.owned_kv_heads
        n_q = shard.heads.size * d
        first = n_q + (owned.start - held.start) * d
        self.columns = np.array(
            [n_q, first, first + len(owned) * d, n_q + len(held) * d], np.int64
        )
        self.widths = np.array([config.n_heads * d, config.n_kv_heads * d], np.int64)

    def apply(self, i, b) -> None:
        """Normalise the queries and keys of ``b.space.qkv`` for layer i. Collective over tensor."""
        raise NotImplementedError


class ExactQKNorm(QKNorm):
    def __init__(self, layers):
        super().__init__(layers)
        self.n_bits = np.array([square_bits(int(k)) for k in self.widths], np.int64)

    def apply(self, i, b) -> None:
        layers, space, results = self.layers, b.space, b.results
        maxima, (sent, summed) = space.qk_maxima, space.qk_sums
        row_maxima(space.qkv, self.columns, maxima)
        if layers.many:
            layers.global_maxima("qk_max", QK, QK_MAX, maxima, space.qk_words, i, b)
        sum_squares(
            space.qkv, self.columns, self.n_bits, maxima, sent, layers.checked, b.keys, i,
            b.first_row, results.rest_expected,
        )  # fmt: skip
        if layers.many:
            layers.sum_over_ranks("qk_sum", i, sent, summed, b)
        bad_rows = normalise(
            space.qkv, self.columns, self.n_bits, self.widths, layers.part.layers[i].qk_norm,
            layers.config.rms_norm_eps, maxima, sent, summed if layers.many else sent,
            layers.checked, b.keys, i, b.first_row, layers.segments, layers.widths.qkv,
            results.segments_found, results.rest_found, results.sums_by_tensor,
            results.rest_expected, not layers.many, results.maxima, results.max_bad,
        )  # fmt: skip
        if bad_rows:
            results.nonfinite[i, NONFINITE_QKV] += bad_rows


class FloatQKNorm(QKNorm):
    """In float32 and MPI_SUM of floats."""

    def apply(self, i, b) -> None:
        layers, qkv, results = self.layers, b.space.qkv, b.results
        sent, summed = b.space.qk_sums
        n_q, first, last, end = self.columns
        sent[:, 0] = np.square(qkv[:, :n_q]).sum(axis=1)
        sent[:, 1] = np.square(qkv[:, first:last]).sum(axis=1)
        if layers.many:
            layers.fingerprint(results.rest_expected[i], QK_SUM, i, sent, b)
            layers.sum_over_ranks("qk_sum", i, sent, summed, b)
            layers.fingerprint(results.rest_found[i], QK_SUM, i, sent, b)
            layers.fingerprint(results.sums_by_tensor[i], QK_SUM, i, summed, b)
        layers.fingerprint_qkv(results.segments_found[i], QKV, i, b)
        total = summed if layers.many else sent
        eps, weight = np.float32(layers.config.rms_norm_eps), layers.part.layers[i].qk_norm
        scales = 1 / np.sqrt(total / self.widths.astype(np.float32) + eps)
        qkv[:, :n_q] *= scales[:, :1] * weight[:n_q]
        qkv[:, n_q:end] *= scales[:, 1:] * weight[n_q:]
        words = np.zeros(len(layers.segments), np.uint64)
        layers.fingerprint_qkv(words, KEY_QK_NORMED, i, b)
        results.rest_expected[i, QK_NORMED] = np.bitwise_xor.reduce(words)
