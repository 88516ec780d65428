"""How far apart two tensors are, by the projections of their sketches: docs/sketches.md.

Plain numpy, for the checks and for the readers of traces.
"""

from math import sqrt

import numpy as np

N_PROJECTIONS = 8
SPREAD = sqrt(2 / N_PROJECTIONS)  # standard error of the squared distance, relative
ERROR = SPREAD / 2  # of the distance: a square root halves a small relative error
CERTAIN = sqrt(10.0)  # the estimate is above this many distances with odds of 2.3e-12


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimates of ‖x - y‖ of tensors with the projections a and b, float64 [..., 8]; infinite
    where they overflow. The standard error is ERROR times the estimate."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        found = np.sqrt(squares.sum(axis=-1) / N_PROJECTIONS)
    return np.where(np.isfinite(found), found, np.inf)


def relative_distances(distance: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """distance / norm: 0 where both are 0, infinite where only the norm is."""
    distance, norm = np.asarray(distance, np.float64), np.asarray(norm, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance == 0, 0.0, distance / norm)
