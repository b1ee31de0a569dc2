"""`profile`: measure the target of a spec, without searching: what each option costs there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.api.plan import Plan, make_plan
from autocomp.core.candidate import Runtime
from autocomp.study.directory import Study

if TYPE_CHECKING:
    from autocomp.report.progress import SearchProgress
    from autocomp.targets.cost_table import CostTable


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
        predicted latencies), and `units`: unit → option → isolated latency and size. Where the spec
        leaves a choice of runtimes this for each of them, under `runtimes`.

    Raises:
        UserError: for anything wrong in the spec, model or data.
    """
    from autocomp.api import prepare
    from autocomp.report.progress import Silent

    progress = progress or Silent()
    plan = make_plan(path, overrides)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="autocomp-profile-")))
        study = Study.create_or_open(scratch / "profile", plan.spec)
        teacher = prepare.untrained_teacher(plan, scratch)
        progress.phase("cost table")
        context = prepare.prepare_context(plan, study, teacher)
        tables = {
            runtime: prepare.prepare_cost_table(plan, study, context, progress, runtime)
            for runtime in plan.runtimes
        }
    reports = {runtime: _report(plan, runtime, table) for runtime, table in tables.items()}
    if not plan.spec.target.chosen:
        return reports[None]
    return {"runtimes": {str(runtime): each for runtime, each in reports.items()}}


def _report(plan: Plan, runtime: Runtime, table: CostTable) -> dict[str, Any]:
    """What the table of one runtime says."""
    from autocomp.api.predictor import TablePredictor
    from autocomp.core.candidate import Option
    from autocomp.targets import make_target

    predictor = TablePredictor(table)
    offered = {
        unit.name: [o for o in plan.options[unit.name] if plan.possible(runtime, unit.name, o)]
        for unit in plan.units
    }
    dense = (
        predictor.predict({name: Option() for name in offered})
        if all(Option() in options for options in offered.values())
        else None
    )
    units: dict[str, dict[str, dict[str, float]]] = {}
    for name, options in offered.items():
        units[name] = {
            option.label(): {
                "latency_ms": round(table.entry(name, option.key).latency_ms, 4),
                "size_bytes": table.entry(name, option.key).size_bytes,
            }
            for option in options
        }
    return {
        "target": make_target(plan.spec.target.on(runtime)).describe(),
        "estimated": {
            "error": table.error(),
            "dense": None if dense is None else _costs(dense.latency_ms, dense.size_bytes),
            "smallest": _costs(
                predictor.predict(
                    {
                        name: min(options, key=partial(predictor.latency_ms, name))
                        for name, options in offered.items()
                    }
                ).latency_ms,
                predictor.base_size_bytes
                + sum(
                    min(predictor.size_bytes(name, option) for option in options)
                    for name, options in offered.items()
                ),
            ),
        },
        "units": units,
    }


def _costs(latency_ms: float | None, size_bytes: float | None) -> dict[str, float | None]:
    return {"latency_ms": latency_ms, "size_bytes": size_bytes}
