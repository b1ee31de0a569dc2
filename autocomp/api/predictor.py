"""The search's view of a cost table: options in, linear terms out."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace

from autocomp.api.peak_memory import PeakMemory
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
        memory: predicts peak memory there.
        hopeful: peak memory is predicted lower by twice the expected error. For budgets that are
            within reach only if the prediction errs: the first trials tell, and refits follow them.
    """

    def __init__(
        self,
        table: CostTable,
        excluded: Container[tuple[str, str]] = (),
        memory: PeakMemory | None = None,
        *,
        hopeful: bool = False,
    ) -> None:
        self._table, self._excluded = table, excluded
        self._memory, self._hopeful = memory, hopeful

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
        cost = self._table.predict({unit: option.key for unit, option in options.items()})
        if self._memory is None:
            return cost
        peak = self._memory.predict(options) * self._share
        return replace(cost, peak_memory_bytes=round(peak))

    @property
    def base_peak_memory_bytes(self) -> float | None:
        """Peak memory of what no unit accounts for."""
        return None if self._memory is None else self._memory.base_bytes * self._share

    def peak_memory_bytes(self, unit: str, option: Option) -> float:
        """What `unit` adds to the peak memory under `option`."""
        if self._memory is None or (unit, option.key) in self._excluded:
            return math.inf
        return self._memory.bytes(unit, option) * self._share

    @property
    def _share(self) -> float:
        """Of the predicted peak memory, what the search reckons with."""
        if self._memory is None or not self._hopeful:
            return 1.0
        return 1.0 / (1.0 + 2.0 * self._memory.error)

    @property
    def peak_memory_error(self) -> float:
        """Mean relative error to be expected of a predicted peak."""
        return 0.0 if self._memory is None else self._memory.error

    def hopeful(self) -> TablePredictor:
        """The same, hopeful."""
        return TablePredictor(self._table, self._excluded, self._memory, hopeful=True)

    @property
    def interaction_ms(self) -> Callable[[Mapping[str, Option]], float] | None:
        """What `predict` says beyond base and the units' terms; `None` where that is nothing."""
        return None if self._table.tokens is None else self._interaction_ms

    def _interaction_ms(self, options: Mapping[str, Option]) -> float:
        linear = sum(self.latency_ms(unit, option) for unit, option in options.items())
        return (self.predict(options).latency_ms or 0.0) - self.base_latency_ms - linear

    def refitted(self, measured: Measured) -> TablePredictor:
        """The same, its corrections fitted to these measurements too."""
        pairs = []
        for options, cost in measured:
            choice = {unit: option.key for unit, option in options.items()}
            known = all(key in self._table.entries.get(unit, {}) for unit, key in choice.items())
            if known and cost.latency_ms is not None:
                pairs.append((choice, cost.latency_ms))
        memory = self._memory
        if memory is not None:
            memory = memory.refitted(
                [
                    (options, cost.peak_memory_bytes)
                    for options, cost in measured
                    if cost.peak_memory_bytes is not None
                ]
            )
        return TablePredictor(
            self._table.with_pairs(pairs), self._excluded, memory, hopeful=self._hopeful
        )
