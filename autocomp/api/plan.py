"""From a spec to what is searched: the model's units and the options of each. No torch.

Every complaint about the spec that needs the model, the data or the registries is made here, with
its file and line, before anything slow begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from autocomp.api.offered import Exclusions, offer
from autocomp.core.candidate import Option, Runtime
from autocomp.core.errors import UserError
from autocomp.core.metric import wrong_metric
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, Unit
from autocomp.distill.losses import LOSSES, leads
from autocomp.models.discover import find_units, rest_parameters
from autocomp.models.mixers import MIXERS
from autocomp.models.sources import read_config, read_tensor_shapes, resolve_source
from autocomp.models.vocabulary import Vocabulary
from autocomp.operators import (
    OPERATORS,
    option_formats,
    rule_of,
    token_reduction,
    unit_options,
)
from autocomp.search.space import Cap, Space
from autocomp.spec.loader import LoadedSpec, load_spec
from autocomp.spec.names import check_losses, check_names, match_rules
from autocomp.spec.schema import Spec
from autocomp.targets import make_target
from autocomp.targets.runtimes import usable_runtimes
from autocomp.tasks import TASKS
from autocomp.tasks.base import model_positions
from autocomp.tasks.inspect import DataSummary, inspect_data


@dataclass(frozen=True)
class Plan:
    """What a spec asks for, resolved against the model, the data and the registries.

    Attributes:
        loaded: the spec with its source, for complaints at a line.
        model_path: the local directory of the source model.
        config: its `config.json`.
        shapes: tensor name → shape, from the safetensors headers.
        data: number of examples, label names.
        units: every unit of the task model, in model order.
        rules: unit name → index of its rule; units without one stay dense.
        options: unit name → options; dense alone where no rule applies.
        vocabulary: the tokens the task uses, where a rule offers keeping these alone.
        runtimes: what is searched on, the one relative limits refer to first; `(None,)` where the
            spec leaves no choice.
        excluded: runtime → options it cannot carry out, though another can.
        notes: on options that are not offered and runtimes that were left out.
    """

    loaded: LoadedSpec
    model_path: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    data: DataSummary
    units: tuple[Unit, ...]
    rules: Mapping[str, int]
    options: Mapping[str, tuple[Option, ...]]
    vocabulary: Vocabulary | None = None
    runtimes: tuple[Runtime, ...] = (None,)
    excluded: Mapping[Runtime, Exclusions] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> Spec:
        """The spec."""
        return self.loaded.spec

    @cached_property
    def space(self) -> Space:
        """The search space."""
        return Space(self.units, self.options, self.spec.distill, self.caps)

    @property
    def caps(self) -> tuple[Cap, ...]:
        """How many units of each rule may be replaced, where the rule says so."""
        found = []
        for index, rule in enumerate(self.spec.space):
            if rule.structure.at_most is not None:
                units = tuple(unit for unit, its in self.rules.items() if its == index)
                found.append(Cap(units, "replace", rule.structure.at_most))
        return tuple(found)

    @cached_property
    def formats(self) -> dict[str, dict[str, dict[str, SiteFormat]]]:
        """Unit name → option key → what the option leaves at each site."""
        return {
            unit.name: {
                option.key: option_formats(unit, option) for option in self.options[unit.name]
            }
            for unit in self.units
        }

    def reductions_on(self, runtime: Runtime) -> dict[str, dict[str, TokenReduction]]:
        """Unit name → option key → what the option does to the sequence, where it does something
        and the runtime can carry it out."""
        found: dict[str, dict[str, TokenReduction]] = {}
        for unit in self.units:
            for option in self.options[unit.name]:
                reduction = token_reduction(unit, option)
                if reduction is not None and self.possible(runtime, unit.name, option):
                    found.setdefault(unit.name, {})[option.key] = reduction
        return found

    def possible(self, runtime: Runtime, unit: str, option: Option) -> bool:
        """Whether a runtime can carry out an option."""
        return (unit, option.key) not in self.excluded.get(runtime, {})

    def formats_on(self, runtime: Runtime) -> dict[str, dict[str, dict[str, SiteFormat]]]:
        """`formats`, of what a runtime can carry out."""
        excluded = self.excluded.get(runtime, {})
        return {
            unit: {key: formats for key, formats in row.items() if (unit, key) not in excluded}
            for unit, row in self.formats.items()
        }

    def suffix(self, runtime: Runtime) -> str:
        """What ids of baselines on this runtime end with: nothing on the first."""
        return "" if runtime == self.runtimes[0] else f"-{runtime}"

    @property
    def rest_bytes(self) -> int:
        """Bytes of the float32 tensors that belong to no unit: norms, positions, a patch conv."""
        return _rest_bytes(self.config, self.units, self.shapes)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense float32 model; a weight that two units share counts once."""
        return _dense_bytes(self.config, self.units, self.shapes)


def make_plan(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Read a spec and resolve it.

    Raises:
        SpecError: with file:line, for anything wrong in the spec.
        ModelError, DataError: for a model or data that cannot be used.
    """
    loaded = load_spec(path, overrides)
    spec = loaded.spec
    check_names(
        loaded,
        {
            "task.name": ("tasks", TASKS.names()),
            "space[*].sparsity.method": ("operators", OPERATORS.names()),
            "space[*].bits.method": ("operators", OPERATORS.names()),
            "space[*].tokens.method": ("operators", OPERATORS.names()),
            "space[*].structure.replace": ("mixers", MIXERS.names()),
        },
    )
    check_losses(loaded, LOSSES.names(), leads)
    check_on_policy(loaded)
    try:
        runtimes, notes = usable_runtimes(spec.target)
    except UserError as error:
        raise loaded.source.error_at(("target", "runtime"), str(error)) from error
    check_floor(loaded)
    model_path = resolve_source(spec.model.source, spec.model.revision)
    config = read_config(model_path)
    if config.get("auto_map") and not spec.model.trust_remote_code:
        raise loaded.source.error_at(
            ("model", "source"),
            f"{model_path} comes with its own code (auto_map in config.json). If you trust it, set "
            f"model.trust_remote_code: true",
        )
    check_generation(loaded, config)
    shapes = read_tensor_shapes(model_path)
    data = inspect_data(spec)
    units = tuple(find_units(config, shapes, spec.task.name, data.num_labels))
    rules = match_rules(loaded, [unit.name for unit in units])
    for unit in units:
        _refuse_tied(loaded, unit, rules.get(unit.name), units)
    vocabulary = _vocabulary(loaded, model_path, units, rules)
    targets = {runtime: make_target(spec.target.on(runtime)) for runtime in runtimes}
    options = {
        unit.name: _options(loaded, unit, rules.get(unit.name), vocabulary) for unit in units
    }
    offered = offer(
        loaded,
        units,
        rules,
        options,
        targets,
        tokens=_image_tokens(spec, model_path, units),
        dense_bytes=_dense_bytes(config, units, shapes),
    )
    return Plan(
        loaded,
        model_path,
        config,
        shapes,
        data,
        units,
        rules,
        offered.options,
        vocabulary,
        tuple(offered.excluded),
        offered.excluded,
        (*notes, *offered.notes),
    )


def check_on_policy(loaded: LoadedSpec) -> None:
    """Only a language model writes text that training could go on.

    Raises:
        SpecError: if another task is to be trained on its own text.
    """
    task = loaded.spec.task.name
    for index, share in enumerate(loaded.spec.distill.on_policy):
        if share > 0 and task != "language-modeling":
            raise loaded.source.error_at(
                ("distill", "on_policy", index),
                f"{share:g} of the batches would be text that the student writes itself, and task "
                f"{task!r} writes none. Leave on_policy out, or use language-modeling",
            )


def check_floor(loaded: LoadedSpec) -> None:
    """A floor on quality may speak of the task's own metric.

    Raises:
        SpecError: if it speaks of another.
    """
    floor = loaded.spec.budget.limits().quality
    metric = TASKS.get(loaded.spec.task.name).metric_name
    if floor is not None and floor.metric not in (None, metric):
        raise loaded.source.error_at(("budget", "quality"), wrong_metric(str(floor.metric)))


def _refuse_tied(loaded: LoadedSpec, unit: Unit, rule: int | None, units: tuple[Unit, ...]) -> None:
    """A table that a head shares is stored once; a table of its own would only add to it."""
    sharing = [other.name for other in units if other.tied_to == unit.name]
    if rule is None or not sharing:
        return
    structure = loaded.spec.space[rule].structure
    for name, asked in (("rank", structure.rank), ("vocabulary", structure.vocabulary)):
        if asked:
            raise loaded.source.error_at(
                ("space", rule, "structure", name),
                f"{unit.name}: its weight is also that of {sharing[0]}, which needs it whole, so "
                f"{name} would make the model larger. Leave it out, or use bits",
            )


def _vocabulary(
    loaded: LoadedSpec, model_path: Path, units: tuple[Unit, ...], rules: Mapping[str, int]
) -> Vocabulary | None:
    """The tokens the task uses, if a rule asks for them: the texts are tokenised for it."""
    for unit in units:
        rule, site = rules.get(unit.name), unit.site("embedding")
        if rule is None or site is None or not loaded.spec.space[rule].structure.vocabulary:
            continue
        from autocomp.tasks.vocabulary import task_vocabulary

        place = ("space", rule, "structure", "vocabulary")
        try:
            return task_vocabulary(loaded.spec, model_path, site.rows)
        except UserError as error:
            raise loaded.source.error_at(place, f"{unit.name}: {error}") from error
    return None


def check_generation(loaded: LoadedSpec, config: Mapping[str, Any]) -> None:
    """A workload that generates needs a language model with enough positions.

    Raises:
        SpecError: if it has not.
    """
    workload, task = loaded.spec.target.workload, loaded.spec.task.name
    if workload.prompt is None or workload.generate is None:
        return
    place = ("target", "workload", "generate")
    if task != "language-modeling":
        raise loaded.source.error_at(
            place,
            f"task {task!r} generates no tokens: leave out prompt and generate, or use "
            f"language-modeling",
        )
    positions = model_positions(config)
    if positions is not None and workload.prompt + workload.generate > positions:
        raise loaded.source.error_at(
            place,
            f"{workload.prompt} tokens of prompt and {workload.generate} generated are more than "
            f"the model's {positions} positions. Their sum may be {positions} at most",
        )


def _options(
    loaded: LoadedSpec, unit: Unit, rule: int | None, vocabulary: Vocabulary | None
) -> tuple[Option, ...]:
    """The unit's options under its rule."""
    if rule is None:
        return (Option(),)
    asked = rule_of(loaded.spec.space[rule])
    if vocabulary is not None and "vocabulary" in asked.structure:
        counts = {"keep": len(vocabulary.kept), "unknown": vocabulary.unknown}
        asked = replace(asked, structure={**asked.structure, "vocabulary": counts})
    try:
        return tuple(unit_options(unit, asked))
    except UserError as error:
        raise loaded.source.error_at(("space", rule), f"{unit.name}: {error}") from error


def _image_tokens(spec: Spec, model_path: Path, units: Sequence[Unit]) -> int:
    """Tokens that an image becomes; 0 where tokens are not patches."""
    protected = next((u.protected_tokens for u in units if u.protected_tokens is not None), None)
    if protected is None:
        return 0
    from autocomp.tasks.image_classification import patches

    return protected + patches(model_path, spec.target.workload.image)


def _rest_bytes(
    config: Mapping[str, Any], units: Sequence[Unit], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    return 4 * sum(_count(shape) for shape in rest_parameters(config, units, shapes).values())


def _dense_bytes(
    config: Mapping[str, Any], units: Sequence[Unit], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    total = _rest_bytes(config, units, shapes)
    for unit in units:
        own = (site for site in unit.sites if unit.tied_to is None or site.bias)
        total += 4 * sum(site.parameters for site in own)
    return total


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
