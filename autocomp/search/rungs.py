"""Rungs: trials are looked at as they train, and those that are worse than others there end early.

Asynchronous successive halving (Li et al., 2020, arXiv:1810.05934) over several objectives
(Schmucker et al., 2021, MO-ASHA, arXiv:2106.12639), in its stopping form: a trial that comes to a
rung goes on if it is among the best share of all that came there, itself included, and the first
always does. What is best: within the budget before what exceeds it; then by non-dominated rank;
within a rank by crowding distance (Deb et al., 2002), without which nearly every trial of three
objectives would stay, being dominated by none. Under a budget crowding has every second place of a
rank and quality the others: trials that fill the budget crowd each other, and would be stopped for
what is small, poor and alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from autocomp.core.budget import Budget
from autocomp.core.measurement import Measurement
from autocomp.front.dominance import crowding, non_dominated
from autocomp.front.pick import FIELDS, Objective
from autocomp.study.records import RungRecord


@dataclass(frozen=True)
class _Point:
    """What a trial is judged by at a rung; everything is better when lower."""

    excess: float
    costs: tuple[float, ...]


class Rungs:
    """Decides at each rung whether a trial goes on. Not thread-safe.

    Args:
        keep: share of the trials at a rung that go on.
        budget: absolute limits; costs are those predicted before the trial ran.
        objectives: what the front trades; quality is judged by the divergence from the teacher,
            which tells more of few examples than a metric does.
    """

    def __init__(self, keep: float, budget: Budget, objectives: Sequence[Objective]) -> None:
        self._keep, self._budget = keep, replace(budget, quality=None)
        self._fields = [FIELDS[name] for name in objectives if name != "quality"]
        self._seen: dict[int, dict[str, _Point]] = {}

    def survives(self, report: RungRecord) -> bool:
        """Take what was seen of a trial at a rung; whether it goes on.

        Asked again about the same trial and rung, it answers by what is known by then.
        """
        there = self._seen.setdefault(report.rung, {})
        there[report.id] = self._point(report)
        kept = max(1, math.floor(self._keep * len(there) + 1e-9))
        order = ranking(list(there.values()), by_quality=self._budget != Budget())
        return list(there).index(report.id) in order[:kept]

    def _point(self, report: RungRecord) -> _Point:
        divergence = report.teacher_kl
        if divergence is None or not math.isfinite(divergence):
            return _Point(math.inf, (math.inf,) * (1 + len(self._fields)))
        cost = report.estimated or Measurement("estimated", None, None)
        known = {field: getattr(cost, field) for field in self._fields}
        costs = [math.inf if value is None else value for value in known.values()]
        return _Point(max([0.0, *self._budget.excess(cost).values()]), (divergence, *costs))


def ranking(points: Sequence[_Point], *, by_quality: bool) -> list[int]:
    """Positions, best first; among equals the earlier.

    Args:
        by_quality: whether every second place within a rank, from the first, goes to the lowest
            divergence.
    """
    ranks = _ranks([point.costs for point in points])
    tiers: dict[tuple[float, int], list[int]] = {}
    for index, point in enumerate(points):
        tiers.setdefault((point.excess, ranks[index]), []).append(index)
    order: list[int] = []
    for _, members in sorted(tiers.items()):
        distances = crowding([points[index].costs for index in members])
        apart = [index for _, index in sorted(zip([-d for d in distances], members, strict=True))]
        best = sorted(members, key=lambda index: (points[index].costs[0], index))
        order += _alternating(best, apart) if by_quality else apart
    return order


def _alternating(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Of two orders of the same, one of each in turn, none twice."""
    return list(dict.fromkeys(chain.from_iterable(zip(first, second, strict=True))))


def _ranks(costs: Sequence[tuple[float, ...]]) -> list[int]:
    """0 for what nothing dominates, 1 for what only those dominate …; infinite costs come last."""
    ranks = [0] * len(costs)
    left = list(range(len(costs)))
    rank = 0
    while left:
        flags = non_dominated([costs[index] for index in left], ["min"] * len(costs[0]))
        best = [index for index, flag in zip(left, flags, strict=True) if flag] or left
        for index in best:
            ranks[index] = rank
        left = [index for index in left if index not in best]
        rank += 1
    return ranks
