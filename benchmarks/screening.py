"""Screening a stitched candidate, against compressing it from scratch and evaluating it.

From scratch is what a system does that compresses per trial: statistics of the whole model on the
calibration split, the candidate's operators on every unit, the model put together, one forward
pass over the screening examples and the divergence from the teacher. Stitched is one call of the
product's `Screener`: stitch, the same forward pass, the same divergence. Both sides start with
model, data and teacher's logits in memory, and alternate; times are processor time of one thread.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.setting import Setting, cpu_seconds, quickstart

CANDIDATES = 9


def run(options: Any) -> dict[str, float]:
    """Medians over random candidates of the quickstart's space."""
    import numpy as np

    from autocomp.trial.screener import Screener

    with quickstart() as setting:
        screener = Screener(setting.context)
        space = setting.plan.space
        rng = np.random.default_rng(0)
        candidates = [space.decode(space.random(rng)) for _ in range(CANDIDATES)]
        rows = []
        for candidate in candidates:
            start = cpu_seconds()
            screener.divergence(candidate)
            first = cpu_seconds() - start
            parts = _from_scratch(setting, screener, candidate)
            start = cpu_seconds()
            found = screener.divergence(candidate)
            stitched = cpu_seconds() - start
            expected = parts.pop("kl")
            if abs(found - expected) > 0.02 * max(abs(expected), 0.01):
                raise RuntimeError(f"the two sides disagree: {found} and {expected} nats")
            rows.append({**parts, "first": first, "stitched": stitched})
        scores = _scores(setting, screener)
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    whole = [row["calibrate"] + row["compress"] + row["evaluate"] for row in rows]
    return {
        "from_scratch_calibrate_s": median["calibrate"],
        "from_scratch_compress_s": median["compress"],
        "from_scratch_evaluate_s": median["evaluate"],
        "from_scratch_s": statistics.median(whole),
        "stitched_s": median["stitched"],
        "stitched_first_read_s": median["first"],
        "ratio": statistics.median(
            total / row["stitched"] for total, row in zip(whole, rows, strict=True)
        ),
        "ratio_first_read": statistics.median(
            total / row["first"] for total, row in zip(whole, rows, strict=True)
        ),
        "replace_one_score_s": scores,
    }


def _from_scratch(setting: Setting, screener: Any, candidate: Any) -> dict[str, float]:
    import torch

    from autocomp.api.library import CALIBRATION_BATCH
    from autocomp.calibrate.stats import load_stats
    from autocomp.calibrate.stream import calibrate
    from autocomp.library.build import load_unit
    from autocomp.models.surgery import copy_for_surgery, install
    from autocomp.operators import apply_option
    from autocomp.tasks.divergence import teacher_kl

    units = setting.plan.units
    seconds = {}
    with TemporaryDirectory(dir=setting.scratch) as directory:
        start = cpu_seconds()
        batches = list(setting.teacher.task.batches("calibrate", CALIBRATION_BATCH))
        files: dict[str, Path] = {}
        for _, written in calibrate(screener.teacher, units, batches, Path(directory)):
            files |= written
        seconds["calibrate"] = cpu_seconds() - start
        start = cpu_seconds()
        model = copy_for_surgery(screener.teacher)
        for unit in units:
            option = candidate[unit.name]
            if not option.dense:
                stats = load_stats(files[unit.name]) if unit.name in files else {}
                dense = load_unit(setting.teacher.path, unit)
                install(model, unit, apply_option(unit, dense, option, stats))
        seconds["compress"] = cpu_seconds() - start
    start = cpu_seconds()
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, reference in zip(
            screener.examples.prefixes.batches, screener.examples.reference, strict=True
        ):
            value = teacher_kl(reference, screener.task.logits(model, inputs))
            total += float(value) * len(reference)
            count += len(reference)
    seconds["evaluate"] = cpu_seconds() - start
    return {**seconds, "kl": total / count}


def _scores(setting: Setting, screener: Any) -> float:
    """A replace-one score, mean over every fourth call of a search."""
    from autocomp.api.screening import SCORED_PER_CALL
    from autocomp.search.scores import replace_one

    wanted = [candidate.to_json() for _, _, candidate in replace_one(setting.plan.space)]
    calls = [wanted[at : at + SCORED_PER_CALL] for at in range(0, len(wanted), SCORED_PER_CALL)]
    start = cpu_seconds()
    for call in calls[::4]:
        screener.evaluate(call)
    return (cpu_seconds() - start) / sum(len(call) for call in calls[::4])
