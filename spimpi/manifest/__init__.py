"""Manifests: a checkpoint's fingerprints, written down once. docs/manifest.md has the format.

Nothing here imports MPI, except over_ranks.py.
"""

from importlib import import_module

_HOMES = {
    "spimpi.manifest.format": ("Derived", "Manifest", "TensorFacts", "read_manifest", "write_manifest"),
    "spimpi.manifest.make": ("make_manifest",),
    "spimpi.manifest.check": ("check_files",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = list(_HOME_OF)


def __getattr__(name):
    if name not in _HOME_OF:
        msg = f"module 'spimpi.manifest' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOME_OF[name]), name)
