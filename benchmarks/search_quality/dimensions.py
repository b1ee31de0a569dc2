"""A space as samplers see it that know nothing of units and options: a few numbers for each unit.

Ours switches whole options. Others learn about a number at a time, so that what an option is made
of (a share of zeros, a number of bits) is a dimension each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from optuna.distributions import BaseDistribution, IntDistribution

from autocomp.core.candidate import Option
from autocomp.search.space import Space, Vector

Axes = Mapping[str, Callable[[Option], float | None]]
"""Name → what it reads off an option; `None` where the option has no such thing."""


class Dimensions:
    """Vectors of a space as Optuna's parameters, ordered integers, and back.

    Args:
        space: the space.
        axes: what options are told apart by, every combination of values an option; without any, a
            unit is one dimension.

    Raises:
        ValueError: if a combination of values is no option, or more than one.
    """

    def __init__(self, space: Space, axes: Axes | None = None) -> None:
        self.distributions: dict[str, BaseDistribution] = {}
        self._units: list[tuple[list[str], list[list[int | None]], dict[tuple[int, ...], int]]] = []
        for unit in space.names:
            options = space.options[unit]
            read: list[list[float | None]] = (
                [[float(at)] for at in range(len(options))]
                if axes is None
                else [[axis(option) for axis in axes.values()] for option in options]
            )
            values = [
                sorted({v for v in column if v is not None}) for column in zip(*read, strict=True)
            ]
            places = [
                [None if v is None else values[axis].index(v) for axis, v in enumerate(row)]
                for row in read
            ]
            names = [unit] if axes is None else [f"{unit} {axis}" for axis in axes]
            for name, levels in zip(names, values, strict=True):
                if len(levels) > 1:
                    self.distributions[name] = IntDistribution(0, len(levels) - 1)
            option_at = {
                at: _only(unit, at, places)
                for at in product(*(range(max(1, len(levels))) for levels in values))
            }
            self._units.append((names, places, option_at))

    def __len__(self) -> int:
        return len(self.distributions)

    def params(self, vector: Vector) -> dict[str, int]:
        """A vector's parameters; 0 where its option has no such thing."""
        return {
            name: value or 0
            for (names, places, _), at in zip(self._units, vector, strict=True)
            for name, value in zip(names, places[at], strict=True)
            if name in self.distributions
        }

    def vector(self, params: Mapping[str, Any]) -> Vector:
        """The vector of all parameters."""
        return tuple(
            options[tuple(int(params.get(name, 0)) for name in names)]
            for names, _, options in self._units
        )


def _only(unit: str, at: tuple[int, ...], places: Sequence[Sequence[int | None]]) -> int:
    """The option at these values: what it does not have may be anything."""
    found = [
        option
        for option, row in enumerate(places)
        if all(mine is None or mine == wanted for mine, wanted in zip(row, at, strict=True))
    ]
    if len(found) != 1:
        raise ValueError(f"{unit}: {len(found)} options at {at}")
    return found[0]
