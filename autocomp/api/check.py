"""`check`: what a spec asks for, and whether its budget is within reach, in seconds. No torch."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from autocomp.api.plan import Plan, make_plan
from autocomp.core.budget import RelativeBudget
from autocomp.core.candidate import Runtime
from autocomp.core.errors import UserError
from autocomp.core.quantities import format_bytes
from autocomp.models.sources import has_classification_head
from autocomp.targets import make_target
from autocomp.targets.protocol import Target
from autocomp.tasks.base import check_sequence


@dataclass(frozen=True)
class CheckReport:
    """What `autocomp check` prints; sizes are estimated from shapes, latency is not estimated.

    Attributes:
        model, task: what the spec names, resolved.
        target: the target; of several runtimes the first, which relative limits refer to.
        runtimes: of each runtime its target, how many options it can carry out and the smallest
            size it reaches.
        rules: pattern → how many units it holds for and how many options each has.
        units: name, kind, parameters and number of options of each unit.
        space_log10: size of the space without distillation settings.
        dense_size_bytes, smallest_size_bytes: estimated bytes on disk; dense on the first runtime,
            the smallest on any.
        budget: the limits, as written.
        size_limit_bytes: the limit on size, absolute.
        reachable: whether the budget may be met, as far as sizes tell; latency is measured later.
        problems: why it is not (the smallest value that is reached and what holds most of it), and
            what a search would refuse once it has read the model.
        notes: worth knowing, not wrong.
    """

    model: str
    task: str
    target: dict[str, Any]
    rules: list[dict[str, Any]]
    units: list[dict[str, Any]]
    space_log10: float
    dense_size_bytes: int
    smallest_size_bytes: int
    budget: dict[str, Any]
    size_limit_bytes: float | None
    reachable: bool = True
    runtimes: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return asdict(self)


def check(path: Path | str, overrides: Mapping[str, Any] | None = None) -> CheckReport:
    """Check a spec against its model, its data and the registries.

    Raises:
        SpecError, ModelError, DataError: for anything that keeps a search from starting.
    """
    return report(make_plan(path, overrides))


def report(plan: Plan) -> CheckReport:
    """The report of a plan."""
    spec = plan.spec
    targets = {runtime: make_target(spec.target.on(runtime)) for runtime in plan.runtimes}
    dense = plan.dense_bytes
    reached = {runtime: _smallest(plan, runtime, target) for runtime, target in targets.items()}
    shares = min(reached.values(), key=lambda each: sum(each.values()))
    smallest = plan.rest_bytes + sum(shares.values())
    limit = spec.budget.limits().size
    limit_bytes = None if limit is None else limit.resolve(dense)
    problems = _refused(plan)
    reachable = limit_bytes is None or smallest <= limit_bytes
    if limit_bytes is not None and not reachable:
        largest = max(shares, key=lambda name: shares[name])
        problems.append(
            f"No candidate meets size ≤ {format_bytes(limit_bytes)}: the smallest in this space is "
            f"{format_bytes(smallest)} ({largest} {format_bytes(shares[largest])} of it). "
            f"Allow fewer bits for {largest}, or raise budget.size"
        )
    notes = [*plan.notes, *_left_out(plan), *_without_effect(plan, limit_bytes)]
    if spec.budget.latency is not None:
        notes.append(
            "latency is measured, not guessed: autocomp profile SPEC tells what is reached"
        )
    if spec.budget.peak_memory is not None:
        notes.append(
            "peak memory is checked by measurement: a search predicts it from formats, corrects "
            "that by its trials, and counts what a process that loads and runs the artifact takes"
        )
    if plan.vocabulary is not None:
        notes.append(
            f"vocabulary: {len(plan.vocabulary.kept)} of {plan.vocabulary.size} tokens are kept"
        )
    unmatched = [unit.name for unit in plan.units if unit.name not in plan.rules]
    if unmatched:
        notes.append(f"no rule for {', '.join(unmatched)}: stays dense")
    return CheckReport(
        model=spec.model.source,
        task=f"{spec.task.name}: {plan.data.describe()}",
        target=targets[plan.runtimes[0]].describe(),
        runtimes=[
            {
                "runtime": target.name.removesuffix(f"-{spec.target.device}"),
                "options": sum(map(len, plan.formats_on(runtime).values())),
                "smallest_size_bytes": plan.rest_bytes + sum(reached[runtime].values()),
                "target": target.describe(),
            }
            for runtime, target in targets.items()
        ],
        rules=[
            {
                "match": rule.match,
                "units": sum(held == index for held in plan.rules.values()),
                "options": max(
                    (len(plan.options[n]) for n, held in plan.rules.items() if held == index),
                    default=0,
                ),
            }
            for index, rule in enumerate(spec.space)
        ],
        units=[
            {
                "name": unit.name,
                "kind": unit.kind,
                "parameters": unit.parameters,
                "options": len(plan.options[unit.name]),
            }
            for unit in plan.units
        ],
        space_log10=round(sum(math.log10(len(o)) for o in plan.options.values()), 2),
        dense_size_bytes=dense,
        smallest_size_bytes=smallest,
        budget=spec.budget.model_dump(exclude_none=True),
        size_limit_bytes=limit_bytes,
        reachable=reachable,
        problems=problems,
        notes=notes,
    )


def _refused(plan: Plan) -> list[str]:
    """What a search, not a profile, would refuse of the model, with the file and line."""
    spec, source = plan.spec, plan.loaded.source
    found: list[Exception] = []
    if spec.task.name != "image-classification":
        continued = spec.task.name == "language-modeling" and spec.task.teacher.fit == "full"
        try:
            check_sequence(spec.target.workload.sequence, plan.config, trained=continued)
        except UserError as error:
            text = str(error).partition(": ")[2]
            found.append(source.error_at(("target", "workload", "sequence"), text))
    headless = plan.data.num_labels is not None and not has_classification_head(plan.shapes)
    if headless and spec.task.teacher.fit == "none":
        found.append(
            source.error_at(
                ("task", "teacher"),
                "fit: none takes the model as the teacher, and it has no classification head. Set "
                "task.teacher.fit: full (head and encoder) or head",
            )
        )
    return [str(error) for error in found]


def _without_effect(plan: Plan, size_limit_bytes: float | None) -> list[str]:
    """Of rules and limits that change nothing, or make no sense on this machine."""
    spec = plan.spec
    notes = []
    for index, rule in enumerate(spec.space):
        if index not in plan.rules.values():
            matched = fnmatch.filter([unit.name for unit in plan.units], rule.match)
            later = sorted({plan.rules[name] for name in matched})
            notes.append(
                f"space[{index}] ({rule.match}) has no effect: rules do not add up, the last that "
                f"matches a unit holds, and space{later} hold for all {len(matched)} of its units"
            )
    limits = spec.budget.limits()
    if replace(limits, quality=None) == RelativeBudget():
        notes.append(
            "budget: no cost is limited: the search looks for quality alone, whatever it costs. "
            "Limit latency, size or peak_memory; of what was measured then, "
            "autocomp pick --quality tells how little a quality costs"
        )
    if limits.latency is not None and limits.latency.relative and limits.latency.value >= 1:
        notes.append("budget.latency: the dense model meets it")
    if size_limit_bytes is not None and size_limit_bytes >= plan.dense_bytes:
        notes.append("budget.size: the dense model meets it")
    cores, threads = len(os.sched_getaffinity(0)), spec.target.workload.threads
    if threads > cores:
        notes.append(
            f"target.workload.threads: {threads} threads are measured on {cores} cores of this "
            f"machine: they wait for each other"
        )
    return notes


def _smallest(plan: Plan, runtime: Runtime, target: Target) -> dict[str, int]:
    """Unit → bytes of its smallest option that the runtime can carry out."""
    return {
        unit: min(sum(map(target.size_bytes, formats.values())) for formats in options.values())
        for unit, options in plan.formats_on(runtime).items()
    }


def _left_out(plan: Plan) -> list[str]:
    """A note for each reason for which a runtime cannot carry out what another can."""
    labels = {
        (unit, option.key): f"{unit}, {option.label()}"
        for unit, options in plan.options.items()
        for option in options
    }
    notes = []
    for runtime, excluded in plan.excluded.items():
        by_reason: dict[str, list[str]] = {}
        for place, reason in excluded.items():
            by_reason.setdefault(reason, []).append(labels[place])
        for reason, places in by_reason.items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            notes.append(f"not on {runtime}: {places[0]}{more}: it {reason}")
    return notes
