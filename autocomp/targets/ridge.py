"""The regression costs are fitted by: few measurements, good guesses, now and then an outlier."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def robust_ridge(
    features: Vector, values: Vector, prior: Vector, deviation: Vector, noise: float
) -> Vector:
    """Coefficients `(K,)` of `features (N, K)` that explain `values (N,)` without leaving `prior`.

    Minimises squared relative misses over `noise`, and squared distances from `prior (K,)` over its
    `deviation (K,)`. What misses by more than thrice the noise counts less (Huber), by reweighting.
    """
    precision = 1.0 / (noise * np.maximum(values, 1e-9))
    weights, solution = precision, prior
    for _ in range(20):
        solution, *_rest = np.linalg.lstsq(
            np.vstack([features * weights[:, None], np.diag(1.0 / deviation)]),
            np.concatenate([values * weights, prior / deviation]),
            rcond=None,
        )
        misses = np.abs(features @ solution - values) * precision
        weights = precision * np.sqrt(np.minimum(1.0, 3.0 / np.maximum(misses, 1e-9)))
    return solution
