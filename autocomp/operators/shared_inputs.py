"""Sites of a unit that read one tensor: they are solved together, and scaled alike. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from autocomp.core.errors import InternalError
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import UnitState, UnitStats


def shared_inputs(
    operator: str,
    unit: Unit,
    state: UnitState,
    stats: UnitStats,
    formats: Mapping[str, SiteFormat] | None = None,
) -> list[list[str]]:
    """The sites of `state` in groups that read one tensor; with `formats`, in the same grid too.

    Raises:
        InternalError: if a site has no statistics.
    """
    together: dict[tuple[object, ...], list[str]] = {}
    for name, site in state.items():
        if name not in stats:
            raise InternalError(f"{operator} at {unit.name}: no calibration statistics for {name}")
        columns = None if site.kept_columns is None else tuple(site.kept_columns.tolist())
        grid = None if formats is None else (formats[name].weight_bits, formats[name].group)
        together.setdefault((id(stats[name].gram), columns, grid), []).append(name)
    return list(together.values())
