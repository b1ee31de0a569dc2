"""Swap-and-repair evolution as an Optuna sampler.

Call sequence: the study asks; `infer_relative_search_space` returns every dimension, so Optuna
draws nothing on its own; `sample_relative` proposes one whole vector that is feasible by
construction and was never proposed in this study. At first the given starts alternate with random
budget-tight vectors, half and half; then parents are drawn among the best completed trials. Once
enough is known, every other proposal is the best of many children by the surrogate.
Asking several times before telling is fine: pending proposals count as proposed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autocomp.search.repair import Repair
from autocomp.search.space import Space, Vector
from autocomp.search.surrogate import Surrogate

ORIGIN = "proposed_by"
"""Trial user attribute: `milp`, `evolution`, `surrogate` or `random`."""

_TRIES = 48
_LEARNT_FROM = 24
"""Completed trials before the surrogate has a say."""
_RELEARN_EVERY = 8
_CHILDREN = 24
"""Of which the surrogate proposes the best."""


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """One ordered integer dimension per unit that has a choice, named after the unit."""
    return {space.names[u]: IntDistribution(0, space.levels[u] - 1) for u in space.free}


def to_params(space: Space, vector: Sequence[int]) -> dict[str, int]:
    """Optuna parameters of a vector."""
    return {space.names[u]: int(vector[u]) for u in space.free}


def from_params(space: Space, params: Mapping[str, Any]) -> Vector:
    """Inverse of `to_params`; other parameters are ignored."""
    return tuple(int(params.get(name, 0)) for name in space.names)


class SwapRepairSampler(BaseSampler):
    """Proposes vectors for a single-objective study to be minimised.

    Args:
        space: the space.
        repair: moves under the limits.
        starts: vectors to propose first, already within the limits.
        seed: of the random choices.
        elite: parents are drawn among this many best trials.
        learn: makes a surrogate of vectors and values; without it children are proposed unseen.
    """

    def __init__(
        self,
        space: Space,
        repair: Repair,
        starts: Sequence[Vector] = (),
        seed: int = 0,
        elite: int = 12,
        learn: Callable[[Sequence[tuple[Vector, float]]], Surrogate] | None = None,
    ) -> None:
        self._space = space
        self._repair = repair
        self._starts = deque(starts)
        self._random_starts = len(starts)
        self._rng = np.random.default_rng(seed)
        self._elite = elite
        self._distributions = distributions(space)
        self._proposed: dict[Vector, str] = {}
        self._absorbed: set[int] = set()
        self._ranked: list[tuple[bool, float, int, Vector]] = []
        self._learn = learn
        self._surrogate: Surrogate | None = None
        self._known: list[tuple[Vector, float]] = []
        self._learnt = 0
        self._turns = 0

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All dimensions, always."""
        return dict(self._distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A new feasible vector; an old one again only when no new one can be found."""
        self._absorb(study)
        vector, origin = self._propose()
        self._proposed.setdefault(vector, origin)
        return to_params(self._space, vector)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Never needed: every dimension is relative."""
        raise RuntimeError(f"{param_name!r} is no dimension of this space")

    def origin(self, vector: Vector) -> str:
        """How a vector came to be proposed: `milp`, `evolution`, `surrogate` or `random`."""
        return self._proposed.get(vector, "random")

    def _absorb(self, study: Study) -> None:
        """Take in what was told or added since the last proposal."""
        for trial in study.get_trials(deepcopy=False):
            if trial.number in self._absorbed or not trial.state.is_finished():
                continue
            self._absorbed.add(trial.number)
            vector = from_params(self._space, trial.params)
            self._proposed.setdefault(vector, trial.user_attrs.get(ORIGIN, "random"))
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                outside = not self._repair.within(vector)
                self._ranked.append((outside, trial.value, trial.number, vector))
                self._known.append((vector, trial.value))
        self._ranked = sorted(self._ranked)[: self._elite]

    def _propose(self) -> tuple[Vector, str]:
        while self._starts or self._random_starts:
            if self._starts and len(self._starts) >= self._random_starts:
                vector: Vector | None = self._starts.popleft()
                origin = "milp"
            else:
                self._random_starts -= 1
                vector, origin = self._repair.random(self._rng), "random"
            if vector is not None and vector not in self._proposed:
                return vector, origin
        self._turns += 1
        if self._turns % 2 and len(self._known) >= _LEARNT_FROM:
            child = self._most_promising()
            if child is not None:
                return child, "surrogate"
        for _ in range(_TRIES if self._ranked else 0):
            vector = self._repair.mutate(self._parent(), self._rng)
            if vector is not None and vector not in self._proposed:
                return vector, "evolution"
        for _ in range(_TRIES):
            vector = self._repair.random(self._rng)
            if vector is not None and vector not in self._proposed:
                return vector, "random"
        return next(iter(self._proposed.items()))

    def _most_promising(self) -> Vector | None:
        """The best of many new children, by what the surrogate expects of them."""
        if self._learn is None:
            return None
        if self._surrogate is None or len(self._known) >= self._learnt + _RELEARN_EVERY:
            self._surrogate, self._learnt = self._learn(self._known), len(self._known)
        drawn = (self._repair.mutate(self._parent(), self._rng) for _ in range(_CHILDREN))
        children = list(
            dict.fromkeys(v for v in drawn if v is not None and v not in self._proposed)
        )
        if not children:
            return None
        return children[int(np.argmin(self._surrogate.predict(children)))]

    def _parent(self) -> Vector:
        """The better of two drawn from the elite."""
        drawn = self._rng.integers(len(self._ranked), size=2)
        return self._ranked[int(drawn.min())][-1]
