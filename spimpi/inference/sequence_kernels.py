"""Fingerprints of what the ranks of a sequence group gathered (sequence.py)."""

import numpy as np

from spimpi.inference.kernels import segment_words
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
