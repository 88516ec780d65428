"""The trace of a run: journals while it goes on, one HDF5 file afterwards (docs/trace.md)."""

from spimpi.trace.reading.reader import Trace, open

__all__ = ["Trace", "open"]
