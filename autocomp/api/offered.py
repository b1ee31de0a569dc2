"""Which of a unit's options are searched: those that some runtime can carry out and gains from.

What no runtime can carry out is left out with a note, as long as every choice the spec names is
found in some other option of the rule; a choice that is found in none is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autocomp.core.candidate import Option, Runtime, Scalar
from autocomp.core.quantities import format_bytes
from autocomp.core.unit import Unit
from autocomp.operators import OPERATORS, option_formats, rule_of, token_reduction
from autocomp.operators.protocol import STAGES, Stage
from autocomp.spec.loader import LoadedSpec
from autocomp.spec.schema import WorkloadSection
from autocomp.targets.protocol import Target

Exclusions = Mapping[tuple[str, str], str]
"""(Unit name, option key) → why a runtime cannot carry the option out."""

LEAST_CACHE_SHARE = 0.05
"""Bytes a rounded cache has to save, of the dense model's: where it saved 3%, peak memory did not
fall and tokens took longer; where it saved 19%, the peak fell by a fifth (docs/log.md)."""

_Choice = tuple[str, str, Scalar]
"""Operator, argument, value as the spec names it; the last two are empty for the operator."""


@dataclass(frozen=True)
class Offered:
    """What is left of the options of a spec.

    Attributes:
        options: unit name → options that some runtime can carry out.
        excluded: runtime → those of them that it cannot carry out itself.
        notes: what was left out, and which runtimes.
    """

    options: Mapping[str, tuple[Option, ...]]
    excluded: Mapping[Runtime, Exclusions]
    notes: tuple[str, ...] = ()


@dataclass
class _Row:
    """The options of one unit, sorted.

    Attributes:
        kept: those some runtime can carry out.
        reasons: option key → runtime → why not; every runtime is there for what is not kept.
        idle: those whose one fault is that they remove no token: nothing is lost with them.
    """

    kept: list[Option] = field(default_factory=list)
    reasons: dict[str, dict[Runtime, str]] = field(default_factory=dict)
    idle: list[Option] = field(default_factory=list)


def offer(
    loaded: LoadedSpec,
    units: Sequence[Unit],
    rules: Mapping[str, int],
    options: Mapping[str, Sequence[Option]],
    targets: Mapping[Runtime, Target],
    *,
    tokens: int,
    dense_bytes: int,
) -> Offered:
    """What the targets can do of `options`; a target left with no option of a unit goes.

    Args:
        tokens: that an image becomes; of no account without images.
        dense_bytes: of the dense model on disk.

    Raises:
        SpecError: for a choice of a rule that is found in no option any more, or if no target is
            left.
    """
    cache = _short_cache(units, options, loaded.spec.target.workload, dense_bytes)
    rows = {
        unit.name: _sort(unit, options[unit.name], targets, tokens, cache)
        for unit in units
        if unit.name in rules
    }
    labels = [targets[runtime].name for runtime in targets]
    for name, row in rows.items():
        _refuse_lost(loaded, rules, name, options, rows, labels)
        if not row.kept:
            first = options[name][0]
            place = ("space", rules[name])
            raise loaded.source.error_at(place, _refusal(name, first, row, labels))
    hopeless = {
        runtime: f"it can carry out no option of {lacking[0]}"
        for runtime in targets
        if (lacking := [n for n, row in rows.items() if not _possible(row, runtime)])
    }
    left_out = tuple(f"runtime {runtime} is left out: {why}" for runtime, why in hopeless.items())
    if hopeless:
        rest = {runtime: target for runtime, target in targets.items() if runtime not in hopeless}
        if not rest:
            raise loaded.source.error_at(("target", "runtime"), "; ".join(left_out))
        found = offer(loaded, units, rules, options, rest, tokens=tokens, dense_bytes=dense_bytes)
        return replace(found, notes=(*left_out, *found.notes))
    excluded: dict[Runtime, dict[tuple[str, str], str]] = {runtime: {} for runtime in targets}
    for name, row in rows.items():
        for option in row.kept:
            for runtime, reason in row.reasons.get(option.key, {}).items():
                excluded[runtime][name, option.key] = reason
    kept = {name: tuple(row.kept) for name, row in rows.items()}
    return Offered(
        {unit.name: kept.get(unit.name, tuple(options[unit.name])) for unit in units},
        excluded,
        tuple(_notes(loaded, rules, options, rows, labels)),
    )


def _sort(
    unit: Unit,
    options: Sequence[Option],
    targets: Mapping[Runtime, Target],
    tokens: int,
    short_cache: str | None,
) -> _Row:
    row = _Row()
    for option in options:
        formats = option_formats(unit, option).values()
        reduction = token_reduction(unit, option)
        reasons: dict[Runtime, str] = {}
        idle = 0
        for runtime, target in targets.items():
            found = [target.formats_supported(left) for left in formats]
            if option.step("kv_cache") is not None:
                found.append(short_cache)
            if reduction is not None and not any(found):
                found.append(target.tokens_supported(reduction, tokens))
                idle += found[-1] is not None
            reason = next((reason for reason in found if reason is not None), None)
            if reason is not None:
                reasons[runtime] = reason
        if reasons:
            row.reasons[option.key] = reasons
        if len(reasons) < len(targets):
            row.kept.append(option)
        elif idle == len(targets):
            row.idle.append(option)
    return row


def _possible(row: _Row, runtime: Runtime) -> bool:
    return any(runtime not in row.reasons.get(option.key, {}) for option in row.kept)


def _short_cache(
    units: Sequence[Unit],
    options: Mapping[str, Sequence[Option]],
    workload: WorkloadSection,
    dense_bytes: int,
) -> str | None:
    """Why a cache of 8 bits is not worth having, by what it saves where it is longest; or `None`.

    Of a float32 cache, three bytes are saved per channel of keys and of values.
    """
    if workload.prompt is None or workload.generate is None:
        return None  # the targets say so
    tokens = workload.batch * (workload.prompt + workload.generate)
    saved = sum(
        3 * 2 * (unit.kv_heads or unit.heads or 0) * (unit.head_dim or 0) * tokens
        for unit in units
        if any(option.step("kv_cache") is not None for option in options[unit.name])
    )
    if saved >= LEAST_CACHE_SHARE * dense_bytes:
        return None
    return (
        f"would save {format_bytes(saved)} of cache at {workload.prompt} + {workload.generate} "
        f"tokens, {saved / dense_bytes:.1%} of the dense model's {format_bytes(dense_bytes)}, and "
        f"take longer for it. From {LEAST_CACHE_SHARE:.0%} on it is offered: leave bits.cache out, "
        f"or raise target.workload.prompt"
    )


def _refuse_lost(
    loaded: LoadedSpec,
    rules: Mapping[str, int],
    name: str,
    options: Mapping[str, Sequence[Option]],
    rows: Mapping[str, _Row],
    labels: Sequence[str],
) -> None:
    """Complain of a choice that this unit's rule names and that no unit of the rule has left."""
    rule = rules[name]
    named = _named(loaded, rule)
    alike = [other for other, held in rules.items() if held == rule]
    left = {
        choice
        for other in alike
        for option in (*rows[other].kept, *rows[other].idle)
        for choice in _choices(option, named)
    }
    for option in options[name]:
        lost = [choice for choice in _choices(option, named) if choice not in left]
        if lost:
            operator, argument, value = lost[-1]
            what = f"{operator} {argument}={value}" if argument else operator
            raise loaded.source.error_at(
                ("space", rule),
                f"{_refusal(name, option, rows[name], labels)}. No option with {what} is possible",
            )


def _refusal(name: str, option: Option, row: _Row, labels: Sequence[str]) -> str:
    return f"{name}, {option.label()}: {_told(row.reasons[option.key], labels)}"


def _told(reasons: Mapping[Runtime, str], labels: Sequence[str]) -> str:
    return "; ".join(
        f"{label} {reason}" for label, reason in zip(labels, reasons.values(), strict=True)
    )


def _notes(
    loaded: LoadedSpec,
    rules: Mapping[str, int],
    options: Mapping[str, Sequence[Option]],
    rows: Mapping[str, _Row],
    labels: Sequence[str],
) -> Iterator[str]:
    """One for each rule and reason: how many options are not offered, and the first of them."""
    places: dict[tuple[int, str], list[str]] = {}
    for name, row in rows.items():
        kept = {option.key for option in row.kept}
        for option in options[name]:
            if option.key not in kept:
                told = _told(row.reasons[option.key], labels)
                places.setdefault((rules[name], told), []).append(f"{name}, {option.label()}")
    for (rule, told), found in places.items():
        many = f"{len(found)} options, the first of them" if len(found) > 1 else "one option,"
        yield f"not offered by {loaded.spec.space[rule].match}: {many} {found[0]}: {told}"


def _named(loaded: LoadedSpec, rule: int) -> dict[Stage, Collection[Scalar]]:
    """The values a rule names in each stage."""
    asked = rule_of(loaded.spec.space[rule])
    named: dict[Stage, Collection[Scalar]] = {
        stage: list(_leaves(getattr(asked, stage, {}))) for stage in STAGES
    }
    return {**named, "cache": named["bits"]}


def _leaves(value: Any) -> Iterator[Scalar]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)
    elif value is not None:
        yield value


def _choices(option: Option, named: Mapping[Stage, Collection[Scalar]]) -> Iterator[_Choice]:
    """What of the spec an option takes up; what follows from shapes is not named there."""
    for step in option.steps:
        yield step.operator, "", ""
        values = named[OPERATORS.get(step.operator).stage]
        for argument, value in step.args:
            if value in values:
                yield step.operator, argument, value
