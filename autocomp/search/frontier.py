"""Proposals for the front: which candidate is expected to add the most hypervolume.

A trial's quality is expected to fall with the logarithm of the KL it is expected to have after
training (`search.gain`); the line through the trials measured so far says how far. Candidates are
looked for at shares of the limits, since screening itself fills them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from autocomp.core.candidate import Runtime
from autocomp.front.dominance import hypervolume
from autocomp.front.pick import FIELDS, Objective, objective, rankable, senses
from autocomp.search.architectures import Architectures, Expected
from autocomp.search.costs import SHARES, Costs, Limits
from autocomp.search.space import Space, Vector
from autocomp.study.records import TrialRecord

_DISTINCT = 1.05
"""Trials whose KLs differ by less than this factor tell no slope."""


@dataclass(frozen=True)
class QualityModel:
    """`quality = level − slope · ln KL`, `slope ≥ 0`, never above the best seen."""

    level: float
    slope: float
    best: float

    @classmethod
    def fit(cls, measured: Sequence[tuple[float, float]]) -> QualityModel:
        """Least squares over (ln KL, quality) of trials, not empty."""
        kl = np.array([value for value, _ in measured], dtype=np.float64)
        quality = np.array([value for _, value in measured], dtype=np.float64)
        slope = 0.0
        if np.ptp(kl) > math.log(_DISTINCT):
            slope = max(0.0, -float(np.polyfit(kl, quality, 1)[0]))
        level = float(np.mean(quality + slope * kl))
        return cls(level, slope, float(quality.max()))

    def predict(self, log_kl: float) -> float:
        """Expected quality after distillation."""
        return min(self.best, self.level - self.slope * log_kl)


class Frontier:
    """Looks for the candidate that is expected to add most to the front.

    Args:
        space: the space.
        architectures: the pool.
        objectives: what the front trades against each other.
    """

    def __init__(
        self, space: Space, architectures: Architectures, objectives: Sequence[Objective]
    ) -> None:
        self._space, self._architectures = space, architectures
        self._objectives = tuple(objectives)

    def most_gain(
        self,
        records: Sequence[TrialRecord],
        costs: Mapping[Runtime, Costs],
        limits: Mapping[Runtime, Limits],
        tried: AbstractSet[Vector],
        rng: np.random.Generator,
        expected: Expected,
    ) -> tuple[Runtime, Vector] | None:
        """The runtime and vector of most expected gain in hypervolume; `None` if there is none.

        Hypervolume is normalised as in `front.view.study_hypervolume`.
        """
        ranked = [record for record in records if rankable(record, self._objectives)]
        dense = next((record for record in ranked if record.kind == "dense"), None)
        learnt = [r for r in ranked if r.kind == "search" and r.candidate in self._space]
        if dense is None or not learnt:
            return None
        logs = expected([self._space.encode(record.candidate) for record in learnt])
        qualities = [record.quality or 0.0 for record in learnt]
        model = QualityModel.fit(list(zip(logs.tolist(), qualities, strict=True)))
        scales = [
            1.0 if name == "quality" else objective(dense, name) or 1.0 for name in self._objectives
        ]
        reference = [0.0 if name == "quality" else 1.0 for name in self._objectives]
        scaled = list(zip(self._objectives, scales, strict=True))
        measured = [
            [(objective(record, name) or 0.0) / scale for name, scale in scaled]
            for record in ranked
        ]
        best: tuple[float, Runtime, Vector] | None = None
        before = hypervolume(measured, reference, senses(self._objectives))
        for runtime, its in costs.items():
            vectors = self._architectures.below(its, limits[runtime], SHARES, tried, rng, expected)
            for vector, log_kl in zip(vectors, expected(vectors).tolist(), strict=True):
                quality = model.predict(log_kl)
                point = [_figure(name, quality, its, vector) / scale for name, scale in scaled]
                after = hypervolume([*measured, point], reference, senses(self._objectives))
                if after > before and (best is None or after > best[0]):
                    best = after, runtime, vector
        return None if best is None else best[1:]


def _figure(name: Objective, quality: float, costs: Costs, vector: Vector) -> float:
    """What is expected of a vector in one objective."""
    if name == "quality":
        return quality
    if FIELDS[name] not in costs.terms:
        return math.nan  # adds nothing
    return costs.total(FIELDS[name], vector)
