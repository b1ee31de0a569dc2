"""From a rule of the spec to the options of a unit, and from an option to formats and weights.

An option takes at most one step per stage (structure, then tokens, sparsity, bits, cache). Within a
stage the operators named by the rule are alternatives; leaving a stage out is offered when every
operator that has a choice there allows it. In structure, lists of fractions are one list: leaving
the unit as it is is offered when any of them allows it; switches (`skip: true`) have no say in
that, and where there is nothing else it is always offered. Torch is imported only when an option
is applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, cast

from autocomp.core.candidate import Option, Step
from autocomp.core.errors import UserError
from autocomp.core.factors import factored_sites
from autocomp.core.registry import Registry
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, Unit, dense_format
from autocomp.operators.protocol import (
    STAGES,
    Need,
    Operator,
    Rule,
    Stage,
    TokenOperator,
    TrainingOperator,
    UnitState,
    UnitStats,
    trained_stats,
)
from autocomp.spec.space import RuleSection

OPERATORS: Registry[Operator] = Registry(
    "operators",
    {
        "heads": "autocomp.operators.prune.heads:OPERATOR",
        "groups": "autocomp.operators.prune.groups:OPERATOR",
        "width": "autocomp.operators.prune.width:OPERATOR",
        "skip": "autocomp.operators.prune.skip:OPERATOR",
        "replace": "autocomp.operators.replace.replace:OPERATOR",
        "rank": "autocomp.operators.factorize.rank:OPERATOR",
        "vocabulary": "autocomp.operators.prune.vocabulary:OPERATOR",
        "tome": "autocomp.operators.tokens.tome:OPERATOR",
        "token_prune": "autocomp.operators.tokens.token_prune:OPERATOR",
        "token_fuse": "autocomp.operators.tokens.token_fuse:OPERATOR",
        "sparsegpt": "autocomp.operators.sparsify.sparsegpt:OPERATOR",
        "wanda": "autocomp.operators.sparsify.wanda:OPERATOR",
        "magnitude": "autocomp.operators.sparsify.magnitude:OPERATOR",
        "rtn": "autocomp.operators.quantize.rtn:OPERATOR",
        "gptq": "autocomp.operators.quantize.gptq:OPERATOR",
        "hqq": "autocomp.operators.quantize.hqq:OPERATOR",
        "awq": "autocomp.operators.quantize.awq:OPERATOR",
        "awq_gptq": "autocomp.operators.quantize.awq:WITH_GPTQ",
        "smoothquant": "autocomp.operators.quantize.smoothquant:OPERATOR",
        "kv_cache": "autocomp.operators.quantize.kv_cache:OPERATOR",
    },
)


_COARSENESS = ("weights", "group", "spare", "spare_weights")
"""Arguments of a quantisation step that say how many bits weights have, and how many a scale."""


def rule_of(section: RuleSection) -> Rule:
    """The part of a spec's rule that operators read; axes that were not asked for are dropped."""
    structure = {
        name: value
        for name, value in section.structure.model_dump(exclude={"at_most"}).items()
        if value is not None and value is not False
    }
    if section.structure.at_most == 0:
        structure.pop("replace", None)
    return Rule(
        structure=structure,
        bits=section.bits.model_dump(),
        sparsity=section.sparsity.model_dump(),
        tokens={} if section.tokens is None else section.tokens.model_dump(),
    )


def unit_options(unit: Unit, rule: Rule) -> list[Option]:
    """Every option `rule` asks for at `unit`: dense first if offered, no duplicates.

    Raises:
        UserError: for an unknown operator or a choice that makes no sense at this unit.
    """
    choices = [_stage_choices(unit, rule, stage) for stage in STAGES]
    options: dict[Option, None] = {}
    for steps in product(*choices):
        options[_canonical(unit, [step for step in steps if step is not None])] = None
    return sorted(options, key=lambda option: not option.dense)


def option_formats(unit: Unit, option: Option) -> dict[str, SiteFormat]:
    """Shape and precision `option` leaves at every site; empty when the unit is skipped."""
    formats = dense_format(unit)
    for step in option.steps:
        formats = OPERATORS.get(step.operator).formats(unit, formats, step)
    return formats


def token_reduction(unit: Unit, option: Option) -> TokenReduction | None:
    """How `option` shortens the sequence behind `unit`; `None` if it does not."""
    for step in option.steps:
        operator = OPERATORS.get(step.operator)
        if operator.stage == "tokens":
            return cast(TokenOperator, operator).reduction(unit, step)
    return None


def tokens_kept(unit: Unit, step: Step, tokens: int) -> int:
    """How many of `tokens` tokens `step` leaves to the units behind `unit`."""
    reduction = token_reduction(unit, Option((step,)))
    return tokens if reduction is None else reduction.kept(tokens)


def sequence_lengths(
    units: Iterable[Unit], options: Mapping[str, Option], tokens: int
) -> dict[str, int]:
    """Unit name → tokens it sees when the first unit sees `tokens`.

    Args:
        units: in model order.
        options: unit name → option; a unit that is not named is dense.
    """
    seen: dict[str, int] = {}
    for unit in units:
        seen[unit.name] = tokens
        for step in options.get(unit.name, Option()).steps:
            tokens = tokens_kept(unit, step, tokens)
    return seen


def weight_option(option: Option) -> Option:
    """`option` without the steps that change no weight: what the library builds and stores."""
    steps = [step for step in option.steps if OPERATORS.get(step.operator).stage != "tokens"]
    return Option(tuple(steps))


def family(option: Option) -> Option:
    """`option` without what says how coarsely it keeps weights: its zeros, bits and groups."""
    kept: list[Step] = []
    for step in option.steps:
        stage = OPERATORS.get(step.operator).stage
        if stage == "bits":
            rest = {name: value for name, value in step.args if name not in _COARSENESS}
            if rest not in ({}, {"activations": 32}):
                kept.append(Step.of(step.operator, **rest))
        elif stage != "sparsity":
            kept.append(step)
    return Option(tuple(kept))


def training_step(option: Option) -> Step | None:
    """The step of `option` that trains, which is its first; `None` if there is none."""
    if not option.steps:
        return None
    first = option.steps[0]
    return first if getattr(OPERATORS.get(first.operator), "trains", False) else None


def step_versions(option: Option) -> dict[str, int | list[int]]:
    """Operator name → its version; with that of what the step names, where it trains."""
    versions: dict[str, int | list[int]] = {}
    for step in option.steps:
        operator = OPERATORS.get(step.operator)
        versions[step.operator] = operator.version
        if getattr(operator, "trains", False):
            named = cast(TrainingOperator, operator).step_version(step)
            if named is not None:
                versions[step.operator] = [operator.version, named]
    return versions


def step_needs(steps: Iterable[Step]) -> frozenset[Need]:
    """What of a unit's statistics carrying out all of `steps` reads."""
    return frozenset().union(*(OPERATORS.get(step.operator).needs(step) for step in steps))


def apply_option(unit: Unit, state: UnitState, option: Option, stats: UnitStats) -> UnitState:
    """Carry out every step of `option`, in order. Does not modify `state`."""
    for step in option.steps:
        state = apply_step(unit, state, step, stats)
    return state


def apply_step(unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
    """Carry out one step. Does not modify `state`.

    The factors of a low-rank site have statistics like any other: see `factor_stats`. Where the
    unit was trained, the output projection's are those that training brought.
    """
    renewed = trained_stats(state)
    if renewed:
        stats = {**stats, **renewed}
    if factored_sites(state):
        from autocomp.operators.factorize.factors import factor_stats

        stats = factor_stats(state, stats)
    return OPERATORS.get(step.operator).apply(unit, state, step, stats)


def _stage_choices(unit: Unit, rule: Rule, stage: Stage) -> list[Step | None]:
    steps: dict[Step, None] = {}
    leaves_out: list[bool] = []  # of each operator with a say
    for name in rule.methods(stage):
        operator = OPERATORS.get(name)
        if operator.stage != stage:
            allowed = [known for known in OPERATORS if OPERATORS.get(known).stage == stage]
            raise UserError(
                f"operator {name!r} belongs to {operator.stage}, not to {stage}. "
                f"Allowed in {stage}: {', '.join(allowed)}. See: autocomp ls operators"
            )
        offered = list(operator.options(unit, rule))
        if offered and not (stage == "structure" and _is_switch(rule.structure[name])):
            leaves_out.append(None in offered)
        steps.update((step, None) for step in offered if step is not None)
    enough = any if stage == "structure" and leaves_out else all
    return [*([None] if enough(leaves_out) else []), *steps]


def _is_switch(choice: Any) -> bool:
    """Whether a choice of structure only adds alternatives: anything but a list of fractions."""
    listed = isinstance(choice, Sequence) and not isinstance(choice, str)
    return not (listed and all(isinstance(one, int | float) for one in choice))


def _canonical(unit: Unit, steps: list[Step]) -> Option:
    """Drop what comes after a step that skips the unit, and a cache that is no longer there."""
    kept: list[Step] = []
    formats = dense_format(unit)
    for step in steps:
        operator = OPERATORS.get(step.operator)
        before, formats = formats, operator.formats(unit, formats, step)
        if operator.stage == "cache" and formats == before:
            continue
        kept.append(step)
        if not formats:
            return Option((step,))
    return Option(tuple(kept))
