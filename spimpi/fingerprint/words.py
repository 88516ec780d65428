"""The word functions of the fingerprint algebra, as numba helpers for every kernel."""

import numpy as np

from spimpi.fingerprint.tag import GOLDEN as _GOLDEN
from spimpi.jit import inlined

GOLDEN = np.uint64(_GOLDEN)
ZERO = np.uint64(0)
ONE = np.uint64(1)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


@inlined
def mix_open(z):
    """``mix`` without its last step, which ``close`` does.

    The last step is linear under XOR: close(a) ^ close(b) == close(a ^ b). A loop that XORs many
    mixed words can therefore leave it out and close the total once.
    """
    z = (z ^ (z >> _S30)) * _M1
    return (z ^ (z >> _S27)) * _M2


@inlined
def close(z):
    """The last step of ``mix``, for one word or for the XOR of many."""
    return z ^ (z >> _S31)


@inlined
def mix(z):
    """SplitMix64's finaliser: a bijection on 64-bit words."""
    return close(mix_open(z))


@inlined
def element_key(key, index):
    """The key of element ``index`` (uint64) in the stream ``key`` (uint64)."""
    return key + (index + ONE) * GOLDEN


@inlined
def element(key, index, bits):
    """A 1-, 2- or 4-byte element's share of the fingerprint; ``bits`` zero-extended to uint64."""
    return mix(element_key(key, index) ^ bits)


@inlined
def element8(key, index, bits):
    """An 8-byte element's share of the fingerprint."""
    own = element_key(key, index)
    return mix(mix(own ^ bits) ^ own)


@inlined
def linear_weight(key, index):
    """The odd weight of element ``index`` in a linear fingerprint."""
    return mix(element_key(key, index)) | ONE
