"""What every method is given: a space, additive costs, limits, and evaluations that are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from autocomp.core.budget import Budget
from autocomp.core.candidate import Option
from autocomp.core.measurement import Measurement
from autocomp.search.costs import Costs, Limits
from autocomp.search.scores import LocalErrors
from autocomp.search.space import Space, Vector
from benchmarks.search_quality.dimensions import Axes, Dimensions

REPEATS = 2
"""A run ends after this many proposals per evaluation it may make: the others were repetitions."""

METRICS = ("latency_ms", "size_bytes")

Terms = Mapping[str, Mapping[str, float]]
"""Unit name → option key → cost."""


@dataclass(frozen=True)
class AdditiveCosts:
    """A `search.costs.Predictor` from plain tables: metric → base, metric → unit → option → cost.

    What has no table costs nothing.
    """

    base: Mapping[str, float]
    terms: Mapping[str, Terms]

    base_peak_memory_bytes = None

    @property
    def base_latency_ms(self) -> float:
        """Latency of what no unit accounts for."""
        return self.base.get("latency_ms", 0.0)

    @property
    def base_size_bytes(self) -> float:
        """Bytes of what no unit accounts for."""
        return self.base.get("size_bytes", 0.0)

    def latency_ms(self, unit: str, option: Option) -> float:
        """Latency that `unit` adds under `option`."""
        return self._term("latency_ms", unit, option)

    def size_bytes(self, unit: str, option: Option) -> float:
        """Bytes that `unit` adds under `option`."""
        return self._term("size_bytes", unit, option)

    def peak_memory_bytes(self, unit: str, option: Option) -> float:
        """Never asked for: there is no base."""
        raise NotImplementedError

    def predict(self, options: Mapping[str, Option]) -> Measurement:
        """The sums."""
        return Measurement(
            "estimated",
            self.base_latency_ms + sum(self.latency_ms(u, o) for u, o in options.items()),
            round(self.base_size_bytes + sum(self.size_bytes(u, o) for u, o in options.items())),
        )

    def _term(self, metric: str, unit: str, option: Option) -> float:
        return self.terms[metric][unit][option.key] if metric in self.terms else 0.0


@dataclass(frozen=True)
class Problem:
    """A space, its costs, and the limits candidates have to meet.

    Attributes:
        limits: one metric, or none where a whole front is looked for.
        axes: what options are made of, for samplers that do not know of options.
        local: local errors of all options, where there are more of these than are scored each.
    """

    space: Space
    predictor: AdditiveCosts
    limits: Limits = field(default_factory=dict)
    axes: Axes | None = None
    local: LocalErrors | None = None

    @cached_property
    def costs(self) -> Costs:
        """The costs in arrays."""
        return Costs(self.space, self.predictor)

    @cached_property
    def dimensions(self) -> Dimensions:
        """The space as other samplers see it."""
        return Dimensions(self.space, self.axes)

    @property
    def budget(self) -> Budget:
        """The limits as the product's."""
        return Budget(**self.limits)

    def within(self, limits: Limits) -> Problem:
        """The same space under other limits."""
        return replace(self, limits=limits)


class StopError(Exception):
    """Raised by an evaluation when the run is over; no method catches it."""


@dataclass(frozen=True)
class Evaluated:
    """A candidate in the order of evaluation; `fits` says whether it met the limits."""

    vector: Vector
    kl: float
    fits: bool


class Recorder:
    """Evaluates vectors, counts the distinct ones, and ends the run.

    What was evaluated before is known and free, for every method alike.

    Args:
        problem: whose limits say what fits.
        lookup: KL of a candidate in nats.
        most: distinct evaluations a run may make.
        enough: a run that has found this KL within the limits is over; `None` for none.
    """

    def __init__(
        self,
        problem: Problem,
        lookup: Callable[[Vector], float],
        most: int,
        enough: float | None = None,
    ) -> None:
        self._problem, self._lookup = problem, lookup
        self.most, self._enough = most, enough
        self._asked = 0
        self._known: dict[Vector, float] = {}
        self.history: list[Evaluated] = []

    def __call__(self, vectors: Sequence[Vector]) -> list[float]:
        """The KL of each, in order.

        Raises:
            StopError: when the run is over.
        """
        return [self._one(tuple(int(level) for level in vector)) for vector in vectors]

    def _one(self, vector: Vector) -> float:
        self._asked += 1
        if self._asked > REPEATS * self.most:
            raise StopError
        if vector not in self._known:
            if len(self._known) == self.most:
                raise StopError
            kl = self._known[vector] = self._lookup(vector)
            fits = self._problem.costs.fits(vector, self._problem.limits)
            self.history.append(Evaluated(vector, kl, fits))
            if self._enough is not None and fits and kl <= self._enough:
                raise StopError
        return self._known[vector]
