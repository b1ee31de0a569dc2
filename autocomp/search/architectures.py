"""The pool of architectures trials are chosen from: the screened ones, and new ones when needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray

from autocomp.core.errors import InfeasibleError
from autocomp.search.costs import Costs, Limits
from autocomp.search.milp import seeds as milp_seeds
from autocomp.search.repair import Repair
from autocomp.search.scores import Scores
from autocomp.search.screening import Screened
from autocomp.search.space import Space, Vector, hamming
from autocomp.search.surrogate import Surrogate

logger = logging.getLogger(__name__)

Expected = Callable[[Sequence[Vector]], NDArray[np.float64]]
"""Vectors → ln of the KL in nats that is expected of each after training, `(N,)`."""

_FEW = 4
_REPAIRED = 20
_SOLVED = 6
_LEARNT_FROM = 600
"""Screened candidates, the last ones."""


class Architectures:
    """Vectors with their screening KL, the same on every runtime.

    Args:
        space: what may be done to each unit.
        screened: candidates with their screening KL; those that failed are left out.
        scores: replace-one scores, to make new vectors where the screened ones do not fit.
    """

    def __init__(self, space: Space, screened: Sequence[Screened], scores: Scores) -> None:
        self._space = space
        self._weights = scores.arrays(space)
        self._kl: dict[Vector, float] = {}
        self._origin: dict[Vector, str] = {}
        for item in screened:
            if item.kl is not None and item.candidate in space:
                self._add(space.encode(item.candidate), item.kl, item.proposed_by)
        self._surrogate = Surrogate(self._weights, list(self._kl.items())[-_LEARNT_FROM:])

    def origin(self, vector: Vector) -> str:
        """`milp`, `evolution`, `surrogate`, `random` or `regular`."""
        return self._origin.get(vector, "evolution")

    def fitting(
        self, costs: Costs, limits: Limits, tried: AbstractSet[Vector], rng: np.random.Generator
    ) -> list[Vector]:
        """Untried vectors within the limits, best first; new ones are made when none is left."""
        found = self._untried(costs, limits, tried)
        if not found:
            self._make(costs, limits, rng)
            found = self._untried(costs, limits, tried)
        if not found:
            logger.warning("nothing untried is predicted to meet %s", dict(limits))
        return sorted(found, key=self.rank)

    def below(
        self,
        costs: Costs,
        limits: Limits,
        shares: Sequence[float],
        tried: AbstractSet[Vector],
        rng: np.random.Generator,
        expected: Expected,
    ) -> list[Vector]:
        """Untried vectors under each share of the limits: the best few, new ones where few fit.

        The best are those of which the least KL is `expected`; of equal ones, in screening.
        """
        found: dict[Vector, None] = {}
        for share in shares:
            tight = {metric: limit * share for metric, limit in limits.items()}
            if len(self._untried(costs, tight, tried)) < _FEW:
                self._make(costs, tight, rng)
            best = sorted(self._untried(costs, tight, tried), key=self.rank)
            order = np.argsort(expected(best), kind="stable")
            found.update(dict.fromkeys(best[i] for i in order[:_FEW]))
        return list(found)

    def kl(self, vector: Vector) -> float:
        """Screening KL in nats; the surrogate's estimate of it, where it was not screened."""
        if vector not in self._kl:
            return float(self._surrogate.predict([vector])[0])
        return self._kl[vector]

    def regular(self, pool: Iterable[Vector]) -> list[Vector]:
        """Those of a pool that are regular shapes."""
        return [vector for vector in pool if self.origin(vector) == "regular"]

    def rank(self, vector: Vector) -> tuple[float, Vector]:
        """What vectors are sorted by: screening KL, then the vector itself."""
        return self._kl[vector], vector

    def finalist(
        self,
        pool: Sequence[Vector],
        tried: AbstractSet[Vector],
        costs: Costs,
        limits: Limits,
        slack: float,
    ) -> Vector | None:
        """The first of the pool under a share of the limits, a tenth of the units from any tried.

        Where there is none, the share and then the distance are given up.
        """
        tight = {metric: limit * slack for metric, limit in limits.items()}
        apart = max(1, len(self._space.free) // 10)
        for within, distance in ((tight, apart), (limits, apart), (limits, 1)):
            for vector in pool:
                if costs.fits(vector, within) and all(
                    hamming(vector, other) >= distance for other in tried
                ):
                    return vector
        return None

    def neighbours(self, vectors: Iterable[Vector], costs: Costs, limits: Limits) -> list[Vector]:
        """What differs from one of these in one unit and is within the limits."""
        found: dict[Vector, None] = {}
        for vector in vectors:
            for unit in self._space.free:
                for option in range(self._space.levels[unit]):
                    other = (*vector[:unit], option, *vector[unit + 1 :])
                    if other != vector and self._solvable(unit, option):
                        found[other] = None
        fitting = [vector for vector in found if costs.fits(vector, limits)]
        self._estimate([(v, "evolution") for v in fitting])
        return fitting

    def _add(self, vector: Vector, kl: float, origin: str) -> None:
        if vector not in self._kl:
            self._kl[vector] = kl
            self._origin[vector] = origin

    def _untried(self, costs: Costs, limits: Limits, tried: AbstractSet[Vector]) -> list[Vector]:
        return [v for v in self._kl if v not in tried and costs.fits(v, limits)]

    def _make(self, costs: Costs, limits: Limits, rng: np.random.Generator) -> None:
        """Bring the best of the pool within the limits, and solve anew under them."""
        repair = Repair(self._weights, costs, limits)
        best = sorted(self._kl, key=lambda vector: self._kl[vector])[:_REPAIRED]
        made = [(repair.fit(vector, rng), "evolution") for vector in best]
        try:
            solved = milp_seeds(self._weights, costs, limits, _SOLVED, int(rng.integers(2**31)))
            made = [(vector, "milp") for vector in solved] + made
        except InfeasibleError as error:
            logger.debug("%s", error)
        self._estimate([(vector, origin) for vector, origin in made if vector is not None])

    def _estimate(self, made: Sequence[tuple[Vector, str]]) -> None:
        """Take vectors that were never screened, with the KL the surrogate expects."""
        new = [(vector, origin) for vector, origin in made if vector not in self._kl]
        expected = self._surrogate.predict([vector for vector, _ in new])
        for (vector, origin), kl in zip(new, expected, strict=True):
            self._add(vector, float(kl), origin)

    def _solvable(self, unit: int, option: int) -> bool:
        """Whether the option did not break the model where it was scored."""
        return bool(np.isfinite(self._weights[unit][option]))
