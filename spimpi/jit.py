"""How numba kernels are compiled here: ahead of use, once a node, cached on disk.

Every kernel carries explicit signatures, so importing its module compiles it or loads it from
the cache; nothing is compiled in the middle of a run. The cache folder is named after the
sources of all kernels, because numba looks only at the file of the kernel itself when it decides
whether a cached kernel is stale, and kernels here inline helpers from other files.
"""

import hashlib
import os
from pathlib import Path

import numba

KERNEL_FILES = (
    "jit.py",
    "fingerprint/tag.py",
    "fingerprint/cpu.py",
    "fingerprint/words.py",
    "fingerprint/lanes.py",
    "fingerprint/painting_cpu.py",
    "fingerprint/projections.py",
    "inference/elementary.py",
    "inference/kernels.py",
    "inference/exact.py",
    "inference/product.py",
    "inference/attention.py",
    "inference/sequence_kernels.py",
    "inference/qk_norm.py",
    "inference/checkpoint_seeded.py",
    "inference/tensors.py",
    "trace/checksum_kernel.py",
)


def cache_folder() -> Path:
    """Where compiled kernels are kept: $SPIMPI_CACHE_DIR, else the user's cache folder."""
    package = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for name in KERNEL_FILES:
        path = package / name
        if path.exists():
            digest.update(name.encode() + path.read_bytes())
    root = os.environ.get("SPIMPI_CACHE_DIR")
    if not root:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        root = os.path.join(base, "spimpi")
    return Path(root) / digest.hexdigest()[:16]


numba.config.CACHE_DIR = str(cache_folder())


def kernel(*signatures, reassociate=False):
    """Compile a function for the given signatures now, without the GIL, cached.

    ``reassociate`` lets the compiler reorder sums and use FMA. It may be set only where no
    operation rounds (all values are integers of at most 2**53), for there it cannot change a bit.
    """
    fastmath = {"reassoc", "contract", "nsz"} if reassociate else False
    return numba.njit(
        list(signatures), cache=True, nogil=True, error_model="numpy", fastmath=fastmath
    )


def inlined(function):
    """A helper that becomes part of each kernel that calls it."""
    return numba.njit(function, inline="never", nogil=True, error_model="numpy")
