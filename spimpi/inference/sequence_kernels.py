"""Fingerprints of what the ranks of a sequence group gathered (sequence.py)."""

import numpy as np

from spimpi.inference.kernels import row_words, segment_words
from spimpi.jit import kernel


@kernel("void(u4[:,::1], u8[::1], i8, i8[:,::1], i8, i8[:,::1], i8, u8[::1])")
def gathered_words(x, keys, which, pieces, own, segments, n_cols, words):
    """words = (share of all rows of x, share of this rank's piece of them).

    The rows are those of ``pieces``, (first row, number of rows) one a rank, one after the other;
    of their columns the segments (local column, global column of n_cols, width).
    """
    key, total, at = keys[which], np.uint64(0), 0
    for s in range(pieces.shape[0]):
        share = np.uint64(0)
        rows = x[at : at + pieces[s, 1]]
        for k in range(segments.shape[0]):
            share ^= segment_words(rows, key, pieces[s, 0], segments[k], n_cols)
        if s == own:
            words[1] = share
        total ^= share
        at += pieces[s, 1]
    words[0] = total


@kernel("void(u4[:,::1], i8[::1], u8, u8[::1], i8)")
def fingerprint_rows(x, rows, key, words, slot):
    """words[slot] = share of whole rows; row i of x is row rows[i] of the tensor."""
    share = np.uint64(0)
    for i in range(x.shape[0]):
        share ^= row_words(x[i], key, np.uint64(rows[i] * x.shape[1]))
    words[slot] = share
