"""The journals of all ranks become one HDF5 file."""
