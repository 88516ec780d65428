"""Grouped-query attention in exact arithmetic over a key/value cache of scaled integers.

Every key's and value's row carries its own exponent; a value's is folded into the probabilities
before they are rounded, so nothing depends on which other keys are present: prefill, chunked
prefill and one-by-one decoding give the same bits (docs/exact-arithmetic.md).

Both products are checked per query row (Freivalds, mod 2^64): the scores against the running sum
of h·r_j·k_j over the keys, the output against p_j·(v_j·r). h is odd, of the place in the cache
(sequence, head): keys and values that move to another place together with their sums show. What
the products do not hold in place (the exponents, the values' order) a running sum does, the seal.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from spimpi.fingerprint.words import linear_weight
from spimpi.inference.elementary import bits_of, exp, power_of_two, rounded
from spimpi.inference.exact import bits, row_input, row_product
from spimpi.inference.kernels import block_words, segment_words
from spimpi.inference.tensors import ATTN, NONFINITE, PRODUCTS, REST
from spimpi.jit import inlined, kernel

REST_ATTN = REST.index("attn")
SCORES = PRODUCTS.index("scores")  # its output, attn, comes next
assert PRODUCTS[SCORES + 1] == "attn"
NONFINITE_ATTN = NONFINITE.index("attn")

NO_FAULT = np.full(3, -1, np.int64)
INTEGER_MATH = {"reassoc", "contract", "nsz"}


@dataclass
class Cache:
    """Keys and values of one layer: integers (float32), exponents, and what their checks need.

    Shapes: keys, values (sequences, kv heads, positions, head_dim); exponents and value_sums
    (sequences, kv heads, positions); key_sums (sequences, kv heads, head_dim); seals (sequences, kv
    heads); lengths (sequences), the position that comes next.
    """

    keys: np.ndarray
    key_exponents: np.ndarray
    key_sums: np.ndarray
    values: np.ndarray
    value_exponents: np.ndarray
    value_sums: np.ndarray
    seals: np.ndarray
    lengths: np.ndarray

    @classmethod
    def empty(cls, n_sequences, n_kv_heads, n_positions, head_dim):
        head = (n_sequences, n_kv_heads)
        return cls(
            np.zeros((*head, n_positions, head_dim), np.float32),
            np.zeros((*head, n_positions), np.int32),
            np.zeros((*head, head_dim), np.int64),
            np.zeros((*head, n_positions, head_dim), np.float32),
            np.zeros((*head, n_positions), np.int32),
            np.zeros((*head, n_positions), np.int64),
            np.zeros(head, np.int64),
            np.zeros(n_sequences, np.int64),
        )

    @staticmethod
    def bytes_per_position(head_dim: int) -> int:
        """Bytes of one position of one key/value head, key_sums not counted."""
        return 8 * head_dim + 16

    def clear(self):
        """Start again with no keys; only the running sums have to be reset."""
        self.key_sums[:] = 0
        self.seals[:] = 0
        self.lengths[:] = 0


@njit(nogil=True, error_model="numpy", fastmath=INTEGER_MATH)
def _dot(a, b):
    total = 0.0
    for i in range(a.shape[0]):
        total += a[i] * np.float64(b[i])
    return total


@njit(nogil=True, error_model="numpy", fastmath=INTEGER_MATH)
def _accumulate(out, weight, row):
    for i in range(out.shape[0]):
        out[i] += weight * np.float64(row[i])


@inlined
def _power_of_two(exponent):
    """2.0**exponent, clamped to normal numbers (float32 data stay far inside)."""
    return power_of_two(min(max(np.int64(exponent), -1022), 1023))


@inlined
def _exponent(largest):
    """The least e with largest < 2**e, for a normal float64; 0 for zero."""
    if largest == 0.0:
        return 0
    return (bits_of(largest) >> 52) - 1022


@inlined
def _rotate(source, position, cosines, sines, out):
    """Rotary embedding of one head's row (Su et al. 2021, halves as Hugging Face pairs them)."""
    half = cosines.shape[1]
    for i in range(half):
        c, s = np.float64(cosines[position, i]), np.float64(sines[position, i])
        low, high = np.float64(source[i]), np.float64(source[half + i])
        out[i] = np.float64(np.float32(low * c - high * s))
        out[half + i] = np.float64(np.float32(high * c + low * s))


@inlined
def _quantize(row, n_bits):
    """Scale a float64 row in place to integers of n_bits; returns (exponent, is finite)."""
    largest = 0.0
    finite = True
    for i in range(row.shape[0]):
        value = abs(row[i])
        if not value <= 1.7976931348623157e308:
            finite = False
        elif value > largest:
            largest = value
    if not finite:
        for i in range(row.shape[0]):
            row[i] = 0.0
        return 0, False
    exponent = _exponent(largest)
    scale = _power_of_two(n_bits - exponent)
    for i in range(row.shape[0]):
        row[i] = rounded(row[i] * scale)
    return exponent, True


@inlined
def _place_weight(r, sequence, kv):
    """h, the odd weight of a sequence's head: what is moved to another place has another."""
    return np.int64(linear_weight(np.uint64(r[0]), np.uint64((sequence << 20) + kv)))


@inlined
def _sealed(value_sum, key_exponent, value_exponent):
    """What a position adds to its head's seal, before its weight r_j·h."""
    return value_sum + key_exponent + (np.int64(value_exponent) << 32)


@kernel(
    "void(f4[:,::1], i8[::1], i8[::1], f4[:,::1], f4[:,::1], i8[::1], i8[::1],"
    " f4[:,:,:,::1], i4[:,:,::1], i8[:,:,::1], f4[:,:,:,::1], i4[:,:,::1], i8[:,:,::1],"
    " i8[:,::1], i8[::1], i8[::1], i8[::1], f4[:,::1], u8[:,::1], i8, i8, i8[:,::1], u8[:,::1], u8[:,::1],"
    " f4[:,::1], i8, i8, u8[:,::1], u8[:,::1], i8[:,::1], i8[:,::1])"
)
def attend(
    qkv, sequences, positions, cosines, sines, kv_of_head, settings,
    keys, key_exponents, key_sums, values, value_exponents, value_sums, seals, lengths,
    r, fault, out, step_keys, layer, first_row, segments, segments_found, made,
    kv_rows, first_own, key_column, product_found, product_expected, product_bad, nonfinite,
):  # fmt: skip
    """Append keys and values to the cache and attend, row after row.

    Keys and values are those of ``kv_rows``, from column key_column on, which are the rows of
    ``sequences`` and ``positions``; those from first_own on are the rows of qkv, and attend. Under
    sequence parallelism the others are other ranks'; else kv_rows is qkv.

    settings = (head_dim, kv heads here, bits of q·k, bits of p·v, checked, columns of qkv, first
    column of attn here, columns of attn, qkv's key (tensors.QKV; QK_NORMED after a QK norm),
    window: how many positions a row sees, its own included). fault = (row, product, index): adds
    one to one integer of a product (0: scores with the first key that the row sees, index = head;
    1: output, index = head·head_dim + column); row -1 means none. product_*[layer] get, at the place
    of the scores, the two sides of their check and its wrong rows, at that of the output those of
    its check and of the seals; nonfinite[layer] gets the rows with NaN or Inf. Seals are looked at
    once a call for each sequence that attends. A position that does not follow the one before in
    its sequence makes a row of scores wrong.

    This is the last use of the layer's qkv and makes attn: segments_found[layer] gets the words of
    qkv's column segments, made[layer] that of attn (step_keys: Keys.of_step).
    """
    head_dim, n_kv, key_bits, value_bits, checked = settings[:5]
    qkv_key, window = settings[8], settings[9]
    n_heads = kv_of_head.shape[0]
    # the two sides of the scores' check; of the output's; the wrong rows of each; not finite
    words = np.zeros(7, np.uint64)
    row_buffer = np.empty(head_dim)
    result = np.empty(head_dim)
    probabilities = np.empty(keys.shape[2])
    softmax_scale = 1.0 / np.sqrt(np.float64(head_dim))
    for row_of_all in range(kv_rows.shape[0]):
        row = row_of_all - first_own
        sequence, position = sequences[row_of_all], positions[row_of_all]
        n_keys = position + 1
        first_key = max(0, n_keys - window)
        finite = True
        if lengths[sequence] != position:
            words[1] += np.uint64(1)
            words[4] += np.uint64(1)
        lengths[sequence] = n_keys
        for kv in range(n_kv):
            place = _place_weight(r, sequence, kv)
            weight = place * r[position]
            at = key_column + kv * head_dim
            _rotate(kv_rows[row_of_all, at : at + head_dim], position, cosines, sines, row_buffer)
            exponent, good = _quantize(row_buffer, key_bits)
            finite &= good
            key_exponents[sequence, kv, position] = exponent
            for i in range(head_dim):
                keys[sequence, kv, position, i] = row_buffer[i]
                key_sums[sequence, kv, i] += np.int64(row_buffer[i]) * weight
            at = key_column + (n_kv + kv) * head_dim
            for i in range(head_dim):
                row_buffer[i] = kv_rows[row_of_all, at + i]
            exponent, good = _quantize(row_buffer, value_bits)
            finite &= good
            value_exponents[sequence, kv, position] = exponent
            projected = np.int64(0)
            for i in range(head_dim):
                values[sequence, kv, position, i] = row_buffer[i]
                projected += np.int64(row_buffer[i]) * r[i]
            value_sums[sequence, kv, position] = projected
            seals[sequence, kv] += weight * _sealed(
                projected, key_exponents[sequence, kv, position], exponent
            )
            if first_key > 0:  # one position more has left the window
                gone = first_key - 1
                weight = place * r[gone]
                for i in range(head_dim):
                    key_sums[sequence, kv, i] -= np.int64(keys[sequence, kv, gone, i]) * weight
                seals[sequence, kv] -= weight * _sealed(
                    value_sums[sequence, kv, gone], key_exponents[sequence, kv, gone],
                    value_exponents[sequence, kv, gone],
                )  # fmt: skip
        if row < 0 or row >= qkv.shape[0]:
            continue

        bad_scores = False
        bad_output = False
        last = row_of_all + 1 == kv_rows.shape[0] or row + 1 == qkv.shape[0]
        if checked and (last or sequences[row_of_all + 1] != sequence):
            for kv in range(n_kv):
                total = np.int64(0)
                for j in range(first_key, n_keys):
                    total += r[j] * _sealed(
                        value_sums[sequence, kv, j], key_exponents[sequence, kv, j],
                        value_exponents[sequence, kv, j],
                    )  # fmt: skip
                total *= _place_weight(r, sequence, kv)
                words[2] += np.uint64(total)
                words[3] += np.uint64(seals[sequence, kv])
                bad_output |= total != seals[sequence, kv]
        for head in range(n_heads):
            kv = kv_of_head[head]
            at = head * head_dim
            _rotate(qkv[row, at : at + head_dim], position, cosines, sines, row_buffer)
            query_exponent, good = _quantize(row_buffer, key_bits)
            finite &= good
            for j in range(first_key, n_keys):
                probabilities[j] = _dot(row_buffer, keys[sequence, kv, j])
            if fault[0] == row and fault[1] == 0 and fault[2] == head:
                probabilities[first_key] += 1.0
            if checked:
                found, n_wrong = row_product(probabilities[first_key:n_keys], r[first_key:])
                found *= _place_weight(r, sequence, kv)
                wanted = row_input(row_buffer, key_sums[sequence, kv])
                words[0] += np.uint64(found)
                words[1] += np.uint64(wanted)
                bad_scores |= found != wanted or n_wrong > 0

            largest = -np.inf
            for j in range(first_key, n_keys):
                shift = query_exponent + key_exponents[sequence, kv, j] - 2 * key_bits
                score = np.float64(np.float32(probabilities[j] * _power_of_two(shift)))
                probabilities[j] = score * softmax_scale
                largest = max(largest, probabilities[j])
            total = 0.0
            for j in range(first_key, n_keys):
                probabilities[j] = exp(probabilities[j] - largest)
                total += probabilities[j]
            for j in range(first_key, n_keys):
                fold = _power_of_two(np.int64(value_exponents[sequence, kv, j]))
                probabilities[j] = probabilities[j] / total * fold
            weight_exponent, good = _quantize(probabilities[first_key:n_keys], value_bits)
            finite &= good

            for i in range(head_dim):
                result[i] = 0.0
            for j in range(first_key, n_keys):
                _accumulate(result, probabilities[j], values[sequence, kv, j])
            if fault[0] == row and fault[1] == 1 and fault[2] // head_dim == head:
                result[fault[2] % head_dim] += 1.0
            if checked:
                found, n_wrong = row_product(result, r)
                seen = probabilities[first_key:n_keys]
                wanted = row_input(seen, value_sums[sequence, kv, first_key:])
                words[2] += np.uint64(found)
                words[3] += np.uint64(wanted)
                bad_output |= found != wanted or n_wrong > 0
            back = _power_of_two(weight_exponent - 2 * value_bits)
            for i in range(head_dim):
                out[row, at + i] = np.float32(result[i] * back) + np.float32(0.0)
        words[4] += np.uint64(bad_scores)
        words[5] += np.uint64(bad_output)
        words[6] += np.uint64(not finite)
    nonfinite[layer, NONFINITE_ATTN] += np.int64(words[6])
    if checked:
        for product in range(2):
            product_found[layer, SCORES + product] = words[2 * product]
            product_expected[layer, SCORES + product] = words[2 * product + 1]
            product_bad[layer, SCORES + product] = np.int64(words[4 + product])
        bits = qkv.view(np.uint32)
        for s in range(segments.shape[0]):
            segments_found[layer, s] = segment_words(
                bits, step_keys[layer + 1, qkv_key], first_row, segments[s], settings[5]
            )
        made[layer, REST_ATTN] = block_words(
            out.view(np.uint32), step_keys[layer + 1, ATTN], first_row, settings[6], settings[7]
        )


def attention_bits(head_dim: int, max_positions: int) -> tuple[int, int]:
    """Integer widths of q·k (inner size head_dim) and of p·v (inner size max_positions)."""
    return bits(head_dim), bits(max_positions)
