"""Two studies of one task side by side: whose front encloses more, and what it covers of the other.

Each is normalised by its own dense model, measured in the same study, so that a machine that was
busier on one day cancels out.
"""

from __future__ import annotations

from typing import Any

from autocomp.core.errors import UserError
from autocomp.front.pick import Objective, front, objective, senses
from autocomp.front.view import study_hypervolume
from autocomp.study.directory import Study


def compare(study: Study, other: Study) -> dict[str, Any]:
    """Hypervolume of both, their ratio, and coverage both ways (Zitzler & Thiele, 1999).

    `covers` is the share of the other front's trials that some trial of this front equals or beats
    in every objective; `covered` the reverse. Figures are null until dense is measured.

    Raises:
        UserError: if the two are not about one task and the same objectives.
    """
    here, there = study.spec, other.spec
    if here.task != there.task or here.model != there.model:
        raise UserError(
            f"{other.paths.root} is of another model or task than {study.paths.root}: their "
            f"fronts cannot be compared. Compare studies whose specs agree in model and task"
        )
    if here.objectives != there.objectives:
        raise UserError(
            f"{study.paths.root} trades {', '.join(here.objectives)}, {other.paths.root} "
            f"{', '.join(there.objectives)}: give both the same objectives"
        )
    objectives: list[Objective] = list(here.objectives)
    volumes = [study_hypervolume(s.trials(), s.dense(), objectives) for s in (study, other)]
    mine, theirs = (_losses(s, objectives) for s in (study, other))
    return {
        "study": str(other.paths.root),
        "hypervolume": volumes[1],
        "ratio": volumes[0] / volumes[1] if volumes[0] is not None and volumes[1] else None,
        "covers": _coverage(mine, theirs),
        "covered": _coverage(theirs, mine),
    }


def _losses(study: Study, objectives: list[Objective]) -> list[list[float]]:
    """The front's trials relative to dense, everything to be minimised."""
    dense = study.dense()
    if dense is None:
        return []
    scales = [1.0 if n == "quality" else objective(dense, n) or 1.0 for n in objectives]
    signs = [-1.0 if sense == "max" else 1.0 for sense in senses(objectives)]
    return [
        [
            sign * (objective(record, name) or 0.0) / scale
            for name, scale, sign in zip(objectives, scales, signs, strict=True)
        ]
        for record in front(study.trials(), objectives)
    ]


def _coverage(one: list[list[float]], other: list[list[float]]) -> float | None:
    if not one or not other:
        return None
    covered = [
        any(all(a <= b for a, b in zip(mine, theirs, strict=True)) for mine in one)
        for theirs in other
    ]
    return sum(covered) / len(covered)
