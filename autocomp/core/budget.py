"""Budgets: hard upper limits on cost and an optional floor on quality. No torch.

A limit is written absolute or relative to dense; `resolve` makes it absolute once the dense model
has been measured. Unmeasured means infeasible: a missing figure never meets a limit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from autocomp.core.measurement import Measurement
from autocomp.core.metric import Floor, Scale
from autocomp.core.quantities import Limit, format_bytes, format_ms


@dataclass(frozen=True)
class Budget:
    """Absolute limits; `None` leaves a dimension free. `quality` is a floor, higher is better."""

    latency_ms: float | None = None
    size_bytes: float | None = None
    peak_memory_bytes: float | None = None
    quality: float | None = None

    def excess(self, cost: Measurement, quality: float | None = None) -> dict[str, float]:
        """Overshoot per limited dimension, relative to the limit: ≤ 0 meets it.

        `inf` when unmeasured (or NaN); for quality the shortfall.
        """
        excess: dict[str, float] = {}
        for name in ("latency_ms", "size_bytes", "peak_memory_bytes"):
            limit, value = getattr(self, name), getattr(cost, name)
            if limit is not None:
                excess[name] = math.inf if _unmeasured(value) else value / limit - 1.0
        if self.quality is not None:
            if quality is None or math.isnan(quality):
                excess["quality"] = math.inf
            else:
                excess["quality"] = (self.quality - quality) / (abs(self.quality) or 1.0)
        return excess

    def feasible(self, cost: Measurement, quality: float | None = None) -> bool:
        """Whether every limit is met."""
        return all(value <= 0 for value in self.excess(cost, quality).values())

    def describe(self, scale: Scale | None = None) -> str:
        """`latency ≤ 1.3 ms, size ≤ 10.1 MB`; with a scale, the floor as a person reads it."""
        parts = []
        if self.latency_ms is not None:
            parts.append(f"latency ≤ {format_ms(self.latency_ms)}")
        if self.size_bytes is not None:
            parts.append(f"size ≤ {format_bytes(self.size_bytes)}")
        if self.peak_memory_bytes is not None:
            parts.append(f"peak memory ≤ {format_bytes(self.peak_memory_bytes)}")
        if self.quality is not None:
            parts.append((scale or Scale()).floor(self.quality))
        return ", ".join(parts) or "no limit"

    def to_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return asdict(self)


def _unmeasured(value: float | None) -> bool:
    return value is None or math.isnan(value)


@dataclass(frozen=True)
class RelativeBudget:
    """Limits as the user wrote them, absolute or relative to dense."""

    latency: Limit | None = None
    size: Limit | None = None
    peak_memory: Limit | None = None
    quality: Floor | None = None

    def resolve(
        self, dense: Measurement, quality: float | None = None, scale: Scale | None = None
    ) -> Budget:
        """Absolute limits, given the dense model measured on the same target.

        Args:
            quality: dense's.
            scale: what qualities of the task are shown on.

        Raises:
            UserError: if the floor is one of another metric.
            ValueError: if a relative limit has no measured dense figure to refer to.
        """

        def absolute(limit: Limit | None, value: float | None, what: str) -> float | None:
            if limit is None:
                return None
            if limit.relative and value is None:
                raise ValueError(f"{what} is relative to dense, but dense {what} was not measured")
            return limit.resolve(value or 0.0)

        return Budget(
            latency_ms=absolute(self.latency, dense.latency_ms, "latency"),
            size_bytes=absolute(self.size, dense.size_bytes, "size"),
            peak_memory_bytes=absolute(self.peak_memory, dense.peak_memory_bytes, "peak memory"),
            quality=None
            if self.quality is None
            else self.quality.resolve(quality, scale or Scale()),
        )
