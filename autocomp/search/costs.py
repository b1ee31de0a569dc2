"""What options cost, as linear terms: the view of a cost table that search works on.

Search never imports a target: anything with the `Predictor` methods will do. Where the runtime is a
dimension of the search there is a predictor for each; they share the space, the scores and what was
screened, since what a candidate computes hardly depends on what runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autocomp.core.budget import Budget
from autocomp.core.candidate import Option, Runtime
from autocomp.core.measurement import Measurement
from autocomp.search.space import Space

Limits = Mapping[str, float]
"""Metric (`latency_ms`, `size_bytes`, `peak_memory_bytes`) → upper limit."""

SHARES = (0.75, 0.5, 0.35, 0.25)
"""Of the limits: where candidates for the front are looked for, besides the limits themselves."""

TOLERANCE = 1e-6
"""Relative rounding error a limit may be exceeded by; the solver works to no better."""


class Predictor(Protocol):
    """A cost model that is linear in the options of the units, or nearly.

    For any candidate, `predict(options).latency_ms` equals `base_latency_ms` plus the sum of
    `latency_ms(unit, option)`, likewise for size: corrections are folded into the terms. What the
    runtime cannot carry out costs `inf`. Where options change what others cost (fewer tokens), the
    terms are a first-order estimate, and an optional attribute `interaction_ms`, a function of the
    options, gives the rest of the latency.
    """

    @property
    def base_latency_ms(self) -> float:
        """Latency of what no unit accounts for."""
        ...

    @property
    def base_size_bytes(self) -> float:
        """Bytes of what no unit accounts for."""
        ...

    def latency_ms(self, unit: str, option: Option) -> float:
        """Latency that `unit` adds under `option`."""
        ...

    def size_bytes(self, unit: str, option: Option) -> float:
        """Bytes that `unit` adds under `option`."""
        ...

    @property
    def base_peak_memory_bytes(self) -> float | None:
        """Peak memory of what no unit accounts for; `None` where peak memory is not predicted."""
        ...

    def peak_memory_bytes(self, unit: str, option: Option) -> float:
        """What `unit` adds to the peak memory under `option`."""
        ...

    def predict(self, options: Mapping[str, Option]) -> Measurement:
        """Estimated cost of the whole model, `provenance="estimated"`."""
        ...


Predictors = Mapping[Runtime, Predictor]
"""Runtime → its cost model; `{None: predictor}` where there is no choice."""


class Costs:
    """Cost terms of a space in arrays: `terms[metric][unit index][option index]`.

    Args:
        space: the space.
        predictor: the cost model.
    """

    def __init__(self, space: Space, predictor: Predictor) -> None:
        self.space = space
        self.base: dict[str, float] = {
            "latency_ms": predictor.base_latency_ms,
            "size_bytes": predictor.base_size_bytes,
        }
        self._interaction: Callable[[Mapping[str, Option]], float] | None = getattr(
            predictor, "interaction_ms", None
        )
        offered = [[(name, option) for option in space.options[name]] for name in space.names]
        self.terms: dict[str, list[NDArray[np.float64]]] = {
            "latency_ms": [np.array([predictor.latency_ms(*o) for o in os]) for os in offered],
            "size_bytes": [np.array([predictor.size_bytes(*o) for o in os]) for os in offered],
        }
        if predictor.base_peak_memory_bytes is not None:
            self.base["peak_memory_bytes"] = predictor.base_peak_memory_bytes
            self.terms["peak_memory_bytes"] = [
                np.array([predictor.peak_memory_bytes(*o) for o in os]) for os in offered
            ]
        self.caps: list[tuple[list[NDArray[np.float64]], int]] = [
            ([np.array([float(cap.counts(*o)) for o in os]) for os in offered], cap.most)
            for cap in space.caps
        ]
        """Costs of another kind: 1 for every option a cap counts, and how many may be chosen. They
        hold under any limits, whatever share of those is asked for."""
        self.possible = [np.isfinite(sizes) for sizes in self.terms["size_bytes"]]
        """Per unit, which options the runtime can carry out."""

    def forbid(self, weights: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """The weights, `inf` (forbidden) for what the runtime cannot carry out."""
        return [
            np.where(possible, row, np.inf)
            for possible, row in zip(self.possible, weights, strict=True)
        ]

    def limits(self, budget: Budget, margin: Mapping[str, float] | float = 0.0) -> dict[str, float]:
        """The budget's limits on metrics that are predicted, each lowered by a relative margin."""
        limits: dict[str, float] = {}
        for metric in self.terms:
            limit = getattr(budget, metric)
            if limit is not None:
                share = margin if isinstance(margin, float) else margin.get(metric, 0.0)
                limits[metric] = limit * (1.0 - share)
        return limits

    def total(self, metric: str, vector: Sequence[int]) -> float:
        """Predicted cost of a whole candidate."""
        terms = self.terms[metric]
        linear = self.base[metric] + float(sum(terms[u][o] for u, o in enumerate(vector)))
        return linear + (self.interaction(vector) if metric == "latency_ms" else 0.0)

    @property
    def linear(self) -> bool:
        """Whether the terms say all."""
        return self._interaction is None

    def around(self, vector: Sequence[int]) -> tuple[float, list[NDArray[np.float64]]]:
        """Latency of a candidate in ms, and per unit what switching it alone to an option adds."""
        total = self.total("latency_ms", vector)
        switched = [
            np.array(
                [
                    self.total("latency_ms", [*vector[:unit], option, *vector[unit + 1 :]]) - total
                    for option in range(len(terms))
                ]
            )
            for unit, terms in enumerate(self.terms["latency_ms"])
        ]
        return total, switched

    def interaction(self, vector: Sequence[int]) -> float:
        """Latency in ms that the terms miss; negative where they say too much."""
        if self._interaction is None or not all(self.possible[u][o] for u, o in enumerate(vector)):
            return 0.0
        space = self.space
        return self._interaction(
            {name: space.options[name][o] for name, o in zip(space.names, vector, strict=True)}
        )

    def excess(self, vector: Sequence[int], limits: Limits) -> dict[str, float]:
        """Relative overshoot per limited metric; ≤ 0 meets it."""
        return {metric: self.total(metric, vector) / limits[metric] - 1.0 for metric in limits}

    def fits(self, vector: Sequence[int], limits: Limits) -> bool:
        """Whether every option is possible, caps hold and limits are met, to a rounding error."""
        return (
            all(self.possible[u][o] for u, o in enumerate(vector))
            and self.within_caps(vector)
            and all(value <= TOLERANCE for value in self.excess(vector, limits).values())
        )

    def within_caps(self, vector: Sequence[int]) -> bool:
        """Whether no cap of the space is exceeded."""
        return all(
            sum(terms[u][o] for u, o in enumerate(vector)) <= most for terms, most in self.caps
        )

    def smallest(self, metric: str) -> float:
        """The smallest cost the terms allow in this metric, other metrics aside."""
        return self.base[metric] + float(sum(terms.min() for terms in self.terms[metric]))

    def share(self, vector: Sequence[int], limits: Limits) -> float:
        """The largest share of a limit that is used; without limits, 0."""
        return 1.0 + max(self.excess(vector, limits).values(), default=-1.0)
