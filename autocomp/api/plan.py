"""From a spec to what is searched: the model's units and the options of each. No torch.

Every complaint about the spec that needs the model, the data or the registries is made here, with
its file and line, before anything slow begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from autocomp.core.candidate import Option
from autocomp.core.errors import UserError
from autocomp.core.unit import SiteFormat, Unit
from autocomp.models.discover import find_units, tensor_keys
from autocomp.models.sources import read_config, read_tensor_shapes, resolve_source
from autocomp.operators import OPERATORS, option_formats, rule_of, unit_options
from autocomp.search.space import Space
from autocomp.spec.loader import LoadedSpec, load_spec
from autocomp.spec.names import check_names, match_rules
from autocomp.spec.schema import Spec
from autocomp.targets import TARGETS, make_target, target_name
from autocomp.targets.protocol import Target
from autocomp.tasks import TASKS
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
    """

    loaded: LoadedSpec
    model_path: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    data: DataSummary
    units: tuple[Unit, ...]
    rules: Mapping[str, int]
    options: Mapping[str, tuple[Option, ...]]

    @property
    def spec(self) -> Spec:
        """The spec."""
        return self.loaded.spec

    @cached_property
    def space(self) -> Space:
        """The search space."""
        return Space(self.units, self.options, self.spec.distill)

    @cached_property
    def formats(self) -> dict[str, dict[str, dict[str, SiteFormat]]]:
        """Unit name → option key → what the option leaves at each site."""
        return {
            unit.name: {
                option.key: option_formats(unit, option) for option in self.options[unit.name]
            }
            for unit in self.units
        }

    @property
    def rest_bytes(self) -> int:
        """Bytes of the float32 tensors that belong to no unit: norms, positions, a patch conv."""
        inside: set[str] = set()
        for unit in self.units:
            inside.update(tensor_keys(self.config, unit, self.shapes).values())
        return 4 * sum(
            _count(shape)
            for name, shape in self.shapes.items()
            if name not in inside and "position_ids" not in name
        )


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
            "space[*].bits.method": ("operators", OPERATORS.names()),
        },
    )
    if target_name(spec.target) not in TARGETS:
        raise loaded.source.error_at(
            ("target", "runtime"),
            f"no target {target_name(spec.target)!r}. Available: {', '.join(TARGETS.names())} "
            f"(runtime-device). See: autocomp ls targets",
        )
    try:
        target = make_target(spec.target)
    except UserError as error:
        raise loaded.source.error_at(("target", "runtime"), str(error)) from error
    model_path = resolve_source(spec.model.source, spec.model.revision)
    config = read_config(model_path)
    shapes = read_tensor_shapes(model_path)
    data = inspect_data(spec)
    units = tuple(find_units(config, shapes, spec.task.name, data.num_labels))
    rules = match_rules(loaded, [unit.name for unit in units])
    options = {unit.name: _options(loaded, unit, rules.get(unit.name), target) for unit in units}
    return Plan(loaded, model_path, config, shapes, data, units, rules, options)


def _options(
    loaded: LoadedSpec, unit: Unit, rule: int | None, target: Target
) -> tuple[Option, ...]:
    """The unit's options under its rule, each one the target can carry out."""
    if rule is None:
        return (Option(),)
    try:
        options = tuple(unit_options(unit, rule_of(loaded.spec.space[rule])))
    except UserError as error:
        raise loaded.source.error_at(("space", rule), f"{unit.name}: {error}") from error
    for option in options:
        for left in option_formats(unit, option).values():
            reason = target.formats_supported(left)
            if reason is not None:
                raise loaded.source.error_at(
                    ("space", rule), f"{unit.name}, {option.label()}: {target.name} {reason}"
                )
    return options


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
