"""Models made smaller directly, linear by linear, to hold stitched and exported ones against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from autocomp.core.unit import Unit
from autocomp.models.surgery import dense_linear, replace_module, unit_modules


def keep_heads(model: nn.Module, unit: Unit, heads: Sequence[int]) -> Unit:
    """Keep these query heads, in this order: whole groups where heads share keys; the unit then."""
    assert unit.heads
    assert unit.kv_heads
    assert unit.head_dim
    per_group = unit.heads // unit.kv_heads
    groups = list(dict.fromkeys(head // per_group for head in heads))
    assert list(heads) == group_heads(unit, groups), "heads that share keys stay together"
    queries = _spread(heads, unit.head_dim)
    keys = _spread(groups, unit.head_dim)
    linears = _dense_linears(model, unit)
    for role, index in (("query", queries), ("key", keys), ("value", keys)):
        name, linear = linears[role]
        replace_module(model, name, _keep_rows(linear, index))
    name, linear = linears["output"]
    replace_module(model, name, _keep_columns(linear, queries))
    return _reshaped(model, replace(unit, heads=len(heads), kv_heads=len(groups)))


def group_heads(unit: Unit, groups: Sequence[int]) -> list[int]:
    """The query heads of these key-value groups, in order."""
    assert unit.heads
    assert unit.kv_heads
    per_group = unit.heads // unit.kv_heads
    return [group * per_group + offset for group in groups for offset in range(per_group)]


def keep_width(model: nn.Module, unit: Unit, channels: Sequence[int]) -> Unit:
    """Keep these inner channels of a feed-forward sublayer, in this order; the unit then."""
    index = torch.as_tensor(list(channels), dtype=torch.long)
    linears = _dense_linears(model, unit)
    for role in ("gate", "up"):
        if role in linears:
            name, linear = linears[role]
            replace_module(model, name, _keep_rows(linear, index))
    name, linear = linears["down"]
    replace_module(model, name, _keep_columns(linear, index))
    return _reshaped(model, replace(unit, width=len(index)))


def _spread(indices: Sequence[int], size: int) -> torch.Tensor:
    """Indices of groups of `size` channels → indices of the channels."""
    start = torch.as_tensor(list(indices), dtype=torch.long)[:, None] * size
    return (start + torch.arange(size)).flatten()


def _dense_linears(model: nn.Module, unit: Unit) -> dict[str, tuple[str, nn.Linear]]:
    linears = {}
    modules = unit_modules(model, unit)
    for site in unit.sites:
        module = modules.get(site.name)
        assert isinstance(module, nn.Linear)
        linears[str(site.role)] = (site.name, module)
    return linears


def _keep_rows(linear: nn.Linear, index: torch.Tensor) -> nn.Linear:
    bias = None if linear.bias is None else linear.bias.detach()[index]
    return dense_linear(linear.weight.detach()[index], bias)


def _keep_columns(linear: nn.Linear, index: torch.Tensor) -> nn.Linear:
    bias = None if linear.bias is None else linear.bias.detach()
    return dense_linear(linear.weight.detach()[:, index].contiguous(), bias)


def _reshaped(model: nn.Module, unit: Unit) -> Unit:
    """The unit with its sites' shapes as they are in `model`."""
    sites = []
    for site in unit.sites:
        weight = model.get_submodule(site.name).weight
        assert isinstance(weight, torch.Tensor)
        sites.append(replace(site, rows=weight.shape[0], columns=weight.shape[1]))
    return replace(unit, sites=tuple(sites))
