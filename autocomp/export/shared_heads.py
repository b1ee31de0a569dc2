"""Keys and values for a config in which fewer query heads share them than in a student. Torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from autocomp.core.unit import Unit
from autocomp.operators.protocol import SiteState, UnitState


def sharing(units: Sequence[Unit], states: Mapping[str, UnitState]) -> list[int]:
    """How many query heads share a key-value head, by layer with attention."""
    found = []
    for unit in units:
        query, key = unit.site("query"), unit.site("key")
        if query is not None and key is not None and states[unit.name]:
            rows = [states[unit.name][site.name].format.rows for site in (query, key)]
            found.append(rows[0] // rows[1])
    return found


def repeated(
    units: Sequence[Unit], states: Mapping[str, UnitState], per_group: int
) -> tuple[dict[str, UnitState], int]:
    """The states with keys and values for `per_group` heads each, and the weights that adds."""
    result, added = dict(states), 0
    for unit in units:
        query, head_dim = unit.site("query"), unit.head_dim
        if query is None or head_dim is None or not states[unit.name]:
            continue
        state = dict(states[unit.name])
        for site in unit.sites:
            if site.role in ("key", "value"):
                before = state[site.name].format.rows
                times = state[query.name].format.rows // per_group // before
                if times > 1:
                    state[site.name] = _repeated_site(state[site.name], times, head_dim)
                    added += (times - 1) * before * state[site.name].format.columns
        result[unit.name] = state
    return result, added


def _repeated_site(site: SiteState, times: int, head_dim: int) -> SiteState:
    """A layer that gives each head's outputs `times` times in a row."""

    def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        heads = tensor.reshape(-1, head_dim, *tensor.shape[1:])
        return heads.repeat_interleave(times, 0).flatten(0, 1)

    weight, form = of(site.weight), site.format
    assert weight is not None
    nonzeros = None if form.nonzeros is None else form.nonzeros * times
    return replace(
        site,
        weight=weight,
        bias=of(site.bias),
        codes=of(site.codes),
        scales=of(site.scales),
        mask=of(site.mask),
        format=replace(form, rows=form.rows * times, nonzeros=nonzeros),
    )


def repeated_note(repeats: int) -> tuple[str, ...]:
    """What a card says about repeated weights, if there are any."""
    if not repeats:
        return ()
    return (
        f"{repeats:,} weights repeat keys and values that more heads share in the trial than in "
        f"this format: they take bytes and time, and change no output.",
    )
