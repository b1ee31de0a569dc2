"""`profile`: measure the target of a spec, without searching: what each option costs there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.api.plan import make_plan
from autocomp.study.directory import Study

if TYPE_CHECKING:
    from autocomp.report.progress import SearchProgress


def profile(
    path: Path | str,
    *,
    overrides: Mapping[str, Any] | None = None,
    progress: SearchProgress | None = None,
) -> dict[str, Any]:
    """The cost table of a spec's space on its target.

    Needs no library: latencies depend on shapes and precision, not on the weights' values. A model
    whose teacher is yet to be fitted is measured with a fresh head.

    Returns:
        `target`, `estimated` (cost of `dense` and `smallest`; `error`, the mean relative error of
        predicted latencies), and `units`: unit → option → isolated latency and size.

    Raises:
        UserError: for anything wrong in the spec, model or data.
    """
    from autocomp.api import prepare
    from autocomp.api.predictor import TablePredictor
    from autocomp.core.candidate import Option
    from autocomp.report.progress import Silent
    from autocomp.targets import make_target

    progress = progress or Silent()
    plan = make_plan(path, overrides)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="autocomp-profile-")))
        study = Study.create_or_open(scratch / "profile", plan.spec)
        teacher = prepare.untrained_teacher(plan, scratch)
        progress.phase("cost table")
        context = prepare.prepare_context(plan, study, teacher)
        table = prepare.prepare_cost_table(plan, study, context, progress)
    predictor = TablePredictor(table)
    dense = (
        predictor.predict({unit.name: Option() for unit in plan.units})
        if all(Option() in plan.options[unit.name] for unit in plan.units)
        else None
    )
    units: dict[str, dict[str, dict[str, float]]] = {}
    for unit in plan.units:
        units[unit.name] = {
            option.label(): {
                "latency_ms": round(table.entry(unit.name, option.key).latency_ms, 4),
                "size_bytes": table.entry(unit.name, option.key).size_bytes,
            }
            for option in plan.options[unit.name]
        }
    return {
        "target": make_target(plan.spec.target).describe(),
        "estimated": {
            "error": table.error(),
            "dense": None if dense is None else _costs(dense.latency_ms, dense.size_bytes),
            "smallest": _costs(
                predictor.base_latency_ms
                + sum(
                    min(predictor.latency_ms(u.name, o) for o in plan.options[u.name])
                    for u in plan.units
                ),
                predictor.base_size_bytes
                + sum(
                    min(predictor.size_bytes(u.name, o) for o in plan.options[u.name])
                    for u in plan.units
                ),
            ),
        },
        "units": units,
    }


def _costs(latency_ms: float | None, size_bytes: float | None) -> dict[str, float | None]:
    return {"latency_ms": latency_ms, "size_bytes": size_bytes}
