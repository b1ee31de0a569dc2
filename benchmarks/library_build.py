"""Building library items: time against a training pass, memory against the model.

Time: GPTQ to 4 bits of every layer of one block (attention and FFN), from its statistics, against
one forward and backward pass of the whole model over the calibration split; they alternate, in
processor time of one thread. Memory: a fresh worker process builds every option of the block's two
units; its peak, less what it held after its imports, against twice the model plus the block's
statistics.
"""

from __future__ import annotations

import pickle
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.setting import Setting, cpu_seconds, quickstart

BLOCK = 3
REPEATS = 5
MB = 1e6


def run(options: Any) -> dict[str, float]:
    """Both comparisons."""
    from autocomp.api.library import CALIBRATION_BATCH
    from autocomp.calibrate.stream import calibrate
    from autocomp.models.load import load_model

    with quickstart(library=False) as setting:
        task, path = setting.teacher.task, setting.teacher.path
        model = load_model(path, task.name, task.num_labels)
        units = [unit for unit in setting.plan.units if unit.layer == BLOCK]
        batches = list(task.batches("calibrate", CALIBRATION_BATCH))
        files: dict[str, Path] = {}
        for _, written in calibrate(model, units, batches, setting.scratch / "statistics"):
            files |= written
        gptq, passes = [], []
        for _ in range(REPEATS):
            gptq.append(_gptq(setting, units, files))
            passes.append(_training_pass(model, task, batches))
        peak, imports = _peak_bytes(setting, units, files)
        model_bytes = sum(p.nbytes for p in model.parameters())
        statistics_bytes = sum(file.stat().st_size for file in files.values())
    limit = 2 * model_bytes + statistics_bytes
    return {
        "gptq_block_s": statistics.median(gptq),
        "training_pass_s": statistics.median(passes),
        "time_ratio": statistics.median(a / b for a, b in zip(gptq, passes, strict=True)),
        "worker_peak_mb": peak / MB,
        "worker_imports_mb": imports / MB,
        "build_peak_mb": (peak - imports) / MB,
        "model_mb": model_bytes / MB,
        "statistics_mb": statistics_bytes / MB,
        "limit_mb": limit / MB,
        "memory_share_percent": 100 * (peak - imports) / limit,
    }


def _gptq(setting: Setting, units: list[Any], files: dict[str, Path]) -> float:
    from autocomp.calibrate.stats import load_stats
    from autocomp.core.candidate import Option, Step
    from autocomp.library.build import load_unit
    from autocomp.operators import apply_option

    option = Option((Step.of("gptq", weights=4, activations=8, group=32),))
    start = cpu_seconds()
    for unit in units:
        dense = load_unit(setting.teacher.path, unit)
        apply_option(unit, dense, option, load_stats(files[unit.name]))
    return cpu_seconds() - start


def _training_pass(model: Any, task: Any, batches: list[Any]) -> float:
    import torch

    start = cpu_seconds()
    for inputs in batches:
        torch.autograd.backward(task.loss(task.logits(model, inputs), inputs["labels"]))
    seconds = cpu_seconds() - start
    model.zero_grad(set_to_none=True)
    return seconds


def _peak_bytes(setting: Setting, units: list[Any], files: dict[str, Path]) -> tuple[float, float]:
    """Peak resident memory of a worker that builds the units, and what its imports take."""
    from autocomp.library.build import plan_build
    from autocomp.library.store import Library

    library = Library(setting.scratch / "library")
    options = {unit.name: setting.plan.options[unit.name] for unit in units}
    plan = plan_build(setting.teacher.path, units, options, files, "benchmark", library)
    tasks = setting.scratch / "tasks.pickle"
    tasks.write_bytes(pickle.dumps(plan.tasks))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.build_worker", str(tasks)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    peak, imports, _ = map(float, done.stdout.split())
    return peak, imports
