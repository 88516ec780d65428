"""The checksums of records compiled by numba, for large traces; checksum.py is what defines them."""

import numpy as np
from numba import uint64, void

from spimpi.jit import kernel

_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _ONE = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(1)


@kernel(void(uint64[:, ::1], uint64[::1], uint64, uint64, uint64[::1]))
def checksums_of(words, keys, key, golden, result):
    """Checksum of each record (its last word, not read); ``keys`` of its words, ``key`` of records."""
    for n in range(len(words)):
        acc = np.uint64(0)
        for i in range(len(keys)):
            word = words[n, i]
            for _ in range(2):
                word ^= keys[i]
                word ^= word >> _S30
                word *= _M1
                word ^= word >> _S27
                word *= _M2
                word ^= word >> _S31
            acc ^= word
        own = key + ((words[n, 0] & np.uint64(0xFFFFFFFF)) + _ONE) * golden
        for _ in range(2):
            acc ^= own
            acc ^= acc >> _S30
            acc *= _M1
            acc ^= acc >> _S27
            acc *= _M2
            acc ^= acc >> _S31
        result[n] = acc
