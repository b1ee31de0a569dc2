"""Searching on two runtimes: one space and one KL, costs of each; against enumeration."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from search_problems import LEVELS, Problem, TablePredictor, problem

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Option
from autocomp.core.errors import InfeasibleError
from autocomp.core.measurement import Measurement
from autocomp.search.baselines import baselines
from autocomp.search.costs import Costs
from autocomp.search.milp import check_reachable, solve
from autocomp.search.proposal import Proposal
from autocomp.search.proposer import TrialProposer
from autocomp.search.repair import Repair
from autocomp.search.screening import Screened, screen_on_each
from autocomp.search.space import Vector
from autocomp.spec.schema import DistilSection
from autocomp.study.records import TrialRecord

DISTIL = DistilSection(tokens=[40000])
SKIP, INT8, INT4 = LEVELS[4], LEVELS[1], LEVELS[2]
RUNTIMES = ("steady", "hasty")


class Lacking(TablePredictor):
    """Half as slow and half as large again where 8 bits are, and without 4 bits."""

    def latency_ms(self, unit: str, option: Option) -> float:
        if option == INT4:
            return math.inf
        return 0.5 * super().latency_ms(unit, option)

    def size_bytes(self, unit: str, option: Option) -> float:
        if option == INT4:
            return math.inf
        return 1.5 * super().size_bytes(unit, option)


def costs_of(p: Problem) -> dict[str, TablePredictor]:
    tables = p.predictor._latency, p.predictor._size
    return {"steady": p.predictor, "hasty": Lacking(*tables, 0.15, 20e3)}


def screened_on(p: Problem, budget: Budget, n: int = 60, known: Sequence[Screened] = ()):
    return screen_on_each(
        p.space, costs_of(p), p.evaluate, budget, n, 0, known, scores=p.scores, batch=8
    )


@pytest.fixture(scope="module")
def small() -> Problem:
    return problem(units=4, seed=3, distill=DISTIL)


def all_vectors(p: Problem) -> list[Vector]:
    return list(itertools.product(*(range(count) for count in p.space.levels)))


def total(of: Callable[[str, Option], float], p: Problem, vector: Vector) -> float:
    return sum(of(name, LEVELS[o]) for name, o in zip(p.space.names, vector, strict=True))


def test_what_a_runtime_lacks_is_never_solved_for_nor_moved_to(small: Problem) -> None:
    predictor = costs_of(small)["hasty"].with_peak(1e6, 0.0)
    costs = Costs(small.space, predictor)
    weights = small.scores.arrays(small.space)
    for limit in (0.6, 1.0, 1.6):
        limits = {"latency_ms": limit, "size_bytes": 300e3, "peak_memory_bytes": 2e6}
        possible = [v for v in all_vectors(small) if 2 not in v]
        inside = [
            vector
            for vector in possible
            if 0.15 + total(predictor.latency_ms, small, vector) <= limit
            and 20e3 + total(predictor.size_bytes, small, vector) <= 300e3
        ]
        assert {v for v in all_vectors(small) if costs.fits(v, limits)} == set(inside)

        def score(vector: Vector) -> float:
            return sum(weights[unit][level] for unit, level in enumerate(vector))

        found = solve(weights, costs, limits)
        assert found is not None
        assert score(found) == pytest.approx(min(map(score, inside)), rel=1e-3)
        repair = Repair(weights, costs, limits)
        rng = np.random.default_rng(0)
        for start in inside[:20]:
            assert repair.within(start)
            child = repair.mutate(start, rng)
            assert child is None or child in inside
            assert repair.random(rng) in inside
        assert not repair.within((2, *inside[0][1:]))


def test_a_runtime_that_lacks_every_small_option_is_out_of_reach(small: Problem) -> None:
    free = [np.zeros(len(LEVELS)) for _ in small.space.names]
    limits = {"size_bytes": 100e3}
    check_reachable(free, Costs(small.space, costs_of(small)["steady"]), limits)

    class Whole(TablePredictor):
        def size_bytes(self, unit: str, option: Option) -> float:
            return super().size_bytes(unit, option) if option == Option() else math.inf

    whole = Whole(small.predictor._latency, small.predictor._size, 0.3, 20e3)
    dense = round((20e3 + total(small.predictor.size_bytes, small, (0,) * 4)) / 1e3)
    with pytest.raises(InfeasibleError, match=f"smallest in this space is {dense} kB"):
        check_reachable(free, Costs(small.space, whole), limits)


def test_screening_is_shared_out_and_shared() -> None:
    p = problem(seed=1)
    budget = Budget(latency_ms=2.0, size_bytes=200e3)
    costs = {its: Costs(p.space, predictor) for its, predictor in costs_of(p).items()}
    found = screened_on(p, budget)
    assert p.evaluations == 60 == len({item.key for item in found}), "each model is screened once"
    assert Counter(item.candidate.runtime for item in found) == {"steady": 30, "hasty": 30}
    for item in found:
        its = costs[str(item.candidate.runtime)]
        vector = p.space.encode(item.candidate)
        assert its.fits(vector, its.limits(budget))
        assert item.estimated is not None
        assert item.estimated.latency_ms == pytest.approx(its.total("latency_ms", vector))

    stored = [Screened.from_json(item.to_json()) for item in found]
    assert screened_on(p, budget, known=stored) == stored
    assert p.evaluations == 60
    more = screened_on(p, budget, 80, stored[:45])
    assert Counter(item.candidate.runtime for item in more) == {"steady": 40, "hasty": 40}
    assert p.evaluations == 60 + 35


def proposer_on(p: Problem, budget: Budget, trials: int, **changes: object) -> TrialProposer:
    arguments: dict[str, object] = {"scores": p.scores, "trials": trials, "seed": 0, **changes}
    found = screened_on(p, budget)
    return TrialProposer(p.space, found, costs_of(p), budget, **arguments)  # type: ignore[arg-type]


def record_of(p: Problem, proposal: Proposal, slow: float = 1.0) -> TrialRecord:
    runtime = str(proposal.candidate.runtime)
    estimated = costs_of(p)[runtime].predict(proposal.candidate.by_unit)
    assert estimated.latency_ms is not None
    return TrialRecord(
        proposal.id,
        proposal.kind,
        proposal.proposed_by,
        "complete",
        proposal.candidate,
        math.exp(-p.truth(p.space.encode(proposal.candidate))),
        measured=Measurement("measured", estimated.latency_ms * slow, estimated.size_bytes),
        estimated=proposal.estimated,
    )


def run(p: Problem, proposer: TrialProposer) -> list[Proposal]:
    proposals: list[Proposal] = []
    while (proposal := proposer.ask()) is not None:
        proposals.append(proposal)
        proposer.tell(proposal.id, record_of(p, proposal))
    return proposals


@pytest.mark.parametrize(
    ("budget", "better"),
    [
        (Budget(latency_ms=1.6), "hasty"),
        (Budget(size_bytes=150e3), "steady"),
    ],
    ids=["latency binds", "size binds"],
)
def test_the_runtime_follows_from_the_budget(budget: Budget, better: str) -> None:
    p = problem(seed=1, distill=DISTIL)
    proposals = run(p, proposer_on(p, budget, 14))
    costs = {its: Costs(p.space, predictor) for its, predictor in costs_of(p).items()}
    for proposal in proposals:
        its = costs[str(proposal.candidate.runtime)]
        assert its.fits(p.space.encode(proposal.candidate), its.limits(budget))
        assert proposal.to_json()["candidate"]["runtime"] == proposal.candidate.runtime
    assert len({proposal.id for proposal in proposals}) == 14
    first = [str(proposal.candidate.runtime) for proposal in proposals[:4]]
    assert first[0] == better, "the best of the screened fits there"
    assert Counter(first[:2]) == {"steady": 1, "hasty": 1}, "they take turns at first"
    later = Counter(str(proposal.candidate.runtime) for proposal in proposals[3:])
    assert later[better] > 8, "then the better one is chosen"
    stitched = {}
    for proposal in proposals:
        stitched.setdefault(proposal.candidate.stitch_key, set()).add(proposal.candidate.runtime)
    assert all(len(runtimes) == 1 for runtimes in stitched.values())


def test_margins_and_refits_are_of_one_runtime() -> None:
    p = problem(seed=1, distill=DISTIL)
    budget = Budget(latency_ms=1.6)
    proposer = proposer_on(p, budget, 10)
    first = proposer.ask()
    assert first is not None
    proposer.tell(first.id, record_of(p, first, slow=1.3))
    told, other = str(first.candidate.runtime), RUNTIMES[first.candidate.runtime == "steady"]
    assert proposer.margins(told)["latency_ms"] > 0.1
    assert proposer.margins(other)["latency_ms"] == pytest.approx(0.01)
    before = costs_of(p)[told]
    tables = before._latency, before._size
    proposer.correct(type(before)(*tables, 0.3 if told == "steady" else 0.15, 20e3, 1.3), told)
    assert proposer.margins(told)["latency_ms"] < 0.02


def test_a_resumed_search_knows_every_runtime_and_one_that_is_gone() -> None:
    p = problem(seed=1, distill=DISTIL)
    budget = Budget(latency_ms=2.0, size_bytes=200e3)
    first = proposer_on(p, budget, 5)
    records = [record_of(p, proposal) for proposal in run(p, first)]
    assert {record.candidate.runtime for record in records} == set(RUNTIMES)
    stored = [TrialRecord.from_json(record.to_json()) for record in records]
    again = proposer_on(p, budget, 8, finished=stored)
    assert [t.params.get("runtime") for t in again.study.trials] == [
        record.candidate.runtime for record in records
    ]
    assert len(run(p, again)) == 3

    one = {"steady": p.predictor}
    found = screened_on(p, budget)
    left = TrialProposer(p.space, found, one, budget, scores=p.scores, trials=9, finished=stored)
    rest = run(p, left)
    assert len(rest) == 4
    assert {proposal.candidate.runtime for proposal in rest} == {"steady"}


def test_baselines_of_a_runtime_leave_out_what_it_lacks() -> None:
    p = problem(units=2)
    found = {
        name: candidate
        for name, _, candidate in baselines(
            p.space, p.space.units, None, "hasty", lambda _, option: option != INT8, "-hasty"
        )
    }
    assert {"dense-hasty", "uniform-int4-hasty"} == set(found)
    assert all(candidate.runtime == "hasty" for candidate in found.values())
    assert found["uniform-int4-hasty"] == Candidate.of(
        dict.fromkeys(p.space.names, INT4), None, "hasty"
    )
