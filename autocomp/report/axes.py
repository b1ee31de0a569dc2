"""Ranges and ticks of the quality-against-cost plots, shared by the terminal and the web page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from autocomp.core.metric import Scale


@dataclass(frozen=True)
class Range:
    """Lower and upper end of an axis; `clipped` when values lie below `low`."""

    low: float
    high: float
    clipped: bool = False


def quality_range(values: Sequence[float]) -> Range:
    """The range that shows the better half of `values` well.

    One ruined model would squeeze all others into a line, so the axis ends three times the better
    half's span below the best; what lies further down is drawn at the edge.
    """
    best, worst = max(values), min(values)
    median = sorted(values)[len(values) // 2]
    floor = best - 3 * max(best - median, 1e-9)
    clipped = worst < floor and best > median
    low = floor if clipped else worst
    margin = 0.06 * (best - low) or max(abs(best) * 0.01, 1e-6)
    return Range(low - margin, best + margin, clipped)


def cost_range(values: Sequence[float]) -> Range:
    """The range of a logarithmic cost axis, with a margin of 8% of its width on both sides."""
    low, high = min(values), max(values)
    margin = (high / low) ** 0.08 if high > low else 1.25
    return Range(low / margin, high * margin)


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round values (1, 2, 5 × 10ⁿ; finer when few fit) between `low` and `high`."""
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ticks = [
            digit * 10.0**power
            for power in range(first, last + 1)
            for digit in digits
            if low <= digit * 10.0**power <= high
        ]
        if len(ticks) <= most:
            return ticks
    return ticks


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values, 1, 2 or 5 × 10ⁿ apart, between `low` and `high`."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


@dataclass(frozen=True)
class QualityAxis:
    """An axis of qualities on a scale: ends and ticks as heights, each tick with its text."""

    low: float
    high: float
    clipped: bool
    ticks: list[tuple[float, str]]


def quality_axis(values: Sequence[float], scale: Scale) -> QualityAxis:
    """The axis for these qualities; ticks are round figures of the scale, perplexities say."""
    span = quality_range([scale.height(value) for value in values])
    if not scale.reciprocal:
        ticks = linear_ticks(span.low, span.high, about=6)
        return QualityAxis(span.low, span.high, span.clipped, _written(ticks, ticks))
    worst, best = math.exp(-span.low), math.exp(-span.high)
    narrow = worst / best < 3
    figures = linear_ticks(best, worst, about=6) if narrow else log_ticks(best, worst)
    heights = [-math.log(figure) for figure in figures]
    return QualityAxis(span.low, span.high, span.clipped, _written(heights, figures))


def _written(heights: Sequence[float], figures: Sequence[float]) -> list[tuple[float, str]]:
    """Each height with its figure, as many decimals as the step between figures needs."""
    step = min((abs(b - a) for a, b in pairwise(figures)), default=0.1)
    digits = max(0, min(6, len(f"{step:.6f}".rstrip("0").partition(".")[2])))
    return [
        (height, f"{figure:.{digits}f}") for height, figure in zip(heights, figures, strict=True)
    ]
