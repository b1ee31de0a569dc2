"""The smallest config of a stock transformers model that holds every layer of a student.

Which configs a model accepts is not guessed: it is built, without memory, and its shapes are looked
at.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autocomp.core.unit import Unit
from autocomp.export.shared_heads import repeated, sharing
from autocomp.models.conversion import to_linear
from autocomp.models.layouts import Layout
from autocomp.models.load import quiet, task_class
from autocomp.operators.protocol import UnitState


def set_layers(layout: Layout, config: Any, layers: tuple[int, ...]) -> None:
    """Make `config` one of these layers alone, their kinds included."""
    types = getattr(config, "layer_types", None)
    setattr(config, layout.keys.layers, len(layers))
    if isinstance(types, list):
        config.layer_types = [types[layer] for layer in layers]


def fitted(
    layout: Layout,
    config: Any,
    task: str,
    units: Sequence[Unit],
    states: Mapping[str, UnitState],
    multiple: int,
) -> tuple[Any, Mapping[str, UnitState], int]:
    """The smallest config that a stock model is built with: groups of heads, then width.

    Args:
        multiple: what both are to be a multiple of, where the dense model's are.

    Returns:
        `config`, changed; the states, with keys and values repeated for as many heads as share them
        in it; how many weights that repeats.
    """
    attention = next(unit for unit in units if unit.kind == "attention")
    ffn = next(unit for unit in units if unit.kind == "ffn")
    assert attention.kv_heads is not None
    assert attention.heads is not None
    assert attention.head_dim is not None
    assert ffn.width is not None
    width = _largest(units, states, "ffn", "up")
    single = copy.deepcopy(config)
    set_layers(layout, single, (0,))  # shapes of one layer are those of all
    own = attention.heads // attention.kv_heads
    common = math.gcd(*sharing(units, states)) or own
    for per_group in dict.fromkeys((common if layout.keys.kv_heads else own, own)):
        changes = _heads_changes(
            layout, single, task, attention, per_group, units, states, multiple
        )
        if changes is not None:
            _change(config, changes)
            _change(single, changes)
            break
    states, repeats = repeated(units, states, per_group)
    for count in range(max(width, 1), ffn.width + 1):
        changes = _width(layout, config, count)
        if count % multiple:
            continue
        if _gives(layout, single, changes, task, ffn, ("up",), (count,)):
            _change(config, changes)
            break
    return config, states, repeats


def _heads_changes(
    layout: Layout,
    config: Any,
    task: str,
    attention: Unit,
    per_group: int,
    units: Sequence[Unit],
    states: Mapping[str, UnitState],
    multiple: int,
) -> dict[str, int] | None:
    """The fewest groups of `per_group` heads that hold every layer, as changes of a config."""
    assert attention.heads is not None
    assert attention.head_dim is not None
    heads = _largest(units, states, "attention", "query") // attention.head_dim
    for count in range(max(heads // per_group, 1), attention.heads // per_group + 1):
        changes = _heads(layout, count, per_group, attention.head_dim)
        shape = (count * per_group * attention.head_dim, count * attention.head_dim)
        if shape[0] % multiple:
            continue
        if _gives(layout, config, changes, task, attention, ("query", "key"), shape):
            return changes
    return None


def _largest(units: Sequence[Unit], states: Mapping[str, UnitState], kind: str, role: Any) -> int:
    """Most rows of a role in any layer."""
    found = 0
    for unit in units:
        site = unit.site(role)
        if unit.kind == kind and site is not None and site.name in states[unit.name]:
            found = max(found, states[unit.name][site.name].format.rows)
    return found


def _heads(layout: Layout, groups: int, per_group: int, head_dim: int) -> dict[str, int]:
    keys = layout.keys
    changes = {keys.heads: groups * per_group}
    if keys.kv_heads is not None:
        changes[keys.kv_heads] = groups
    if keys.head_dim is not None:
        changes[keys.head_dim] = head_dim
    return changes


def _width(layout: Layout, config: Any, width: int) -> dict[str, Any]:
    if layout.keys.width_ratio is not None:
        return {layout.keys.width_ratio: width / getattr(config, layout.keys.hidden)}
    return {layout.keys.width: width}


def _change(config: Any, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        setattr(config, key, value)


def _gives(
    layout: Layout,
    config: Any,
    changes: Mapping[str, Any],
    task: str,
    unit: Unit,
    roles: tuple[Any, ...],
    rows: tuple[int, ...],
) -> bool:
    """Whether a model of the changed config reloads with these rows at the sites of `roles`."""
    data = {**config.to_dict(), **changes}
    try:
        model = build(type(config).from_dict(data), task)
    except (ValueError, TypeError, RuntimeError, AssertionError):
        return False
    except Exception as error:  # a config's own validation has classes of its own
        if "Validation" in type(error).__name__:
            return False
        raise
    path, own = layout.block_path(0), layout.block_path(unit.layer or 0)
    for role, expected in zip(roles, rows, strict=True):
        site = unit.site(role)
        assert site is not None
        weight = model.get_submodule(path + site.name.removeprefix(own)).weight
        assert isinstance(weight, torch.Tensor)
        if weight.shape[0] != expected:
            return False
    return True


def build(config: Any, task: str) -> nn.Module:
    """The stock model of a config, without memory, its linear layers plain ones."""
    with quiet(), torch.device("meta"):
        model: nn.Module = task_class(task).from_config(copy.deepcopy(config))
    to_linear(model)
    return model
