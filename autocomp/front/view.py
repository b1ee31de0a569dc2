"""The front as JSON: the machine-readable shape of `autocomp front --json`, stable.

Hypervolume convention: quality is taken as it is, costs are divided by the dense model's, and the
reference point is (quality 0, latency 1.0, size 1.0, peak memory 1.0). A model no cheaper than
dense adds nothing; a perfect, free model would reach 1.0 for a quality in [0, 1]. So the figure
can be compared among studies of one task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autocomp.core.budget import Budget
from autocomp.core.measurement import Measurement, latency_clock
from autocomp.front.choice import bounds, choose, distinct_options, qualities
from autocomp.front.dominance import hypervolume
from autocomp.front.noise import Interval, Noise
from autocomp.front.pick import (
    OBJECTIVES,
    NothingFitsError,
    Objective,
    absolute,
    feasible,
    front,
    objective,
    rankable,
    senses,
)
from autocomp.study.directory import Study
from autocomp.study.per_example import scores_of
from autocomp.study.records import DENSE, TrialRecord, dense_reference


def study_hypervolume(
    records: Sequence[TrialRecord],
    dense: TrialRecord | None,
    objectives: Sequence[Objective] = OBJECTIVES,
) -> float | None:
    """Hypervolume of all trials that rank, normalised by dense; `None` until dense is measured."""
    if dense is None or not rankable(dense, objectives):
        return None
    scales = [1.0 if name == "quality" else objective(dense, name) or 1.0 for name in objectives]
    points = [
        [(objective(record, name) or 0.0) / s for name, s in zip(objectives, scales, strict=True)]
        for record in records
        if rankable(record, objectives)
    ]
    reference = [0.0 if name == "quality" else 1.0 for name in objectives]
    return hypervolume(points, reference, senses(objectives))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _costs(cost: Measurement | None) -> dict[str, float | None]:
    return {
        name: None if cost is None else _finite(getattr(cost, name))
        for name in ("latency_ms", "size_bytes", "peak_memory_bytes")
    }


def _metric(record: TrialRecord) -> dict[str, Any]:
    """The metric's own name and value; empty unless it is a finite number."""
    value = record.metric.get("value")
    finite = isinstance(value, int | float) and math.isfinite(value)
    return dict(record.metric) if finite else {}


def trial_json(
    record: TrialRecord,
    budget: Budget,
    on_front: bool,
    target: Mapping[str, Any],
    interval: Interval | None = None,
) -> dict[str, Any]:
    """One trial in the stable shape. Costs are measured ones or null; estimates stay apart.

    `interval` is that of its quality, where per-example scores are there to tell.

    `target` is the description of the front's target. Its `runtime` is that of a study without a
    choice; its workload says which clock `latency_ms` is counted on (`latency_clock`).
    """
    measured = record.measured if objective(record, "latency") is not None else None
    threads = (target.get("workload") or {}).get("threads")
    return {
        "id": record.id,
        "kind": record.kind,
        "runtime": record.candidate.runtime or target.get("runtime"),
        "proposed_by": record.proposed_by,
        "state": record.state,
        "on_front": on_front,
        "feasible": feasible(record, budget),
        "quality": _finite(record.quality),
        "metric": _metric(record),
        "teacher_kl": _finite(record.teacher_kl),
        **_costs(measured),
        "latency_clock": None if measured is None or threads is None else latency_clock(threads),
        "latency_wall_ms": None if measured is None else _finite(measured.latency_wall_ms),
        "measured": measured is not None,
        "estimated": _costs(record.estimated),
        "candidate": record.candidate.to_json(),
        **bounds("quality", interval),
        "distinct_options": distinct_options(record.candidate),
        "undone": record.undone,
    }


def front_json(
    study: str,
    target: Mapping[str, Any],
    budget: Budget,
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective] = OBJECTIVES,
    reports: Mapping[str, Mapping[str, Any]] | None = None,
    noise: Noise | None = None,
    report_noise: Noise | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole study, JSON-ready: no NaN, no infinity.

    While nothing measured meets the budget, `chosen` is null and `nearest` names the trial that
    misses it least, with the limit that binds (a key of `budget`). `selection` says what was chosen
    among and with which intervals (`Choice.to_json`).

    Args:
        study: name or path of the study.
        target: the target's description; `runtime` in it is the one of a study without a choice.
        budget: absolute limits.
        records: every finished trial, in the ledger's order.
        objectives: what the front is drawn over.
        reports: trial id → what the report split said of it, as in the ledger.
        noise, report_noise: of the qualities on the search split and on the report split.
        about: what tells this front from those of other studies: `model`, `task`, `spec_key`,
            `devices`.
    """
    noise = noise or Noise()
    dense = dense_reference(records)
    on_front = {record.id for record in front(records, objectives)}
    chosen = nearest = selection = None
    try:
        choice = choose(records, budget, noise)
        chosen, selection = choice.record.id, choice.to_json()
    except NothingFitsError as error:
        if error.nearest is not None:
            nearest = {"id": error.nearest.id, "binding": error.binding}
    return {
        "study": study,
        **(about or {}),
        "target": dict(target),
        "budget": budget.to_json(),
        "dense": None if dense is None else dense.id,
        "chosen": chosen,
        "nearest": nearest,
        "hypervolume": study_hypervolume(records, dense, objectives),
        "report": None if chosen is None else report_json(chosen, reports or {}, report_noise),
        "trials": [
            trial_json(record, budget, record.id in on_front, target, noise.quality(record.id))
            for record in records
        ],
        "selection": selection,
    }


def report_json(
    id: str, reports: Mapping[str, Mapping[str, Any]], noise: Noise | None = None
) -> dict[str, Any] | None:
    """A trial on the report split, beside the teacher; `None` if the split was not opened for it.

    `ratio` is quality over the teacher's, with the 95% interval of the pair (the teacher is dense,
    as exported) where there are per-example scores; `metric` the task's own figure (a perplexity),
    `candidates` what `candidates_reported` counts.
    """
    report = reports.get(id)
    if report is None:
        return None
    quality, teacher = _finite(report["quality"]), _finite(report["teacher_quality"])
    return {
        "id": id,
        "quality": quality,
        "teacher_quality": teacher,
        "ratio": quality / teacher if quality is not None and teacher else None,
        "metric": dict(report.get("metric") or {}),
        "teacher_metric": dict(report.get("teacher_metric") or {}),
        "candidates": candidates_reported(reports),
        **report_bounds(id, noise),
    }


def report_bounds(id: str, noise: Noise | None) -> dict[str, Any]:
    """`ratio_low`, `ratio_high` and how many `examples`; null without per-example scores."""
    ratio = None if noise is None else noise.ratio(id, DENSE)
    examples = None if noise is None or ratio is None else noise.examples(id)
    return {**bounds("ratio", ratio), "examples": examples}


def noise_on_search(study: Study, records: Sequence[TrialRecord]) -> Noise:
    """Of the qualities of trials on the search split."""
    known = qualities(records)
    return Noise.of(known, scores_of(study.paths, known, "search"))


def noise_on_report(study: Study, reports: Mapping[str, Mapping[str, Any]]) -> Noise:
    """Of the qualities on the report split, of what it was opened for."""
    found = {trial: _finite(report["quality"]) for trial, report in reports.items()}
    known = {trial: quality for trial, quality in found.items() if quality is not None}
    return Noise.of(known, scores_of(study.paths, known, "report"))


def candidates_reported(reports: Iterable[str]) -> int:
    """How many candidates were looked at on the report split: dense is none.

    An entry that a fork took over ends with the name of its study, `3f2a91c0b7@quickstart-5e0d`.
    """
    return len({key.partition("@")[0] for key in reports} - {DENSE})


def study_budget(study: Study) -> Budget:
    """The study's budget, absolute; until dense is measured, without the limits relative to it."""
    dense = study.dense()
    limits = study.spec.budget.limits()
    if dense is None or dense.measured is None:
        floor = limits.quality
        return Budget(quality=None if floor is None or floor.relative else floor.value)
    return absolute(limits, dense)


def study_target(study: Study) -> dict[str, Any]:
    """What a study's spec says of its target: name, workload, runtime unless there is a choice."""
    target = study.spec.target
    workload = target.workload.model_dump(exclude_none=True)
    description: dict[str, Any] = {"name": target.label, "workload": workload}
    return description if target.chosen else {**description, "runtime": target.runtime}


def study_front(study: Study) -> dict[str, Any]:
    """The `front --json` mapping of a study, with what its spec says of the target."""
    records, reports = study.trials(), study.ledger.read().of("report")
    return front_json(
        str(study.paths.root),
        study_target(study),
        study_budget(study),
        records,
        list(study.spec.objectives),
        reports,
        noise_on_search(study, records),
        noise_on_report(study, reports),
        {
            "model": study.spec.model.source,
            "task": study.spec.task.name,
            "spec_key": study.spec.key,
            "devices": study.devices,
        },
    )
