"""`check`: what a spec asks for, and whether its budget is within reach, in seconds. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autocomp.api.plan import Plan, make_plan
from autocomp.core.candidate import Option
from autocomp.core.quantities import format_bytes
from autocomp.core.unit import Unit
from autocomp.targets import make_target


@dataclass(frozen=True)
class CheckReport:
    """What `autocomp check` prints; sizes are estimated from shapes, latency is not estimated.

    Attributes:
        model, task, target: what the spec names, resolved.
        rules: pattern → how many units it holds for and how many options each has.
        units: name, kind, parameters and number of options of each unit.
        space_log10: size of the space without distillation settings.
        dense_size_bytes, smallest_size_bytes: estimated bytes on disk.
        budget: the limits, as written.
        size_limit_bytes: the limit on size, absolute.
        reachable: whether the budget may be met, as far as sizes tell; latency is measured later.
        problems: why it is not: the smallest value that is reached and what holds most of it.
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
    target = make_target(spec.target)

    def size(unit: Unit, option: Option) -> int:
        return sum(target.size_bytes(f) for f in plan.formats[unit.name][option.key].values())

    dense = plan.rest_bytes
    shares = {}
    for unit in plan.units:
        shares[unit.name] = min(size(unit, option) for option in plan.options[unit.name])
        dense += sum(
            4 * site.parameters for site in unit.sites if unit.tied_to is None or site.bias
        )
    smallest = plan.rest_bytes + sum(shares.values())
    limit = spec.budget.limits().size
    limit_bytes = None if limit is None else limit.resolve(dense)
    problems = []
    if limit_bytes is not None and smallest > limit_bytes:
        largest = max(shares, key=lambda name: shares[name])
        problems.append(
            f"No candidate meets size ≤ {format_bytes(limit_bytes)}: the smallest in this space is "
            f"{format_bytes(smallest)} ({largest} {format_bytes(shares[largest])} of it). "
            f"Allow fewer bits for {largest}, or raise budget.size"
        )
    notes = []
    if spec.budget.latency is not None:
        notes.append(
            "latency is measured, not guessed: autocomp profile SPEC tells what is reached"
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
        target=target.describe(),
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
        reachable=not problems,
        problems=problems,
        notes=notes,
    )
