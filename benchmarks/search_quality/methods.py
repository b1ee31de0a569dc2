"""The searches compared: ours, and samplers as they come or with what helps them most.

A method proposes until the recorder ends the run. Ours is the product's own code: replace-one
scores, each an evaluation, then `search.screening.screen`. *Stock* samplers know of the limits what
Optuna lets them know: how far each evaluated candidate exceeded them (`trial.set_constraint`). The
others are given our repair, without scores: what they propose is within the limits and mostly fills
them, which takes much of the difficulty away. Ours is also run with one of its parts taken out.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autocomp.core.candidate import Candidate
from autocomp.search import screening
from autocomp.search.costs import TOLERANCE, Limits
from autocomp.search.evolution import SwapRepairSampler
from autocomp.search.repair import Repair
from autocomp.search.scores import Scores, interpolated, to_score
from autocomp.search.screening import Screened, screen
from autocomp.search.space import Space, Vector
from benchmarks.search_quality.problem import Evaluated, Problem, Recorder, StopError

Method = Callable[[Problem, Recorder, int], None]
"""Proposes candidates of the problem to the recorder until that raises; the last is the seed."""

FrontMethod = Callable[[Problem, Sequence[Limits], Recorder, int], None]
"""The same for a whole front of KL and size; the limits are where ours and `tight` look for it."""


def ours(problem: Problem, evaluate: Recorder, seed: int) -> None:
    """Replace-one scores, then MILP seeds and swap-and-repair evolution."""
    scores = scored(problem, evaluate)
    _screened(problem, evaluate, seed, scores, problem.space.size)


def without_surrogate(problem: Problem, evaluate: Recorder, seed: int) -> None:
    """Ours, every child proposed as it comes."""

    def sampler(*args: Any, learn: Any, **settings: Any) -> SwapRepairSampler:
        return SwapRepairSampler(*args, **settings)

    with patch.object(screening, "SwapRepairSampler", sampler):
        ours(problem, evaluate, seed)


def without_milp(problem: Problem, evaluate: Recorder, seed: int) -> None:
    """Ours, begun with random budget-tight candidates alone."""
    rng = np.random.default_rng(seed)

    def sampler(
        space: Space, repair: Repair, starts: Sequence[Vector], **settings: Any
    ) -> SwapRepairSampler:
        drawn = [repair.random(rng) for _ in starts]
        return SwapRepairSampler(space, repair, [one for one in drawn if one], **settings)

    with patch.object(screening, "SwapRepairSampler", sampler):
        ours(problem, evaluate, seed)


def random(problem: Problem, evaluate: Recorder, seed: int) -> None:
    """Uniform, whatever it costs."""
    rng = np.random.default_rng(seed)
    while True:
        evaluate([problem.space.random(rng)])


def tight(problem: Problem, evaluate: Recorder, seed: int) -> None:
    """Uniform, then switched at random until it just fits: the fair baseline."""
    rng = np.random.default_rng(seed)
    repair = blind_repair(problem)
    while True:
        vector = repair.random(rng)
        evaluate([] if vector is None else [vector])


def tpe(problem: Problem, evaluate: Recorder, seed: int) -> None:
    """Optuna's TPE with constraints."""
    _optuna(problem, evaluate, _tpe(seed))


def nsga2(problem: Problem, evaluate: Recorder, seed: int) -> None:
    """Optuna's NSGA-II with constraints."""
    _optuna(problem, evaluate, NSGAIISampler(seed=seed))


def tpe_repair(problem: Problem, evaluate: Recorder, seed: int) -> None:
    """TPE, its proposals repaired."""
    _optuna(problem, evaluate, RepairedSampler(_tpe(seed), problem, seed))


def nsga2_repair(problem: Problem, evaluate: Recorder, seed: int) -> None:
    """NSGA-II, its proposals repaired."""
    _optuna(problem, evaluate, RepairedSampler(NSGAIISampler(seed=seed), problem, seed))


METHODS: dict[str, tuple[str, Method]] = {
    "ours": ("ours", ours),
    "no_surrogate": ("ours without surrogate", without_surrogate),
    "no_milp": ("ours without MILP", without_milp),
    "random": ("random", random),
    "tpe": ("TPE, constraints", tpe),
    "nsga2": ("NSGA-II, constraints", nsga2),
    "tight": ("random, budget-tight", tight),
    "tpe_repair": ("TPE with our repair", tpe_repair),
    "nsga2_repair": ("NSGA-II with our repair", nsga2_repair),
}
OURS = ("ours", "no_surrogate", "no_milp")
"""Run anew every time, since the code they run changes."""
STOCK = ("random", "tpe", "nsga2")


def ours_front(problem: Problem, limits: Sequence[Limits], evaluate: Recorder, seed: int) -> None:
    """Scores once, then each limit in turn with an equal share of what is left."""
    scores = scored(problem, evaluate)
    known: list[Screened] = []
    for at, limit in enumerate(limits):
        share = math.ceil((evaluate.most - len(evaluate.history)) / (len(limits) - at))
        known = _screened(problem.within(limit), evaluate, seed, scores, len(known) + share, known)


def random_front(problem: Problem, limits: Sequence[Limits], evaluate: Recorder, seed: int) -> None:
    """Uniform."""
    random(problem, evaluate, seed)


def tight_front(problem: Problem, limits: Sequence[Limits], evaluate: Recorder, seed: int) -> None:
    """Budget-tight at each limit in turn."""
    rng = np.random.default_rng(seed)
    repairs = [blind_repair(problem.within(limit)) for limit in limits]
    for repair in itertools.cycle(repairs):
        vector = repair.random(rng)
        evaluate([] if vector is None else [vector])


def tpe_front(problem: Problem, limits: Sequence[Limits], evaluate: Recorder, seed: int) -> None:
    """TPE with two objectives."""
    _optuna(problem, evaluate, _tpe(seed), front=True)


def nsga2_front(problem: Problem, limits: Sequence[Limits], evaluate: Recorder, seed: int) -> None:
    """NSGA-II with two objectives."""
    _optuna(problem, evaluate, NSGAIISampler(seed=seed), front=True)


FRONT_METHODS: dict[str, FrontMethod] = {
    "ours": ours_front,
    "random": random_front,
    "tpe": tpe_front,
    "nsga2": nsga2_front,
    "tight": tight_front,
}


def run(name: str, problem: Problem, evaluate: Recorder, seed: int) -> list[Evaluated]:
    """What a method evaluates until its run is over."""
    with suppress(StopError):
        METHODS[name][1](problem, evaluate, seed)
    return evaluate.history


def run_front(
    name: str, problem: Problem, limits: Sequence[Limits], evaluate: Recorder, seed: int
) -> list[Evaluated]:
    """The same for a front."""
    with suppress(StopError):
        FRONT_METHODS[name](problem, limits, evaluate, seed)
    return evaluate.history


class RepairedSampler(BaseSampler):
    """Another sampler's proposals, brought within the limits: it never learns of its own ones.

    Repairs make many proposals one. Instead of a candidate proposed before, another is taken that
    a change of one dimension leads to.

    Args:
        inner: draws all dimensions at once (`sample_relative`) or leaves some out, which are drawn
            uniformly, as at its start.
        problem: whose limits hold.
        seed: of the repairs.
    """

    def __init__(self, inner: BaseSampler, problem: Problem, seed: int) -> None:
        self._inner, self._dimensions = inner, problem.dimensions
        self._repair = blind_repair(problem)
        self._rng = np.random.default_rng(seed)
        self._proposed: set[Vector] = set()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All dimensions, always."""
        return dict(self._dimensions.distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What the inner sampler draws, repaired."""
        params = self._inner.sample_relative(study, trial, search_space)
        drawn = {name: self._drawn(dimension) for name, dimension in search_space.items()}
        wanted = {**drawn, **params}
        repaired = self._repaired(wanted)
        for name in self._rng.permutation(list(search_space)):
            if repaired not in self._proposed:
                break
            changed = {**wanted, name: self._drawn(search_space[name])}
            repaired = self._repaired(changed)
        self._proposed.add(repaired)
        return dict(self._dimensions.params(repaired))

    def _drawn(self, dimension: BaseDistribution) -> int:
        assert isinstance(dimension, IntDistribution)
        return int(self._rng.integers(dimension.low, dimension.high + 1))

    def _repaired(self, params: dict[str, Any]) -> Vector:
        """One in five is left unfilled, as in our own search: more is not always better."""
        vector = self._dimensions.vector(params)
        fill = bool(self._rng.random() < 0.8)
        return self._repair.fit(vector, self._rng, scored=False, fill=fill) or vector

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Never needed: every dimension is relative."""
        raise RuntimeError(f"{param_name!r} is no dimension of this space")

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """The inner sampler's."""
        self._inner.before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """The inner sampler's."""
        self._inner.after_trial(study, trial, state, values)


def blind_repair(problem: Problem) -> Repair:
    """Our repair for a method that has no scores."""
    nothing = [np.zeros(count) for count in problem.space.levels]
    return Repair(nothing, problem.costs, problem.limits)


def scored(problem: Problem, evaluate: Recorder) -> Scores:
    """Replace-one scores as a search finds them, each an evaluation."""
    space, local = problem.space, problem.local
    rows: dict[str, dict[str, float | None]] = {}
    while wanted := to_score(space, rows, local):
        values = evaluate([space.encode(candidate) for _, _, candidate in wanted])
        for (unit, option, _), kl in zip(wanted, values, strict=True):
            rows.setdefault(unit, {})[option.key] = kl
    return Scores(rows) if local is None else interpolated(space, rows, local)


def _screened(
    problem: Problem,
    evaluate: Recorder,
    seed: int,
    scores: Scores,
    most: int,
    known: Sequence[Screened] = (),
) -> list[Screened]:
    """The product's screening, with an evaluation that is counted."""

    def kl(candidates: list[Candidate]) -> list[float]:
        return evaluate([problem.space.encode(candidate) for candidate in candidates])

    return screen(
        problem.space, problem.predictor, kl, problem.budget, most, seed, known, scores=scores
    )


def _tpe(seed: int) -> TPESampler:
    with _no_warnings():  # multivariate counts as experimental, and is the better one here
        return TPESampler(seed=seed, multivariate=True)


def _optuna(
    problem: Problem, evaluate: Recorder, sampler: BaseSampler, *, front: bool = False
) -> None:
    """Ask, evaluate, tell; the excess over the limits as constraints, or size as an objective."""
    costs, dimensions = problem.costs, problem.dimensions
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * (2 if front else 1))
    while True:
        trial = study.ask(dict(dimensions.distributions))
        vector = dimensions.vector(trial.params)
        for metric, excess in costs.excess(vector, problem.limits).items():
            trial.set_constraint(metric, excess if excess > TOLERANCE else min(excess, 0.0))
        [kl] = evaluate([vector])
        if not math.isfinite(kl):
            study.tell(trial, state=TrialState.FAIL)
        elif front:
            study.tell(trial, [kl, costs.total("size_bytes", vector)])
        else:
            study.tell(trial, kl)


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
