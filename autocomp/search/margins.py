"""How much of a limit is left unused, since what was measured was more than predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autocomp.core.budget import Budget
from autocomp.front.pick import rankable
from autocomp.search.costs import Costs
from autocomp.study.records import TrialRecord

_LARGEST = 0.4


def margins(
    costs: Costs, records: Sequence[TrialRecord], budget: Budget, least: float
) -> dict[str, float]:
    """Metric → share of its limit to leave unused.

    The least, or by what the worst of the search's trials that missed the limit exceeded its
    prediction; at most two fifths.

    Args:
        records: of one runtime, that of `costs`.
        budget: absolute limits.
    """
    missed = [
        (record.measured, costs.space.encode(record.candidate))
        for record in records
        if record.kind == "search"
        and record.candidate in costs.space
        and rankable(record)
        and record.measured is not None
    ]
    found: dict[str, float] = {}
    for metric in costs.limits(budget):
        ratios = [
            getattr(measured, metric) / max(costs.total(metric, vector), 1e-12)
            for measured, vector in missed
            if budget.excess(measured).get(metric, 0.0) > 0
        ]
        worst = max([1.0, *(ratio for ratio in ratios if math.isfinite(ratio))])
        found[metric] = min(1.0 - (1.0 - least) / worst, _LARGEST)
    return found
