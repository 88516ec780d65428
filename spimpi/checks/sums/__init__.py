"""Sums of anybody's numbers: docs/sums.md and docs/sketches.md.

``verify`` has the checks of allreduce and reduce-scatter, ``float_bound`` what rounding can do,
``sketch`` the tolerant comparison of two tensors or runs.
"""
