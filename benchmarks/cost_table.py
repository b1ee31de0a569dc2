"""Latency as the cost table predicts it, against latency measured, on candidates not in its fit.

The table is made as a search makes it: every distinct sublayer timed alone, corrected on a dozen
whole candidates. Then random whole candidates, of costs all over the range, are measured.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from benchmarks.setting import prepared

CANDIDATES = 24


def run(options: Any) -> dict[str, float]:
    """Errors over the candidates."""
    return measure("onnxruntime")


def measure(runtime: str, spec: str = "quickstart") -> dict[str, float]:
    """The same of any runtime, and of any space on the quickstart's model."""
    import onnx

    from autocomp.api.prepare import prepare_cost_table
    from autocomp.export.companions import Companions
    from autocomp.report.progress import Silent
    from autocomp.targets import make_target
    from autocomp.targets.profile import check_table

    overrides = {"target.runtime": runtime}
    with prepared(spec, library=False, overrides=overrides) as setting:
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
    return figures_of(accuracy, seconds, table)


def sum_bias(table: Any) -> float:
    """Mean of sum over measured − 1, signed: sublayers as they were timed alone, plainly added.

    Over the whole candidates that the table's correction is fitted to, without that correction.
    """
    plain = replace(table, pairs=[], correction=None)
    misses = [plain.predict(choice).latency_ms / ms - 1 for choice, ms in table.pairs]
    return sum(misses) / len(misses)


def figures_of(accuracy: Any, seconds: float, table: Any) -> dict[str, float]:
    """Figures of an `Accuracy`, of a table and of the seconds it took to make it."""
    measured = [pair[1] for pair in accuracy.pairs]
    return {
        "candidates": len(measured),
        "sum_bias_percent": 100 * sum_bias(table),
        "fastest_ms": min(measured),
        "slowest_ms": max(measured),
        "mean_error_percent": 100 * accuracy.mean_error,
        "worst_error_percent": 100 * accuracy.worst_error,
        "spearman": accuracy.spearman,
        "table_s": seconds,
    }
