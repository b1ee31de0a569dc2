"""The trials of a search as an in-memory Optuna study, a projection of its records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState, create_trial

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Runtime
from autocomp.core.measurement import Measurement
from autocomp.front.pick import Objective, objective, rankable
from autocomp.search.evolution import ORIGIN, distributions, to_params
from autocomp.search.screening import new_study
from autocomp.search.settings import Settings
from autocomp.search.space import Space
from autocomp.study.records import TrialRecord


class Projection:
    """Told every trial of a search, it shows them as Optuna does. Not thread-safe.

    Args:
        space, settings: what the parameters of a trial are.
        runtimes: those there is a choice of.
        budget: absolute limits, the constraints.
        objectives: the values.
        seed: of the study's sampler, which is never asked.
    """

    def __init__(
        self,
        space: Space,
        settings: Settings,
        runtimes: Sequence[Runtime],
        budget: Budget,
        objectives: Sequence[Objective],
        seed: int,
    ) -> None:
        self._space, self._settings, self._runtimes = space, settings, list(runtimes)
        self._budget, self._objectives = budget, tuple(objectives)
        directions = ["maximize" if name == "quality" else "minimize" for name in self._objectives]
        self.study = new_study(optuna.samplers.RandomSampler(seed), directions)  # type: ignore[arg-type]
        self._running: dict[str, optuna.Trial] = {}

    def begin(self, id: str, candidate: Candidate, origin: str) -> None:
        """A trial of the search was asked for."""
        params, dimensions = self._dimensions(candidate)
        self.study.enqueue_trial(params, user_attrs={"id": id, ORIGIN: origin})
        self._running[id] = self.study.ask(fixed_distributions=dimensions)

    def end(self, record: TrialRecord) -> None:
        """A trial's record; of one that never began here (a baseline, an earlier run's), too."""
        trial = self._running.pop(record.id, None)
        if trial is None:
            self._add(record)
            return
        for name, value in self._constraints(record).items():
            trial.set_constraint(name, value)
        values = self._values(record)
        if values is not None:
            self.study.tell(trial, values)
            return
        trial.set_user_attr("error", record.error or "a figure is missing or not finite")
        trial.set_user_attr("rungs", list(record.rungs))
        self.study.tell(trial, state=_unfinished(record))

    def _add(self, record: TrialRecord) -> None:
        values = self._values(record)
        params, dimensions = self._dimensions(record.candidate)
        self.study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if values is not None else _unfinished(record),
                values=values,
                params=params,
                distributions=dimensions,
                user_attrs={"id": record.id, ORIGIN: record.proposed_by},
                constraints=self._constraints(record),
            )
        )

    def _dimensions(
        self, candidate: Candidate
    ) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """Parameters and distributions; none for what lies outside the space."""
        settings = candidate.distillation
        offered = candidate.runtime in self._runtimes and candidate in self._space
        if not offered or not self._settings.holds(settings):
            return {}, {}
        params: dict[str, Any] = {
            **to_params(self._space, self._space.encode(candidate)),
            **self._settings.to_params(settings),
        }
        dimensions = {**distributions(self._space), **self._settings.distributions(settings)}
        if candidate.runtime is not None:
            params["runtime"] = candidate.runtime
            dimensions["runtime"] = CategoricalDistribution(self._runtimes)
        return params, dimensions

    def _values(self, record: TrialRecord) -> list[float] | None:
        if not rankable(record, self._objectives):
            return None
        return [float(objective(record, name) or 0.0) for name in self._objectives]

    def _constraints(self, record: TrialRecord) -> dict[str, float]:
        """Relative overshoot per limit, the same keys for every trial; unmeasured is infinite."""
        cost = record.measured or Measurement("measured", None, None)
        return self._budget.excess(cost, record.quality)


def _unfinished(record: TrialRecord) -> TrialState:
    return TrialState.PRUNED if record.state == "pruned" else TrialState.FAIL
