"""Rungs: who goes on, against what the definition says of every point."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Distillation, Option
from autocomp.core.measurement import Measurement
from autocomp.front.pick import OBJECTIVES
from autocomp.search.rungs import Rungs, _Point, ranking
from autocomp.study.records import RungRecord


def seen(
    name: str, kl: float | None, latency_ms: float = 1.0, size_bytes: int = 100, rung: int = 0
) -> RungRecord:
    candidate = Candidate.of({"layers.0.ffn": Option()}, Distillation(tokens=1000))
    cost = Measurement("estimated", latency_ms, size_bytes)
    return RungRecord(name, "search", "milp", candidate, cost, rung, 250, 0.5, kl)


def new(keep: float = 0.5, budget: Budget | None = None) -> Rungs:
    return Rungs(keep, budget or Budget(latency_ms=2.0, size_bytes=200), OBJECTIVES)


def test_the_first_goes_on_and_then_the_better_half() -> None:
    rungs = new()
    kls = [0.5, 0.6, 0.4, 0.45, 0.9, 0.3]
    found = [rungs.survives(seen(str(index), kl)) for index, kl in enumerate(kls)]
    # kept of n: 1 1 1 2 2 3
    assert found == [True, False, True, True, False, True]


def test_rungs_are_judged_apart() -> None:
    rungs = new()
    assert rungs.survives(seen("a", 0.1))
    assert not rungs.survives(seen("b", 0.2))
    assert rungs.survives(seen("b", 0.2, rung=1))


def test_within_the_budget_comes_before_any_quality() -> None:
    rungs = new()
    assert rungs.survives(seen("over", 0.01, latency_ms=2.1))
    assert rungs.survives(seen("within", 0.9))
    assert not rungs.survives(seen("far over", 0.001, size_bytes=900))


def test_a_floor_on_quality_is_no_matter_of_costs() -> None:
    rungs = new(budget=Budget(quality=0.99))
    assert rungs.survives(seen("a", 0.2))
    assert rungs.survives(seen("b", 0.1))


@pytest.mark.parametrize("kl", [None, math.nan, math.inf])
def test_what_is_no_number_never_goes_on_before_one(kl: float | None) -> None:
    rungs = new()
    assert rungs.survives(seen("a", 5.0))
    assert not rungs.survives(seen("b", kl))
    assert rungs.survives(seen("c", 4.0))


def test_an_unknown_cost_is_over_every_limit() -> None:
    rungs = new()
    assert rungs.survives(seen("a", 5.0))
    unknown = replace(seen("b", 0.1), estimated=None)
    assert not rungs.survives(unknown)


def test_asking_again_gives_the_same_answer_and_counts_once() -> None:
    rungs = new()
    answers = [rungs.survives(seen("a", 0.3)), rungs.survives(seen("b", 0.4))]
    again = [rungs.survives(seen("a", 0.3)), rungs.survives(seen("b", 0.4))]
    assert answers == again == [True, False]


def test_who_is_dominated_by_fewer_fronts_goes_first() -> None:
    """Every order of arrival: the last to come stays if less than half of all are ranked before.

    The ranks are those of the definition: the longest chain of points that dominate each other.
    """
    rng = np.random.default_rng(0)
    for _ in range(30):
        points = rng.integers(1, 5, size=(6, 2)) / 10
        rungs = new(budget=Budget())
        for index, (kl, latency) in enumerate(points):
            going_on = rungs.survives(seen(str(index), float(kl), float(latency)))
        chain = ranks(points)
        better = sum(rank < chain[-1] for rank in chain)
        equal = sum(rank == chain[-1] for rank in chain)
        if better >= 3:
            assert not going_on
        elif better + equal <= 3:
            assert going_on


def ranks(points: np.ndarray) -> list[int]:
    """Length of the longest chain of dominating points above each."""
    dominated = {
        (i, j)
        for i, j in product(range(len(points)), repeat=2)
        if (points[i] <= points[j]).all() and (points[i] < points[j]).any()
    }

    def rank(j: int) -> int:
        return max((1 + rank(i) for i, k in dominated if k == j), default=0)

    return [rank(index) for index in range(len(points))]


def test_the_ends_of_a_front_go_on_before_its_crowd() -> None:
    """All are non-dominated; the newcomer that is best in an objective is no crowd."""
    rungs = new(budget=Budget())
    for index, (kl, latency) in enumerate([(0.1, 5.0), (0.5, 1.0), (0.3, 3.0), (0.31, 2.9)]):
        rungs.survives(seen(f"{index}", kl, latency))
    assert rungs.survives(seen("end", 0.05, 6.0))
    assert not rungs.survives(seen("crowd", 0.305, 2.95))


def test_under_a_budget_the_best_do_not_stop_each_other() -> None:
    """Six of the same cost crowd each other; two of the ends are worse by far."""
    limits = Budget(latency_ms=6.0)
    ends = [("small", 2.0, 1.0), ("smaller", 2.5, 0.5), ("smallest", 3.0, 0.1)]
    crowd = [(f"crowd {n}", 0.3 - 0.01 * n, 5.0 + 0.01 * n) for n in range(5)]

    def going_on(budget: Budget) -> bool:
        rungs = new(budget=budget)
        for name, kl, latency in [*ends, ("best", 0.1, 5.9), *crowd[:3], crowd[4]]:
            rungs.survives(seen(name, kl, latency))
        return rungs.survives(seen("newcomer", 0.2, 5.2))

    assert going_on(limits)
    assert not going_on(Budget())


def test_a_rank_is_filled_by_quality_and_crowding_in_turn() -> None:
    kls, latencies = [0.5, 0.4, 0.3, 0.2, 0.1], [1.0, 2.0, 3.9, 4.0, 5.0]
    points = [_Point(0.0, pair) for pair in zip(kls, latencies, strict=True)]
    # the ends are apart from all; then the second, whose neighbours are farthest away
    assert ranking(points, by_quality=False) == [0, 4, 1, 2, 3]
    assert ranking(points, by_quality=True) == [4, 0, 3, 2, 1]
