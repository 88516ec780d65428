"""Packages that reading a trace does not need: what to install where one of them is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from spimpi.errors import MissingDependency

# Package (the first part of a module's name): the extra of spimpi that brings it.
EXTRAS = {
    "mpi4py": "mpi",
    "numba": "mpi",
    "llvmlite": "mpi",
    "safetensors": "mpi",
    "ml_dtypes": "mpi",
}


@contextmanager
def optional_packages() -> Iterator[None]:
    """Raises MissingDependency where the block imports one of them in vain."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        msg = (
            f"{package} is not installed: this needs pip install 'spimpi[{EXTRAS[package]}]' "
            "(without it spimpi reads traces, and no more)"
        )
        raise MissingDependency(msg) from error
