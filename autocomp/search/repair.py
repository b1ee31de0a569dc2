"""Swap-and-repair: every proposal is feasible by construction and fills its budget.

A child switches one to three units of its parent (EvoPress: Sieberling et al., 2024), then other
units give way until the limits hold, then what room is left is spent. The moves are drawn among
the best few by estimated score per cost, so repeated proposals differ; the units that were just
switched are left alone as long as possible, so a mutation survives its repair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.search.costs import TOLERANCE, Costs, Limits
from autocomp.search.milp import Weights
from autocomp.search.space import Vector

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
_SLACK = 1e-12
_MOST_MOVES = 2000
"""A repair gives up after this many moves."""


class Repair:
    """Moves between vectors under fixed limits.

    Args:
        weights: replace-one scores per unit; `inf` forbids an option, as an infinite cost does.
        costs: linear cost terms.
        limits: upper limit per metric; may be empty.
        choices: a move is drawn among this many best ones.
    """

    def __init__(self, weights: Weights, costs: Costs, limits: Limits, choices: int = 3) -> None:
        weights = costs.forbid(weights)
        counts = [len(row) for row in weights]
        self._starts = np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.int64)
        self._unit = np.repeat(np.arange(len(counts)), counts)
        self._score: Floats = np.concatenate(list(weights))
        self._allowed: Flags = np.isfinite(self._score)
        self._choices = choices
        self._costs = costs
        metrics = list(limits) or ["latency_ms", "size_bytes"]
        self._missed: Floats = np.zeros(len(metrics))  # 1 / limit where the terms may miss a part
        if not costs.linear and "latency_ms" in limits:
            self._missed[metrics.index("latency_ms")] = 1.0 / limits["latency_ms"]
        norms = [limits.get(metric) or max(costs.smallest(metric), 1e-9) for metric in metrics]
        cost = np.stack(  # (metrics, options), in units of the limit
            [
                np.concatenate(costs.terms[metric]) / norm
                for metric, norm in zip(metrics, norms, strict=True)
            ]
        )
        self._cost: Floats = np.where(np.isfinite(cost), cost, 0.0)
        self._base: Floats = np.array(
            [costs.base[m] / n for m, n in zip(metrics, norms, strict=True)]
        )
        self._room: Floats = np.full(len(metrics), 1.0 if limits else np.inf)
        self._spendable = len(metrics)  # what comes behind them are the caps
        for terms, most in costs.caps:
            norm = max(most, 1)
            self._cost = np.vstack([self._cost, np.concatenate(terms) / norm])
            self._base = np.append(self._base, 0.0)
            self._room = np.append(self._room, most / norm)
            self._missed = np.append(self._missed, 0.0)
        self._free: Flags = np.array([count > 1 for count in counts])
        self._usable = [np.flatnonzero(np.isfinite(row)) for row in weights]

    def within(self, vector: Sequence[int]) -> bool:
        """Whether the vector meets the limits and uses no forbidden option."""
        current = self._starts + np.array(vector)
        used = self._used(np.array(vector))
        return bool((used <= self._room + TOLERANCE).all() and self._allowed[current].all())

    def mutate(self, parent: Vector, rng: np.random.Generator) -> Vector | None:
        """A child: one to three switches, then repaired and filled. `None` if beyond repair.

        One child in five is left unfilled: more of a unit is not always better next to others.
        """
        units = [u for u in np.flatnonzero(self._free) if len(self._usable[u]) > 1]
        if not units:
            return None
        child = np.array(parent)
        count = min(len(units), int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2])))
        switched = rng.choice(units, size=count, replace=False)
        for unit in switched:
            others = self._usable[unit][self._usable[unit] != child[unit]]
            child[unit] = rng.choice(others)
        return self._settle(child, switched, rng, scored=True, fill=bool(rng.random() < 0.8))

    def random(self, rng: np.random.Generator) -> Vector | None:
        """A random candidate that just fills its budget: the fair baseline for any search.

        Knows nothing of scores: random switches down until it fits, then up in cost while they fit.
        """
        start = np.array([rng.choice(usable) for usable in self._usable])
        return self._settle(start, np.array([], dtype=int), rng, scored=False)

    def fit(
        self,
        vector: Vector,
        rng: np.random.Generator,
        *,
        scored: bool = True,
        fill: bool = True,
    ) -> Vector | None:
        """The vector itself brought within the limits and filled; at random unless `scored`."""
        nothing = np.array([], dtype=int)
        return self._settle(np.array(vector), nothing, rng, scored=scored, fill=fill)

    def _settle(
        self,
        vector: NDArray[np.int64],
        locked: NDArray[np.int64],
        rng: np.random.Generator,
        scored: bool,
        fill: bool = True,
    ) -> Vector | None:
        if not self._allowed[self._starts + vector].all():
            return None
        for frozen in (locked, np.array([], dtype=int)) if len(locked) else (locked,):
            moved = vector.copy()
            mask = np.ones(len(self._unit), dtype=bool)
            mask[np.isin(self._unit, frozen)] = False
            if self._shrink(moved, mask & self._allowed, rng, scored):
                if fill:
                    self._fill(moved, mask & self._allowed, rng, scored)
                return tuple(int(value) for value in moved)
        return None

    def _used(self, vector: NDArray[np.int64]) -> Floats:
        """Used budget `(metrics,)`."""
        used: Floats = self._base + self._cost[:, self._starts + vector].sum(axis=1)
        if self._missed.any():
            used = used + self._missed * self._costs.interaction(vector.tolist())
        return used

    def _deltas(self, vector: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
        """Used budget `(metrics,)`, change per move `(metrics, options)`, change of score."""
        current = self._starts + vector
        used = self._used(vector)
        change = self._cost - self._cost[:, current][:, self._unit]
        score = self._score - self._score[current][self._unit]
        return used, change, score

    def _shrink(
        self,
        vector: NDArray[np.int64],
        mask: Flags,
        rng: np.random.Generator,
        scored: bool,
    ) -> bool:
        """Switch until the limits hold; False if no switch brings them nearer."""
        for _ in range(_MOST_MOVES):
            used, change, score = self._deltas(vector)
            over = np.maximum(used - self._room, 0.0)
            if (over <= _SLACK).all():
                return True
            after = np.maximum(used[:, None] + change - self._room[:, None], 0.0)
            gain = over.sum() - after.sum(axis=0)
            moves = np.flatnonzero(mask & (gain > _SLACK))
            if len(moves) == 0:
                return False
            if scored:
                worth = (np.maximum(score[moves], 0.0) + 1e-9) / gain[moves]
            else:
                worth = rng.random(len(moves))
            self._move(vector, moves, worth, rng)
        return False

    def _fill(
        self,
        vector: NDArray[np.int64],
        mask: Flags,
        rng: np.random.Generator,
        scored: bool,
    ) -> None:
        """Spend what room is left, on better scores or, without scores, on cost."""
        while True:
            used, change, score = self._deltas(vector)
            fits = (used[:, None] + change <= self._room[:, None] + _SLACK).all(axis=0)
            spent = change[: self._spendable].sum(axis=0)
            better = score < -_SLACK if scored else spent > _SLACK
            moves = np.flatnonzero(mask & fits & better)
            if len(moves) == 0:
                return
            if scored:
                worth = score[moves] / np.maximum(spent[moves], 1e-4)
            else:
                worth = rng.random(len(moves))
            before = vector.copy()
            self._move(vector, moves, worth, rng)
            if self._missed.any() and not self.within(vector.tolist()):
                mask[self._starts + vector] &= vector == before  # costs more than its terms say
                vector[:] = before

    def _move(
        self,
        vector: NDArray[np.int64],
        moves: NDArray[np.int64],
        worth: Floats,
        rng: np.random.Generator,
    ) -> None:
        best = np.argsort(worth, kind="stable")[: self._choices]
        move = moves[rng.choice(best)]
        unit = self._unit[move]
        vector[unit] = move - self._starts[unit]
