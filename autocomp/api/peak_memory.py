"""Peak memory of candidates on one runtime: from formats, corrected by what trials measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Option
from autocomp.core.unit import Unit
from autocomp.operators import option_formats
from autocomp.targets.load_memory import PeakFit
from autocomp.targets.protocol import Target


class PeakMemory:
    """Predicts the peak resident memory of a process that loads and runs a candidate.

    Weights that a head shares with a table count twice: that errs on the safe side.

    Args:
        units: every unit of the model.
        target: tells how it loads a format.
        fit: what trials have taught so far.
    """

    def __init__(self, units: Sequence[Unit], target: Target, fit: PeakFit) -> None:
        self._units = {unit.name: unit for unit in units}
        self._target, self._fit = target, fit
        self._parts: dict[tuple[str, str], Mapping[str, float]] = {}

    @property
    def base_bytes(self) -> float:
        """What no unit accounts for."""
        return self._fit.idle_bytes

    @property
    def error(self) -> float:
        """Mean relative error to be expected."""
        return self._fit.error

    def bytes(self, unit: str, option: Option) -> float:
        """What a unit adds under an option."""
        return self._fit.of(self._loading(unit, option))

    def predict(self, options: Mapping[str, Option]) -> float:
        """Of a whole candidate, in bytes."""
        return self.base_bytes + sum(self.bytes(unit, option) for unit, option in options.items())

    def refitted(self, measured: Sequence[tuple[Mapping[str, Option], int]]) -> PeakMemory:
        """Fitted to these candidates (unit name → option, peak in bytes) and no others."""
        pairs = []
        for options, peak in measured:
            total: dict[str, float] = {}
            for unit, option in options.items():
                if unit in self._units:
                    for way, bytes_ in self._loading(unit, option).items():
                        total[way] = total.get(way, 0.0) + bytes_
            pairs.append((total, float(peak)))
        start = PeakFit(self._target.idle_memory_bytes)
        return PeakMemory(list(self._units.values()), self._target, start.fitted(pairs))

    def _loading(self, unit: str, option: Option) -> Mapping[str, float]:
        """Way of loading → bytes of a unit under an option."""
        key = (unit, option.key)
        if key not in self._parts:
            total: dict[str, float] = {}
            for left in option_formats(self._units[unit], option).values():
                way, bytes_ = self._target.load_bytes(left)
                total[way] = total.get(way, 0.0) + bytes_
            self._parts[key] = total
        return self._parts[key]
