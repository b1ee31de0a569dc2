"""Screening: evaluate many stitched candidates without training, in batches, resumably.

The evaluation is a callable, so this room needs no torch and no workers: the caller stitches,
runs the calibration tokens through and returns each candidate's KL to the teacher.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import optuna
from optuna.trial import TrialState, create_trial

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Runtime
from autocomp.core.errors import InfeasibleError, InternalError
from autocomp.core.measurement import Measurement
from autocomp.search.costs import SHARES, Costs, Limits, Predictor, Predictors
from autocomp.search.evolution import (
    ORIGIN,
    SwapRepairSampler,
    distributions,
    from_params,
    to_params,
)
from autocomp.search.milp import Weights
from autocomp.search.milp import seeds as milp_seeds
from autocomp.search.regular import regular_shapes
from autocomp.search.repair import Repair
from autocomp.search.scores import Scores
from autocomp.search.space import Space, Vector
from autocomp.search.surrogate import Surrogate

logger = logging.getLogger(__name__)

_REGULAR = 10
"""One in so many of the candidates screened is a regular shape, where there are any."""

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Screened:
    """A candidate and the divergence of its stitched model.

    Attributes:
        kl: mean KL(teacher ‖ stitched) in nats, or `None` if it was not finite.
        proposed_by: `milp`, `evolution`, `surrogate`, `random` or `regular`.
        estimated: predicted cost.
    """

    candidate: Candidate
    kl: float | None
    proposed_by: str
    estimated: Measurement | None = None

    @property
    def key(self) -> str:
        """The stitched model's key, under which the ledger keeps it: the same on every runtime."""
        return self.candidate.stitch_key

    def to_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return {
            "candidate": self.candidate.to_json(),
            "kl": self.kl,
            "proposed_by": self.proposed_by,
            "estimated": None if self.estimated is None else self.estimated.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Screened:
        """Inverse of `to_json`."""
        estimated = data.get("estimated")
        return cls(
            Candidate.from_json(data["candidate"]),
            data["kl"],
            data["proposed_by"],
            None if estimated is None else Measurement.from_json(estimated),
        )


def screen(
    space: Space,
    predictor: Predictor,
    evaluate: Callable[[list[Candidate]], Sequence[float]],
    budget: Budget,
    n: int,
    seed: int,
    known: Sequence[Screened] = (),
    *,
    scores: Scores,
    batch: int = 16,
    starts: int = 8,
    margin: float = 0.0,
    runtime: Runtime = None,
    on_batch: Callable[[list[Screened]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Screened]:
    """Screen candidates within the predicted budget until `n` are known.

    Args:
        space: what may be done to each unit.
        predictor: linear cost model.
        evaluate: KL of each candidate of a batch, in order; not finite means it failed.
        budget: absolute limits; the quality floor plays no part here.
        n: how many candidates are to be known in the end, `known` included.
        seed: of every random choice.
        known: screened before (from the ledger): replayed into the study, not evaluated again.
        scores: replace-one scores; they guide seeds and repairs.
        batch: candidates asked for at once; a multiple of the number of workers.
        starts: how many MILP seeds at the limits; one more at each of `SHARES` of them, and as many
            random budget-tight ones follow.
        margin: share of each limit that is left unused.
        runtime: whose costs the predictor tells; noted in the candidates proposed.
        on_batch: called with each batch of new records as soon as it is known (ledger).
        progress: called with (known, n).

    Returns:
        `known`, then the new ones in the order they were proposed. Fewer than `n` if the space
        holds no more candidates.

    Raises:
        InfeasibleError: if nothing meets the limits.
    """
    results = list({item.key: item for item in known if item.candidate in space}.values())
    if len(results) >= n:
        return results
    costs = Costs(space, predictor)
    limits = costs.limits(budget, margin)
    weights = scores.arrays(space)
    sampler = SwapRepairSampler(
        space,
        Repair(weights, costs, limits),
        [
            *milp_seeds(weights, costs, limits, starts, seed),
            *_seeds_below(weights, costs, limits, seed),
        ],
        seed=seed + 7919 * len(results),
        learn=partial(Surrogate, weights),
    )
    study = new_study(sampler, ["minimize"])
    dimensions = distributions(space)
    for item in results:
        vector = space.encode(item.candidate)
        study.add_trial(
            create_trial(
                state=TrialState.FAIL if item.kl is None else TrialState.COMPLETE,
                value=item.kl,
                params=to_params(space, vector),
                distributions=dimensions,
                user_attrs={ORIGIN: item.proposed_by},
                constraints=costs.excess(vector, limits),
            )
        )
    seen = {item.key for item in results}
    if progress is not None:
        progress(len(results), n)
    while len(results) < n:
        asked: list[tuple[optuna.Trial, Candidate]] = []
        for _ in range(min(batch, n - len(results))):
            trial = study.ask(fixed_distributions=dimensions)
            vector = from_params(space, trial.params)
            trial.set_user_attr(ORIGIN, sampler.origin(vector))
            for metric, excess in costs.excess(vector, limits).items():
                trial.set_constraint(metric, excess)
            candidate = space.decode(vector, runtime=runtime)
            if candidate.stitch_key in seen:  # nothing new could be proposed
                study.tell(trial, state=TrialState.PRUNED)
                break
            seen.add(candidate.stitch_key)
            asked.append((trial, candidate))
        if not asked:
            logger.info("the space within the budget is exhausted after %d", len(results))
            break
        values = evaluate([candidate for _, candidate in asked])
        if len(values) != len(asked):
            raise InternalError(f"evaluate returned {len(values)} values for {len(asked)}")
        fresh = [
            _tell(study, trial, candidate, float(value), predictor)
            for (trial, candidate), value in zip(asked, values, strict=True)
        ]
        results.extend(fresh)
        if on_batch is not None:
            on_batch(fresh)
        if progress is not None:
            progress(len(results), n)
    return results


def screen_on_each(
    space: Space,
    predictors: Predictors,
    evaluate: Callable[[list[Candidate]], Sequence[float]],
    budget: Budget,
    n: int,
    seed: int,
    known: Sequence[Screened] = (),
    **settings: Any,
) -> list[Screened]:
    """`screen` for each runtime in turn, an equal share of `n` proposed within its costs.

    What was screened for one runtime counts for all: its divergence is known to the next, which
    goes on from the best of it. The last tenth of each share are regular shapes (`regular`), which
    nothing but these would propose; where there are fewer, or none, `screen` has their places.

    Args:
        predictors: a cost model for each runtime, each able to meet the budget.
        settings: as for `screen`, `scores` among them.

    Raises:
        InfeasibleError: if nothing meets the limits on one of the runtimes.
    """
    results = list({item.key: item for item in known if item.candidate in space}.values())
    left = n - sum(item.candidate.runtime not in predictors for item in results)
    for done, (runtime, predictor) in enumerate(predictors.items()):
        own = sum(item.candidate.runtime == runtime for item in results)
        share = max(own, left // (len(predictors) - done))
        target = len(results) - own + share
        shapes: list[Candidate] = []
        if len(results) < target:
            shapes = _regular(space, predictor, budget, runtime, settings)[: share // _REGULAR]
        for held in (len({c.stitch_key for c in shapes} - {r.key for r in results}), 0):
            results = screen(
                space,
                predictor,
                evaluate,
                budget,
                target - held,
                seed,
                results,
                runtime=runtime,
                **settings,
            )
            fresh = [shape for shape in shapes if shape.stitch_key not in {r.key for r in results}]
            if fresh and len(results) < target:
                results += _screened_regular(fresh, predictor, evaluate, settings.get("on_batch"))
        left -= sum(item.candidate.runtime == runtime for item in results)
    return results


def _regular(
    space: Space,
    predictor: Predictor,
    budget: Budget,
    runtime: Runtime,
    settings: Mapping[str, Any],
) -> list[Candidate]:
    """Regular shapes within what `screen` is given."""
    costs = Costs(space, predictor)
    limits = costs.limits(budget, settings.get("margin", 0.0))
    vectors = regular_shapes(space, costs, limits, settings["scores"].arrays(space))
    return [space.decode(vector, runtime=runtime) for vector in vectors]


def _screened_regular(
    candidates: list[Candidate],
    predictor: Predictor,
    evaluate: Callable[[list[Candidate]], Sequence[float]],
    on_batch: Callable[[list[Screened]], None] | None,
) -> list[Screened]:
    fresh = [
        _screened(candidate, float(value), "regular", predictor)
        for candidate, value in zip(candidates, evaluate(candidates), strict=True)
    ]
    if on_batch is not None:
        on_batch(fresh)
    return fresh


def _seeds_below(weights: Weights, costs: Costs, limits: Limits, seed: int) -> list[Vector]:
    """The best under shares of the limits, for the front: repairs always fill the whole budget."""
    found: list[Vector] = []
    for share in SHARES if limits else ():
        tight = {metric: limit * share for metric, limit in limits.items()}
        with contextlib.suppress(InfeasibleError):
            found += milp_seeds(weights, costs, tight, 1, seed)
    return found


def new_study(
    sampler: optuna.samplers.BaseSampler, directions: Sequence[Direction]
) -> optuna.Study:
    """An in-memory Optuna study that does not log: the ledger is the record, this a projection."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=sampler, directions=list(directions))


def _tell(
    study: optuna.Study, trial: optuna.Trial, candidate: Candidate, kl: float, predictor: Predictor
) -> Screened:
    if math.isfinite(kl):
        study.tell(trial, kl)
    else:
        study.tell(trial, state=TrialState.FAIL)
    return _screened(candidate, kl, trial.user_attrs[ORIGIN], predictor)


def _screened(candidate: Candidate, kl: float, origin: str, predictor: Predictor) -> Screened:
    return Screened(
        candidate,
        kl if math.isfinite(kl) else None,
        origin,
        predictor.predict(candidate.by_unit),
    )
