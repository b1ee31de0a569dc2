"""What a whole candidate's KL will be, from replace-one scores and the candidates screened so far.

The KL of a small perturbation of the output is quadratic in it. If unit i alone moves the output by
d_i, its score is c_i = d_iᵀ F d_i, and of all units together

    KL ≈ Σ_i c_i + 2 Σ_{i<j} ρ_ij √(c_i c_j),        ρ_ij in [-1, 1]

where ρ_ij says how far the errors of two units point the same way. The scores alone are the
additive estimate, all ρ = 0; here ρ is learnt from screened candidates by ridge regression of the
relative error. Written with inner products of the vectors s_i = √c_i, a candidate costs one product
with each of those learnt from, however many pairs of units there are:

    k(a, b) = 4 Σ_{i<j} s_ai s_aj s_bi s_bj = 2 [(s_a · s_b)² − Σ_i s_ai² s_bi²]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.search.milp import Weights
from autocomp.search.space import Vector

Floats = NDArray[np.float64]

RIDGE = 0.5
LEAST_KL = 1e-6


class Surrogate:
    """Predicts the screening KL of vectors, nats. Immutable.

    Args:
        weights: replace-one scores per unit; one that is not finite counts as 0.
        known: vectors and their KL, finite; none gives the additive estimate.
    """

    def __init__(self, weights: Weights, known: Sequence[tuple[Vector, float]] = ()) -> None:
        self._scores = [np.where(np.isfinite(row), np.maximum(row, 0.0), 0.0) for row in weights]
        self._learnt = self._roots([vector for vector, _ in known])
        kl = np.array([max(value, LEAST_KL) for _, value in known])
        residual = 1.0 - (self._learnt**2).sum(axis=1) / kl  # of what is relative to the KL
        gram = _pairs(self._learnt, self._learnt) / kl[:, None] / kl
        solved = np.linalg.solve(gram + RIDGE * np.eye(len(kl)), residual)
        self._coefficients: Floats = solved / kl

    def predict(self, vectors: Sequence[Vector]) -> Floats:
        """`(N,)`, above zero."""
        roots = self._roots(vectors)
        found = (roots**2).sum(axis=1) + _pairs(roots, self._learnt) @ self._coefficients
        floor: Floats = np.maximum(found, LEAST_KL)
        return floor

    def _roots(self, vectors: Sequence[Vector]) -> Floats:
        """√c, `(N, units)`."""
        chosen = np.array(vectors, dtype=np.int64).reshape(len(vectors), len(self._scores))
        columns = [row[chosen[:, unit]] for unit, row in enumerate(self._scores)]
        roots: Floats = np.sqrt(np.stack(columns, axis=1))
        return roots


def _pairs(left: Floats, right: Floats) -> Floats:
    """The kernel, `(N, M)`."""
    kernel: Floats = 2.0 * ((left @ right.T) ** 2 - (left**2) @ (right**2).T)
    return kernel
