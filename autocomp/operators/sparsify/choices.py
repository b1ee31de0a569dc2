"""Reading the sparsity levels of a rule, and what they leave: exact counts. No torch.

A level is a fraction of zeros (0.5) or a pattern "N:M": N of every M consecutive weights of a row
are kept. Every method leaves the same number of weights, so that sizes are known beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autocomp.core.candidate import Step
from autocomp.core.errors import UserError
from autocomp.core.unit import SiteFormat, Unit

Level = float | str


def sparsity_steps(operator: str, unit: Unit, sparsity: Mapping[str, Any]) -> list[Step | None]:
    """A step for every level the rule asks for; `None` for level zero.

    Raises:
        UserError: at an embedding, or for a level that is neither a fraction nor N:M.
    """
    levels = sparsity.get("levels", [0.0])
    if not isinstance(levels, list | tuple) or not levels:
        raise UserError(
            f"{operator} at {unit.name}: sparsity.levels must be a list like [0.0, 0.5, '2:4'], "
            f"not {levels!r}"
        )
    steps: dict[Step | None, None] = {}
    for level in levels:
        if level == 0 and not isinstance(level, bool):
            steps[None] = None
            continue
        _check(level, operator, unit)
        steps[Step.of(operator, level=level if isinstance(level, str) else float(level))] = None
    if unit.kind == "embedding" and any(steps):
        raise UserError(
            f"{operator} at {unit.name}: rows of a table are looked up, not multiplied with; "
            f"sparsity applies to linear layers. Give the embedding a rule without sparsity"
        )
    return list(steps)


def _check(level: Any, operator: str, unit: Unit) -> None:
    if isinstance(level, str):
        kept, _, group = level.partition(":")
        if kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group):
            return
    elif isinstance(level, int | float) and not isinstance(level, bool) and 0 < level < 1:
        return
    raise UserError(
        f"{operator} at {unit.name}: sparsity.levels {level!r} is not supported. Allowed: a "
        f"fraction of zeros in [0, 1), or N:M like '2:4'"
    )


def pattern(level: Level) -> tuple[int, int] | None:
    """(N, M) of "N:M", `None` for a fraction."""
    if not isinstance(level, str):
        return None
    kept, _, group = level.partition(":")
    return int(kept), int(group)


def kept_per_row(level: Level, columns: int) -> int:
    """Weights kept in a row of `columns`, on average over rows: a whole number, at least one.

    Under N:M a last group that is too short keeps N of its weights, or all.
    """
    found = pattern(level)
    if found is None:
        assert isinstance(level, float)
        return max(columns - round(level * columns), 1)
    kept, group = found
    return columns // group * kept + min(kept, columns % group)


def sparse_formats(formats: Mapping[str, SiteFormat], step: Step) -> dict[str, SiteFormat]:
    """The formats with the weights that `step` keeps; where that is all of them, unchanged."""
    result = {}
    for name, before in formats.items():
        kept = kept_per_row(step["level"], before.columns)
        nonzeros = None if kept == before.columns else before.rows * kept
        result[name] = replace(before, nonzeros=nonzeros)
    return result
