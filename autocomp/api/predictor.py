"""The search's view of a cost table: options in, linear terms out."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence

from autocomp.core.candidate import Option
from autocomp.core.measurement import Measurement
from autocomp.targets.cost_table import CostTable

Measured = Sequence[tuple[Mapping[str, Option], Measurement]]
"""Whole candidates that were measured: unit name → option, and their cost."""


class TablePredictor:
    """A `search.costs.Predictor` on a cost table.

    Tied weights that are shared on disk are counted twice by the linear terms, once by `predict`:
    the terms err on the safe side. Where options shorten the sequence, the terms are a first-order
    estimate and `interaction_ms` says what is missing.

    Args:
        table: the table of one runtime.
        excluded: (unit name, option key) of what that runtime cannot carry out: it costs `inf`.
    """

    def __init__(self, table: CostTable, excluded: Container[tuple[str, str]] = ()) -> None:
        self._table, self._excluded = table, excluded

    @property
    def base_latency_ms(self) -> float:
        """Latency of what no unit accounts for."""
        return self._table.fitted.base_ms

    @property
    def base_size_bytes(self) -> float:
        """Bytes of what no unit accounts for."""
        return float(self._table.rest_bytes)

    def latency_ms(self, unit: str, option: Option) -> float:
        """Latency that `unit` adds under `option`."""
        if (unit, option.key) in self._excluded:
            return math.inf
        return self._table.latency_ms(unit, option.key)

    def size_bytes(self, unit: str, option: Option) -> float:
        """Bytes that `unit` adds under `option`."""
        if (unit, option.key) in self._excluded:
            return math.inf
        return float(self._table.entry(unit, option.key).size_bytes)

    def predict(self, options: Mapping[str, Option]) -> Measurement:
        """Estimated cost of the whole model."""
        return self._table.predict({unit: option.key for unit, option in options.items()})

    @property
    def interaction_ms(self) -> Callable[[Mapping[str, Option]], float] | None:
        """What `predict` says beyond base and the units' terms; `None` where that is nothing."""
        return None if self._table.tokens is None else self._interaction_ms

    def _interaction_ms(self, options: Mapping[str, Option]) -> float:
        linear = sum(self.latency_ms(unit, option) for unit, option in options.items())
        return (self.predict(options).latency_ms or 0.0) - self.base_latency_ms - linear

    def refitted(self, measured: Measured) -> TablePredictor:
        """The same table, its correction fitted to these measurements too."""
        pairs = []
        for options, cost in measured:
            choice = {unit: option.key for unit, option in options.items()}
            known = all(key in self._table.entries.get(unit, {}) for unit, key in choice.items())
            if known and cost.latency_ms is not None:
                pairs.append((choice, cost.latency_ms))
        return TablePredictor(self._table.with_pairs(pairs), self._excluded)
