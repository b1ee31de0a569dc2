"""Regular shapes: every layer alike, or some layers kept alike and the others skipped.

What a person would try by hand. Screening passes them over, since a candidate fitted unit by unit
diverges less before training; distillation makes more of regular ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.search.costs import TOLERANCE, Costs, Limits
from autocomp.search.milp import Weights
from autocomp.search.space import Space, Vector, hamming

_DEPTHS = 6
"""Numbers of kept layers that are tried."""
_EACH = 3
"""Shapes of each choice of layers."""
_CHOICES = 4000
"""Ways to choose an option for each group of units; of more a random sample is looked at."""


def regular_shapes(space: Space, costs: Costs, limits: Limits, weights: Weights) -> list[Vector]:
    """Regular shapes within the limits, one of every choice of kept layers before a second.

    Units of a kind that offer the same options have the same one in all kept layers. Of each choice
    of layers those of least estimated KL are taken, which fill the limits. None without limits.

    Args:
        weights: replace-one scores per unit.
    """
    if not limits:
        return []
    shapes = _Shapes(space, costs, limits, weights)
    found = [shapes.best(kept) for kept in _layer_choices(shapes.depth, shapes.skippable)]
    taken = itertools.chain.from_iterable(itertools.zip_longest(*found))
    return list(dict.fromkeys(vector for vector in taken if vector is not None))


def _layer_choices(depth: int, skippable: bool) -> list[tuple[int, ...]]:
    """Layers to keep: all; fewer, evenly spread, the first ones, the first ones and the last."""
    choices = {tuple(range(depth)): None}
    depths = np.linspace(depth, 1, min(depth, _DEPTHS)) if skippable else np.empty(0)
    for count in depths.round().astype(int).tolist():
        spread = np.linspace(0, depth - 1, count).round().astype(int)
        choices[tuple(spread.tolist())] = None
        choices[tuple(range(count))] = None
        choices[(*range(count - 1), depth - 1)] = None
    return list(choices)


class _Shapes:
    """The units of a space in groups that are treated alike."""

    def __init__(self, space: Space, costs: Costs, limits: Limits, weights: Weights) -> None:
        self._space, self._costs, self._limits = space, costs, limits
        self._weights = costs.forbid(weights)
        self._layers = sorted({unit.layer for unit in space.units if unit.layer is not None})
        groups: dict[tuple[object, ...], list[int]] = {}
        for at, unit in enumerate(space.units):
            offered = tuple(option.key for option in space.options[unit.name])
            alone = at if unit.layer is None else None
            groups.setdefault((unit.kind, offered, alone), []).append(at)
        self._groups = list(groups.values())
        self._skips = [
            next((i for i, o in enumerate(space.options[name]) if o.step("skip")), None)
            for name in space.names
        ]
        self._choices = self._sampled(
            [
                [o for o in range(space.levels[group[0]]) if o != self._skips[group[0]]] or [0]
                for group in self._groups
            ]
        )

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def skippable(self) -> bool:
        """Whether whole layers may be skipped."""
        return all(
            skip is not None
            for unit, skip in zip(self._space.units, self._skips, strict=True)
            if unit.layer is not None
        )

    def best(self, kept: Sequence[int]) -> list[Vector]:
        """Shapes of least estimated KL with these layers, each other in two groups at least."""
        layers = {self._layers[position] for position in kept}
        fits = np.ones(len(self._choices), dtype=bool)
        for metric, limit in self._limits.items():
            total = self._costs.base[metric] + self._sum(self._costs.terms[metric], layers)
            fits &= total <= limit * (1 + TOLERANCE)
        score = self._sum(self._weights, layers)
        fits &= np.isfinite(score)
        found: list[int] = []
        vectors: list[Vector] = []
        for row in np.flatnonzero(fits)[np.argsort(score[fits], kind="stable")]:
            apart = min(2, len(self._groups))
            choice = self._choices[row].tolist()
            if any(hamming(choice, self._choices[other].tolist()) < apart for other in found):
                continue
            vector = self._vector(row, layers)
            if self._costs.fits(vector, self._limits):
                found.append(row)
                vectors.append(vector)
            if len(vectors) == _EACH:
                break
        return vectors

    def _sum(self, terms: Sequence[NDArray[np.float64]], layers: set[int]) -> NDArray[np.float64]:
        """Σ over units of what they add, `(choices,)`."""
        total = np.zeros(len(self._choices))
        for group, chosen in zip(self._groups, self._choices.T, strict=True):
            for at in group:
                skip = self._skipped(at, layers)
                total += terms[at][chosen if skip is None else skip]
        return total

    def _vector(self, row: int, layers: set[int]) -> Vector:
        vector = [0] * len(self._space)
        for group, option in zip(self._groups, self._choices[row].tolist(), strict=True):
            for at in group:
                skip = self._skipped(at, layers)
                vector[at] = option if skip is None else skip
        return tuple(vector)

    def _skipped(self, at: int, layers: set[int]) -> int | None:
        """The option that skips a unit outside the kept layers; `None` where it is kept."""
        layer = self._space.units[at].layer
        return None if layer is None or layer in layers else self._skips[at]

    @staticmethod
    def _sampled(offered: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Every choice of an option per group, or a sample of them, `(choices, groups)`."""
        if math.prod(map(len, offered)) <= _CHOICES:
            return np.array(list(itertools.product(*offered)), dtype=np.int64)
        rng = np.random.default_rng(0)
        columns = [rng.choice(np.array(options), size=_CHOICES) for options in offered]
        return np.unique(np.stack(columns, axis=1), axis=0)
