"""The divergence that distillation will leave, learnt from the trials that were trained so far.

Before training, a candidate's KL says which of two alike shapes is better; which shape distillation
makes most of it hardly says, the less the harder a model is compressed. What trials reached does. A
Gaussian process (Rasmussen & Williams, 2006, chapter 2) over ln KL after training:

    k(a, b) = exp(−|x_a − x_b|² / 2) + ⅓ z_a z_b + ⅓ exp(−|t_a − t_b|² / 2) + ⅒ [a is b]

x: for each step and kind of unit the share of those units that it is done to (what is skipped, kept
at a quarter, in 4 bits …), z: ln of the screening KL, standardised, t: the distillation settings.
Fixed, since there are too few trials to fit it to. Left out one at a time, the KL at the first rung
of 24 trials of MiniLM at a tenth of its latency is told with Spearman .69 (the KL of screening:
.29), the KL of 24 regular shapes of all sizes after their training with .95.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocomp.core.candidate import Distillation
from autocomp.search.space import Space, Vector
from autocomp.search.surrogate import LEAST_KL, Floats
from autocomp.study.records import TrialRecord

_TERM, _NOISE = 1 / 3, 0.1
_UNKNOWN_SPREAD = 0.5
"""Standard deviation of ln KL while trials do not tell."""


@dataclass(frozen=True)
class Trained:
    """What a trial diverged after training: at its first rung, or in the end if it had none."""

    vector: Vector
    settings: Distillation
    kl: float

    @classmethod
    def of(cls, record: TrialRecord, space: Space) -> Trained | None:
        """Of a record, of a stopped trial too; `None` if it was never looked at."""
        seen = record.rungs[0]["teacher_kl"] if record.rungs else record.teacher_kl
        if seen is None or not math.isfinite(seen) or record.candidate not in space:
            return None
        return cls(space.encode(record.candidate), record.candidate.distillation, float(seen))


class Shapes:
    """Vectors as points: what is done to which share of the units of a kind."""

    def __init__(self, space: Space) -> None:
        kinds = [unit.kind for unit in space.units]
        named = [
            [[(kind, step) for step in option.steps] for option in space.options[name]]
            for name, kind in zip(space.names, kinds, strict=True)
        ]
        names = list(dict.fromkeys(n for unit in named for option in unit for n in option))
        place = {name: column for column, name in enumerate(names)}
        self._tables = [np.zeros((len(options), len(names))) for options in named]
        for table, options, kind in zip(self._tables, named, kinds, strict=True):
            for row, steps in zip(table, options, strict=True):
                for step in steps:
                    row[place[step]] = 1 / kinds.count(kind)

    def points(self, vectors: Sequence[Vector]) -> Floats:
        """`(N, features)`."""
        chosen = np.array(vectors, dtype=np.int64).reshape(len(vectors), len(self._tables))
        points: Floats = np.zeros((len(vectors), self._tables[0].shape[1]))
        for unit, table in enumerate(self._tables):
            points += table[chosen[:, unit]]
        return points


class Gain:
    """Predicts ln KL after training. Immutable.

    Args:
        shapes: of the space.
        screened: screening KL of a vector, or an estimate of it, nats.
        trained: what trials reached.
        pending: vectors and settings in training, taken to reach what is expected of them, so that
            their neighbours are not asked for as well (Ginsbourger et al., 2010).
    """

    def __init__(
        self,
        shapes: Shapes,
        screened: Callable[[Vector], float],
        trained: Sequence[Trained],
        pending: Sequence[tuple[Vector, Distillation]] = (),
    ) -> None:
        self._shapes, self._screened = shapes, screened
        logs = np.log([max(each.kl, LEAST_KL) for each in trained])
        self._mean = float(logs.mean()) if len(logs) else 0.0
        self._spread = (float(logs.std()) if len(logs) > 1 else 0.0) or _UNKNOWN_SPREAD
        known = self._logs([each.vector for each in trained])
        self._middle = float(known.mean()) if len(known) else 0.0
        self._scale = (float(known.std()) if len(known) > 1 else 0.0) or 1.0
        self._learn(
            [each.vector for each in trained],
            [each.settings for each in trained],
            (logs - self._mean) / self._spread,
        )
        if pending:
            vectors = [*(each.vector for each in trained), *(vector for vector, _ in pending)]
            settings = [*(each.settings for each in trained), *(its for _, its in pending)]
            expected = self._posterior([v for v, _ in pending], [s for _, s in pending])[0]
            self._learn(vectors, settings, np.concatenate([self._values, expected]))

    def predict(self, vectors: Sequence[Vector], settings: Distillation) -> tuple[Floats, Floats]:
        """Mean and standard deviation of ln KL under these settings, `(N,)` each."""
        mean, variance = self._posterior(vectors, [settings] * len(vectors))
        return self._mean + self._spread * mean, self._spread * np.sqrt(variance)

    def _learn(
        self, vectors: Sequence[Vector], settings: Sequence[Distillation], values: Floats
    ) -> None:
        self._known, self._values = self._features(vectors, settings), values
        gram = _kernel(self._known, self._known) + _NOISE * np.eye(len(values))
        self._inverse = np.linalg.inv(gram)

    def _posterior(
        self, vectors: Sequence[Vector], settings: Sequence[Distillation]
    ) -> tuple[Floats, Floats]:
        """In units of the spread."""
        points = self._features(vectors, settings)
        across = _kernel(points, self._known)
        weights = across @ self._inverse
        itself = 1.0 + _TERM * points.screened**2 + _TERM
        mean: Floats = weights @ self._values
        return mean, np.maximum(itself - (weights * across).sum(axis=1), 0.0)

    def _logs(self, vectors: Sequence[Vector]) -> Floats:
        return np.log([max(self._screened(vector), LEAST_KL) for vector in vectors])

    def _features(self, vectors: Sequence[Vector], settings: Sequence[Distillation]) -> _Features:
        screened = (self._logs(vectors) - self._middle) / self._scale
        losses = np.array([its.loss for its in settings], dtype=object)
        return _Features(
            self._shapes.points(vectors),
            np.clip(screened, -3.0, 3.0),
            np.array([_numbers(its) for its in settings]).reshape(len(settings), 3),
            losses,
        )


@dataclass(frozen=True)
class _Features:
    """Points `(N, F)`, screened `(N,)`, settings `(N, 3)` and loss `(N,)`."""

    points: Floats
    screened: Floats
    settings: Floats
    losses: NDArray[np.object_]


def _numbers(settings: Distillation) -> list[float]:
    """In units over which training changes about as much: learning rates of a factor 2 …"""
    return [
        math.log2(max(settings.lr, 1e-12)),
        math.log2(max(settings.temperature, 1e-12)) / 2,
        math.log2(settings.tokens + 1),
    ]


def _kernel(left: _Features, right: _Features) -> Floats:
    shape = np.exp(-_distances(left.points, right.points) / 2)
    apart = _distances(left.settings, right.settings)
    apart = apart + (left.losses[:, None] != right.losses[None, :])
    kernel: Floats = (
        shape + _TERM * np.outer(left.screened, right.screened) + _TERM * np.exp(-apart / 2)
    )
    return kernel


def _distances(left: Floats, right: Floats) -> Floats:
    """Squared, `(N, M)`."""
    squared = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None, :]
    found: Floats = np.maximum(squared - 2 * left @ right.T, 0.0)
    return found
