"""The space of candidates: per unit its options, encoded as a vector of option indices.

A *vector* is a tuple with one option index per unit, in model order. Distillation settings and the
runtime are apart: they matter to a trial, not to a stitched model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocomp.core.candidate import Candidate, Distillation, Option, Runtime
from autocomp.core.errors import InternalError
from autocomp.core.unit import Unit
from autocomp.spec.schema import DistilSection

Vector = tuple[int, ...]


@dataclass(frozen=True)
class Cap:
    """At most `most` of these units may have an option with a step of `operator`."""

    units: tuple[str, ...]
    operator: str
    most: int

    def counts(self, unit: str, option: Option) -> bool:
        """Whether this option of this unit is one of those that are capped."""
        return unit in self.units and option.step(self.operator) is not None


class Space:
    """What may be done to each unit.

    Args:
        units: every unit of the model, in model order.
        options: unit name → its options; a unit that is not named stays dense.
        distill: the ranges of the distillation settings.
        caps: on how many units an operator may be used, no unit under two of them; those that
            cannot bind are dropped.

    Raises:
        InternalError: for options of a unit that does not exist, none at all, or duplicates.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        options: Mapping[str, Sequence[Option]],
        distill: DistilSection | None = None,
        caps: Sequence[Cap] = (),
    ) -> None:
        self.units = tuple(units)
        self.names = tuple(unit.name for unit in units)
        self.distill = distill or DistilSection()
        unknown = sorted(set(options) - set(self.names))
        if unknown:
            raise InternalError(f"options for units that do not exist: {', '.join(unknown)}")
        self.options: dict[str, tuple[Option, ...]] = {
            name: tuple(options.get(name, (Option(),))) for name in self.names
        }
        for name, offered in self.options.items():
            if not offered or len(set(offered)) != len(offered):
                raise InternalError(f"{name}: options must be distinct and at least one")
        self._index = {
            name: {option.key: index for index, option in enumerate(offered)}
            for name, offered in self.options.items()
        }
        self.levels = tuple(len(self.options[name]) for name in self.names)
        self.caps = tuple(cap for cap in caps if self._counted(cap) > cap.most)

    def __len__(self) -> int:
        """Number of units."""
        return len(self.names)

    @property
    def size(self) -> int:
        """Number of candidates within the caps, distillation settings aside."""
        total = math.prod(self.levels)
        for cap in self.caps:
            ways, every = [1] + [0] * cap.most, 1  # by how many of the cap's units count
            for name in cap.units:
                counted = sum(cap.counts(name, option) for option in self.options[name])
                plain = len(self.options[name]) - counted
                ways = [
                    plain * here + counted * fewer
                    for here, fewer in zip(ways, [0, *ways], strict=False)
                ]
                every *= plain + counted
            total = total // every * sum(ways)
        return total

    @property
    def free(self) -> tuple[int, ...]:
        """Positions of the units that have a choice."""
        return tuple(i for i, count in enumerate(self.levels) if count > 1)

    def __iter__(self) -> Iterator[tuple[str, Option]]:
        """Every (unit, option) pair, in order."""
        for name, offered in self.options.items():
            for option in offered:
                yield name, option

    def __contains__(self, candidate: object) -> bool:
        return (
            isinstance(candidate, Candidate)
            and tuple(name for name, _ in candidate) == self.names
            and all(option.key in self._index[name] for name, option in candidate)
        )

    def encode(self, candidate: Candidate) -> Vector:
        """The candidate's option indices.

        Raises:
            InternalError: if a unit is missing or its option is not in this space.
        """
        vector: list[int] = []
        for name in self.names:
            option = candidate.by_unit.get(name)
            index = None if option is None else self._index[name].get(option.key)
            if index is None:
                what = "missing" if option is None else option.label()
                raise InternalError(f"{name}: {what} is not in this space")
            vector.append(index)
        return tuple(vector)

    def decode(
        self,
        vector: Sequence[int],
        distillation: Distillation | None = None,
        runtime: Runtime = None,
    ) -> Candidate:
        """The candidate of a vector. Inverse of `encode`."""
        pairs = zip(self.names, vector, strict=True)
        options = {name: self.options[name][i] for name, i in pairs}
        return Candidate.of(options, distillation, runtime)

    def _counted(self, cap: Cap) -> int:
        return sum(
            any(cap.counts(name, option) for option in self.options[name]) for name in cap.units
        )

    def random(self, rng: np.random.Generator) -> Vector:
        """A vector drawn uniformly; seldom within a budget."""
        return tuple(int(rng.integers(count)) for count in self.levels)


def hamming(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of units whose options differ."""
    return sum(a != b for a, b in zip(left, right, strict=True))
