"""How well the qualities of trials are known from the examples they were evaluated on.

The nonparametric bootstrap (Efron, 1979): examples are drawn with replacement, as many as there
are, and the quality of each draw is computed. Trials that were evaluated on the same examples share
their draws, so that a difference or a ratio of two is paired (Koehn, 2004): what makes an example
hard for both cancels out. Intervals are the percentiles that hold 95% of the draws. Seeded: the
same study says the same each time, and a trial's interval does not depend on what others there are.

Draws from answers that are all right (or of which two trials give the same ones everywhere) never
vary, which is no certainty: there the ends are moved out by 3 / N, the rule of three (Hanley &
Lippman-Hand, 1983).

A quality is the mean of the scores (an accuracy) or exp of their mean (1 / perplexity), whichever
gives the quality that was recorded. Scores from which neither does are left aside: they are of
another metric, or not of this trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from autocomp.study.per_example import ExampleScores

Array = NDArray[np.float64]

RESAMPLES = 4000
"""Draws: an end of an interval is then known to about 4% of a standard error."""
LEVEL = 0.95
_SEED = 0
_AT_ONCE = 2_000_000
"""Examples drawn at once, so that memory stays small."""
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval and its standard error."""

    value: float
    low: float
    high: float
    standard_error: float

    def holds(self, value: float) -> bool:
        """Whether the interval holds a value."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class _Drawn:
    """A trial's quality, its draws `(RESAMPLES,)` and what they were drawn from.

    `unseen` is the share of examples that may be otherwise although none was, 0 where scores are
    not right or wrong.
    """

    quality: float
    draws: Array
    examples: str
    count: int
    unseen: float


@dataclass(frozen=True)
class Noise:
    """Intervals of trials and of pairs of them, by their ids. `None` where there are no scores."""

    _drawn: Mapping[str, _Drawn] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, qualities: Mapping[str, float], scores: Mapping[str, ExampleScores]) -> Noise:
        """From the recorded quality and the per-example scores of each trial."""
        groups: dict[tuple[str, int], list[tuple[str, Callable[[Array], Array]]]] = {}
        for trial, its in scores.items():
            quality = qualities.get(trial)
            aggregate = None if quality is None else _aggregate(float(its.values.mean()), quality)
            if aggregate is not None:
                group = groups.setdefault((its.examples, len(its.values)), [])
                group.append((trial, aggregate))
        drawn: dict[str, _Drawn] = {}
        for (examples, count), members in groups.items():
            values = [scores[trial].values for trial, _ in members]
            means = resampled_means(np.stack(values))
            for (trial, aggregate), mine, mean in zip(members, values, means, strict=True):
                unseen = min(1.0, 3 / count) if np.isin(mine, (0.0, 1.0)).all() else 0.0
                drawn[trial] = _Drawn(qualities[trial], aggregate(mean), examples, count, unseen)
        return cls(drawn)

    def quality(self, trial: str) -> Interval | None:
        """The quality of a trial."""
        its = self._drawn.get(trial)
        if its is None:
            return None
        found = _interval(its.quality, its.draws, its.unseen)
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))

    def examples(self, trial: str) -> int | None:
        """How many examples a trial's quality is of."""
        its = self._drawn.get(trial)
        return None if its is None else its.count

    def difference(self, trial: str, other: str) -> Interval | None:
        """The quality of a trial less that of another, paired; negative where the trial is worse.

        `None` also where the two were evaluated on different examples.
        """
        pair = self._pair(trial, other)
        if pair is None:
            return None
        one, two = pair
        return _interval(one.quality - two.quality, one.draws - two.draws, one.unseen)

    def ratio(self, trial: str, other: str) -> Interval | None:
        """The quality of a trial over that of another, paired; above 1 where the trial is better.

        `None` also where the other's may be 0.
        """
        pair = self._pair(trial, other)
        if pair is None or min(pair[1].quality, pair[1].draws.min()) <= 0:
            return None
        one, two = pair
        unseen = one.unseen / two.quality
        return _interval(one.quality / two.quality, one.draws / two.draws, unseen)

    def _pair(self, trial: str, other: str) -> tuple[_Drawn, _Drawn] | None:
        one, two = self._drawn.get(trial), self._drawn.get(other)
        if one is None or two is None or (one.examples, one.count) != (two.examples, two.count):
            return None
        return one, two


def resampled_means(scores: Array, resamples: int = RESAMPLES, seed: int = _SEED) -> Array:
    """Means of bootstrap samples: scores `(T, N)` of T trials on N examples → `(T, resamples)`.

    All trials see the same samples.
    """
    trials, count = scores.shape
    rng = np.random.default_rng(seed)
    means = np.empty((trials, resamples))
    step = max(1, _AT_ONCE // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        means[:, start : start + rows] = scores @ times.T.astype(np.float64) / count
    return means


def _interval(value: float, draws: Array, unseen: float) -> Interval:
    if draws.min() == draws.max():
        return Interval(value, value - unseen, value + unseen, 0.0)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), float(draws.std(ddof=1)))


def _mean(means: Array) -> Array:
    return means


def _exp(means: Array) -> Array:
    drawn: Array = np.exp(means)
    return drawn


def _aggregate(mean: float, quality: float) -> Callable[[Array], Array] | None:
    """What makes the recorded quality of the mean score; no number is its own exp."""
    if math.isclose(mean, quality, rel_tol=_TOLERANCE, abs_tol=1e-12):
        return _mean
    if mean < 1 and math.isclose(math.exp(mean), quality, rel_tol=_TOLERANCE):
        return _exp
    return None
