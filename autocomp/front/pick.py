"""The front of a study's trials, and the choice of one under a budget.

A trial ranks only if it is complete and its quality and costs are measured and finite. An
estimate, a NaN or a missing figure never ranks, on no front and under no budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from autocomp.core.budget import Budget, RelativeBudget
from autocomp.core.errors import InfeasibleError
from autocomp.core.metric import Scale
from autocomp.core.quantities import Dimension, format_bytes, format_limit, format_ms
from autocomp.front.dominance import Sense, non_dominated
from autocomp.study.records import TrialRecord

Objective = Literal["quality", "latency", "size", "peak_memory"]
OBJECTIVES: tuple[Objective, ...] = ("quality", "latency", "size")

FIELDS: dict[Dimension, str] = {
    "latency": "latency_ms",
    "size": "size_bytes",
    "peak_memory": "peak_memory_bytes",
}
"""Objective → field of a measurement."""
_NAMES = {
    "latency_ms": "latency",
    "size_bytes": "size",
    "peak_memory_bytes": "peak memory",
    "quality": "quality",
}


class NothingFitsError(InfeasibleError):
    """No measured trial meets the budget.

    Attributes:
        nearest: the trial whose worst overshoot is smallest, or `None` if none ranks.
        binding: the limit it misses by most, or `None`.
    """

    def __init__(self, message: str, nearest: TrialRecord | None, binding: str | None) -> None:
        super().__init__(message)
        self.nearest = nearest
        self.binding = binding

    def details(self) -> dict[str, str | None]:
        """See `AutocompError.details`."""
        return {"nearest": self.nearest.id if self.nearest else None, "binding": self.binding}


def objective(record: TrialRecord, name: Objective) -> float | None:
    """A trial's measured figure, or `None` if it is missing, estimated or not finite."""
    value: float | None
    if name == "quality":
        value = record.quality
    elif record.measured is None or record.measured.provenance != "measured":
        value = None
    else:
        value = getattr(record.measured, FIELDS[name])
    return value if value is not None and math.isfinite(value) else None


def divergence(record: TrialRecord) -> float | None:
    """KL(teacher ‖ artifact) in nats on the search split; `None` if it is no finite figure."""
    kl = record.teacher_kl
    return kl if kl is not None and math.isfinite(kl) else None


def closest_first(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Least divergence from the teacher first; by quality where one of them has none."""
    known = [(record, divergence(record)) for record in records]
    if any(kl is None for _, kl in known):
        return sorted((record for record, _ in known), key=lambda record: -(record.quality or 0.0))
    return [record for record, _ in sorted(known, key=lambda pair: pair[1] or 0.0)]


def rankable(record: TrialRecord, objectives: Sequence[Objective] = OBJECTIVES) -> bool:
    """Whether the trial is complete and every objective is measured and finite."""
    return record.state == "complete" and all(
        objective(record, name) is not None for name in objectives
    )


def senses(objectives: Sequence[Objective]) -> list[Sense]:
    """Quality is maximised, costs are minimised."""
    return ["max" if name == "quality" else "min" for name in objectives]


def feasible(record: TrialRecord, budget: Budget) -> bool:
    """Whether the trial ranks and its measured figures meet every limit."""
    return (
        rankable(record)
        and record.measured is not None
        and budget.feasible(record.measured, record.quality)
    )


def front(
    records: Sequence[TrialRecord], objectives: Sequence[Objective] = OBJECTIVES
) -> list[TrialRecord]:
    """The non-dominated trials, in the order given. Trials with equal figures stay together."""
    ranked = [record for record in records if rankable(record, objectives)]
    points = [[objective(record, name) for name in objectives] for record in ranked]
    flags = non_dominated(points, senses(objectives))
    return [record for record, flag in zip(ranked, flags, strict=True) if flag]


def preference(record: TrialRecord) -> tuple[Any, ...]:
    """A sort key: best quality first, then the cheapest: latency, size, id."""
    return (
        -(objective(record, "quality") or 0.0),
        objective(record, "latency"),
        objective(record, "size"),
        record.id,
    )


def pick(records: Sequence[TrialRecord], budget: Budget) -> TrialRecord:
    """The feasible trial of highest quality; among equals the cheapest.

    `budget` is absolute: the caller resolves limits that are relative to dense.

    Raises:
        NothingFitsError: naming the nearest trial, the limit that binds and what to relax.
    """
    fitting = [record for record in records if feasible(record, budget)]
    if fitting:
        return min(fitting, key=preference)
    scale = scale_of(records)
    ranked = [record for record in records if rankable(record)]
    if not ranked:
        raise NothingFitsError(
            f"No trial of this study is complete and measured, so none can meet "
            f"{budget.describe(scale)}. Run more trials: autocomp search with a higher --trials",
            None,
            None,
        )
    nearest = min(ranked, key=lambda record: (_worst(record, budget)[1], preference(record)))
    binding, excess = _worst(nearest, budget)
    raise NothingFitsError(_message(nearest, budget, binding, excess, scale), nearest, binding)


def absolute(limits: RelativeBudget, dense: TrialRecord) -> Budget:
    """The limits, given the dense trial, which is measured.

    Raises:
        UserError: if the floor on quality is one of a metric that the task does not have.
    """
    assert dense.measured is not None
    return limits.resolve(dense.measured, dense.quality, scale_of([dense]))


def scale_of(records: Iterable[TrialRecord]) -> Scale:
    """What the qualities of these trials are shown as: quality, or a perplexity."""
    return Scale.of((record.metric, record.quality) for record in records)


def _worst(record: TrialRecord, budget: Budget) -> tuple[str, float]:
    """The limit missed by most and by how much."""
    assert record.measured is not None
    excess = budget.excess(record.measured, record.quality)
    name = max(excess, key=lambda key: excess[key])
    return name, excess[name]


def _message(record: TrialRecord, budget: Budget, binding: str, excess: float, scale: Scale) -> str:
    assert record.measured is not None
    assert record.quality is not None
    cost, quality = record.measured, record.quality
    shown = f"{scale.name} {scale.value(quality):.4g}"
    figures = {
        "quality": shown,
        "latency_ms": f"latency {format_ms(cost.latency_ms)}",
        "size_bytes": f"size {format_bytes(cost.size_bytes)}",
    }
    if budget.peak_memory_bytes is not None:
        figures["peak_memory_bytes"] = f"peak memory {format_bytes(cost.peak_memory_bytes)}"
    name = _NAMES[binding]
    if not math.isfinite(excess):
        why, relax = f"its {name} was not measured", f"drop the {name} limit"
    elif binding == "quality":
        assert budget.quality is not None
        why = f"{scale.floor(budget.quality)} binds"
        relax = f"move the floor on quality to {scale.written(quality)}"
    else:
        over = f"{excess:.1%}" if excess >= 0.0005 else "less than 0.1%"
        why = f"{name} is {over} over, the limit it misses by most"
        dimension = next(name for name, field in FIELDS.items() if field == binding)
        limit = format_limit(getattr(cost, binding), dimension)
        relax = f"raise the limit to {name} {limit}"
    return (
        f"No measured trial meets {budget.describe(scale)}. Nearest: {record.id} "
        f"({', '.join(figures.values())}): {why}. Next: {relax}, or search on with more trials"
    )
