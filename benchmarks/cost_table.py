"""Latency as the cost table predicts it, against latency measured, on candidates not in its fit.

The table is made as a search makes it: every distinct sublayer timed alone, corrected on a dozen
whole candidates. Then random whole candidates, of costs all over the range, are measured.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from benchmarks.setting import quickstart

CANDIDATES = 24


def run(options: Any) -> dict[str, float]:
    """Errors over the candidates."""
    return measure("onnxruntime")


def measure(runtime: str) -> dict[str, float]:
    """The same of any runtime."""
    import onnx

    from autocomp.api.prepare import prepare_cost_table
    from autocomp.export.companions import Companions
    from autocomp.report.progress import Silent
    from autocomp.targets import make_target
    from autocomp.targets.profile import check_table

    with quickstart(library=False, overrides={"target.runtime": runtime}) as setting:
        plan, context = setting.plan, setting.context
        target: Any = make_target(plan.spec.target, context.gate)
        reference = asdict(target.record_reference())  # one unit of time for table and candidates
        context = replace(context, references={None: reference})
        start = time.perf_counter()
        table = prepare_cost_table(plan, setting.study, context, Silent())
        seconds = time.perf_counter() - start
        accuracy = check_table(
            table,
            target,
            onnx.load(context.skeleton_path),
            plan.units,
            plan.formats,
            Companions(setting.study.paths.companions).inputs,
            candidates=CANDIDATES,
        )
    return figures_of(accuracy, seconds)


def figures_of(accuracy: Any, seconds: float) -> dict[str, float]:
    """Figures of an `Accuracy` and of the seconds it took to make the table."""
    measured = [pair[1] for pair in accuracy.pairs]
    return {
        "candidates": len(measured),
        "fastest_ms": min(measured),
        "slowest_ms": max(measured),
        "mean_error_percent": 100 * accuracy.mean_error,
        "worst_error_percent": 100 * accuracy.worst_error,
        "spearman": accuracy.spearman,
        "table_s": seconds,
    }
