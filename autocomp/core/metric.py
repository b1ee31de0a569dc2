"""How a task's own metric follows from quality, so that people read the figure they know.

Quality is higher-is-better for every task: an accuracy as it is, a perplexity as its reciprocal,
exp(−mean negative log-likelihood). Ledger and JSON hold both; tables, axes and messages speak of
the metric. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autocomp.core.errors import UserError

_TOLERANCE = 1e-3
"""Relative; metrics written by hand are rounded."""
PERPLEXITY = "perplexity"
"""The metric that a floor may be written in."""
_FLOOR = re.compile(rf"(?:({PERPLEXITY})\s+)?(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(%?)")
_FLOORS = "0.9, '98%' of dense, or of a language model 'perplexity 50'"
_LEAST = 1e-200
"""What a quality of 0 is drawn at."""


@dataclass(frozen=True)
class Scale:
    """The scale that qualities are shown on: quality itself, or a metric that is its reciprocal.

    Attributes:
        name: `quality`, or the metric's own name.
        reciprocal: the metric is 1 / quality, and lower is better.
    """

    name: str = "quality"
    reciprocal: bool = False

    @classmethod
    def of(cls, figures: Iterable[tuple[Mapping[str, Any], float | None]]) -> Scale:
        """The one that suits all these trials, (metric, quality) each; else quality itself.

        Trials without a metric say nothing.
        """
        names = {
            str(metric.get("name")) if _reciprocal(metric, quality) else ""
            for metric, quality in figures
            if metric and quality is not None
        }
        name = names.pop() if len(names) == 1 else ""
        return cls(name, True) if name else cls()

    def value(self, quality: float) -> float:
        """The figure on this scale."""
        if not self.reciprocal:
            return quality
        return 1.0 / quality if quality > 0 else math.inf

    def ends(self, low: float, high: float) -> tuple[float, float]:
        """An interval of qualities on this scale, the lower figure first."""
        one, two = self.value(low), self.value(high)
        return (two, one) if self.reciprocal else (one, two)

    def height(self, quality: float) -> float:
        """Where a plot draws it, better above: quality, or the logarithm of a reciprocal."""
        if not self.reciprocal:
            return quality
        return math.log(max(quality, _LEAST))

    def floor(self, quality: float) -> str:
        """A floor on quality: `quality ≥ 0.9`, `perplexity ≤ 55.6`."""
        return f"{self.name} {'≤' if self.reciprocal else '≥'} {self.value(quality):.4g}"

    def written(self, quality: float) -> str:
        """A floor that `quality` just meets, as `parse_floor` reads it: `0.8833`, `perplexity 56`.

        A reciprocal other than the perplexity is written as the quality.
        """
        if not self.reciprocal or self.name != PERPLEXITY or quality <= 0:
            return f"{_round_down(quality):.4g}"
        limit = 1 / quality
        text = f"{limit:.4g}"
        return f"{self.name} {text if float(text) >= limit else f'{1.0005 * limit:.4g}'}"


@dataclass(frozen=True)
class Floor:
    """A lower limit on quality, as a person writes it.

    Attributes:
        value: a quality, or a share of the dense model's.
        relative: which of the two.
        metric: the metric that was written, of which quality is the reciprocal: `perplexity 50`.
    """

    value: float
    relative: bool = False
    metric: str | None = None

    def resolve(self, dense: float | None, scale: Scale) -> float:
        """The quality that is asked for, given dense's and the scale the task is shown on.

        Raises:
            UserError: if the task has no such metric.
            ValueError: if it is relative to a quality that is not known.
        """
        if self.metric is not None and (scale.name != self.metric or not scale.reciprocal):
            raise UserError(f"quality: {wrong_metric(self.metric)}")
        if not self.relative:
            return self.value
        if dense is None:
            raise ValueError("quality is relative to dense, but dense quality was not measured")
        return self.value * dense


def wrong_metric(metric: str) -> str:
    """What is wrong with a floor that speaks of another metric than the task's."""
    return f"this task is not scored by {metric}. Write {_FLOORS}"


def parse_floor(text: str | float) -> Floor:
    """Parse a floor on quality: `0.9`, `98%` of dense, `perplexity 50`.

    Raises:
        UserError: if it is none, or none that a model can be held against.
    """
    match = _FLOOR.fullmatch(text.strip()) if isinstance(text, str) else None
    if isinstance(text, str) and match is None:
        raise UserError(f"{text!r} is no floor on quality: write {_FLOORS}")
    metric, number, unit = match.groups() if match else ("", text, "")
    value = float(number)
    if metric or unit:
        if (metric and unit) or not 0 < value < math.inf:
            raise UserError(f"{text!r} is no floor on quality: write {_FLOORS}")
        return Floor(1 / value, metric=metric) if metric else Floor(value / 100, relative=True)
    if (problem := floor_problem(value)) is not None:
        raise UserError(problem)
    return Floor(value)


def floor_problem(quality: float) -> str | None:
    """What is wrong with a floor on quality, or `None`: every task's lies in (0, 1]."""
    if 0 < quality <= 1:
        return None
    problem = f"a floor on quality lies above 0 and at most at 1, got {quality:g}"
    hints = []
    if 1 < quality <= 100:
        hints.append(
            f"an accuracy of {quality:g}% is {quality / 100:g}, and {quality:g}% of dense's is "
            f"'{quality:g}%'"
        )
    if 1 < quality < math.inf:
        hints.append(
            f"of a language model quality is 1 / perplexity: write 'perplexity {quality:g}' for "
            f"one of {quality:g} at most"
        )
    return f"{problem}: {'; '.join(hints)}" if hints else f"{problem}. Leave it out to have none"


def _reciprocal(metric: Mapping[str, Any], quality: float | None) -> bool:
    value = metric.get("value")
    if not isinstance(value, int | float) or value == quality or not quality:
        return False
    return math.isclose(value * quality, 1.0, rel_tol=_TOLERANCE)


def _round_down(quality: float, digits: int = 4) -> float:
    """To so many significant digits, never above: a floor of this, `quality` itself meets."""
    if quality <= 0 or not math.isfinite(quality):
        return quality
    step = 10.0 ** (math.floor(math.log10(quality)) + 1 - digits)
    rounded = float(f"{math.floor(quality / step) * step:.{digits}g}")
    return rounded if rounded <= quality else float(f"{rounded - step:.{digits}g}")
