"""Which of the trials that meet a budget is taken: the closest, and the simplest as good as it.

The trial of highest quality is the best of many noisy figures, so part of its lead is luck. It and
the trials whose difference to it has 0 in its paired 95% interval are the finalists, and among
these the metric says little more. Two things do:

- how far a model diverges from its teacher, which every example tells to many digits, where a
  metric says right or wrong. The *closest* is the finalist of least divergence. In what the budget
  does not limit it costs no more than the best, to 5%, which measuring again may say too;
- simplicity. In place of the closest another one is taken that does fewer distinct things (the
  options of its units, told apart as they are printed, without those that leave a unit dense), if
  its quality is lower by no more than one standard error of their paired difference (Breiman et
  al., 1984), whose 95% interval holds 0, and by no more than half a percent: on few examples a
  standard error is a lot; if it diverges no further, to a tenth; and if it costs no more, to 5%.

Of those the one with the fewest distinct options is taken, then the closest. Where there are no
per-example scores it is the best, as it is when that is asked for.

A floor on quality turns the question round: what is the least that it can be had for? Then the
trial that meets every limit at the lowest of one cost is taken, whatever is closer to the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate
from autocomp.core.quantities import Dimension
from autocomp.front.noise import Noise
from autocomp.front.pick import FIELDS, divergence, feasible, objective, pick, preference
from autocomp.study.records import TrialRecord

STANDARD_ERRORS = 1.0
LARGEST_DROP = 0.005
"""Of the closest's quality."""
COST_TOLERANCE = 0.05
KL_TOLERANCE = 0.1


@dataclass(frozen=True)
class Choice:
    """The trial taken under a budget, and what it was chosen among.

    Attributes:
        record: the trial taken.
        best: the feasible trial of highest quality.
        closest: the finalist that diverges least from the teacher.
        finalists: the best, then in order of quality the feasible trials that the examples do not
            tell apart from it: the 95% interval of the difference holds 0.
        least: the cost that the trial taken is the lowest in, where that was asked for.
        fitting: how many trials meet the budget.
    """

    record: TrialRecord
    best: TrialRecord
    closest: TrialRecord
    finalists: tuple[TrialRecord, ...]
    noise: Noise = field(repr=False)
    fitting: int
    least: Dimension | None = None

    def to_json(self) -> dict[str, Any] | None:
        """`chosen`, `best`, `closest`, `least`, `fitting`, `examples` (how many), `finalists`.

        A finalist has `id`, `quality` and its interval, `difference` and `ratio` to the best with
        theirs (null for the best), `teacher_kl`, `distinct_options`. `None` without per-example
        scores.
        """
        examples = self.noise.examples(self.best.id)
        if examples is None:
            return None
        return {
            "chosen": self.record.id,
            "best": self.best.id,
            "closest": self.closest.id,
            "least": self.least,
            "fitting": self.fitting,
            "examples": examples,
            "finalists": [self._finalist(record) for record in self.finalists],
        }

    def _finalist(self, record: TrialRecord) -> dict[str, Any]:
        noise, row = self.noise, {"id": record.id, "quality": record.quality}
        row.update(bounds("quality", noise.quality(record.id)))
        for name, figure in (("difference", noise.difference), ("ratio", noise.ratio)):
            found = None if record is self.best else figure(record.id, self.best.id)
            row[name] = None if found is None else found.value
            row.update(bounds(name, found))
        row["teacher_kl"] = divergence(record)
        return {**row, "distinct_options": distinct_options(record.candidate)}


def bounds(name: str, found: Any) -> dict[str, float | None]:
    """`{"quality_low": …, "quality_high": …}` of an interval, null where there is none."""
    low, high = (None, None) if found is None else (found.low, found.high)
    return {f"{name}_low": low, f"{name}_high": high}


def distinct_options(candidate: Candidate) -> int:
    """How many different things are done to the units of a model; leaving one dense is none."""
    return len({option.key for _, option in candidate if not option.dense})


def choose(
    records: Sequence[TrialRecord],
    budget: Budget,
    noise: Noise | None = None,
    *,
    plain: bool = False,
    least: Dimension | None = None,
) -> Choice:
    """Choose among the trials that meet an absolute budget.

    Args:
        noise: of their qualities on the search split.
        plain: take the best, whatever is as good and closer or simpler.
        least: take the lowest in this cost.

    Raises:
        NothingFitsError: as `pick`.
    """
    noise = noise or Noise()
    best = pick(records, budget)
    fitting = [record for record in records if feasible(record, budget)]
    finalists = [
        record for record in fitting if record is not best and _as_good(record, best, noise)
    ]
    finalists = [best, *sorted(finalists, key=preference)]
    closest = min(
        (each for each in finalists if each is best or _costs_no_more(each, best, budget)),
        key=lambda record: (_distance(record), *preference(record)),
    )
    taken = best
    if least is not None:
        cost = least
        taken = min(fitting, key=lambda record: (objective(record, cost), *preference(record)))
    elif not plain:
        simpler = [record for record in finalists if _stands_in(record, closest, noise)]
        taken = min([closest, *simpler], key=_simplicity)
    return Choice(taken, best, closest, tuple(finalists), noise, len(fitting), least)


def _simplicity(record: TrialRecord) -> tuple[Any, ...]:
    return (distinct_options(record.candidate), _distance(record), *preference(record))


def _distance(record: TrialRecord) -> float:
    """The divergence from the teacher, infinite where it is not known."""
    kl = divergence(record)
    return math.inf if kl is None else kl


def _as_good(record: TrialRecord, best: TrialRecord, noise: Noise) -> bool:
    difference = noise.difference(record.id, best.id)
    return difference is not None and difference.holds(0.0)


def _stands_in(record: TrialRecord, closest: TrialRecord, noise: Noise) -> bool:
    """Whether a finalist may be taken in place of the closest."""
    difference = noise.difference(record.id, closest.id)
    options = distinct_options(closest.candidate)
    if difference is None or distinct_options(record.candidate) >= options:
        return False
    drop = min(STANDARD_ERRORS * difference.standard_error, LARGEST_DROP * (closest.quality or 0.0))
    return (
        difference.holds(0.0)
        and -difference.value <= drop + 1e-12
        and _distance(record) <= (1 + KL_TOLERANCE) * _distance(closest)
        and _costs_no_more(record, closest, Budget())
    )


def _costs_no_more(record: TrialRecord, other: TrialRecord, budget: Budget) -> bool:
    """In what the budget does not limit."""
    for name, field_name in FIELDS.items():
        its, reference = objective(record, name), objective(other, name)
        free = getattr(budget, field_name) is not None
        if free or reference is None:
            continue
        if its is None or its > (1 + COST_TOLERANCE) * reference:
            return False
    return True


def qualities(records: Sequence[TrialRecord]) -> Mapping[str, float]:
    """Trial → quality on the search split, of those that are complete and have one."""
    found = {r.id: objective(r, "quality") for r in records if r.state == "complete"}
    return {trial: quality for trial, quality in found.items() if quality is not None}
