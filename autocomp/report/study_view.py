"""The `front --json` mapping of a study, from its directory alone."""

from __future__ import annotations

from typing import Any

from autocomp.core.budget import Budget
from autocomp.front.view import front_json
from autocomp.study.directory import Study


def study_front(study: Study) -> dict[str, Any]:
    """The `front --json` mapping of a study, with what its spec says of the target.

    Before dense is measured, limits relative to it are left out.
    """
    dense = study.dense()
    target = study.spec.target
    limits = study.spec.budget.limits()
    if dense is None or dense.measured is None:
        budget = Budget(quality=limits.quality)
    else:
        budget = limits.resolve(dense.measured)
    workload = target.workload.model_dump(exclude_none=True)
    description = {"name": f"{target.runtime}-{target.device}", "workload": workload}
    objectives = list(study.spec.objectives)
    return front_json(str(study.paths.root), description, budget, study.trials(), objectives)
