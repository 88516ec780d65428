"""The arithmetics that a run may compute in: names that traces and golden files carry."""

from spimpi.errors import UsageError

EXACT = "exact-1"
FLOAT32_BLAS = "float32-blas"


def exact_bits(k: int) -> int:
    """Bits b of exact-1's scaled integers for the GLOBAL inner size k: k * 2**b * 2**b <= 2**53."""
    if k < 1:
        msg = f"a matmul's global inner size must be at least 1, found {k}"
        raise UsageError(msg)
    return min(24, (53 - (k - 1).bit_length()) // 2)
