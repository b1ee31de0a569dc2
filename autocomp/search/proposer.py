"""Which candidate becomes the next full trial, with which distillation settings.

Call sequence: `ask()` until it returns `None`; `tell(id, outcome)` once per proposal, in any
order; `correct(predictor)` whenever the cost table was refitted. The state is an in-memory Optuna
study, a projection that is rebuilt from the ledger's records when a search resumes.

How it chooses, in order:
1. baselines, as given;
2. until a quarter of the trials (three at least) were looked at and three feasible ones are
   measured, in turn: the best of the screened, at the whole limits and at shares of them (insurance
   against an optimistic estimate, and points for the front), each a tenth of the units or more away
   from all earlier ones; and the regular shape least like anything tried, since screening does not
   tell what distillation makes of it. Settings are spread. Runtimes take turns, beginning with the
   one on which the best of the screened fits: insurance against an estimate that flatters one;
3. then, in turn: the best architecture under settings near its own, on its runtime; the one of
   which the least divergence may be hoped for after training (`gain`), on the runtime where it
   leaves most of the budget; and what is expected to add most to the front (`frontier`).

What is best is what diverges least from the teacher: on few examples that tells more of a model
than its metric.

An architecture is tried on one runtime: what it computes is the same on another, what it costs
there the table knows.

Every proposal is predicted within the budget less a margin; the margin of a runtime grows to what
measured trials that missed the budget on it exceeded their prediction by.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence

import numpy as np
import optuna

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Distillation, Runtime
from autocomp.core.errors import InternalError
from autocomp.front.pick import OBJECTIVES, Objective, closest_first, feasible
from autocomp.search.architectures import Architectures
from autocomp.search.baselines import Baseline
from autocomp.search.costs import Costs, Limits, Predictor, Predictors
from autocomp.search.frontier import Frontier
from autocomp.search.gain import Gain, Shapes, Trained
from autocomp.search.margins import margins
from autocomp.search.projection import Projection
from autocomp.search.proposal import Proposal, trial_id
from autocomp.search.scores import Scores
from autocomp.search.screening import Screened
from autocomp.search.settings import Settings
from autocomp.search.space import Space, Vector
from autocomp.study.records import RungRecord, TrialKind, TrialRecord

logger = logging.getLogger(__name__)

_SLACK = (1.0, 0.75, 1.0, 0.5)
_ADAPT_AFTER = 3
_AROUND = 3
"""Best architectures whose neighbours are considered."""
_TURN = ("best", "gain", "front", "gain")


class TrialProposer:
    """Proposes trials within the budget. Thread-safe; parallel asks never give the same trial.

    Args:
        space: what may be done to each unit, and the ranges of the distillation settings.
        screened: candidates with their screening KL.
        predictors: a linear cost model for each runtime.
        budget: absolute limits.
        scores: replace-one scores, to make new candidates where the screened ones do not fit.
        trials: proposals of the search in all, those of `finished` included.
        seed: of every random choice.
        finished: records of earlier runs (from the ledger); never proposed again.
        baselines: proposed first, not counted as `trials`.
        again: trials that are proposed once more, before anything new; none of `finished`.
        margin: share of each predicted limit that is always left unused.
        objectives: the values told to the Optuna study.
    """

    def __init__(
        self,
        space: Space,
        screened: Sequence[Screened],
        predictors: Predictors,
        budget: Budget,
        *,
        scores: Scores,
        trials: int,
        seed: int = 0,
        finished: Sequence[TrialRecord] = (),
        baselines: Sequence[Baseline] = (),
        again: Sequence[TrialRecord | RungRecord] = (),
        margin: float = 0.01,
        objectives: Sequence[Objective] = OBJECTIVES,
    ) -> None:
        self._space, self._budget = space, budget
        self._least_margin = margin
        self._architectures = Architectures(space, screened, scores)
        self._frontier = Frontier(space, self._architectures, objectives)
        self._shapes = Shapes(space)
        self._settings = Settings(space.distill)
        self._rng = np.random.default_rng([seed, len(finished)])
        self._trials = trials
        self._lock = threading.Lock()
        self._projection = Projection(
            space, self._settings, list(predictors), budget, objectives, seed
        )
        self._records: dict[str, TrialRecord] = {}
        self._pending: dict[str, Proposal] = {}
        self._predictors: dict[Runtime, Predictor] = {}
        self._costs: dict[Runtime, Costs] = {}
        for runtime, predictor in predictors.items():
            self.correct(predictor, runtime)
        for record in finished:
            if record.id not in self._records:
                self._records[record.id] = record
                self._projection.end(record)
        self._baselines = deque(b for b in baselines if b[0] not in self._records)
        self._again = deque(record for record in again if record.kind == "search")

    @property
    def study(self) -> optuna.Study:
        """The trials as Optuna shows them."""
        return self._projection.study

    @property
    def in_flight(self) -> list[Proposal]:
        """Asked and not yet told."""
        with self._lock:
            return list(self._pending.values())

    def correct(self, predictor: Predictor, runtime: Runtime = None) -> None:
        """Take a refitted cost model of a runtime; later proposals are within its prediction."""
        with self._lock:
            self._predictors[runtime] = predictor
            self._costs[runtime] = Costs(self._space, predictor)

    def extend(self, trials: int) -> None:
        """Allow this many more proposals (the budget was missed; search on)."""
        with self._lock:
            self._trials += trials

    def margins(self, runtime: Runtime = None) -> dict[str, float]:
        """Share of each limit left unused now on a runtime."""
        searched = [r for r in self._records.values() if r.candidate.runtime == runtime]
        return margins(self._costs[runtime], searched, self._budget, self._least_margin)

    def ask(self) -> Proposal | None:
        """The next trial, or `None` when there is none left to propose."""
        with self._lock:
            if self._baselines:
                name, kind, candidate = self._baselines.popleft()
                return self._begin(name, kind, candidate, "baseline")
            if self._again:
                record = self._again.popleft()
                return self._begin(record.id, "search", record.candidate, record.proposed_by)
            if self._asked() >= self._trials:
                return None
            chosen = self._choose()
            if chosen is None:
                return None
            candidate, origin = chosen
            return self._begin(trial_id(candidate), "search", candidate, origin)

    def tell(self, id: str, outcome: TrialRecord | str) -> None:
        """Report a trial: its record, or the cause of its failure.

        A record with a missing or non-finite figure is told as failed.

        Raises:
            InternalError: for an id that was not asked.
        """
        with self._lock:
            if id not in self._pending:
                raise InternalError(f"trial {id!r} was not asked, or was told before")
            proposal = self._pending.pop(id)
            if isinstance(outcome, str):
                outcome = TrialRecord(
                    id, proposal.kind, proposal.proposed_by, "failed", proposal.candidate,
                    error=outcome,
                )  # fmt: skip
            self._records[id] = outcome
            self._projection.end(outcome)

    def _begin(self, id: str, kind: TrialKind, candidate: Candidate, origin: str) -> Proposal:
        estimated = None
        if self._offered(candidate):
            estimated = self._predictors[candidate.runtime].predict(candidate.by_unit)
        proposal = Proposal(id, kind, candidate, origin, estimated)
        if kind == "search":
            self._projection.begin(id, candidate, origin)
        self._pending[id] = proposal
        return proposal

    # -- choosing

    def _asked(self) -> int:
        return sum(kind == "search" for _, kind in self._candidates())

    def _tried(self) -> dict[str, Candidate]:
        """Candidate key → candidate of everything asked or finished."""
        return {candidate.key: candidate for candidate, _ in self._candidates()}

    def _candidates(self) -> list[tuple[Candidate, TrialKind]]:
        """Finished, then pending ones."""
        finished = [(record.candidate, record.kind) for record in self._records.values()]
        return finished + [(p.candidate, p.kind) for p in self._pending.values()]

    def _choose(self) -> tuple[Candidate, str] | None:
        tried = self._tried()
        vectors = {self._space.encode(c) for c in tried.values() if c in self._space}
        limits = {
            runtime: costs.limits(self._budget, self.margins(runtime))
            for runtime, costs in self._costs.items()
        }
        pools = {
            runtime: self._architectures.fitting(costs, limits[runtime], vectors, self._rng)
            for runtime, costs in self._costs.items()
        }
        searched = [record for record in self._records.values() if record.kind == "search"]
        trained = [t for r in searched if (t := Trained.of(r, self._space)) is not None]
        good = closest_first(record for record in searched if self._good(record))
        best = good[0] if good else None
        index = self._asked()
        seen = max(len(trained), len(good))
        if best is None or len(good) < _ADAPT_AFTER or seen < self._trials // 4:
            begun = self._insurance(index, pools, limits, vectors, tried)
            if begun is not None:
                return begun
        if best is None:
            return self._repeat(tried, limits, index)
        turn = _TURN[index % len(_TURN)]
        if turn == "best" and self._fits(best.candidate, limits):
            again = self._named(
                best.candidate.runtime,
                self._space.encode(best.candidate),
                self._near(best.candidate.distillation, index),
                tried,
            )
            if again is not None:
                return again
        settings = self._near(best.candidate.distillation, index)
        gain = self._gain(trained)
        if turn == "front":
            added = self._frontier.most_gain(
                list(self._records.values()),
                self._costs,
                limits,
                vectors,
                self._rng,
                lambda vectors: gain.predict(vectors, settings)[0],
            )
            named = None if added is None else self._named(*added, settings, tried)
            if named is not None:
                return named[0], "front"
        vector = self._hoped_for(pools, limits, vectors, gain, good[:_AROUND], settings)
        if vector is None:
            return self._repeat(tried, limits, index)
        named = self._named(self._roomiest(vector, limits), vector, settings, tried)
        return named if named is None else (named[0], "gain" if trained else named[1])

    def _insurance(
        self,
        index: int,
        pools: Mapping[Runtime, Sequence[Vector]],
        limits: Mapping[Runtime, Limits],
        vectors: set[Vector],
        tried: dict[str, Candidate],
    ) -> tuple[Candidate, str] | None:
        """Without knowing better: the best of the screened, or a regular shape."""
        regular = {its: self._architectures.regular(pool) for its, pool in pools.items()}
        turn, odd = index // len(pools), 0
        if any(regular.values()):
            turn, odd = divmod(turn, 2)
        settings = self._settings.spread(index)
        for runtime in self._turns(pools):
            vector = self._unlike(regular[runtime], vectors) if odd and regular[runtime] else None
            if vector is None:
                slack = _SLACK[turn % len(_SLACK)]
                vector = self._architectures.finalist(
                    pools[runtime], vectors, self._costs[runtime], limits[runtime], slack
                )
            if vector is not None:
                return self._named(runtime, vector, settings, tried)
        return None

    def _unlike(self, vectors: Sequence[Vector], others: set[Vector]) -> Vector:
        """The one whose shape is furthest from the nearest of others; the first without others."""
        if not others:
            return vectors[0]
        here, there = self._shapes.points(vectors), self._shapes.points(sorted(others))
        apart = ((here[:, None] - there[None]) ** 2).sum(axis=-1).min(axis=1)
        return vectors[int(apart.argmax())]

    def _gain(self, trained: Sequence[Trained]) -> Gain:
        pending = [
            (self._space.encode(p.candidate), p.candidate.distillation)
            for p in self._pending.values()
            if p.kind == "search" and p.candidate in self._space
        ]
        return Gain(self._shapes, self._architectures.kl, trained, pending if trained else ())

    def _hoped_for(
        self,
        pools: Mapping[Runtime, Sequence[Vector]],
        limits: Mapping[Runtime, Limits],
        vectors: set[Vector],
        gain: Gain,
        best: Sequence[TrialRecord],
        settings: Distillation,
    ) -> Vector | None:
        """Of what is untried and fits: least mean less one standard deviation of ln KL (LCB)."""
        pool = {v for its in pools.values() for v in its}
        around = [self._space.encode(record.candidate) for record in best]
        for runtime, costs in self._costs.items():
            near = self._architectures.neighbours(around, costs, limits[runtime])
            pool.update(vector for vector in near if vector not in vectors)
        if not pool:
            return None
        ordered = sorted(pool, key=self._architectures.rank)
        mean, deviation = gain.predict(ordered, settings)
        return ordered[int(np.argmin(mean - deviation))]

    def _turns(self, pools: Mapping[Runtime, Sequence[Vector]]) -> list[Runtime]:
        """The runtimes on which anything fits: the least proposed first, then by their best."""
        proposed = Counter(c.runtime for c, kind in self._candidates() if kind == "search")
        return sorted(
            (runtime for runtime, pool in pools.items() if pool),
            key=lambda runtime: (proposed[runtime], self._architectures.rank(pools[runtime][0])),
        )

    def _roomiest(self, vector: Vector, limits: Mapping[Runtime, Limits]) -> Runtime:
        """The runtime on which a vector that fits leaves most of the budget, else is fastest."""
        return min(
            (its for its, costs in self._costs.items() if costs.fits(vector, limits[its])),
            key=lambda its: (
                self._costs[its].share(vector, limits[its]),
                self._costs[its].total("latency_ms", vector),
            ),
        )

    def _offered(self, candidate: Candidate) -> bool:
        """Whether it could be proposed: a point of the space, on a runtime that is searched."""
        return candidate.runtime in self._costs and candidate in self._space

    def _fits(self, candidate: Candidate, limits: Mapping[Runtime, Limits]) -> bool:
        vector = self._space.encode(candidate)
        return self._costs[candidate.runtime].fits(vector, limits[candidate.runtime])

    def _good(self, record: TrialRecord) -> bool:
        return self._offered(record.candidate) and feasible(record, self._budget)

    def _near(self, settings: Distillation, index: int) -> Distillation:
        if settings.tokens == 0 or not self._settings.holds(settings):
            return self._settings.spread(index)
        return self._settings.near(settings, self._rng)

    def _named(
        self,
        runtime: Runtime,
        vector: Vector,
        settings: Distillation,
        tried: dict[str, Candidate],
    ) -> tuple[Candidate, str] | None:
        """The candidate, under other settings if exactly this one was tried."""
        for attempt in range(16):
            candidate = self._space.decode(vector, settings, runtime)
            if candidate.key not in tried:
                return candidate, self._architectures.origin(vector)
            settings = self._settings.spread(attempt)
        return None

    def _repeat(
        self, tried: dict[str, Candidate], limits: Mapping[Runtime, Limits], index: int
    ) -> tuple[Candidate, str] | None:
        """No new architecture fits: old ones that fit, under new settings."""
        for candidate in tried.values():
            trained = candidate.distillation.tokens > 0
            if trained and self._offered(candidate) and self._fits(candidate, limits):
                vector = self._space.encode(candidate)
                settings = self._settings.spread(index)
                named = self._named(candidate.runtime, vector, settings, tried)
                if named is not None:
                    return named
        logger.info("no candidate is left to propose within the predicted budget")
        return None
