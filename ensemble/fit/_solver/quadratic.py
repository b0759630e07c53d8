"""Small convex quadratics over x >= 0: the inner problem of every fit in this package."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv

Array = NDArray[np.float64]


def nonnegative_minimum(H: Array, b: Array, start: Array) -> Array:
    """Minimise x'Hx / 2 - b'x over x >= 0 by an active set that begins at `start`.

    Args:
        H: (A, A) symmetric, positive definite.
        b: (A,).
        start: (A,) non-negative; a good guess of the support makes this one or two solves.

    Returns:
        (A,) the minimum.

    References:
        Lawson and Hanson, "Solving least squares problems", 1974, chapter 23.
    """
    x, free = start.copy(), start > 0
    slack = 1e-14 * (np.abs(b).max(initial=0.0) + np.abs(H).max(initial=0.0))
    for _ in range(3 * len(b) + 10):
        x, free = _solve_on_free(H, b, x, free)
        slope = np.where(free, -np.inf, b - H @ x)
        entering = int(slope.argmax()) if len(slope) else 0
        if not len(slope) or slope[entering] <= slack:
            break
        free[entering] = True
    return x


def _solve_on_free(H: Array, b: Array, x: Array, free: NDArray[np.bool_]) -> tuple[Array, NDArray[np.bool_]]:
    """The minimum over the free coordinates; those that would turn negative on the way leave."""
    free = free.copy()
    while free.any():
        target = np.zeros_like(x)
        target[free] = _solved(H[free][:, free], b[free])
        falling = free & (target <= 0)
        if not falling.any():
            return target, free
        step = float((x[falling] / (x[falling] - target[falling] + 1e-300)).min())
        x = x + step * (target - x)
        free &= ~(falling & (x <= 1e-15))
        x[~free] = 0.0
    return np.zeros_like(x), free


def _solved(H: Array, b: Array) -> Array:
    """Cholesky straight from LAPACK: these systems are small and many, and checks would cost more."""
    _, x, failed = dposv(H, b)
    if failed:
        x = np.linalg.lstsq(H, b)[0]
    return np.asarray(x, dtype=np.float64)
