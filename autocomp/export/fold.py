"""Scaled inputs without a multiplication: folded, exactly, into what computes these inputs.

    norm(x; γ) · t = norm(x; γ t)          where query, key, value (or gate, up) share t
    (a ∘ (W x)) · t = a ∘ (diag(t) W x)    the rows of up before down, of value before output

A row's scale is a factor of its codes, so quantised rows take t over in their scales alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from autocomp.core.unit import Role, Unit
from autocomp.export.structure import Structure, cannot
from autocomp.models.layouts import Layout
from autocomp.operators.protocol import SiteState


def fold_input_scales(
    structure: Structure, layout: Layout, units: Sequence[Unit], format: str
) -> tuple[Structure, dict[str, torch.Tensor]]:
    """The structure with no scaled inputs, and parameter of a norm → what it is to be times.

    For gated pre-norm models.

    Raises:
        UserError: for the first unit whose readers of one tensor scale it differently.
    """
    states = dict(structure.states)
    places = {original: place for place, original in structure.names.items()}
    norms: dict[str, torch.Tensor] = {}
    for unit in units:
        here: dict[Role, str] = {
            site.role: places[site.name]
            for site in unit.sites
            if site.name in places and places[site.name] in states
        }
        if not here or unit.layer is None:
            continue
        attention = unit.kind == "attention"
        readers: tuple[Role, ...] = ("query", "key", "value") if attention else ("gate", "up")
        factors = [states[here[role]].input_scale for role in readers]
        first = factors[0]
        if not all(_equal(first, factor) for factor in factors):
            raise cannot(format, unit, f"{', '.join(readers)} scale their input differently")
        if first is not None:
            sublayer = layout.attention if attention else layout.ffn
            block = layout.block_path(structure.layers.index(unit.layer))
            norms[f"{block}.{sublayer.identity[0]}.weight"] = first
        last: Role = "output" if attention else "down"
        before: Role = "value" if attention else "up"
        factor = states[here[last]].input_scale
        if factor is not None:
            rows = _per_row(unit, factor, states[here[before]].format.rows, format)
            states[here[before]] = _scaled_rows(states[here[before]], rows)
        for place in here.values():
            site = states[place]
            states[place] = replace(
                site, input_scale=None, format=replace(site.format, scaled=False)
            )
    return replace(structure, states=states), norms


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _per_row(unit: Unit, factor: torch.Tensor, rows: int, format: str) -> torch.Tensor:
    """The factor of each row of the layer before; query heads of a group read the same rows."""
    if len(factor) == rows or unit.head_dim is None:
        return factor
    heads = factor.view(rows // unit.head_dim, -1, unit.head_dim)  # (groups, heads of one, width)
    if not torch.equal(heads, heads[:, :1].expand_as(heads)):
        raise cannot(format, unit, "heads that share a value scale it differently")
    return heads[:, 0].flatten()


def _scaled_rows(site: SiteState, factor: torch.Tensor) -> SiteState:
    return replace(
        site,
        weight=site.weight * factor[:, None],
        bias=None if site.bias is None else site.bias * factor,
        scales=None if site.scales is None else site.scales * factor[:, None],
    )
